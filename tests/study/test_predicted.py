"""Searches for a device that is not here: a simulated one, whose profile is given another name."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from autocomp.api import retarget, run_search
from autocomp.capabilities import Capabilities, Numerics
from autocomp.config import SearchConfig
from autocomp.engines import BackendSpec, make_backend
from autocomp.engines.label import labelled, policy_of
from autocomp.errors import ConfigError, EngineError, InputError, RunError
from autocomp.hardware import HardwareProfile, KernelTime, Predictor, kernels_of
from autocomp.outcome import SearchResult
from autocomp.policy import FP32, INT8, Policy
from autocomp.study.build_profile import build_profile, jobs_of
from autocomp.study.heritage import heritage_of, read_heritage
from autocomp.study.predicted import PredictedBackend, hardware_profile
from autocomp.study.run import read_manifest
from autocomp.study.trial import Trials
from autocomp.study.workbench import prepare
from tests.engines.conftest import case
from tests.engines.nets import resnet

SIGNED = Numerics(signed_activations=True, symmetric_activations=True, weight_max=127)
SIGNED_CAPABILITIES = Capabilities((FP32, INT8), 8, SIGNED)
CONFIG = SearchConfig(
    model="zoo:resnet8", data="random:3x16x16x10", batch=2, calibration_images=16, search_images=32,
    selection_images=32, trials=6, baseline_trials=0, finalists=1, budget=("0.9x",), space="int8",
)  # fmt: skip


def ignore(_: Any) -> None:
    pass


@pytest.fixture(scope="module")
def far(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HardwareProfile]:
    """A working directory with the profile of ``far-1t``, which runs signed int8 and is in truth the simulated one."""
    folder = tmp_path_factory.mktemp("far")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        seconds = iter(range(10**6))
        jobs = jobs_of(replace(CONFIG, engine="simulated"), ())
        built = build_profile(jobs, 30, folder, ignore, ignore, lambda: float(next(seconds))).profile
        assert built.capabilities is not None and INT8 in built.capabilities.precisions
        profile = replace(
            built, device="far-1t", engine="openvino 9", details="cpu: far", capabilities=SIGNED_CAPABILITIES
        )
        profile.save(folder / "hardware_profiles")
        yield profile


@pytest.fixture(scope="module")
def found(far: HardwareProfile) -> SearchResult:
    return run_search(replace(CONFIG, hardware="far-1t", engine="openvino", out="found"))


def truth_ms(file: bytes) -> float:
    with make_backend(BackendSpec("simulated", batch=2)).build(file) as engine:
        return float(engine.time(1)[0])


def test_the_latency_is_the_devices_and_the_result_is_predicted(far: HardwareProfile, found: SearchResult) -> None:
    assert found.predicted and not found.verified and found.device["name"] == "far-1t"
    assert read_manifest(found.run).device["engine"] == "openvino 9"
    best = found.best
    assert best is not None and best.latency is not None and not best.verified
    shipped = (found.run / "model.onnx").read_bytes()
    assert policy_of(shipped) == best.policy
    truth = truth_ms(shipped) / truth_ms((found.run / "reference.onnx").read_bytes())
    assert best.latency.ratio.value == pytest.approx(truth, rel=0.05) and best.latency.ratio.value <= 0.9
    assert best.latency.latency_ms.low < best.latency.latency_ms.value < best.latency.latency_ms.high
    assert any("predicted from the profile far-1t" in note and "ONNX Runtime" in note for note in found.notes)
    text = (found.run / "report.md").read_text()
    assert "Latencies and ratios are predicted, nothing was measured" in text
    timed = [effect.saved_ms for effect in found.effects]
    assert timed and all(saved is not None for saved in timed)


def test_accuracy_is_scored_in_the_engines_arithmetic(far: HardwareProfile, found: SearchResult) -> None:
    graph = onnx.load(found.run / "model.onnx").graph
    points = {node.input[2] for node in graph.node if node.op_type == "QuantizeLinear"}
    types = {numpy_helper.to_array(t).dtype for t in graph.initializer if t.name in points}
    assert types == {np.dtype(np.int8)}  # ONNX Runtime itself takes uint8


def test_other_engines_threads_batches_and_profiles_are_refused(far: HardwareProfile) -> None:
    wanted = replace(CONFIG, hardware="far-1t", engine="openvino")
    for changed, said in (
        (replace(wanted, engine="onnxruntime"), "give --engine openvino --threads 1"),
        (replace(wanted, threads=2), "give --engine openvino --threads 1"),
        (replace(wanted, batch=64), "measured with batch 2: --batch 64"),
        (replace(wanted, hardware="nowhere"), "no measured profile"),
    ):
        with pytest.raises(ConfigError, match=said):
            prepare(changed, ignore)
    silent = replace(far, device="silent-1t", capabilities=None)
    silent.save(Path("hardware_profiles"))
    with pytest.raises(ConfigError, match="does not say what its engine runs"):
        prepare(replace(wanted, hardware="silent-1t"), ignore)
    (Path("hardware_profiles") / "far-1t" / "kernels.csv").rename("kept.csv")
    with pytest.raises(ConfigError, match="torn"):
        hardware_profile(wanted)
    Path("kept.csv").rename(Path("hardware_profiles") / "far-1t" / "kernels.csv")
    assert hardware_profile(replace(CONFIG, hardware="simulated", engine="simulated")) is None  # only described


def test_an_engine_takes_what_the_profile_says_and_times_no_operators(far: HardwareProfile) -> None:
    model = case(resnet(depth=8, width=8, size=8))
    kernels = dict.fromkeys(kernels_of(model.net.graph, Policy(), 4).values())
    times = tuple(KernelTime(kernel, 0.5 + place, 0.0, 9) for place, kernel in enumerate(kernels))

    def backend(known: HardwareProfile) -> PredictedBackend:
        return PredictedBackend("openvino", 4, model.net.graph, Predictor(known), SIGNED_CAPABILITIES)

    whole = backend(replace(far, kernels=times, engines=()))
    file = labelled(model.emit(Policy()), Policy())
    with whole.build(file) as engine:
        assert engine.time(2).tolist() == pytest.approx([sum(whole.layer_ms(Policy()).values())] * 2)
        np.testing.assert_allclose(engine.run(model.images), model.expected(Policy()), rtol=1e-3, atol=1e-4)
    with pytest.raises(EngineError, match="far-1t is not here"):
        whole.profile(file, 3)
    with pytest.raises(InputError, match="3 measured kernels, too few"):
        backend(replace(far, kernels=times[:3])).build(file)


def test_a_file_says_which_policy_it_is_of() -> None:
    model, policy = case(resnet(depth=8, width=8, size=8)), Policy({"layer1.0.conv1": 8}, precisions={"conv1": INT8})
    file = model.emit(policy)
    assert policy_of(labelled(file, policy)) == policy
    plain, named = onnx.load_from_string(file), onnx.load_from_string(labelled(file, policy))
    assert named.graph == plain.graph and named.opset_import == plain.opset_import
    with pytest.raises(EngineError, match="does not say which policy"):
        policy_of(file)
    torn = onnx.load_from_string(labelled(file, policy))
    torn.metadata_props[0].value = "{"
    with pytest.raises(EngineError, match="cannot be read"):
        policy_of(torn.SerializeToString())


class Counted:
    """Counts what is compressed to be scored in trials."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.scored: list[str] = []
        inner = Trials._score
        patch.setattr(Trials, "_score", lambda own, policy, watch: self._count(policy) or inner(own, policy, watch))

    def _count(self, policy: Policy) -> None:
        self.scored.append(policy.digest)


