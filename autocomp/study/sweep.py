"""The sensitivity of a model to every single choice: measured, kept in a cache, and found again."""

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from math import ceil
from pathlib import Path

import numpy as np

from autocomp import resources
from autocomp.compress import divergences, lost_outputs, to_tensor
from autocomp.errors import RunError
from autocomp.graph import LayerGraph
from autocomp.outcome import Observer, Phase, Step
from autocomp.policy import FP32, Policy, Precision, Recipe, digest_of
from autocomp.quantization import place
from autocomp.space import Decision
from autocomp.storage import write_atomic
from autocomp.study.score import Floats, kl_divergence, load_metric, measured
from autocomp.study.sensitivity import FORMAT, Choice, Kind, Sensitivity, SensitivityRow, read, stored_bytes
from autocomp.study.workbench import Workbench, first_images, package_versions

__all__ = ["QUICK", "THOROUGH", "Effort", "measure", "obtain"]

FEWEST_IMAGES = 32


@dataclass(frozen=True, slots=True)
class Effort:
    """How much measuring may cost. It is bounded in work, not in time, so that equal inputs give equal results.

    Attributes:
        macs: multiply-accumulates of all forward passes together; fewer images are used where these would be more.
        images: at most, and at least 32 where the split has them.
        counts: kept counts measured in each group, spread from the smallest up; None for all of them.
        kinds: of decisions that are looked at.
    """

    macs: float
    images: int
    counts: int | None
    kinds: tuple[Kind, ...]


THOROUGH = Effort(1.2e12, 256, None, ("channels", "branch", "precision"))
"""Of the command: every choice."""
QUICK = Effort(3e11, 256, 2, ("channels", "branch"))
"""Of a search before its first trial, in which int8 is taken for granted where the space allows it."""


def obtain(bench: Workbench, effort: Effort, observer: Observer, beside: Path | None = None) -> Sensitivity:
    """The sensitivity from ``beside`` or the user's cache, else measured; then kept in both.

    A file that is torn, or of other inputs, counts as none, and a cache that cannot be written is done without. What a
    metric of the user's says is not cached, for its code may change under its name.

    Raises:
        AutocompError: as `measure`; RunError if ``beside`` cannot be written.
    """
    key = _key(bench, effort)
    cached = resources.cache("sensitivity") / f"{key}.json" if bench.config.metric == "kl" else None
    known = [found for path in (beside, cached) if path is not None and (found := read(path, key)) is not None]
    sensitivity = known[0] if known else measure(bench, effort, observer)
    text = json.dumps(sensitivity.to_json(), indent=1)
    if beside is not None:
        write_atomic(beside, text)
    if cached is not None and not known:
        with suppress(OSError, RunError):
            cached.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(cached, text)
    return sensitivity


def measure(bench: Workbench, effort: Effort, observer: Observer) -> Sensitivity:
    """Make every choice of the space alone and compare the model with the uncompressed one.

    The models are those that `compress` gives, without recalibration (which a single change hardly ever calls for)
    and with weights rounded to nearest.

    Raises:
        CompressError: a choice leaves a layer whose output is not finite.
    """
    graph = bench.traced.graph
    choices = [(d, option) for kind in effort.kinds for d in _decisions(bench, kind) for option in d.options[1:]]
    policies = {(d, option): _alone(d, option) for d, option in choices}
    measured = [entry for entry in choices if _wanted(*entry, effort)]
    measured.sort(key=lambda entry: _begins(graph, policies[entry]))
    count = _images(graph, [policies[entry] for entry in measured], effort, len(bench.splits.search))
    observer(Phase("sensitivity", len(measured)))
    found = {}
    values = divergences(
        bench.traced,
        bench.statistics,
        _light(bench.recipe),
        bench.backend.capabilities().numerics,
        to_tensor(bench.images),
        to_tensor(first_images(bench.splits.search, count)),
        [policies[entry] for entry in measured],
        _own_measure(bench, count),
    )
    for entry, value in zip(measured, values, strict=True):
        found[entry] = value
        observer(Step())
    lost = lost_outputs(bench.traced, bench.statistics)
    macs, size_bytes = graph.macs(Policy()), stored_bytes(graph, Policy())

    def row(decision: Decision, choice: Choice) -> SensitivityRow:
        policy, kept, error = policies[decision, choice], None, None
        if decision.kind == "channels" and isinstance(choice, int):
            kept = choice / graph.group_by_name[decision.name].channels
            error = float(lost[decision.name][choice]) if decision.name in lost else None
        return SensitivityRow(
            decision.kind, decision.name, choice, kept, found.get((decision, choice)), error,
            macs - graph.macs(policy), size_bytes - stored_bytes(graph, policy),
        )  # fmt: skip

    rows = tuple(row(*entry) for entry in choices)
    made = (_key(bench, effort), bench.model.spec, bench.splits.source, count, macs, size_bytes, rows)
    return Sensitivity(*made, metric=bench.config.metric)


