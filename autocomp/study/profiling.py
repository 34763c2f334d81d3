"""Measuring the kernels that a model and a space can reach: in whole engines, the most uncertain kernels first."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, exp, sqrt
from time import monotonic

import numpy as np

from autocomp.engines import between_pairs, by_graph_value, compare, device_lock, estimate
from autocomp.errors import InputError
from autocomp.graph import LayerGraph
from autocomp.hardware import (
    SHORTEST_MS,
    EngineTime,
    HardwareProfile,
    Kernel,
    KernelTime,
    Predictor,
    kernels_of,
    owners,
)
from autocomp.policy import Policy
from autocomp.protocols import Backend, Engine
from autocomp.results import OperatorTimes, TimingProtocol
from autocomp.space import PolicySpace
from autocomp.study.steady import DRIFT

__all__ = ["PROTOCOL", "Subject", "Survey", "by_layer", "measured_engine", "quiet_ms", "survey"]

PROTOCOL = TimingProtocol(warmup_ms=60.0, blocks=5, block_ms=40.0)
"""Of a whole engine beside the reference."""
PROFILED_MS = 300.0
"""Of runs under the runtime's own profiler."""
RUNS = (10, 100)
"""Of these runs at least and at most."""
CANDIDATES = 200
"""Policies among which the next engine is chosen, beside the uniform ones."""
CHANGED = 0.15
"""Share of a candidate's choices that differ from a uniform policy's."""
UNKNOWN = 0.5
"""Standard deviation, as a fraction, of a kernel about which nothing is known yet."""
ATTEMPTS = 4
"""Times that an engine is timed at most while the device is slowed."""
KERNEL_NOISE = 0.05
"""Relative standard deviation of a kernel's time from engine to engine."""
SPEED = 0.03
"""Relative standard deviation of a whole engine's."""
SETTLED = 0.01
"""Relative deviation of every candidate's prediction below which nothing more is measured."""


@dataclass(frozen=True)
class Subject:
    """A model whose kernels are measured.

    Attributes:
        model: as ``--model`` names it.
        space: of its policies.
        backend: of the device.
        skeleton: a policy's file for timing.
        values: value of the graph -> value of that file.
        reference: the uncompressed engine.
        reference_ms: what it usually takes; times are stated for a device at that speed.
    """

    model: str
    space: PolicySpace
    backend: Backend
    skeleton: Callable[[Policy], bytes]
    values: Mapping[str, str]
    reference: Engine
    reference_ms: float

    @property
    def graph(self) -> LayerGraph:
        return self.space.graph

    @property
    def noise(self) -> str:
        """Data of this model's input shape and classes, for a model with random weights; "" for several inputs."""
        if len(self.graph.inputs) > 1:
            return ""
        return f"random:{'x'.join(map(str, (*self.graph.input_shape, self.graph.output_shape[-1])))}"


@dataclass(frozen=True, slots=True)
class Survey:
    """How far a survey has come.

    Attributes:
        profile: with all that was measured.
        engines: measured.
        uncertainty: largest relative deviation of a candidate's prediction before the last engine.
        busy: engines that were measured while other work slowed the device, for no attempt met it quiet.
    """

    profile: HardwareProfile
    engines: int
    uncertainty: float
    busy: int = 0


