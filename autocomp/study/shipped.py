"""What a shipped folder claims, held against this device and the data."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from autocomp.config import SearchConfig
from autocomp.data import Splits, load_data
from autocomp.engines import make_backend
from autocomp.errors import DataError, RunError
from autocomp.outcome import Note, Observer, Phase
from autocomp.protocols import Backend
from autocomp.results import LatencyEstimate
from autocomp.study.card import CARD, Card, sha256
from autocomp.study.loading import data_options
from autocomp.study.recheck import admit_here, refuse_estimates
from autocomp.study.score import predict
from autocomp.study.verify import Verdict
from autocomp.study.workbench import backend_spec

__all__ = ["ShippedVerification", "verify_shipped"]

TOLERANCE = 0.002
"""Accuracy that may be missing: other processors and versions add in other orders, which tips single images."""
CONFIDENCE = 0.95
SLOWER = 1.05
"""How far above the card's bounds those measured here may lie: builds and the load of a day differ by less."""
AS_FAST = 0.1
"""Change of the uncompressed engine's latency up to which the device runs as it did for the card."""


@dataclass(frozen=True)
class ShippedVerification:
    """Which claims of a shipped folder hold.

    Attributes:
        folder, card: looked at.
        broken: the claims that no longer hold, a line each.
        device: this one; None, as what follows, where files were changed: they were not run.
        verdict: on the budgets.
        accuracy: of the engine over the test images; None also where the card claims none.
    """

    folder: Path
    card: Card
    broken: tuple[str, ...]
    device: Mapping[str, Any] | None = None
    verdict: Verdict | None = None
    accuracy: float | None = None

    @property
    def holds(self) -> bool:
        return not self.broken

    def to_json(self) -> dict[str, Any]:
        verdict = self.verdict
        return {
            "holds": self.holds,
            "broken": list(self.broken),
            "folder": str(self.folder),
            "budget": [str(budget) for budget in self.card.budgets],
            "timing": None if verdict is None else verdict.latency.to_json(),
            "size_bytes": None if verdict is None else verdict.size_bytes,
            "confidence": CONFIDENCE,
            "accuracy": self.accuracy,
            "claimed_accuracy": self.card.model.test_accuracy,
            "device": None if self.device is None else dict(self.device),
        }


def verify_shipped(folder: Path, data: str | None, observer: Observer) -> ShippedVerification:
    """Measure and score what was shipped again, on fresh engines in fresh processes, and compare with the card.

    Nothing is written. Where a file is not what was shipped, none is run.

    Args:
        data: where the card's data lies now; None for where it lay.

    Raises:
        RunError: the folder was not shipped, or without ONNX.
        ConfigError: its engine is not here, or only estimates.
        DataError: the test images are not here, or others than the card's.
        EngineError: an engine failed.
    """
    card, untouched = Card.read(folder)
    changed = [line for name, digest in card.files.items() if (line := _changed(folder, name, digest)) is not None]
    if not untouched:
        changed.append(f"{CARD} was changed after it was shipped")
    if changed:
        return ShippedVerification(folder, card, tuple(changed))
    if not {"model.onnx", "reference.onnx"} <= card.files.keys():
        raise RunError(f"{folder} was shipped without ONNX, which is what is measured: export with onnx in --to")
    config = SearchConfig.from_json(card.config)
    refuse_estimates(config)
    splits = _splits(config if data is None else replace(config, data=data), card)
    spec = replace(backend_spec(config), hardware=None)
    backend = make_backend(spec)
    device = backend.device.to_json()
    if device != card.device:
        observer(Note(f"the card is for {card.device.get('name')} with {card.device.get('engine')}"))
    onnx, reference = ((folder / name).read_bytes() for name in ("model.onnx", "reference.onnx"))
    measured_here = not card.predicted and device == card.device
    rows = (card.model, card.reference if measured_here else replace(card.reference, latency=None))
    verdict = admit_here(onnx, reference, spec, backend, card.budgets, rows, CONFIDENCE, observer)
    claimed_budgets = card.verified or card.predicted
    broken = [str(verdict.reason)] if claimed_budgets and not verdict.admitted else []
    broken += _slower(card.model.latency, verdict.latency, measured_here=measured_here)
    observer(Phase("test"))
    accuracy = _accuracy(backend, onnx, splits)
    claimed = card.model.test_accuracy
    if accuracy is not None and claimed is not None and accuracy < claimed - TOLERANCE:
        broken.append(f"the accuracy is {100 * accuracy:.2f} %, the card says {100 * claimed:.2f} %")
    return ShippedVerification(folder, card, tuple(broken), device, verdict, accuracy)


def _slower(claimed: LatencyEstimate | None, found: LatencyEstimate, *, measured_here: bool) -> list[str]:
    """The numbers of a card that are worse now; milliseconds only where its own device runs as it did then."""
    if claimed is None or claimed.statistic != found.statistic:
        return []
    pairs = [("ratio", found.ratio, claimed.ratio, "")]
    if measured_here and abs(found.reference_ms.value / claimed.reference_ms.value - 1) <= AS_FAST:
        pairs.append((f"latency ({found.statistic})", found.latency_ms, claimed.latency_ms, " ms"))
    return [
        f"the {what} is {now.value:.3f}{unit} ({now.low:.3f} to {now.high:.3f}), the card says {then.value:.3f}{unit} "
        f"({then.low:.3f} to {then.high:.3f})"
        for what, now, then, unit in pairs
        if now.low > SLOWER * then.high
    ]


def _changed(folder: Path, name: str, digest: str) -> str | None:
    try:
        content = (folder / name).read_bytes()
    except OSError:
        return f"{name} is missing"
    return None if sha256(content) == digest else f"{name} was changed after it was shipped"


def _splits(config: SearchConfig, card: Card) -> Splits | None:
    """The card's data; None where it claims no accuracy."""
    if card.model.test_accuracy is None:
        return None
    try:
        splits = load_data(config.data, data_options(config))
    except DataError as error:
        raise DataError(f"the card's accuracy cannot be checked ({error}): say where the images are with --data") from (
            error
        )
    if splits.digest != card.data.digest:
        raise DataError(f"{config.data} is not the data of the card, {card.data.source}: name that with --data")
    return splits


def _accuracy(backend: Backend, onnx: bytes, splits: Splits | None) -> float | None:
    if splits is None:
        return None
    with backend.build(onnx) as engine:
        return predict(engine, splits.test).accuracy
