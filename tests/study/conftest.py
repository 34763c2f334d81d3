"""Finished runs that several tests of what comes after a search share."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from autocomp.budget import parse_budgets
from autocomp.config import SearchConfig
from autocomp.engines import BackendSpec, make_backend
from autocomp.outcome import Contender, SearchResult
from autocomp.policy import INT8, Policy
from autocomp.results import Block, Interval, LatencyEstimate, Timing
from autocomp.study import recheck
from autocomp.study import verify as verification
from autocomp.study.run import Manifest, Run
from tests.engines.conftest import Case, case
from tests.engines.nets import resnet

HERE = make_backend(BackendSpec()).device.to_json()
Make = Callable[..., Path]


@pytest.fixture(scope="session")
def model() -> Case:
    return case(resnet(depth=8, width=16, size=16))


@pytest.fixture
def make(tmp_path: Path, model: Case) -> Make:
    """A finished run's folder; the compressed model has half of the inner channels, its first layer in int8."""
    policy = Policy({g.name: g.channels // 2 for g in model.net.graph.groups}, frozenset(), {"conv1": INT8})

    def go(
        *,
        predicted: bool,
        device: Any = HERE,
        engine: str = "onnxruntime",
        budget: str = "0.9x",
        data: str = "npz:gone.npz",
        data_digest: str = "",
        accuracy: float = 0.9,
    ) -> Path:
        onnx = model.emit(policy)
        tensors, _, params = model.parts(policy)
        one = Interval(1.0, 0.9, 1.1)
        latency = LatencyEstimate("p50", one, one, one, 100)
        graph = model.net.graph
        rows = {
            role: Contender(role, own, latency, 0.9, 0.9, accuracy, None, graph.macs(own), 1000, False, 5)
            for role, own in (("reference", Policy()), ("best", policy), ("random", policy))
        }
        folder = tmp_path / "run"
        notes = ("latencies are predicted, nothing is verified", "another")
        result = SearchResult(
            False, parse_budgets([budget]), rows, {"search": 5}, (), 1.0, folder, notes, device, predicted
        )
        config = SearchConfig(
            budget=(budget,), engine=engine, batch=4, data=data, out=str(folder), calibration_images=40,
            search_images=40, selection_images=40,
        )  # fmt: skip
        shipped = {
            "policy": policy.to_json(),
            "onnx_sha256": hashlib.sha256(onnx).hexdigest(),
            "reference_sha256": hashlib.sha256(model.emit(Policy())).hexdigest(),
            "scales": {value: found.to_json() for value, found in params.items()},
        }
        versions, digests = {"torch": "2"}, {"data": data_digest}
        command = ["autocomp", "search"]
        manifest = Manifest("0.1.0", config.to_json(), command, versions, device, digests, "unverified")
        with Run.create(folder, manifest) as run:
            run.write("result.json", json.dumps(result.to_json()))
            run.write("model.onnx", onnx)
            run.write("reference.onnx", model.emit(Policy()))
            run.write("policy.json", json.dumps(shipped))
            run.write("weights.safetensors", save({name: np.ascontiguousarray(v) for name, v in tensors.items()}))
        return folder

    return go


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Fresh processes answer with an exact ratio."""

    def at(ratio: float) -> None:
        blocks = tuple(Block(build, (ratio,) * 4, (1.0,) * 4) for build in range(5) for _ in range(8))
        monkeypatch.setattr(verification, "measure_fresh", lambda *_: Timing(blocks))
        monkeypatch.setattr(recheck, "quiet_ms", lambda _: 1.0)

    return at
