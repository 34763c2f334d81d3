from datetime import date
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autocomp.errors import ConfigError, RunError
from autocomp.hardware import HardwareProfile, Kernel
from autocomp.policy import FP32, INT8

SHIPPED = Path(__file__).resolve().parents[2] / "hardware_profiles"

texts = st.text(st.characters(codec="utf-8"), max_size=30)
times = st.floats(0, 1e6)
kernels = st.builds(
    Kernel,
    name=texts.filter(lambda text: "\r" not in text),  # csv reads a bare carriage return as the end of a line
    precision=st.sampled_from([FP32, INT8]),
    batch=st.integers(1, 512),
    median_ms=times,
    deviation_ms=times,
    samples=st.integers(1, 10**6),
)
profiles = st.builds(
    HardwareProfile,
    device=st.from_regex(r"[a-z0-9][a-z0-9-]{0,20}", fullmatch=True),
    engine=texts.filter(bool),
    threads=st.integers(1, 256),
    date=st.dates(),
    measured=st.just(True),
    notes=texts,
    kernels=st.lists(kernels, max_size=4).map(tuple),
)

KERNEL = Kernel("conv 3x3 16->16", INT8, 32, 0.25, 0.01, 100)
PROFILE = HardwareProfile("box", "onnxruntime 1.31.1", 2, date(2026, 1, 31), True, "quiet", (KERNEL,))


@given(profile=profiles)
def test_a_profile_survives_its_folder(tmp_path_factory: pytest.TempPathFactory, profile: HardwareProfile) -> None:
    folder = profile.save(tmp_path_factory.mktemp("profiles"))
    assert folder.name == profile.device
    assert HardwareProfile.load(folder) == profile


def test_saving_again_replaces_it_whole(tmp_path: Path) -> None:
    PROFILE.save(tmp_path)
    bare = HardwareProfile("box", "onnxruntime 2", 1, date(2026, 2, 1), True)
    assert HardwareProfile.load(bare.save(tmp_path)) == bare
    assert sorted(path.name for path in (tmp_path / "box").iterdir()) == ["profile.toml"]


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
        ("32", "0", "1 or more"),
        ("int8", "int99", "int99"),
        (",0.25,0.01,100", ",0.2", "line 2 is torn"),
        ("0.25", "fast", "line 2 is torn"),
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
