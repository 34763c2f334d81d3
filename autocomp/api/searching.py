"""Searches: begun, gone on with, over a front of budgets, for another engine."""

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from datetime import datetime
from os import PathLike
from pathlib import Path
from typing import Any

from autocomp.api.common import LIVE, of_live_objects, silent
from autocomp.config import SearchConfig, default_folder, load_config
from autocomp.data import Splits, splits_from_objects
from autocomp.errors import CompressError, ConfigError, DataError, EngineError, InfeasibleError, RunError
from autocomp.models import LoadedModel, wrap_model
from autocomp.outcome import Note, Observer, SearchResult
from autocomp.report import write_front_report, write_report
from autocomp.results import TrialResult
from autocomp.storage import storage_errors
from autocomp.study.conduct import Interrupted, conduct, manifest_of, refuse_changes
from autocomp.study.executors import hire, trainer
from autocomp.study.finetune import finetune_run
from autocomp.study.front import Front, FrontPoint, front_configs, hand_on, refuse_other_settings, write_front
from autocomp.study.heritage import heritage_of
from autocomp.study.loading import data_options
from autocomp.study.predicted import retargeted
from autocomp.study.replacement import FINETUNED, go_on, was_stopped
from autocomp.study.run import Run, read_manifest, refuse_taken
from autocomp.study.search import Prologue, begin
from autocomp.study.study import journaled_trials
from autocomp.study.training import Course, recipe_of, training_images
from autocomp.study.workbench import Workbench, package_versions, prepare
from autocomp.train import Trainer

__all__ = ["load_result", "resume", "retarget", "run_front", "run_search", "search"]


def search(
    model: Any = None,
    data: Any = None,
    budget: str | Sequence[str] = "15ms",
    *,
    observer: Observer | None = None,
    **settings: Any,
) -> SearchResult:
    """Find the most accurate compressed model whose engine, measured here, meets the budget.

    Args:
        model: an ``nn.Module`` with trained weights, or a spec as in ``--model``. Comes back unchanged.
        data: a `Splits`, a (train, test) pair of datasets or loaders of (image, label), or a spec as in ``--data``.
        budget: one budget or several, all of which must hold.
        observer: told of every event; None for silence.
        settings: fields of `SearchConfig`.

    Returns:
        The object behind the closing table; its folder holds the files.

    Raises:
        InputError: something given does not fit; the message says what to change.
        InfeasibleError: no engine in the space meets the budget.
    """
    flags: dict[str, object] = dict(settings)
    flags["budget"] = tuple(budget) if isinstance(budget, list | tuple) else budget
    flags.update({name: str(value) for name, value in settings.items() if isinstance(value, PathLike)})
    live_data = not (isinstance(data, str) or data is None)
    flags["data"] = LIVE + type(data).__name__ if live_data else data
    given = isinstance(model, str) or model is None
    flags["model"] = model if given else LIVE + type(model).__name__
    config = load_config(None, flags)
    live_model = None if given else wrap_model(model, output_key=config.output_key)
    splits = splits_from_objects(data, data_options(config)) if live_data else None
    return run_search(config, observer, live_model, splits)


def run_search(
    config: SearchConfig,
    observer: Observer | None = None,
    model: LoadedModel | None = None,
    splits: Splits | None = None,
) -> SearchResult:
    """Run a configured search from the beginning.

    Raises:
        InputError, InfeasibleError: as `search`.
        Interrupted: the user stopped it.
    """
    if config.front:
        raise ConfigError("a front is several searches: call run_front, or leave front out")
    watch = observer or silent
    folder = Path(config.out) if config.out is not None else default_folder(config, datetime.now())
    refuse_taken(folder)
    with closing(hire(config)) as crew:
        bench = prepare(config, watch, model, splits)
        with begin(bench, crew) as prologue, Run.create(folder, manifest_of(bench)) as run:
            try:
                return _conduct(bench, prologue, run, watch)
            except Interrupted:
                if not of_live_objects(config):
                    raise
                how = "autocomp.search on a new folder, as live objects cannot be read again; {run} keeps its trials"
                raise Interrupted(folder, how) from None


