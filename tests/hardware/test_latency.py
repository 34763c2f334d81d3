from dataclasses import replace
from pathlib import Path

import pytest

from autocomp.capabilities import DeviceInfo
from autocomp.errors import ConfigError, RunError
from autocomp.hardware import LatencyEntry, LatencyKey, LatencyTable

DEVICE = DeviceInfo("box", "onnxruntime 1.31.1", 1, (("isa", "avx2"),))
KEY = LatencyKey.of("structure", "reference", DEVICE, 32)
ENTRY = LatencyEntry(KEY, 0.5, 30.0)


def test_everything_a_time_depends_on_is_in_the_key() -> None:
    others = [
        LatencyKey.of("other", "reference", DEVICE, 32),
        LatencyKey.of("structure", "other", DEVICE, 32),
        LatencyKey.of("structure", "reference", DEVICE, 1),
        *(
            LatencyKey.of("structure", "reference", device, 32)
            for device in (
                replace(DEVICE, name="other"),
                replace(DEVICE, engine="onnxruntime 1.31.2"),
                replace(DEVICE, threads=2),
                replace(DEVICE, details=()),
            )
        ),
    ]
    assert len({KEY, *others}) == 1 + len(others)
    assert LatencyKey.of("structure", "reference", replace(DEVICE), 32) == KEY


def test_entries_are_there_again_after_opening(tmp_path: Path) -> None:
    path = tmp_path / "latencies.jsonl"
    table = LatencyTable(path)
    assert len(table) == 0 and table.get(KEY) is None
    other = LatencyEntry(replace(KEY, batch=1), 0.25, 1.5)
    for entry in (ENTRY, other, replace(ENTRY, ratio=0.6)):
        table.put(entry)
    for opened in (table, LatencyTable(path)):
        assert len(opened) == 2
        assert opened.get(KEY) == replace(ENTRY, ratio=0.6)  # the later one counts
        assert opened.get(other.key) == other
    assert ENTRY.latency_ms == 15.0


def test_every_cut_of_the_last_line_is_survived(tmp_path: Path) -> None:
    path = tmp_path / "latencies.jsonl"
    second = LatencyEntry(replace(KEY, batch=1), 0.25, 1.5)
    LatencyTable(path).put(ENTRY)
    first = len(path.read_bytes())
    LatencyTable(path).put(second)
    whole = path.read_bytes()
    for cut in range(first, len(whole)):
        path.write_bytes(whole[:cut])
        table = LatencyTable(path)
        assert table.get(KEY) == ENTRY and table.get(second.key) is None
        table.put(second)
        assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "line", ["{", "[]", "{}", '{"format": 2}', '{"format": 1, "key": {}, "ratio": 1, "reference_ms": 1}', "null"]
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "latencies.jsonl"
    LatencyTable(path).put(ENTRY)
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ConfigError, match=r"latencies\.jsonl line 2"):
        LatencyTable(path)


@pytest.mark.parametrize("bad", [{"ratio": -0.5}, {"ratio": 0.0}, {"ratio": float("nan")}, {"reference_ms": -1.0}])
def test_no_time_is_negative(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="positive"):
        replace(ENTRY, **bad)


def test_an_unwritable_place(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="latencies"):
        LatencyTable(tmp_path / "nowhere" / "latencies.jsonl").put(ENTRY)
    with pytest.raises(RunError):
        LatencyTable(tmp_path)  # a folder
