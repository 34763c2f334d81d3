"""The whole of a search over a prepared workbench and an open run: reference, trials, baselines, finalists, test."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Self

from autocomp.budget import parse_budgets
from autocomp.controllers import make_controller
from autocomp.engines import compare, device_lock, estimate, initializer_bytes, structure_digest
from autocomp.errors import ConfigError, DataError, EngineError, ModelError
from autocomp.hardware import LatencyTable, Predictor
from autocomp.outcome import PREDICTED, Contender, Event, Note, Observer, Phase, SearchResult, layer_choices
from autocomp.policy import Policy
from autocomp.protocols import Controller, Engine
from autocomp.results import LatencyEstimate, TimingProtocol, TrialResult
from autocomp.study.artefacts import ship
from autocomp.study.executors import Crew, Kit
from autocomp.study.explain import effects_of, predictor_for, without_slow_types
from autocomp.study.finalists import Finalist
from autocomp.study.floor import probe_floor, refuse_if_none_feasible
from autocomp.study.front import best_of, scores_of
from autocomp.study.guidance import guidance
from autocomp.study.heritage import inherited_plans, read_heritage
from autocomp.study.predicted import PredictedBackend
from autocomp.study.run import Run
from autocomp.study.score import Predictions, Scorer, load_metric, paired_interval, predict
from autocomp.study.sensitivity import Sensitivity
from autocomp.study.starts import initial_policies, quick_sensitivity
from autocomp.study.study import FixedList, Plan, Study
from autocomp.study.training import training_images
from autocomp.study.trial import Limits, Trials
from autocomp.study.trust import gauge
from autocomp.study.undoing import Undoing
from autocomp.study.verify import (
    Verdict,
    reference_latency,
    statistics_of,
    verification_protocol,
    verify_roles,
)
from autocomp.study.workbench import Workbench, chance_limit

__all__ = ["Prologue", "begin", "search"]

WARM_STARTS = 24
"""Policies a controller is given to begin with, at most."""


@dataclass(frozen=True)
class Prologue:
    """The uncompressed engine, its outputs on the search split, and who is ready to work: before a folder is made."""

    reference: Engine
    scorer: Scorer
    crew: Crew

    @property
    def search(self) -> Predictions:
        return self.scorer.reference

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.reference.__exit__(None, None, None)


def begin(bench: Workbench, crew: Crew) -> Prologue:
    """Build the reference engine, score it on the search split, and give the crew what it needs.

    Raises:
        ConfigError: a worker cannot start, or the metric fails on the uncompressed model's outputs.
        ModelError: the model guesses: its accuracy is at chance level; or the engine fails on the uncompressed model.
    """
    try:
        reference = bench.backend.build(bench.reference)
        reference.time(1)  # an engine that cannot be timed here ends the search before there is a folder
        found = predict(reference, bench.splits.search)
    except EngineError as error:
        raise ModelError(f"the uncompressed model cannot be scored on {bench.splits.source}: {error}") from error
    limit = chance_limit(bench.splits.classes, len(found.labels))
    if bench.splits.labelled and found.accuracy <= limit:
        raise ModelError(
            f"the uncompressed model scores {100 * found.accuracy:.1f}% on {bench.splits.source}, which is chance "
            f"level (up to {100 * limit:.1f}%): check --weights, and --mean, --std and --size of the data; outputs "
            "that are no logits of classes need images without labels and a --metric"
        )
    scorer = Scorer(bench.splits.search, found, bench.splits.labelled, load_metric(bench.config.metric))
    try:
        scorer.of(found)
    except EngineError as error:
        raise ConfigError(f"{bench.config.metric} cannot score the uncompressed model: {error}") from error
    backend = None if bench.backend.measures else bench.backend
    kit = Kit(bench.emitter, bench.spec, backend, bench.reference, scorer, TimingProtocol())
    crew.equip(kit, bench.backend.device.to_json())
    return Prologue(reference, scorer, crew)


def search(
    bench: Workbench, prologue: Prologue, run: Run, observer: Observer, earlier: Sequence[TrialResult] = ()
) -> SearchResult:
    """Search, verify, and only then read the test split.

    Args:
        earlier: trials of the same workbench under other budgets; the best of them that keep these come first.

    Raises:
        InfeasibleError: no engine in the space meets the budget; the run is kept and marked.
        StudyError: too many trials failed in a row.
    """
    notes: list[str] = []

    def watch(event: Event) -> None:
        if isinstance(event, Note):
            notes.append(event.text)
        observer(event)

    def note(text: str) -> None:
        watch(Note(text))

    for text in (*bench.notes, *_data_notes(bench)):
        note(text)
    limits, reference = _limits(bench, prologue, run, observer)
    if limits.idle and limits.goal == "accuracy":
        note(
            "the uncompressed engine meets the budget already, and its outputs have no accuracy that a faster policy "
            "could be held to: give a tighter budget"
        )
    if limits.goal == "speed":
        note(
            "the uncompressed engine meets the budget already; searching for the fastest policy within "
            "1 point of its accuracy"
        )
    heritage = read_heritage(run.folder)
    trials = Trials(
        graph=bench.traced.graph,
        emitter=bench.emitter,
        backend=bench.backend,
        reference=prologue.reference,
        reference_structure=structure_digest(bench.reference),
        scorer=prologue.scorer,
        limits=limits,
        protocol=TimingProtocol(),
        cache=LatencyTable(run.folder / "latencies.jsonl"),
        folder=run.folder,
        observer=watch,
        scores=heritage.scores if heritage is not None else scores_of(earlier),
    )
    probe_floor(bench, trials, observer)
    executor = prologue.crew.executor(trials)
    study = Study(run, executor, observer)
    try:
        sensitivity = quick_sensitivity(bench, run, observer)
        if heritage is not None:
            predictor = predictor_for(bench, run.folder)
            plans = inherited_plans(heritage, bench.config.wave)
        else:
            first = best_of(earlier, limits)
            controller = _controller(bench, limits, prologue.reference, sensitivity, first, run, observer)
            predictor = predictor_for(bench, run.folder)  # from the profile that guides, where one was just measured
            plans = _plans(bench, _undoing(bench, controller, predictor))
        for plan in plans:
            study.explore(plan)
    finally:
        executor.close()
    refuse_if_none_feasible(study.results, trials.current())

    observer(Phase("selection"))
    held_out = bench.splits.selection
    selection = Scorer(held_out, predict(trials.reference, held_out), bench.splits.labelled, prologue.scorer.metric)
    winners = verify_roles(bench, trials, study, selection, run, observer)
    for role in ("search", "uniform", "random"):
        count = len(study.of(role))
        if count and ("best" if role == "search" else role) not in winners:
            note(f"{role}: none of its {count} trials held the budgets when timed again, so none is verified")
    trust = gauge(trials, study.results, selection, run, bench.config.seed, observer)
    run.record("choice", contenders={role: found.trial.policy.to_json() for role, (found, _) in winners.items()})
    tested = run.entries("test")
    if tested:  # read before a stop; it is not read again
        contenders = {role: Contender.from_json(role, row) for role, row in tested[0]["contenders"].items()}
    else:
        contenders = _contenders(bench, trials, study, selection, winners, reference, observer)
        run.record("test", contenders={role: row.to_json() for role, row in contenders.items()})
    best = contenders.get("best")
    if trust is not None:
        note(str(trust))
    results = sorted(study.results, key=lambda result: result.number)
    result = SearchResult(
        verified=best is not None and best.verified,
        budgets=limits.budgets,
        contenders=contenders,
        trials={role: len(study.of(role)) for role in ("search", "uniform", "random") if study.of(role)},
        front=tuple(results),
        seconds=run.seconds,
        run=run.folder,
        notes=tuple(dict.fromkeys(notes)),
        device=bench.backend.device.to_json(),
        predicted=not bench.backend.measures,
        layers=layer_choices(bench.traced.graph, best.policy) if best is not None else (),
        trust=trust,
        effects=effects_of(bench.traced.graph, best.policy, bench.spec.batch, sensitivity, predictor) if best else (),
    )
    ship(bench, run, result, results)
    return result


def _data_notes(bench: Workbench) -> Sequence[str]:
    notes = []
    if bench.splits.from_training:
        notes.append(
            "search and selection images come from the training images: their accuracy says nothing about new images"
        )
    if not bench.splits.labelled:
        notes.append("the data has no labels: accuracy is not reported, only divergence from the uncompressed model")
    if bench.config.resolved_finetune_epochs():
        try:
            training_images(bench.splits)
        except DataError as error:
            notes.append(str(error))
    if isinstance(bench.backend, PredictedBackend):
        notes.append(bench.backend.note)
    elif not bench.backend.measures:
        notes.append(f"{PREDICTED}estimates of a described device ({bench.backend.device.name}), nothing is verified")
    return notes


def _limits(bench: Workbench, prologue: Prologue, run: Run, observer: Observer) -> tuple[Limits, LatencyEstimate]:
    """What budgets are relative to: measured once, journaled, and read back when a run goes on."""
    observer(Phase("reference"))
    budgets = parse_budgets(bench.config.budget)
    known = run.entries("reference")
    if known:
        estimates = [LatencyEstimate.from_json(data) for data in known[0]["latency"]]
    else:
        protocol = verification_protocol(statistics_of(budgets), builds=1, blocks=20)
        with bench.backend.build(bench.reference) as twin, device_lock(bench.backend.device):
            timing = compare(twin, prologue.reference, protocol)
        names = dict.fromkeys((*statistics_of(budgets), "p50"))
        estimates = [estimate(timing, name) for name in names]
        run.record("reference", latency=[found.to_json() for found in estimates])
    latency_ms = {found.statistic: found.latency_ms.value for found in estimates}
    macs, size_bytes = bench.traced.graph.macs(Policy()), initializer_bytes(bench.reference)
    limits = Limits(budgets, latency_ms, macs, size_bytes)
    if limits.idle and prologue.scorer.classifies:
        accuracy = prologue.search.accuracy if bench.splits.labelled else 1.0
        limits = Limits(budgets, latency_ms, macs, size_bytes, "speed", accuracy)
    return limits, estimates[0]


def _controller(
    bench: Workbench,
    limits: Limits,
    reference: Engine,
    sensitivity: Sensitivity | None,
    first: Sequence[Policy],
    run: Run,
    observer: Observer,
) -> Controller:
    """The one that was asked for, with what is known before the first trial; evolution where that is too little."""
    config, name = bench.config, bench.config.controller
    if name == "guided":
        if sensitivity is not None:
            knowledge = guidance(bench, limits, reference, sensitivity, run.folder, observer)
            if knowledge is not None:
                return make_controller(name, bench.space, config.seed, tuple(first), knowledge)
        name = "evolution"
    initial = (*first, *initial_policies(bench, limits, sensitivity, observer, WARM_STARTS))
    return make_controller(name, bench.space, config.seed, initial)


def _undoing(bench: Workbench, controller: Controller, predictor: Predictor | None) -> Controller:
    """The controller, its last proposals without types that cost time, where a profile of the device tells."""
    if predictor is None:
        return controller
    config = bench.config
    undone = partial(without_slow_types, bench.space, batch=bench.spec.batch, predictor=predictor)
    return Undoing(controller, undone, config.trials, min(config.finalists, config.trials // 4))


def _plans(bench: Workbench, controller: Controller) -> Sequence[Plan]:
    """The search, then both baselines with as many evaluations."""
    config, space = bench.config, bench.space
    granted = config.resolved_baseline_trials()
    plans = [Plan("search", controller, config.trials, config.wave)]
    if granted:
        uniform = _spread(space.uniform(), granted)
        plans.append(Plan("uniform", FixedList(uniform), len(uniform), config.wave))
        plans.append(Plan("random", make_controller("random", space, config.seed + 1), granted, config.wave))
    return plans


def _spread(policies: Sequence[Policy], count: int) -> list[Policy]:
    """At most ``count`` of them, evenly from the least to the most compressed, both ends included."""
    if count >= len(policies):
        return list(policies)
    places = [round(index * (len(policies) - 1) / max(1, count - 1)) for index in range(count)]
    return [policies[place] for place in (places if count > 1 else [len(policies) - 1])]


def _contenders(
    bench: Workbench,
    trials: Trials,
    study: Study,
    selection: Scorer,
    winners: Mapping[str, tuple[Finalist, Verdict]],
    reference: LatencyEstimate,
    observer: Observer,
) -> dict[str, Contender]:
    """Read the test split, once, for every row of the closing table; one without labels has nothing to say."""
    observer(Phase("test", 1 + len(winners)))
    baseline = predict(trials.reference, bench.splits.test) if bench.splits.labelled else None
    best = winners.get("best")
    if best is not None:
        reference = reference_latency(best[1].latency)
    search = held_out = test = None
    if baseline is not None:
        search, held_out, test = trials.scorer.reference.accuracy, selection.reference.accuracy, baseline.accuracy
    limits = trials.limits
    rows = {
        "reference": Contender(
            "reference",
            bench.reference_policy,
            reference,
            search,
            held_out,
            test,
            None,
            limits.macs,
            limits.size_bytes,
            False,
            0,
        )
    }
    for role, (finalist, verdict) in winners.items():
        trial = finalist.trial
        accuracy = change = None
        if baseline is not None:
            with bench.backend.build(trials.emitter.emit(trials.emitter.finish(trial.policy))) as engine:
                found = predict(engine, bench.splits.test)
            accuracy, change = found.accuracy, paired_interval(found, baseline)
        rows[role] = Contender(
            role, trial.policy, verdict.latency, trial.score.accuracy if trial.score else None,
            finalist.selection.accuracy, accuracy, change, trial.macs or 0, verdict.size_bytes,
            verdict.admitted and bench.backend.measures, len(study.of(trial.role)), verdict.reason,
        )  # fmt: skip
    return rows
