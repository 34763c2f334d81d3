"""What a program calls; the command line calls the same functions."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from os import PathLike
from pathlib import Path
from typing import Any

from autocomp.config import SearchConfig, default_folder, load_config
from autocomp.data import Splits, splits_from_objects
from autocomp.engines import BackendSpec, compare, device_lock, estimate, make_backend, open_engine
from autocomp.errors import AutocompError, ConfigError, EngineError, InfeasibleError, InputError, RunError
from autocomp.models import LoadedModel, wrap_model
from autocomp.outcome import Event, Note, Observer, SearchResult
from autocomp.report import write_front_report, write_report, write_sensitivity
from autocomp.results import LatencyEstimate, TrialResult
from autocomp.study.artefacts import ShippedPolicy, write_model
from autocomp.study.build_profile import build_profile
from autocomp.study.conduct import Interrupted, conduct, manifest_of, refuse_changes
from autocomp.study.front import Front, FrontPoint, front_configs, hand_on, refuse_other_settings, write_front
from autocomp.study.heritage import heritage_of
from autocomp.study.loading import data_options
from autocomp.study.predicted import retargeted
from autocomp.study.profiles import check_profile, predict_policy
from autocomp.study.recheck import Verification, verify_run
from autocomp.study.run import Run, read_manifest, refuse_taken, storage_errors
from autocomp.study.search import Prologue, begin
from autocomp.study.sensitivity import Sensitivity
from autocomp.study.sweep import THOROUGH, obtain
from autocomp.study.verify import verification_protocol
from autocomp.study.workbench import Workbench, package_versions, prepare

__all__ = [
    "Interrupted",
    "apply_policy",
    "build_profile",
    "check_profile",
    "load_result",
    "measure",
    "predict_policy",
    "resume",
    "retarget",
    "run_front",
    "run_search",
    "run_sensitivity",
    "search",
    "verify",
]

LIVE = "object:"
"""Marks a configuration whose model or data was a live object."""


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
    live_model = None
    if isinstance(model, str) or model is None:
        flags["model"] = model
    else:
        live_model = wrap_model(model)
        flags["model"] = LIVE + type(model).__name__
    config = load_config(None, flags)
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
    watch = observer or _silent
    folder = Path(config.out) if config.out is not None else default_folder(config, datetime.now())
    refuse_taken(folder)
    bench = prepare(config, watch, model, splits)
    with begin(bench) as prologue, Run.create(folder, manifest_of(bench)) as run:
        try:
            return _conduct(bench, prologue, run, watch)
        except Interrupted:
            if not _of_live_objects(config):
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
    watch = observer or _silent
    folder = Path(config.out) if config.out is not None else default_folder(config, datetime.now())
    configs = front_configs(config, folder)
    refuse_other_settings(configs)
    bench = prepare(configs[0], watch)
    points: list[FrontPoint] = []
    earlier: list[TrialResult] = []
    with begin(bench) as prologue:
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
    config = bench.config
    folder = Path(str(config.out))
    if not (folder / "manifest.json").exists():
        with Run.create(folder, manifest_of(bench)) as run:
            if before is not None:
                hand_on(before, folder)
            return _conduct(bench, prologue, run, observer, earlier)
    if (folder / "result.json").exists():
        return load_result(folder)
    with Run.open(folder) as run:
        refuse_changes(run, bench)
        run.set_status("running")
        return _conduct(bench, prologue, run, observer, earlier)


def resume(run: Path, observer: Observer | None = None) -> SearchResult:
    """Go on with a run after any kind of stop; no finished trial is evaluated again.

    Raises:
        RunError: the folder is no run, is in use, is damaged, or something it depends on has changed.
    """
    manifest = read_manifest(run)
    if manifest.version != package_versions().get("autocomp", "unknown"):
        raise RunError(f"{run} was written by autocomp {manifest.version}: go on with that version")
    if manifest.status in ("verified", "unverified"):
        with suppress(RunError):  # without a whole result, it is made again from the journal
            return load_result(run)
    config = SearchConfig.from_json(manifest.config)
    if _of_live_objects(config):
        raise RunError(f"{run} was started from live objects: call autocomp.search(..., out=...) on a new folder")
    watch = observer or _silent
    with Run.open(run) as opened:
        try:
            bench = prepare(config, watch)
            refuse_changes(opened, bench)
            prologue = begin(bench)
        except KeyboardInterrupt:
            raise Interrupted(run) from None
        opened.set_status("running")
        with prologue:
            return _conduct(bench, prologue, opened, watch)


def load_result(run: Path) -> SearchResult:
    """The result of a finished run.

    Raises:
        RunError: the folder is no run, or the run has not finished.
    """
    manifest = read_manifest(run)
    try:
        data = json.loads((run / "result.json").read_text())
        front = tuple(TrialResult.from_json(e["result"]) for e in Run.entries_of(run) if e["kind"] == "trial")
        return SearchResult.from_json({**data, "run": str(run)}, front)
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
    watch = observer or _silent
    manifest = read_manifest(run)
    old = SearchConfig.from_json(manifest.config)
    if _of_live_objects(old):
        raise RunError(f"{run} was started from live objects: call autocomp.search with another engine")
    given = {name: value for name, value in settings.items() if value not in (None, ())}
    config = retargeted(old, given)
    folder = out if out is not None else default_folder(config, datetime.now())
    config = replace(config, out=str(folder))
    refuse_taken(folder)
    bench = prepare(config, watch)
    heritage = heritage_of(run, bench, watch)
    with begin(bench) as prologue, Run.create(folder, manifest_of(bench)) as opened:
        heritage.write(folder)
        return _conduct(bench, prologue, opened, watch)


def verify(run: Path, observer: Observer | None = None) -> Verification:
    """Measure what a run shipped again, on fresh engines in fresh processes on this device, and judge its budgets.

    Needs the run's folder and its engine, neither model nor data. A run that was predicted for this device becomes a
    measured one, and its report is written anew.

    Raises:
        RunError: the folder is no finished run, or not whole.
        InputError: its engine is not here, or only estimates.
    """
    result = load_result(run)
    with Run.open(run) as opened:
        found = verify_run(opened, result, observer or _silent)
    if found.changed:
        write_report(found.result, run)
    return found


def apply_policy(policy: Path, config: SearchConfig, out: Path) -> Path:
    """Rebuild a compressed model from its policy, the original weights and the calibration data.

    Writes ``model.onnx``, ``weights.safetensors`` and ``policy.json`` into ``out``. With the weights, data and engine
    numerics named in a run's ``policy.json`` the ONNX is the run's, bit for bit.

    Raises:
        InputError: the policy does not fit the model, or weights or data are not those it was made with.
    """
    shipped = ShippedPolicy.read(policy)
    _refuse_filled(out)
    if shipped.settings:
        config = SearchConfig.from_json({**config.to_json(), **shipped.settings})
    bench = prepare(config, _silent, recipe=shipped.recipe if shipped.digests else None)
    for name, digest in (shipped.digests or {}).items():
        if bench.digests.get(name) != digest:
            raise InputError(
                f"the {name} differ from those the policy was made with: give the same --model, --weights and --data "
                f"(it names model {shipped.model}, data {shipped.data})"
            )
    bench.traced.graph.validate(shipped.policy)
    bench.backend.capabilities().validate(shipped.policy)
    compressed = bench.emitter.finish(bench.traced.graph.normalise(shipped.policy))
    with storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        written = write_model(bench, compressed, out)
    if shipped.onnx_sha256 not in (None, written.onnx_sha256):
        raise AutocompError(
            f"{out / 'model.onnx'} is not the file that was measured: torch or onnx differ from the run's; see the "
            "versions in its manifest.json"
        )
    return out


def run_sensitivity(config: SearchConfig, observer: Observer | None = None) -> tuple[Sensitivity, Path]:
    """Measure what every single choice of the space does to a model, or find it in the user's cache.

    Returns:
        what was measured, and the folder with ``sensitivity.csv``, ``sensitivity.json`` and ``sensitivity.png``.

    Raises:
        InputError: something given does not fit; the message says what to change.
    """
    watch = observer or _silent
    folder = Path(config.out) if config.out is not None else default_folder(config, datetime.now(), "sensitivity")
    _refuse_filled(folder)
    bench = prepare(config, watch)
    for text in bench.notes:
        watch(Note(text))
    if not bench.splits.labelled:
        watch(Note(f"{bench.splits.source} is no real data: what is found there says little about real images"))
    sensitivity = obtain(bench, THOROUGH, watch)
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_sensitivity(sensitivity, folder)
    return sensitivity, folder


def measure(onnx: Path, spec: BackendSpec, reference: Path | None = None, statistic: str = "p50") -> LatencyEstimate:
    """Time an ONNX file under the verification protocol, in this process.

    Args:
        reference: another file to interleave with and to give the ratio to; the file itself where None.

    Raises:
        InputError: a file is missing, or the runtime refuses it.
    """
    files = [onnx, reference or onnx]
    for path in files:
        if not path.is_file():
            raise InputError(f"no file {path}: give an ONNX model")
    backend = make_backend(spec)
    protocol = verification_protocol((statistic,), builds=1, blocks=30)
    try:
        engines = [open_engine(backend, path) for path in files]
    except EngineError as error:
        raise InputError(str(error)) from error
    with engines[0] as candidate, engines[1] as other:
        with device_lock(backend.device):
            timing = compare(candidate, other, protocol)
        return estimate(timing, statistic)


def _refuse_filled(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists already and is not empty: choose another --out")


def _conduct(
    bench: Workbench, prologue: Prologue, run: Run, observer: Observer, earlier: Sequence[TrialResult] = ()
) -> SearchResult:
    result = conduct(bench, prologue, run, observer, earlier)
    try:
        write_report(result, run.folder)
    except KeyboardInterrupt:
        raise Interrupted(run.folder, "autocomp report {run}") from None
    return result


def _of_live_objects(config: SearchConfig) -> bool:
    return config.model.startswith(LIVE) or config.data.startswith(LIVE)


def _silent(event: Event) -> None:
    del event