def test_retargeting_keeps_scores_only_where_the_numerics_match(
    far: HardwareProfile, found: SearchResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First to a device twice as slow with the same arithmetic, then to one with another arithmetic."""
    old = {trial.policy: trial for trial in found.front if trial.score is not None}
    slower = tuple(replace(entry, median_ms=2 * entry.median_ms) for entry in far.kernels)
    replace(far, device="near-1t", details="cpu: near", kernels=slower).save(Path("hardware_profiles"))
    counted = Counted(monkeypatch)
    near = retarget(found.run, {"hardware": "near-1t"}, out=Path("near"))
    assert counted.scored == [] and near.predicted and near.device["name"] == "near-1t"
    assert near.reference.latency is not None and found.reference.latency is not None
    assert near.reference.latency.latency_ms.value > 1.5 * found.reference.latency.latency_ms.value
    scored = {trial.policy: trial for trial in near.front if trial.score is not None}
    assert scored and all(trial.score == old[policy].score for policy, trial in scored.items() if policy in old)
    assert near.trials == found.trials and near.best is not None
    events: list[Any] = []
    other = heritage_of(found.run, prepare(replace(CONFIG, engine="simulated"), ignore), events.append)
    assert other.scores == {} and other.policies == {"search": tuple(trial.policy for trial in found.front)}
    assert ["numerics differ" in event.text for event in events] == [True]
    with pytest.raises(ConfigError, match="for this engine and device already"):
        retarget(found.run, {"hardware": "far-1t"})
    with pytest.raises(RunError, match="no run folder"):
        retarget(Path("hardware_profiles"), {"engine": "simulated"})
    kept = read_heritage(near.run)
    assert kept is not None and kept.policies == other.policies
    (near.run / "heritage.json").write_text("{")
    with pytest.raises(RunError, match=r"heritage\.json is damaged"):
        read_heritage(near.run)