def survey(
    subject: Subject,
    profile: HardwareProfile,
    seconds: float,
    most: int,
    step: Callable[[Survey], None],
    seed: int = 0,
    clock: Callable[[], float] = monotonic,
) -> HardwareProfile:
    """Measure engines until the time is over or every candidate's latency is known to `SETTLED`.

    The uniform policies come first, for a search stays near them more often than not; then the candidate whose
    kernels have the largest summed variance that one more sample would remove. Candidates are uniform policies with
    some of their choices changed at random.

    Args:
        profile: with what is known already; extended.
        seconds: after which no further engine is begun; the first one is in any case.
        most: engines.
        step: told after every engine.
        seed: of the candidates.
    """
    begun, busy = clock(), 0
    chosen: list[tuple[Kernel, ...]] = []
    batch = subject.backend.batch
    space = subject.space
    first = list(dict.fromkeys((space.nearest({}, space.precisions[-1]), Policy(), *space.uniform())))
    generator = random.Random(seed)
    drawn = (*first, *(_near(space, generator.choice(first), generator) for _ in range(CANDIDATES)))
    pool = {policy: tuple(kernels_of(space.graph, policy, batch).values()) for policy in dict.fromkeys(drawn)}
    while pool and len(chosen) < most and (not chosen or clock() - begun < seconds):
        gains, uncertainty = _gains(Predictor(profile, refine=False), pool)
        if uncertainty < SETTLED:
            break
        known = {entry.kernel for entry in profile.kernels}
        new = (policy for policy in first if policy in pool and not known.issuperset(pool[policy]))
        policy = next(new, None) or max(gains, key=gains.__getitem__)
        chosen.append(pool.pop(policy))
        profile, quiet = measured_engine(subject, profile, policy)
        busy += not quiet
        step(Survey(profile, len(chosen), uncertainty, busy))
    return _summed(profile, chosen)


def _summed(profile: HardwareProfile, chosen: Sequence[Sequence[Kernel]]) -> HardwareProfile:
    """The last engines with the sums of what their kernels usually take, which is what predictions begin from."""
    usual = {entry.kernel: entry.median_ms for entry in profile.kernels}
    before = len(profile.engines) - len(chosen)
    pairs = zip(profile.engines[before:], chosen, strict=True)
    new = (replace(engine, kernels_ms=sum(usual[kernel] for kernel in own)) for engine, own in pairs)
    return replace(profile, engines=(*profile.engines[:before], *new))


def measured_engine(subject: Subject, profile: HardwareProfile, policy: Policy) -> tuple[HardwareProfile, bool]:
    """The profile with one more engine's kernels, and whether the device was quiet meanwhile.

    The engine is timed beside the reference, and then once more under the runtime's profiler, whose times are scaled
    so that the whole run takes what the first timing said. While other work slows the reference down nothing counts:
    the slowdown differs from engine to engine. Where that does not end, what is left of it is common to all kernels of
    an engine, so those that are known already tell how much it is.

    Raises:
        EngineError: the engine cannot be built, or failed.
    """
    onnx = subject.skeleton(policy)
    with subject.backend.build(onnx) as engine, device_lock(subject.backend.device):
        slowed, wall_ms, found = _timed(subject, engine, onnx)
    scale = wall_ms / found.run_ms
    kernels = kernels_of(subject.graph, policy, subject.backend.batch)
    sums = {name: scale * ms for name, ms in by_layer(subject.graph, policy, onnx, found, subject.values).items()}
    times = {entry.kernel: entry for entry in profile.kernels}
    quiet, slower = slowed <= 1 + DRIFT, 1.0
    if not quiet:
        slower = _slowdown([(times[kernel], sums[name]) for name, kernel in kernels.items() if kernel in times])
    for name, kernel in kernels.items():
        known, ms = times.get(kernel), sums[name] / slower
        times[kernel] = KernelTime(kernel, ms, 0.0, 1) if known is None else known.with_sample(ms)
    total_ms = sum(sums.values()) / slower
    whole = EngineTime(subject.model, subject.backend.batch, len(kernels), total_ms, wall_ms / slower, subject.noise)
    profile = replace(profile, kernels=tuple(times.values()), engines=(*profile.engines, whole))
    return profile, quiet


def by_layer(
    graph: LayerGraph, policy: Policy, onnx: bytes, found: OperatorTimes, values: Mapping[str, str]
) -> dict[str, float]:
    """Layer -> ms of its kernel, and `ENTRY` -> what comes before the first, from the operators' times in a file."""
    pairs, policy = graph.paired(policy)
    values = {**values, **between_pairs(graph, pairs, values)}
    belongs = owners(pairs, pairs.live(policy))
    sums = dict.fromkeys(belongs.values(), 0.0)
    for node, ms in by_graph_value(onnx, found.by_value, values).items():
        sums[belongs[node]] += ms
    return sums


