"""Memory that is free, and that work will take, against what the system and the real work say."""

from pathlib import Path

import pytest

from autocomp import memory
from autocomp.compress import collect, footprint, trace
from autocomp.errors import ModelError
from autocomp.memory import available_bytes, refuse_larger
from autocomp.policy import Recipe
from tests.compress.nets import Mixed, images, trained
from tests.graphs import residual_net


def test_free_memory_is_some_of_the_machines() -> None:
    total = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    free = available_bytes()
    assert free is not None and 0 < free <= 1024 * int(total.split()[1])


@pytest.mark.parametrize(
    ("limit", "expected"),
    [("3000000", 3_000_000 - 1_500_000 + 200_000), ("max", 4_096_000), ("1000", 0), ("90000000", 4_096_000)],
)
def test_a_control_group_limits_it_and_cached_files_are_free(tmp_path: Path, limit: str, expected: int) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:  9000 kB\nMemFree: 10 kB\nMemAvailable:   4000 kB\n")
    (tmp_path / "memory.max").write_text(limit + "\n")
    (tmp_path / "memory.current").write_text("1500000\n")
    (tmp_path / "memory.stat").write_text("anon 1300000\ninactive_file 200000\n")
    assert available_bytes(tmp_path / "meminfo", tmp_path) == expected


def test_systems_that_do_not_say_refuse_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert available_bytes(tmp_path / "none", tmp_path) is None
    monkeypatch.setattr(memory, "available_bytes", lambda: None)
    refuse_larger("a model", {"for all": 10**18})


def test_what_does_not_fit_is_refused_with_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: 3 * 10**9)
    refuse_larger("net", {"for weights": 10**9, "for images": 2 * 10**9})
    with pytest.raises(
        ModelError, match=r"net needs about 3\.50 GB .*1\.00 GB for weights, 2\.50 GB for images\), but 3\.00"
    ):
        refuse_larger("net", {"for weights": 10**9, "for images": 25 * 10**8})


def test_the_estimate_is_what_statistics_take() -> None:
    model, calibration = trained(Mixed()), images(40, 16)
    traced = trace(model, calibration[:2])
    found = collect(traced, calibration, Recipe())
    parameters, moments, data, values = footprint(traced.graph, 40).values()
    assert parameters == 5 * sum(4 * tensor.numel() for tensor in traced.module.state_dict().values())
    assert moments == 3 * sum(4 * moment.gram.numel() for moment in found.moments.values())
    assert data == 4 * (calibration.numel() + found.logits.numel())
    assert values == 2 * 4 * 40 * 8 * 16 * 16  # what the stem gives, and its activation


def test_a_wide_layer_is_more_than_any_machine_has() -> None:
    with pytest.raises(ModelError, match="for the second moments of what its layers read"):
        refuse_larger("wide", footprint(residual_net(1, channels=3 * 10**5), 100))
