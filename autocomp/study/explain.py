"""What each choice of a policy saves, as a profile predicts it, and what it costs, as the sensitivity has it."""

from collections import Counter
from collections.abc import Iterator, Sequence
from math import hypot, sqrt
from pathlib import Path

from autocomp import resources
from autocomp.errors import ConfigError, InputError
from autocomp.graph import LayerGraph
from autocomp.hardware import HardwareProfile, Kernel, Predictor, kernels_of
from autocomp.outcome import ChoiceEffect
from autocomp.policy import FP32, Policy, Precision
from autocomp.results import Interval
from autocomp.space import PolicySpace
from autocomp.study.predicted import PredictedBackend
from autocomp.study.sensitivity import Choice, Kind, Sensitivity
from autocomp.study.starts import losses_of
from autocomp.study.workbench import Workbench

__all__ = ["effects_of", "predictor_for", "without_slow_types"]

NORMAL = 1.959964
"""Standard deviations to either side that hold 95 %."""


def effects_of(
    graph: LayerGraph, policy: Policy, batch: int, sensitivity: Sensitivity | None, predictor: Predictor | None
) -> tuple[ChoiceEffect, ...]:
    """What every choice that a policy makes saves and costs, in the graph's order.

    The time that a choice saves is that of the policy without it, all others as they are, minus that of the policy,
    both predicted; negative where the choice costs time. What it costs is the divergence that it alone causes in the
    uncompressed model.

    Args:
        policy: normalised.
        sensitivity: None where it was not measured: losses are then unknown.
        predictor: None where there is no profile; without one, or with too little in it, times are unknown.
    """
    choices = list(_choices(graph, policy))
    undone = {choice: graph.normalise(_without(graph, policy, *choice)) for choice in choices}
    times = dict.fromkeys(choices, None) if predictor is None else _times(graph, policy, undone, batch, predictor)
    found = []
    for kind, name, option in choices:
        loss, measured = _loss(sensitivity, kind, name, option)
        found.append(
            ChoiceEffect(
                kind, name, _text(graph, name, option), times[kind, name, option], loss, measured,
                graph.macs(undone[kind, name, option]) - graph.macs(policy),
            )
        )  # fmt: skip
    return tuple(found)


def without_slow_types(space: PolicySpace, policy: Policy, batch: int, predictor: Predictor) -> Policy:
    """A policy with the layers in float32 whose type, int8 mostly, costs time there, beyond the prediction's error.

    One after another, what costs most first: neighbours of one type spare each other conversions.

    Args:
        policy: of the space; a layer that has no float32 there stays as it is.
        predictor: without enough measured, nothing is known to cost time.
    """
    graph, policy = space.graph, space.graph.normalise(policy)
    while True:
        types: list[_Named] = [("precision", name, precision) for name, precision in policy.precisions.items()]
        undone = {choice: graph.normalise(_without(graph, policy, *choice)) for choice in types}
        undone = {choice: other for choice, other in undone.items() if space.contains(other)}
        saved = _times(graph, policy, undone, batch, predictor)
        slow = {choice: time.value for choice, time in saved.items() if time is not None and time.high < 0}
        if not slow:
            return policy
        policy = undone[min(slow, key=slow.__getitem__)]


_Named = tuple[Kind, str, Choice]


def _choices(graph: LayerGraph, policy: Policy) -> Iterator[_Named]:
    """By the layer they begin at."""
    place = {layer.name: index for index, layer in enumerate(graph.layers)}
    found: list[tuple[int, _Named]] = []
    for branch in policy.dropped:
        found.append((min(place[name] for name in graph.branch_by_name[branch].layers), ("branch", branch, True)))
    for group, kept in policy.kept.items():
        owners = [m.parameter.rpartition(".")[0] for m in graph.group_by_name[group].members]
        found.append((min(place.get(name, len(place)) for name in owners), ("channels", group, kept)))
    for layer, precision in policy.precisions.items():
        found.append((place[layer], ("precision", layer, precision)))
    return (choice for _, choice in sorted(found, key=lambda entry: (entry[0], entry[1][:2])))


def _without(graph: LayerGraph, policy: Policy, kind: Kind, name: str, option: Choice) -> Policy:
    """The policy with one choice undone. What a removed branch brings back runs as most layers of the policy do."""
    kept, dropped, precisions = dict(policy.kept), set(policy.dropped), dict(policy.precisions)
    if kind == "channels":
        del kept[name]
    elif kind == "precision":
        del precisions[name]
    else:
        dropped.remove(name)
        gone = graph.removed_layers(policy)
        ((usual, _),) = Counter(
            policy.precision(layer.name) for layer in graph.layers if layer.name not in gone
        ).most_common(1)
        if usual != FP32:
            precisions |= dict.fromkeys(graph.branch_by_name[name].layers, usual)
    return Policy(kept, frozenset(dropped), precisions)


def _times(
    graph: LayerGraph, policy: Policy, undone: dict[_Named, Policy], batch: int, predictor: Predictor
) -> dict[_Named, Interval | None]:
    """Choice -> ms that it saves, with the 95 % interval; None for all where the profile holds too little."""
    own = tuple(kernels_of(graph, policy, batch).values())
    others = {choice: tuple(kernels_of(graph, other, batch).values()) for choice, other in undone.items()}
    try:
        predictor.kernels([*own, *(kernel for kernels in others.values() for kernel in kernels)])  # all at once
        whole = predictor.engine(own).ms
        return {choice: _saved(predictor, own, whole, kernels) for choice, kernels in others.items()}
    except InputError:
        return dict.fromkeys(undone)


def _saved(predictor: Predictor, own: Sequence[Kernel], whole_ms: float, other: Sequence[Kernel]) -> Interval:
    """Only kernels that differ make the difference uncertain."""
    value = predictor.engine(other).ms - whole_ms
    sides = (Counter(own) - Counter(other), Counter(other) - Counter(own))
    errors = (sqrt(sum(e.deviation_ms**2 for e in predictor.kernels(list(side.elements())))) for side in sides)
    margin = NORMAL * hypot(*errors)
    return Interval(value, value - margin, value + margin)


def _loss(sensitivity: Sensitivity | None, kind: Kind, name: str, option: Choice) -> tuple[float | None, bool]:
    """Nats, and whether they were measured or read off a line through measured ones."""
    rows = sensitivity.of(kind).get(name, ()) if sensitivity is not None else ()
    measured = next((row.divergence for row in rows if row.choice == option), None)
    if measured is not None or kind != "channels" or not isinstance(option, int):
        return measured, measured is not None
    return losses_of(rows).get(option), False


def _text(graph: LayerGraph, name: str, option: Choice) -> str:
    if isinstance(option, Precision):
        return str(option)
    return "removed" if option is True else f"{option} of {graph.group_by_name[name].channels}"


def predictor_for(bench: Workbench, run: Path) -> Predictor | None:
    """By the profile of the run's folder, else by the one that fits this device; None without."""
    if isinstance(bench.backend, PredictedBackend):
        return bench.backend.predictor
    device = bench.backend.device
    known = resources.available("hardware_profiles").get(device.name)
    for folder in (run / "profile" / device.name, known):
        if folder is None or not (folder / "profile.toml").is_file():
            continue
        try:
            profile = HardwareProfile.load(folder)
        except ConfigError:
            continue
        if profile.measured and not profile.differences(device):
            return Predictor(profile)
    return None