def _own_measure(bench: Workbench, count: int) -> Callable[[Floats, Floats], float] | None:
    """The rise of the user's metric above the uncompressed model's, on the first images; None without one."""
    metric = load_metric(bench.config.metric)
    if metric is kl_divergence:
        return None
    labels = np.concatenate([part for _, part in bench.splits.search.batches(128)])[:count]

    def rise(reference: Floats, outputs: Floats) -> float:
        return measured(metric, outputs, reference, labels) - measured(metric, reference, reference, labels)

    return rise


def _decisions(bench: Workbench, kind: Kind) -> list[Decision]:
    """The space's decisions of a kind; a precision's options begin with fp32, which is no change."""
    found = [decision for decision in bench.space.decisions if decision.kind == kind]
    if kind == "precision":
        found = [replace(d, options=(FP32, *(o for o in d.options if o != FP32))) for d in found]
    return found


def _alone(decision: Decision, option: Choice) -> Policy:
    if isinstance(option, Precision):
        return Policy(precisions={decision.name: option})
    return Policy(dropped=frozenset([decision.name])) if option is True else Policy({decision.name: option})


def _wanted(decision: Decision, option: Choice, effort: Effort) -> bool:
    if decision.kind != "channels" or effort.counts is None:
        return True
    smallest_first = decision.options[:0:-1]
    return smallest_first.index(option) % ceil(len(smallest_first) / effort.counts) == 0


def _begins(graph: LayerGraph, policy: Policy) -> int:
    """Place of the first node that a policy of one change touches."""
    layers = {member.parameter.rpartition(".")[0] for n in policy.kept for member in graph.group_by_name[n].members}
    layers |= graph.removed_layers(policy)
    nodes = {graph.layer_by_name[name].node for name in layers if name in graph.layer_by_name}
    nodes |= set(place(graph, policy).observed)
    return min((index for index, node in enumerate(graph.nodes) if node.name in nodes), default=0)


def _images(graph: LayerGraph, policies: Sequence[Policy], effort: Effort, available: int) -> int:
    """Images that keep all passes, each from the first changed node on, within the effort."""
    order = {node.name: index for index, node in enumerate(graph.nodes)}
    macs = {order[graph.layer_by_name[name].node]: count for name, count in graph.layer_macs(Policy()).items()}
    begins = [_begins(graph, policy) for policy in policies]
    each = sum(count for begin in begins for at, count in macs.items() if at >= begin)
    return min(max(int(effort.macs / max(each, 1)), FEWEST_IMAGES), effort.images, available)


def _light(recipe: Recipe) -> Recipe:
    """The recipe without what costs more than a single change is worth."""
    solve = "auto" if recipe.reconstruction == "sequential" else recipe.reconstruction
    return replace(recipe, reconstruction=solve, recalibration="never", bias_correction="never", rounding="nearest")


def _key(bench: Workbench, effort: Effort) -> str:
    versions = [package_versions().get(name) for name in ("autocomp", "torch")]
    inputs = [dict(bench.digests), _light(bench.recipe).to_json(), asdict(effort), bench.config.metric]
    return digest_of([FORMAT, versions, *inputs])