def quiet_ms(reference: Engine, blocks: int = 30, repeats: int = 3) -> float:
    """What the reference takes while nothing else runs: the lower quartile of the medians of short blocks."""
    return float(np.quantile([np.median(reference.time(repeats)) for _ in range(blocks)], 0.25))


def _timed(subject: Subject, engine: Engine, onnx: bytes) -> tuple[float, float, OperatorTimes]:
    """How far the reference was slowed, wall time at its usual speed, and the operators' times.

    Taken again while the device is slowed; of all attempts the least slowed one counts.
    """
    fewest, most = RUNS
    taken: list[tuple[float, float, OperatorTimes]] = []
    while True:
        timing = compare(engine, subject.reference, PROTOCOL)
        found = estimate(timing, "p50")
        repeats = min(max(ceil(PROFILED_MS / found.latency_ms.value), fewest), most)
        operators = subject.backend.profile(onnx, repeats)
        after = float(np.median(subject.reference.time(PROTOCOL.min_repeats)))
        slowed = max(found.reference_ms.value, after) / subject.reference_ms
        taken.append((slowed, found.ratio.value * subject.reference_ms, operators))
        if slowed <= 1 + DRIFT or len(taken) == ATTEMPTS:
            return min(taken, key=lambda entry: entry[0])


def _slowdown(pairs: Sequence[tuple[KernelTime, float]]) -> float:
    """How much slower an engine ran than those before it, from the kernels they share.

    The mean of the logarithms of the ratios, weighted by time, drawn to 0 as a normal prior of width `SPEED` has it.
    """
    if not pairs:
        return 1.0
    weights = np.array([known.median_ms for known, _ in pairs])
    ratios = np.log([max(ms, SHORTEST_MS) / max(known.median_ms, SHORTEST_MS) for known, ms in pairs])
    mean = float(np.average(ratios, weights=weights + 1e-12))
    effective = float(weights.sum() ** 2 / (weights**2).sum()) if weights.any() else 1.0
    evidence = effective / KERNEL_NOISE**2
    return exp(mean * evidence / (evidence + 1 / SPEED**2))


def _gains(predictor: Predictor, pool: Mapping[Policy, Sequence[Kernel]]) -> tuple[dict[Policy, float], float]:
    """For each policy the variance that measuring it removes, relative to its time, and the largest deviation."""
    kernels = tuple(dict.fromkeys(kernel for own in pool.values() for kernel in own))
    try:
        found = dict(zip(kernels, predictor.kernels(kernels), strict=True))
        ms = {kernel: entry.ms for kernel, entry in found.items()}
        deviation = {kernel: entry.deviation_ms for kernel, entry in found.items()}
    except InputError:  # too little is known to interpolate: multiply-accumulates stand for times
        ms = {kernel: 1e5 + kernel.macs for kernel in kernels}
        known = {entry.kernel for entry in predictor.profile.kernels}
        deviation = {kernel: 0.05 * ms[kernel] if kernel in known else UNKNOWN * ms[kernel] for kernel in kernels}
    variance = {kernel: value**2 for kernel, value in deviation.items()}
    gains = {policy: sum(variance[kernel] for kernel in dict.fromkeys(own)) for policy, own in pool.items()}
    relative = [sqrt(sum(variance[k] for k in own)) / sum(ms[k] for k in own) for own in pool.values()]
    return gains, max(relative)


def _near(space: PolicySpace, policy: Policy, generator: random.Random) -> Policy:
    """Some choices of a policy changed, branches less often: a dropped one hides all kernels inside it."""
    indices = list(space.encode(policy))
    for place, decision in enumerate(space.decisions):
        if generator.random() < CHANGED * (0.3 if decision.kind == "branch" else 1.0):
            indices[place] = generator.randrange(len(decision.options))
    return space.decode(indices)
