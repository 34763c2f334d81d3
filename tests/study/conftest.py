"""Finished runs that several tests of what comes after a search share."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save

from autocomp import api
from autocomp.budget import parse_budgets
from autocomp.config import SearchConfig
from autocomp.data.arrays import ArraySplit
from autocomp.data.preprocess import IMAGENET
from autocomp.engines import BackendSpec, make_backend
from autocomp.outcome import Contender, SearchResult
from autocomp.policy import INT8, Policy
from autocomp.results import Block, Interval, LatencyEstimate, Timing
from autocomp.study import recheck
from autocomp.study import verify as verification
from autocomp.study.run import Manifest, Run
from autocomp.train import Training, TrainingRecipe, finetune
from tests.engines.conftest import Case, case
from tests.engines.nets import resnet
from tests.study import tiny

HERE = make_backend(BackendSpec()).device.to_json()
Make = Callable[..., Path]


@pytest.fixture(scope="session")
def model() -> Case:
    return case(resnet(depth=8, width=16, size=16))


@pytest.fixture(scope="session")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a small trained network, its best pruned hard; its latency is an estimate."""
    folder = tmp_path_factory.mktemp("finetune")
    tiny.saved(folder / "images.npz", 900, 400)
    images = ArraySplit(*tiny.images(900, 0), np.arange(900), IMAGENET, "tiny")
    recipe = TrainingRecipe(epochs=3, lr=0.05, batch=64, crop=0, flip=0.0)  # not to its end
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = tiny.model()
    trained = finetune(Training(network, None, images, recipe), lambda event: None)
    (folder / "weights.safetensors").write_bytes(save(dict(trained.tensors)))
    config = SearchConfig(
        model="tests.study.tiny:model", weights=str(folder / "weights.safetensors"), data=f"npz:{folder}/images.npz",
        budget=("0.4xMACs",), engine="simulated", batch=256, trials=12, baseline_trials=0, finalists=1,
        finetune_finalists=1,
        out=str(folder / "run"),
        calibration_images=100, search_images=100, selection_images=200,
    )  # fmt: skip
    result = api.run_search(config)
    assert result.best is not None
    return folder / "run"


@pytest.fixture
def run(searched: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(searched, tmp_path / "run"))


@pytest.fixture
def make(tmp_path: Path, model: Case) -> Make:
    """A finished run's folder; the compressed model has half of the inner channels, its first layer in int8."""
    policy = Policy({g.name: g.channels // 2 for g in model.net.graph.groups}, frozenset(), {"conv1": INT8})

    def go(
        *,
        predicted: bool,
        verified: bool = False,
        device: Any = HERE,
        engine: str = "onnxruntime",
        budget: str = "0.9x",
        data: str = "npz:gone.npz",
        data_digest: str = "",
        accuracy: float | None = 0.9,
        **settings: Any,
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
            verified, parse_budgets([budget]), rows, {"search": 5}, (), 1.0, folder, notes, device, predicted
        )
        config = SearchConfig(
            budget=(budget,), engine=engine, batch=4, data=data, out=str(folder), calibration_images=40,
            search_images=40, selection_images=40, **settings,
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
