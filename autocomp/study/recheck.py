"""What a finished run shipped, measured again on this device: the run's budgets judged on fresh engines."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from autocomp.budget import Budget
from autocomp.config import SearchConfig
from autocomp.data import load_data
from autocomp.engines import BackendSpec, device_lock, initializer_bytes, make_backend
from autocomp.errors import ConfigError, DataError, RunError
from autocomp.outcome import NUMERICS, PREDICTED, Contender, Note, Observer, Phase, SearchResult
from autocomp.protocols import Backend
from autocomp.study.loading import data_options
from autocomp.study.profiling import quiet_ms
from autocomp.study.run import Run
from autocomp.study.score import paired_interval, predict
from autocomp.study.steady import Patience
from autocomp.study.trial import Limits
from autocomp.study.verify import Verdict, admit, reference_latency, statistics_of, verification_protocol
from autocomp.study.workbench import backend_spec

__all__ = ["ENTRY", "Verification", "admit_here", "refuse_estimates", "shipped_files", "verify_run"]

ENTRY = "verification"
"""Kind of the journal's entries."""


@dataclass(frozen=True)
class Verification:
    """What fresh engines said of a run's shipped model.

    Attributes:
        verdict: on this device.
        confidence: of its bounds; higher the more often this model was asked about.
        device: this one.
        result: of the run; where it was predicted for this device it is now a measured one.
        changed: whether it was changed so.
    """

    verdict: Verdict
    confidence: float
    device: Mapping[str, Any]
    result: SearchResult
    changed: bool

    def to_json(self) -> dict[str, Any]:
        return {
            "verified": self.verdict.admitted,
            "budget": [str(budget) for budget in self.result.budgets],
            "reference_precision": self.result.reference.precision,
            "reason": self.verdict.reason,
            "timing": self.verdict.latency.to_json(),
            "size_bytes": self.verdict.size_bytes,
            "confidence": self.confidence,
            "device": dict(self.device),
            "run": str(self.result.run),
            "updated": self.changed,
        }


def verify_run(run: Run, result: SearchResult, observer: Observer) -> Verification:
    """Measure a run's ``model.onnx`` beside its ``reference.onnx`` and journal the verdict.

    A run that was predicted for this device becomes a measured one: result, manifest and status say so. The result of
    a run that was measured stays as it was. A model that is asked about again, its search included, must hold at a
    higher confidence, 1 - 0.05 / n the n-th time, so that asking until it passes does not help it.

    Raises:
        RunError: the run shipped nothing, or its files are not what it shipped.
        ConfigError: its engine is not here, or only estimates.
        EngineError: an engine failed.
    """
    config = SearchConfig.from_json(run.manifest.config)
    best = result.best
    if best is None:
        raise RunError(f"{run.folder} shipped no model: there is nothing to verify")
    refuse_estimates(config)
    onnx, reference = shipped_files(run.folder)
    spec = replace(backend_spec(config), hardware=None)
    backend = make_backend(spec)
    device = backend.device.to_json()
    here = run.manifest.device.get("name") == device["name"]
    if not here:
        observer(Note(f"the run is for {run.manifest.device.get('name')}: the verdict is about {device['name']} alone"))
    before = [entry for entry in run.entries(ENTRY) if entry["device"] == device]
    if not result.predicted and run.manifest.device == device:  # the search asked as well
        before += [entry for entry in run.entries("verdict") if entry["policy"] == best.policy.digest]
    confidence = 1 - 0.05 / (1 + len(before))
    measured_here = not result.predicted and run.manifest.device == device
    rows = (best, result.reference if measured_here else replace(result.reference, latency=None))
    verdict = admit_here(onnx, reference, spec, backend, result.budgets, rows, confidence, observer)
    run.record(
        ENTRY, admitted=verdict.admitted, reason=verdict.reason, latency=verdict.latency.to_json(),
        size_bytes=verdict.size_bytes, confidence=confidence, device=device,
    )  # fmt: skip
    changed = result.predicted and here
    if changed:
        result = _measured(result, best, verdict, device, backend, onnx, reference, config, observer)
        run.write("result.json", json.dumps(result.to_json(), indent=2))
        run.manifest = replace(run.manifest, device=device)
        run.set_status("verified" if result.verified else "unverified")
    return Verification(verdict, confidence, device, result, changed)