def run_front(config: SearchConfig, observer: Observer | None = None) -> Front:
    """Run one search a budget of a front, from the tightest to the loosest, with one model, reference and statistics.

    Called again with the same ``out`` it goes on where it stopped. A budget out of reach is a point without a result.

    Raises:
        InputError: as `search`; or the folder holds runs of other settings.
        Interrupted: the user stopped it.
    """
    watch = observer or silent
    folder = Path(config.out) if config.out is not None else default_folder(config, datetime.now())
    configs = front_configs(config, folder)
    refuse_other_settings(configs)
    points: list[FrontPoint] = []
    earlier: list[TrialResult] = []
    with ExitStack() as stack:
        crew = stack.enter_context(closing(hire(configs[0])))
        bench = prepare(configs[0], watch)
        prologue = stack.enter_context(begin(bench, crew))
        for before, own in zip((None, *configs), configs, strict=False):
            watch(Note(f"budget {' and '.join(own.budget)}"))
            try:
                shared = Path(str(before.out)) if before is not None else None
                result = _front_run(replace(bench, config=own), prologue, earlier, shared, watch)
                points.append(FrontPoint(own.budget[0], result))
            except InfeasibleError as error:
                points.append(FrontPoint(own.budget[0], None, str(error)))
            except Interrupted:
                raise Interrupted(folder, "the same command with --out {run}") from None
            entries = Run.entries_of(Path(str(own.out)))
            earlier += [TrialResult.from_json(entry["result"]) for entry in entries if entry["kind"] == "trial"]
    front = Front(tuple(points), folder)
    write_front(front)
    write_front_report(front)
    return front


def _front_run(
    bench: Workbench, prologue: Prologue, earlier: Sequence[TrialResult], before: Path | None, observer: Observer
) -> SearchResult:
    """One budget of a front: from the beginning, from where it stopped, or what it ended with.

    Args:
        earlier: trials of the budgets before.
        before: folder of the last of these.

    Raises:
        RunError: the folder holds a run of other inputs.
    """
    folder = Path(str(bench.config.out))
    if not (folder / "manifest.json").exists():
        with Run.create(folder, manifest_of(bench)) as run:
            if before is not None:
                hand_on(before, folder)
            return _conduct(bench, prologue, run, observer, earlier)
    finished = load_result(folder) if (folder / "result.json").exists() else None
    if finished is not None and not _training_due(bench.config, finished):
        return finished
    with Run.open(folder) as run:
        refuse_changes(run, bench)
        if finished is not None:
            return _trained(bench, run, finished, observer, prologue.crew.trainer())
        run.set_status("running")
        return _conduct(bench, prologue, run, observer, earlier)


def resume(run: Path, observer: Observer | None = None, address: str | None = None) -> SearchResult:
    """Go on with a run after any kind of stop; no finished trial is evaluated again.

    Args:
        address: of another Ray cluster than the run began on.

    Raises:
        RunError: the folder is no run, is in use, is damaged, or something it depends on has changed.
    """
    manifest = read_manifest(run)
    if manifest.version != package_versions().get("autocomp", "unknown"):
        raise RunError(f"{run} was written by autocomp {manifest.version}: go on with that version")
    config, finished = SearchConfig.from_json(manifest.config), None
    if manifest.status in ("verified", "unverified"):
        with suppress(RunError):  # without a whole result, it is made again from the journal
            finished = load_result(run)
    if finished is not None and not _training_due(config, finished):
        return finished
    config = replace(config, out=str(run), address=address or config.address)
    if of_live_objects(config):
        raise RunError(f"{run} was started from live objects: call autocomp.search(..., out=...) on a new folder")
    watch = observer or silent
    with Run.open(run) as opened, ExitStack() as stack:
        try:
            if finished is not None:
                train, bench = trainer(config), prepare(config, watch)
                refuse_changes(opened, bench)
                return _trained(bench, opened, finished, watch, train)
            crew = stack.enter_context(closing(hire(config)))
            bench = prepare(config, watch)
            refuse_changes(opened, bench)
            prologue = stack.enter_context(begin(bench, crew))
        except KeyboardInterrupt:
            raise Interrupted(run) from None
        opened.set_status("running")
        return _conduct(bench, prologue, opened, watch)


