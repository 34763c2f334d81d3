"""What an engine's accuracy differs by from the torch model's, and the layer at which it goes wrong."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from math import copysign
from typing import Any

from autocomp.compress import logits_of
from autocomp.engines.cuts import Cut, cuts_of, head, tail
from autocomp.engines.torch_cuda import torch_function
from autocomp.errors import DataError, EngineError, InputError
from autocomp.outcome import Note, Observer, Phase, Step
from autocomp.protocols import Backend
from autocomp.results import Score
from autocomp.study.artefacts import ShippedPolicy
from autocomp.study.card import sha256
from autocomp.study.score import Floats, Scorer, predict, predictions
from autocomp.study.workbench import Workbench

__all__ = ["LIMIT", "AccuracyGap", "Culprit", "Partial", "debug", "narrow"]

LIMIT = 0.005
"""Difference in accuracy from which on the layer behind it is looked for."""


@dataclass(frozen=True, slots=True)
class Partial:
    """The engine before a layer, torch from there on.

    Attributes:
        layer: that torch begins with.
        lost: accuracy against the torch model, in [-1, 1]; negative where it is better.
    """

    layer: str
    lost: float


@dataclass(frozen=True, slots=True)
class Culprit:
    """Where the engine goes wrong.

    Attributes:
        layer: its operators, or what lies between them and the next layer, do; None for what comes before all layers,
            which is the quantization of the input.
        until: the next layer; None behind the last one.
        precision: of the layer; None without one.
        before, after: accuracy lost where the engine computes what comes before the layer alone, and with the layer.
    """

    layer: str | None
    until: str | None
    precision: str | None
    before: float
    after: float


@dataclass(frozen=True)
class AccuracyGap:
    """A file's accuracy on an engine beside the torch model's.

    Attributes:
        device: of the engine.
        torch, engine: scores on the same images; divergence and agreement are against the torch model.
        lost: accuracy of the torch model minus the engine's; without labels the share of images on which they differ.
        culprit: None where the two differ by no more than `LIMIT`, or `reason` says why none was found.
        partials: what was tried, in the order of the layers.
        reason: why no layer could be named.
    """

    device: Mapping[str, Any]
    torch: Score
    engine: Score
    lost: float
    culprit: Culprit | None = None
    partials: tuple[Partial, ...] = ()
    reason: str | None = None

    @property
    def agrees(self) -> bool:
        return abs(self.lost) <= LIMIT

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "device": dict(self.device), "limit": LIMIT, "agrees": self.agrees}


def debug(bench: Workbench, shipped: ShippedPolicy, file: bytes | None, observer: Observer) -> AccuracyGap:
    """Score a policy's file on the engine and the policy's torch model on the search split.

    Where they differ by more than `LIMIT` the engine runs the file's first layers and torch the others, and the number
    of first layers is bisected.

    Args:
        file: that was written for this policy; None for the one that is written now.

    Raises:
        InputError: the policy does not fit the model or the engine, or its torch model cannot be made.
        DataError: the outputs are no logits of classes.
        EngineError: the engine refuses the file.
    """
    if not (bench.splits.labelled or bench.config.metric == "kl"):
        raise DataError("the outputs are no logits of classes, so there is no accuracy to lose: use --metric kl")
    model, own = _torch_model(bench, shipped, file)
    if file is not None and file != own:
        observer(Note("the file is not the one that is written for this policy here: it was changed or copied"))
    split, examined = bench.splits.search, own if file is None else file
    observer(Phase("score"))
    expected = predictions(model, split)
    scorer = Scorer(split, expected, bench.splits.labelled)
    with bench.backend.build(examined) as engine:
        score = scorer.of(predict(engine, split))
    right = scorer.of(expected)
    lost = _lost(right, score)
    found = AccuracyGap(bench.backend.device.to_json(), right, score, lost)
    if found.agrees:
        return found
    try:
        culprit, partials = _culprit(bench, shipped, scorer, (examined, own), lost, observer)
    except EngineError as error:
        return AccuracyGap(found.device, right, score, lost, reason=str(error))
    return AccuracyGap(found.device, right, score, lost, culprit, partials)


def _torch_model(
    bench: Workbench, shipped: ShippedPolicy, file: bytes | None
) -> tuple[Callable[[Floats], Floats], bytes]:
    """The compressed model in torch, and the file that is written for it."""
    if shipped.training is None:
        compressed = bench.emitter.finish(bench.traced.graph.normalise(shipped.policy))
        return lambda images: logits_of(compressed.module, images), bench.emitter.emit(compressed)
    if file is None or sha256(file) != shipped.onnx_sha256:
        raise InputError("a fine-tuned model is known by its own model.onnx alone: give its run's folder, unchanged")
    return torch_function(file), file


def _lost(right: Score, found: Score) -> float:
    if right.accuracy is not None and found.accuracy is not None:
        return right.accuracy - found.accuracy
    return 1.0 - (found.agreement or 0.0)


def _culprit(
    bench: Workbench,
    shipped: ShippedPolicy,
    scorer: Scorer,
    files: tuple[bytes, bytes],
    lost: float,
    observer: Observer,
) -> tuple[Culprit, tuple[Partial, ...]]:
    """The layer at which the accuracy goes.

    Args:
        files: the one that the engine runs, and the one that is written for the policy.

    Raises:
        EngineError: the file does not come apart, or does not say what the torch model computes.
    """
    examined, own = files
    right = scorer.of(scorer.reference)
    alone = _lost(right, scorer.of(predictions(torch_function(own), scorer.split)))
    if abs(alone) > LIMIT:
        raise EngineError(
            f"the file that is written says something else than the torch model ({100 * alone:+.2f} points in torch): "
            "that is no fault of the engine, report it"
        )
    cuts = cuts_of(own)
    observer(Phase("bisect", len(cuts).bit_length()))

    def at(place: int) -> float:
        found = _lost(right, _joined(bench.backend, examined, own, cuts[place], scorer))
        observer(Step())
        return found

    known, low, high = narrow(at, len(cuts), lost)
    layer = cuts[low].layer if low >= 0 else None
    culprit = Culprit(
        layer=layer,
        until=cuts[high].layer if high < len(cuts) else None,
        precision=None if layer is None else str(shipped.policy.precision(layer)),
        before=known[low],
        after=known[high],
    )
    tried = (Partial(cuts[place].layer, known[place]) for place in sorted(known) if 0 <= place < len(cuts))
    return culprit, tuple(tried)


def narrow(at: Callable[[int], float], count: int, total: float) -> tuple[dict[int, float], int, int]:
    """Bisect for two places next to each other between which the loss comes to be more than half of the total.

    Half, because a little is lost at every layer. The invariant holds whether or not the loss grows with each place:
    it is at most half at the lower end, and more at the upper one.

    Args:
        at: what is lost up to a place in 0 ... count - 1; nothing is before them, and the total behind.

    Returns:
        what was found, by place, with both ends as -1 and ``count``; and the two places.
    """
    known = {-1: 0.0, count: total}
    low, high = -1, count
    while high - low > 1:
        middle = (low + high) // 2
        known[middle] = at(middle)
        if copysign(1.0, total) * known[middle] > abs(total) / 2:
            high = middle
        else:
            low = middle
    return known, low, high


def _joined(backend: Backend, examined: bytes, own: bytes, cut: Cut, scorer: Scorer) -> Score:
    """The score of the engine up to a cut with torch behind it."""
    sources: Sequence[str] = tuple(dict.fromkeys(cut.values.values()))
    rest = torch_function(tail(own, cut))
    with ExitStack() as stack:
        engines = {source: stack.enter_context(backend.build(head(examined, source))) for source in sources}

        def run(images: Floats) -> Floats:
            given = {source: engine.run(images) for source, engine in engines.items()}
            return rest(*(given[source] for source in cut.values.values()))

        return scorer.of(predictions(run, scorer.split))
