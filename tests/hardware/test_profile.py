from datetime import date
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autocomp.capabilities import Capabilities, DeviceInfo, Numerics
from autocomp.errors import ConfigError, RunError
from autocomp.hardware import EngineTime, HardwareProfile, Kernel, KernelTime
from autocomp.policy import FEWER_BITS, FP32, INT8

SHIPPED = Path(__file__).resolve().parents[2] / "hardware_profiles"

texts = st.text(st.characters(codec="utf-8"), max_size=30)
times = st.floats(0, 1e6)
sizes = st.lists(st.integers(1, 512), max_size=3).map(tuple)
kernels = st.builds(
    Kernel,
    op=st.sampled_from(["conv", "linear", "entry"]),
    channels_in=st.integers(1, 4096),
    channels_out=st.integers(1, 4096),
    kernel=sizes,
    stride=sizes,
    groups=st.integers(1, 64),
    size=sizes,
    batch=st.integers(1, 512),
    precision=st.sampled_from(["fp32", "int8"]),
    context=texts.filter(lambda text: "\r" not in text),  # csv reads a bare carriage return as the end of a line
)
kernel_times = st.builds(KernelTime, kernels, times, times, st.integers(1, 10**6))
engine_times = st.builds(
    EngineTime,
    model=texts.filter(lambda text: "\r" not in text),
    batch=st.integers(1, 512),
    kernels=st.integers(1, 500),
    kernels_ms=times,
    ms=times,
    data=st.sampled_from(["", "random:3x32x32x10"]),
)
profiles = st.builds(
    HardwareProfile,
    device=st.from_regex(r"[a-z0-9][a-z0-9-]{0,20}", fullmatch=True),
    engine=texts.filter(bool),
    threads=st.integers(1, 256),
    date=st.dates(),
    measured=st.just(True),
    details=texts,
    protocol=texts,
    notes=texts,
    kernels=st.lists(kernel_times, max_size=4, unique_by=lambda entry: entry.kernel).map(
        lambda entries: tuple(sorted(entries, key=lambda entry: entry.kernel))
    ),
    engines=st.lists(engine_times, max_size=3).map(tuple),
    capabilities=st.one_of(
        st.none(),
        st.builds(
            Capabilities,
            st.lists(st.sampled_from([FP32, INT8, *FEWER_BITS]), min_size=1, max_size=3).map(tuple),
            st.integers(1, 64),
            st.builds(Numerics, st.booleans(), st.booleans(), st.integers(1, 127)),
        ),
    ),
)

KERNEL = Kernel("conv", 16, 24, (3, 3), (1, 1), 1, (8, 8), 32, "int8", "q conv2d relu.q>int8,add(qq)")
PROFILE = HardwareProfile(
    "box", "onnxruntime 1.31.1", 2, date(2026, 1, 31), True, "cpu: Xeon", "5 blocks", "quiet",
    (KernelTime(KERNEL, 0.25, 0.01, 100),), (EngineTime("zoo:resnet20", 32, 22, 18.5, 19.0),),
    Capabilities((FP32, INT8), 8, Numerics(True, True, 63)),
)  # fmt: skip


@given(profile=profiles)
def test_a_profile_survives_its_folder(tmp_path_factory: pytest.TempPathFactory, profile: HardwareProfile) -> None:
    folder = profile.save(tmp_path_factory.mktemp("profiles"))
    assert folder.name == profile.device
    assert HardwareProfile.load(folder) == profile