def refuse_estimates(config: SearchConfig) -> None:
    """Raises: ConfigError if nothing that the configured engine says can be verified."""
    if config.engine == "simulated":
        raise ConfigError(
            "the engine simulated only estimates, its runs cannot be verified: search with another --engine"
        )


def admit_here(
    onnx: bytes,
    reference: bytes,
    spec: BackendSpec,
    backend: Backend,
    budgets: Sequence[Budget],
    rows: tuple[Contender, Contender],
    confidence: float,
    observer: Observer,
) -> Verdict:
    """Measure a shipped model beside the uncompressed one on fresh engines, and judge its budgets.

    Args:
        rows: of the model and of the uncompressed one; the latter with a latency where it was measured on this device.
    """
    best, base = rows
    observer(Phase("verify"))
    with backend.build(reference) as usual, device_lock(backend.device):
        usual_ms = quiet_ms(usual)
    if base.latency is not None:
        usual_ms = min(usual_ms, base.latency.reference_ms.value)
    limits = Limits(tuple(budgets), {"p50": usual_ms}, base.macs, initializer_bytes(reference))
    protocol = verification_protocol(statistics_of(budgets))
    return admit(onnx, reference, spec, backend, limits, best.macs, confidence, protocol, Patience(observer))


def shipped_files(folder: Path) -> tuple[bytes, bytes]:
    """The shipped model and the uncompressed one of a run.

    Raises:
        RunError: one is missing, or is not what the run shipped.
    """
    try:
        onnx, reference = ((folder / name).read_bytes() for name in ("model.onnx", "reference.onnx"))
        shipped = json.loads((folder / "policy.json").read_text())
        digests = {"model.onnx": shipped["onnx_sha256"], "reference.onnx": shipped["reference_sha256"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{folder} is not whole ({error}): search again, or copy the whole folder") from error
    for (name, digest), data in zip(digests.items(), (onnx, reference), strict=True):
        if hashlib.sha256(data).hexdigest() != digest:
            raise RunError(f"{folder / name} is not the file that the run shipped: copy the whole folder again")
    return onnx, reference


def _measured(
    result: SearchResult,
    best: Contender,
    verdict: Verdict,
    device: Mapping[str, Any],
    backend: Backend,
    onnx: bytes,
    reference: bytes,
    config: SearchConfig,
    observer: Observer,
) -> SearchResult:
    """A predicted result as measurements now have it; what was not measured keeps no latency."""
    notes = [f"searched with predicted latencies, which the trials still have; measured afterwards on {device['name']}"]
    row = replace(
        best, latency=verdict.latency, size_bytes=verdict.size_bytes, verified=verdict.admitted, note=verdict.reason
    )
    base = replace(result.reference, latency=reference_latency(verdict.latency))
    try:
        test = load_data(config.data, data_options(config)).test
        with backend.build(onnx) as engine, backend.build(reference) as beside:
            found, uncompressed = predict(engine, test), predict(beside, test)
        if best.test_accuracy is not None:
            row = replace(row, test_accuracy=found.accuracy, test_delta=paired_interval(found, uncompressed))
            base = replace(base, test_accuracy=uncompressed.accuracy)
    except DataError as error:
        notes.append(f"{NUMERICS}, not the engine's: {error}")
    for text in notes:
        observer(Note(text))
    others = {
        role: replace(other, latency=None, note="its latency was only predicted")
        for role, other in result.contenders.items()
        if role not in ("reference", "best")
    }
    contenders = {"reference": base, "best": row, **others}
    kept = tuple(note for note in result.notes if not note.startswith(PREDICTED))
    return replace(
        result, verified=verdict.admitted, predicted=False, contenders=contenders, device=device, notes=(*kept, *notes)
    )