def load_result(run: Path) -> SearchResult:
    """The result of a finished run; where a trained model was just being put in place, that is ended first.

    Raises:
        RunError: the folder is no run, or the run has not finished.
    """
    if was_stopped(run):
        with Run.open(run) as opened:
            replaced = go_on(opened)
        if replaced:
            write_report(load_result(run), run)
    manifest = read_manifest(run)
    try:
        data = json.loads((run / "result.json").read_text())
        return SearchResult.from_json({**data, "run": str(run)}, tuple(journaled_trials(Run.entries_of(run))))
    except FileNotFoundError:
        raise RunError(f"{run} has no result ({manifest.status}): go on with 'autocomp resume {run}'") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(
            f"{run / 'result.json'} is damaged or of another version ({error!r}): make it again with "
            f"'autocomp resume {run}'"
        ) from error


def retarget(
    run: Path, settings: Mapping[str, Any], observer: Observer | None = None, out: Path | None = None
) -> SearchResult:
    """A new run for another engine or device, with the policies of an old one.

    Scores are taken over where all that they depend on is what it was, the engine's numerics among it; else the
    policies are scored again. Latency is measured, or predicted, and finalists are verified anew.

    Args:
        run: the old one.
        settings: fields of `SearchConfig` that differ: ``engine``, ``hardware``, ``threads``, ``budget``. With a
            measured profile as hardware engine and threads are the profile's.
        out: folder of the new run; None for one under ``runs``.

    Raises:
        InputError: the folder is no run or of live objects, or nothing is to change; also as `search`.
        InfeasibleError: as `search`.
    """
    watch = observer or silent
    manifest = read_manifest(run)
    old = SearchConfig.from_json(manifest.config)
    if of_live_objects(old):
        raise RunError(f"{run} was started from live objects: call autocomp.search with another engine")
    given = {name: value for name, value in settings.items() if value not in (None, ())}
    config = retargeted(old, given)
    folder = out if out is not None else default_folder(config, datetime.now())
    config = replace(config, out=str(folder))
    refuse_taken(folder)
    with closing(hire(config)) as crew:
        bench = prepare(config, watch)
        heritage = heritage_of(run, bench, watch)
        with begin(bench, crew) as prologue, Run.create(folder, manifest_of(bench)) as opened:
            heritage.write(folder)
            return _conduct(bench, prologue, opened, watch)


def _conduct(
    bench: Workbench, prologue: Prologue, run: Run, observer: Observer, earlier: Sequence[TrialResult] = ()
) -> SearchResult:
    result = conduct(bench, prologue, run, observer, earlier)
    try:
        write_report(result, run.folder)
    except KeyboardInterrupt:
        raise Interrupted(run.folder, "autocomp report {run}") from None
    if not _training_due(bench.config, result):
        return result
    return _trained(bench, run, result, observer, prologue.crew.trainer())


def _training_due(config: SearchConfig, result: SearchResult) -> bool:
    """The configuration asks for fine-tuning, and none has ended in the run's folder."""
    if config.resolved_finetune_epochs() == 0 or result.best is None:
        return False
    return not any(entry["kind"] == FINETUNED for entry in Run.entries_of(result.run))


def _trained(bench: Workbench, run: Run, result: SearchResult, observer: Observer, train: Trainer) -> SearchResult:
    """A finished search's result after the fine-tuning that its configuration asks for."""
    config = bench.config
    recipe = recipe_of(config, {"epochs": config.resolved_finetune_epochs()})
    try:
        with storage_errors(run.folder):
            course = Course(bench, training_images(bench.splits), recipe, observer, run.folder, train)
            found = finetune_run(course, run, result, config.finetune_finalists)
        write_report(found.result, run.folder)
    except (CompressError, DataError) as error:
        run.record(FINETUNED, recipe=recipe.to_json(), reason=str(error))
        observer(Note(f"not fine-tuned: {error}"))
        return result
    except EngineError as error:  # may pass: it is not journaled as the training's end, so that resume tries again
        observer(Note(f"not fine-tuned: {error}; 'autocomp resume {run.folder}' tries again"))
        return result
    except KeyboardInterrupt:
        raise Interrupted(run.folder) from None
    return found.result
