"""Awkward models from a search's preparation to a pruned engine, against what torch computes."""

from pathlib import Path

import numpy as np
import pytest
import torch

from autocomp.compress import Compressed
from autocomp.config import SearchConfig
from autocomp.hardware import kernels_of
from autocomp.policy import FP32, INT8, Policy
from autocomp.study.workbench import EditEmitter, Workbench, prepare
from tests import awkward

NAMES = ("twice", "tower", "unshuffled", "causal")


def bench_of(name: str) -> Workbench:
    config = SearchConfig(
        model=f"tests.awkward:{name}", data="random:3x16x16x4", engine="onnxruntime", budget=("0.7x",),
        calibration_images=16, search_images=16, selection_images=16,
    )  # fmt: skip
    return prepare(config, lambda event: None)


def error_of(bench: Workbench, compressed: Compressed) -> float:
    """Relative L2 error of the engine against torch."""
    images = np.random.default_rng(1).standard_normal((4, 3, 16, 16)).astype(np.float32)
    with bench.backend.build(bench.emitter.emit(compressed)) as engine, torch.no_grad():
        found, expected = engine.run(images), compressed.module(torch.from_numpy(images)).numpy()
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_pruned_runs_on_the_engine_as_in_torch(name: str, tmp_path: Path) -> None:
    bench = bench_of(name)
    graph = bench.traced.graph
    images = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(bench.traced.module(images), getattr(awkward, name)()(images), atol=1e-5, rtol=1e-4)
    assert graph.groups
    for part in (0.25, 0.5):
        kept = {group.name: max(1, int(part * group.channels)) for group in graph.groups}
        assert error_of(bench, bench.emitter.compress(Policy(kept))) < 1e-5
    for precision in (FP32, INT8):  # what guides a search knows every one of its kernels
        policy = bench.space.nearest({}, precision)
        assert kernels_of(graph, policy, 1)


def test_what_is_used_twice_stays_whole_with_its_norm_beside_it() -> None:
    graph = bench_of("twice").traced.graph
    assert {group.name for group in graph.groups} == {"wide", "last"}
    assert "several times" in graph.left_whole["conv"] and "shared" in graph.left_whole["stem"]


def test_blocks_turned_into_channels_are_pruned_by_editing() -> None:
    bench = bench_of("unshuffled")
    assert isinstance(bench.emitter, EditEmitter)
    assert {group.name for group in bench.traced.graph.groups} == {"first", "second", "third"}
