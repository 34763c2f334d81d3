"""The GPU benchmark without a GPU: its tables on the simulated engine, and what it says of what cannot run."""

import json
import re
from pathlib import Path

import pytest
import torch

from autocomp.engines import BackendSpec, load_template, make_backend
from autocomp.engines.tensorrt.backend import NUMERICS
from autocomp.policy import INT8, Policy
from benchmarks import gpu
from tests.engines.nets import resnet


@pytest.fixture(scope="module")
def made() -> gpu.Network:
    net = resnet(depth=8, width=8, size=8)
    return gpu.Network(net.graph, load_template(net.onnx, net.graph), net.tensors)


def test_rows_hold_the_speedups_of_the_engine(made: gpu.Network) -> None:
    spec = BackendSpec("simulated", batch=8)
    rows = gpu.table(made, "resnet8", spec)
    assert [row["variant"] for row in rows] == ["fp32, tf32", "fp32, half the channels", "int8"]
    backend = make_backend(spec)
    policy = Policy(precisions={layer.name: INT8 for layer in made.graph.layers})
    times = [backend.build(made.file(chosen, backend)).time(1)[0] for chosen in (Policy(), policy)]
    assert rows[2]["speedup"] == pytest.approx(times[0] / times[1])
    assert rows[0]["speedup"] == pytest.approx(1.0)


def test_goals_are_met_missed_or_not_measured(made: gpu.Network) -> None:
    rows = [{"network": "a", "batch": 8, "variant": "int8", "speedup": 2.5}]
    assert [gpu.goal(rows, "a", 8, "int8", least)["met"] for least in (2.0, 3.0)] == [True, False]
    assert gpu.goal(rows, "a", 1, "int8", 2.0)["met"] is None


def test_files_of_tensorrt_are_symmetric(made: gpu.Network) -> None:
    pytest.importorskip("tensorrt_rtx_bindings", reason="not installed: pip install 'autocomp[tensorrt-rtx]'")
    backend = make_backend(BackendSpec("tensorrt-rtx", batch=2, hardware="sm89"))
    assert backend.capabilities().numerics == NUMERICS
    variants = gpu.variants(made.graph, backend)
    assert {"fp16", "bf16", "int8", "fp8", "fp16-2:4", "int8-2:4"} <= variants.keys()
    for name in ("fp8", "int8-2:4"):
        with backend.build(made.file(variants[name][0], backend)):
            pass
    half, _ = variants["fp32, half the channels"]
    policy = Policy(half.kept, precisions={layer.name: INT8 for layer in made.graph.layers})
    with backend.build(made.file(policy, backend)):
        pass


@pytest.mark.parametrize("part", sorted(gpu.PARTS))
def test_a_part_that_cannot_run_says_why(part: str, tmp_path: Path) -> None:
    if part != "finetune" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    found = json.loads(gpu.record(part, tmp_path, None, 1.0).read_text())
    answers = "not written yet" if part == "finetune" else "tensorrt: .*tensorrt-rtx: .*torch-cuda: no CUDA device"
    assert re.search(answers, found["cannot_run"]) and found["doctor"]["engines"]
