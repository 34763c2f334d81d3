"""What guides a search: a profile of the device, measured where there is none, and the terms it gives the solver."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import date
from pathlib import Path

from autocomp import resources
from autocomp.budget import Budget
from autocomp.controllers import Factor, Knowledge, Problem
from autocomp.engines import device_lock
from autocomp.errors import AutocompError, ConfigError, RunError
from autocomp.graph import Layer
from autocomp.hardware import HardwareProfile, Kernel, Predictor, kernels_of
from autocomp.outcome import Note, Observer, Phase, Step
from autocomp.policy import Policy, Precision
from autocomp.protocols import Engine
from autocomp.study.factors import layer_terms, shape_terms
from autocomp.study.knowledge import Terms, losses, terms_of
from autocomp.study.predicted import PredictedBackend
from autocomp.study.profiling import PROTOCOL, Subject, quiet_ms, survey
from autocomp.study.sensitivity import Sensitivity, stored_bytes
from autocomp.study.staleness import Drift, expected_ms, rebuild_command
from autocomp.study.trial import Limits
from autocomp.study.workbench import EditEmitter, Workbench

__all__ = ["SURVEY_ENGINES", "SURVEY_S", "guidance", "known_profile", "obtain_profile", "subject_of"]

SURVEY_S = 40.0
"""Spent at most on kernels that no profile holds, before a search's first trial."""
SURVEY_ENGINES = 40
"""Engines measured in that time, at most."""


def subject_of(bench: Workbench, reference: Engine) -> Subject | None:
    """The workbench's model, to be measured; None where its file cannot be followed operator by operator."""
    if not isinstance(bench.emitter, EditEmitter):
        return None
    emitter = bench.emitter
    with device_lock(bench.backend.device):
        usual_ms = quiet_ms(reference)
    values = emitter.template.values
    return Subject(bench.config.model, bench.space, bench.backend, emitter.skeleton, values, reference, usual_ms)


def known_profile(bench: Workbench, observer: Observer) -> HardwareProfile | None:
    """The profile of this device, where there is one that still fits."""
    device = bench.backend.device
    folder = resources.available("hardware_profiles").get(device.name)
    if folder is None:
        return None
    try:
        profile = HardwareProfile.load(folder)
    except ConfigError as error:
        observer(Note(f"the profile {device.name} cannot be read ({error}): kernels are measured anew, for this run"))
        return None
    differences = profile.differences(device)
    if not profile.measured or not differences:
        return profile if profile.measured else None
    observer(
        Note(
            f"the profile {device.name} is stale ({'; '.join(differences)}): kernels are measured anew; for a whole "
            f"profile run '{rebuild_command(profile)}'"
        )
    )
    return None


def obtain_profile(
    bench: Workbench, reference: Engine, folder: Path, observer: Observer
) -> tuple[Subject, HardwareProfile] | None:
    """A profile that covers the space as well as `SURVEY_S` seconds allow, kept in the run's folder and for later.

    Returns:
        None, with a note, where a profile of this device says too little: of ranks, of engines that are measured
        elsewhere, of a model whose kernels cannot be told apart.
    """
    subject, reason = None, "this model's kernels cannot be told apart"
    if bench.space.ranks:
        reason = f"space {bench.config.space} has ranks, which it does not weigh"
    elif bench.config.target_resource is not None:
        reason = f"engines are measured on the nodes with {bench.config.target_resource}, not here"
    else:
        subject = subject_of(bench, reference)
    if subject is None:
        observer(Note(f"the search is not guided by a profile: {reason}"))
        return None
    device = bench.backend.device
    kept = folder / "profile"
    if (kept / device.name / "profile.toml").is_file():
        return subject, HardwareProfile.load(kept / device.name)
    if isinstance(bench.backend, PredictedBackend):
        bench.backend.known.save(kept)
        return subject, bench.backend.known
    known = known_profile(bench, observer)
    drifted = known is not None and _tell_drift(known, subject, bench.spec.batch, bench.reference_policy, observer)
    profile = known or HardwareProfile.of(device, date.today(), str(PROTOCOL), bench.backend.capabilities())
    observer(Phase("profile", SURVEY_ENGINES))
    seconds = SURVEY_S if bench.backend.measures else float("inf")
    profile = survey(subject, profile, seconds, SURVEY_ENGINES, lambda _: observer(Step()), bench.config.seed)
    profile.save(kept)
    if bench.backend.measures and not drifted:  # else times of a busy device would stay among those of a quiet one
        with suppress(OSError, ConfigError, RunError):  # a search goes on where it cannot be kept for the next one
            kept_before = resources.available("hardware_profiles").get(device.name)
            if kept_before is not None:
                HardwareProfile.load(kept_before)  # one that cannot be read is left for its owner to mend
            profile.save(resources.writable("hardware_profiles"))
    return subject, profile