def test_saving_again_replaces_it_whole(tmp_path: Path) -> None:
    PROFILE.save(tmp_path)
    bare = HardwareProfile("box", "onnxruntime 2", 1, date(2026, 2, 1), True)
    assert HardwareProfile.load(bare.save(tmp_path)) == bare
    assert sorted(path.name for path in (tmp_path / "box").iterdir()) == [
        "engines.csv", "kernels.csv", "profile.toml",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("threads = 2\n", "", "threads missing"),
        ("format = 1", "format = 2", "format is not 1"),
        ("format = 1\n", "", "format is not 1"),
        ("threads = 2", "threads = 0", "1 or more"),
        ("threads = 2", 'threads = "2"', "a whole number"),
        ("threads = 2", "treads = 2", "did you mean threads"),
        ("date = 2026-01-31", 'date = "today"', "a date"),
        ("date = 2026-01-31", "date = 2026-01-31T10:00:00", "a date"),
        ("measured = true", "measured = false", "only described"),
        ('device = "box"', 'device = "../box"', "a folder's"),
        ('notes = "quiet"', 'notes = "qui', "profile.toml"),
        ("channel_multiple = 8\n", "", "channel_multiple missing"),
        ("weight_max = 63", "weight_max = 255", "between 1 and 127"),
        ("weight_max = 63", "weight_max = -1", "between 1 and 127"),
        ('"int8"', '"int9"', "int9"),
    ],
)
def test_a_wrong_profile_is_refused_by_name(tmp_path: Path, old: str, new: str, complaint: str) -> None:
    path = PROFILE.save(tmp_path) / "profile.toml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(ConfigError, match=complaint) as caught:
        HardwareProfile.load(path.parent)
    assert str(path.parent) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("0.25", "-0.25", "negative"),
        ("0.25", "nan", "negative or no number"),
        ("0.01", "-1", "negative"),
        (",32,", ",0,", "1 or more"),
        ("3x3", "3y3", "line 2 is torn"),
        (",0.25,0.01,100", ",0.2", "line 2 is torn"),
        ("0.25", "fast", "line 2 is torn"),
        (",0.25,", ",,", "line 2 is torn"),
        ("conv", '"' + 140_000 * "x", "it is torn"),
        ("median_ms", "mean_ms", "first line"),
    ],
)
def test_wrong_kernels_are_refused(tmp_path: Path, old: str, new: str, complaint: str) -> None:
    path = PROFILE.save(tmp_path) / "kernels.csv"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(ConfigError, match=complaint) as caught:
        HardwareProfile.load(path.parent)
    assert str(path) in str(caught.value)


def test_wrong_engines_are_refused(tmp_path: Path) -> None:
    path = PROFILE.save(tmp_path) / "engines.csv"
    path.write_text(path.read_text().replace("18.5", "-18.5"))
    with pytest.raises(ConfigError, match=r"engines\.csv: an engine of zoo:resnet20 has a time that is negative"):
        HardwareProfile.load(path.parent)


def test_engines_of_earlier_versions_are_read_and_missing_kernels_are_not(tmp_path: Path) -> None:
    folder = PROFILE.save(tmp_path)
    path = folder / "engines.csv"
    path.write_text("".join(line.rpartition(",")[0] + "\n" for line in path.read_text().splitlines()))
    assert path.read_text().startswith("model,batch,kernels,kernels_ms,ms\n")
    assert HardwareProfile.load(folder) == PROFILE
    (folder / "kernels.csv").unlink()
    with pytest.raises(ConfigError, match=r"kernels\.csv: it is missing: the profile is torn"):
        HardwareProfile.load(folder)


def test_samples_are_averaged_as_numpy_does() -> None:
    values = [1.0, 1.2, 0.9, 1.4, 1.1]
    found = KernelTime(KERNEL, values[0], 0.0, 1)
    assert found.error_ms == pytest.approx(0.05)
    for value in values[1:]:
        found = found.with_sample(value)
    assert found.samples == 5
    assert found.median_ms == pytest.approx(np.mean(values))
    assert found.deviation_ms == pytest.approx(np.std(values, ddof=1))
    assert found.error_ms == pytest.approx(np.std(values, ddof=1) / np.sqrt(5))


def test_a_profile_says_what_a_device_has_otherwise() -> None:
    same = DeviceInfo("box", "onnxruntime 1.31.1", 2, (("cpu", "Xeon"),))
    assert HardwareProfile.of(same, date(2026, 1, 31), "").differences(same) == ()
    assert HardwareProfile.of(same, date(2026, 1, 31), "").fingerprint == same
    other = DeviceInfo("box", "onnxruntime 1.32", 4, (("cpu", "Epyc"),))
    assert PROFILE.differences(other) == (
        "engine was onnxruntime 1.31.1, is onnxruntime 1.32", "threads was 2, is 4",
        "device was cpu: Xeon, is cpu: Epyc",
    )  # fmt: skip


def test_pandas_reads_the_tables(tmp_path: Path) -> None:
    folder = PROFILE.save(tmp_path)
    table = pd.read_csv(folder / "kernels.csv")
    assert table.channels_out.tolist() == [24] and table.median_ms.tolist() == [0.25]


def test_missing_and_unwritable(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        HardwareProfile.load(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="box"):
        PROFILE.save(tmp_path / "file")


def test_the_shipped_ones_say_what_they_are() -> None:
    folders = [path.parent for path in SHIPPED.glob("*/profile.toml")]
    assert folders
    for folder in folders:
        profile = HardwareProfile.load(folder)
        assert profile.device == folder.name
        assert profile.kernels or not profile.measured
