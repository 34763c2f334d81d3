"""``--reference``: searches relative to an uncompressed engine of another precision than fp32."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest

from autocomp import api
from autocomp.engines import initializer_bytes
from autocomp.engines.simulated import DESCRIPTIONS, roofline_ms
from autocomp.errors import ConfigError
from autocomp.outcome import SearchResult
from autocomp.study.heritage import heritage_of
from autocomp.study.run import read_manifest

SETTINGS: dict[str, Any] = {
    "model": "tests.tiny:model", "data": "tests.tiny:data", "engine": "simulated", "batch": 8, "trials": 6,
    "baseline_trials": 2, "finalists": 1, "controller": "guided",
    "calibration_images": 64, "search_images": 100, "selection_images": 100,
}  # fmt: skip
DEVICE = DESCRIPTIONS["simulated"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> SearchResult:
    """Relative to int8, on the time and on the bytes."""
    out = tmp_path_factory.mktemp("reference") / "run"
    return api.search(SETTINGS["model"], SETTINGS["data"], ("0.8x", "0.9xMB"), reference="int8", out=out,
                      **{name: value for name, value in SETTINGS.items() if name not in ("model", "data")})  # fmt: skip


def test_everything_is_relative_to_the_reference(run: SearchResult) -> None:
    shipped, reference = ((run.run / name).read_bytes() for name in ("model.onnx", "reference.onnx"))
    weights = {tensor.name for tensor in onnx.load_model_from_string(reference).graph.initializer}
    assert {"conv1.weight_codes", "blocks.0.conv1.weight_codes", "head.weight_codes"} <= weights
    own, other = (roofline_ms(data, DEVICE, 8, 1) for data in (reference, shipped))
    assert run.reference.latency is not None and run.reference.latency.latency_ms.value == pytest.approx(own)
    assert run.best is not None and run.best.latency is not None
    assert run.best.latency.ratio.value == pytest.approx(other / own) and other <= 0.8 * own
    assert run.reference.size_bytes == initializer_bytes(reference)
    assert run.best.size_bytes <= 0.9 * initializer_bytes(reference)
    for trial in run.front:
        if trial.score is not None and trial.policy == run.reference.policy:
            assert trial.ratio == pytest.approx(1) and trial.score.divergence == 0


def test_a_guided_search_reckons_with_it(run: SearchResult) -> None:
    """Times of a simulated device are as predicted, so every proposal keeps what is reckoned in the right unit."""
    proposed = [trial for trial in run.front if trial.role == "search"]
    assert len(proposed) == SETTINGS["trials"] and all(trial.feasible for trial in proposed)


def test_its_precision_is_named_wherever_the_result_is(run: SearchResult) -> None:
    stored, manifest = (json.loads((run.run / name).read_text()) for name in ("result.json", "manifest.json"))
    assert stored["reference_precision"] == "int8" and manifest["digests"]["reference"] == "int8"
    assert set(stored["reference"]["policy"]["precisions"].values()) == {"int8"}
    assert api.load_result(run.run).reference.precision == "int8"
    assert (run.run / "report.md").read_text().count("uncompressed int8") == 3  # budgets, result, accuracy
    card = api.export(run.run, ["onnx"], run.run / "shipped")
    assert card.reference.policy == run.reference.policy
    assert "| uncompressed int8 |" in (run.run / "shipped" / "card.md").read_text()


def test_scores_against_another_reference_are_not_taken_over(run: SearchResult) -> None:
    digests = read_manifest(run.run).digests
    events: list[Any] = []
    for reference, kept in (("int8", True), ("fp32", False)):
        bench: Any = SimpleNamespace(
            digests={**digests, "reference": reference}, space=SimpleNamespace(contains=lambda _: True)
        )
        assert bool(heritage_of(run.run, bench, events.append).scores) is kept
    assert "its reference differ from those of" in events[-1].text


@pytest.mark.parametrize(
    ("reference", "message"),
    [("fp16", "--reference fp16 does not run on simulated: give one of fp32, int8"), ("half", "--reference half: ")],
)
def test_a_reference_that_the_engine_lacks_is_refused(tmp_path: Path, reference: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        api.search(budget="0.5x", **SETTINGS, reference=reference, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