def _tell_drift(profile: HardwareProfile, subject: Subject, batch: int, reference: Policy, observer: Observer) -> bool:
    """Whether the uncompressed engine is not as fast as the profile says, with a note; ratios still guide a search."""
    expected = expected_ms(profile, subject.graph, batch, reference)
    if expected is None:
        return False
    drift = Drift(subject.model, batch, expected, subject.reference_ms)
    if drift.stale:
        observer(
            Note(
                f"the profile {profile.device} is stale, or the device is busy: {drift}; only ratios of its times are "
                f"used; on a quiet device run '{rebuild_command(profile)}'"
            )
        )
    return drift.stale


def guidance(
    bench: Workbench, limits: Limits, reference: Engine, sensitivity: Sensitivity, folder: Path, observer: Observer
) -> Knowledge | None:
    """What the guided controller begins with; None, with a note, where too little can be predicted."""
    try:
        found = obtain_profile(bench, reference, folder, observer)
        if found is None:
            return None
        predictor = Predictor(found[1])
        return knowledge_of(bench, limits, sensitivity, predictor)
    except RunError:
        raise
    except AutocompError as error:
        observer(Note(f"the search is not guided by a profile: {error}"))
        return None


def knowledge_of(bench: Workbench, limits: Limits, sensitivity: Sensitivity, predictor: Predictor) -> Knowledge:
    """Losses and costs of a search's decisions.

    A latency is in units of the uncompressed engine's predicted one, so that what both have in common cancels.

    Raises:
        InputError: the profile holds too little.
    """
    terms = terms_of(bench.space)
    graph, batch = bench.traced.graph, bench.spec.batch
    whole = predictor.engine(kernels_of(graph, bench.reference_policy, batch).values()).ms
    speed = limits.goal == "speed"
    budgets = (Budget("latency", 1.0, True, "p50"),) if speed else limits.budgets
    meters = [_meter(budget, bench, limits, predictor, terms, whole) for budget in budgets]
    problem = Problem(losses(terms, sensitivity), tuple(factors for factors, _, _ in meters), terms.tied)

    def costs(policy: Policy) -> tuple[float, ...]:
        return tuple(cost(policy) for _, _, cost in meters)

    return Knowledge(problem, tuple(limit for _, limit, _ in meters), terms.choices, terms.policy, costs, speed)


def _meter(
    budget: Budget, bench: Workbench, limits: Limits, predictor: Predictor, terms: Terms, whole_ms: float
) -> tuple[tuple[Factor, ...], float, Callable[[Policy], float]]:
    """Factors of what a budget limits, the limit on their sum, and the cost of a policy as it really is."""
    graph, batch = bench.traced.graph, bench.spec.batch
    if budget.metric == "macs":
        factors = shape_terms(terms, lambda layer, weights, out, precision: float(weights * layer.positions))
        return factors, budget.limit_for(limits.macs), lambda policy: float(graph.macs(policy))
    if budget.metric == "size":
        own = float(
            stored_bytes(graph, bench.reference_policy)
        )  # scales and shapes of the file come on top, in proportion
        rate = limits.size_bytes / own

        def size(layer: Layer, weights: int, out: int, precision: Precision) -> float:
            return rate * (weights * precision.weight_bits / 8 + 4 * out)

        return shape_terms(terms, size), budget.limit_for(limits.size_bytes), lambda p: rate * stored_bytes(graph, p)
    limit = limits.ratio_of(budget)

    def relative(kernels: Sequence[Kernel]) -> list[float]:
        return [
            (predictor.scale * entry.ms + predictor.overhead_kernel_ms) / whole_ms
            for entry in predictor.kernels(kernels)
        ]

    def cost(policy: Policy) -> float:
        return predictor.engine(kernels_of(graph, policy, batch).values()).ms / whole_ms - constant

    constant = predictor.overhead_ms / whole_ms
    return layer_terms(terms, relative, batch), limit - constant, cost
