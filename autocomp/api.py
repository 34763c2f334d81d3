"""What a program calls; the command line calls the same functions."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from os import PathLike
from pathlib import Path
from typing import Any

from autocomp.config import SearchConfig, default_folder, load_config
from autocomp.data import Splits, splits_from_objects
from autocomp.engines import BackendSpec, compare, device_lock, estimate, make_backend, open_engine
from autocomp.errors import AutocompError, EngineError, InfeasibleError, InputError, RunError
from autocomp.models import LoadedModel, wrap_model
from autocomp.outcome import Event, Note, Observer, SearchResult
from autocomp.report import render_card, write_report, write_sensitivity
from autocomp.results import LatencyEstimate, TrialResult
from autocomp.storage import storage_errors, write_atomic
from autocomp.study.artefacts import ShippedPolicy, write_model, write_table
from autocomp.study.build_profile import build_profile
from autocomp.study.card import Card, sha256
from autocomp.study.finetune import Finetuned, finetune_run, recipe_of
from autocomp.study.heritage import heritage_of
from autocomp.study.loading import data_options
from autocomp.study.predicted import retargeted
from autocomp.study.profiles import check_profile, predict_policy
from autocomp.study.recheck import Verification, verify_run
from autocomp.study.run import Run, read_manifest, refuse_changes, refuse_taken
from autocomp.study.search import Prologue, begin
from autocomp.study.search import search as run_study
from autocomp.study.sensitivity import Sensitivity
from autocomp.study.ship import export_run, write_card
from autocomp.study.shipped import ShippedVerification
from autocomp.study.shipped import verify_shipped as check_shipped
from autocomp.study.sweep import THOROUGH, obtain
from autocomp.study.verify import verification_protocol
from autocomp.study.workbench import Workbench, manifest_of, package_versions, prepare

__all__ = [
    "Interrupted",
    "apply_policy",
    "build_profile",
    "check_profile",
    "export",
    "finetune",
    "load_result",
    "measure",
    "predict_policy",
    "resume",
    "retarget",
    "run_search",
    "run_sensitivity",
    "search",
    "verify",
    "verify_shipped",
]

LIVE = "object:"
"""Marks a configuration whose model or data was a live object."""


class Interrupted(KeyboardInterrupt):
    """The user stopped a search; everything finished so far is kept in ``run``."""

    def __init__(self, run: Path) -> None:
        super().__init__(f"stopped; go on with: autocomp resume {run}")
        self.run = run


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
    flags["budget"] = (budget,) if isinstance(budget, str) else tuple(budget)
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
    watch = observer or _silent
    folder = Path(config.out) if config.out is not None else default_folder(config, datetime.now())
    refuse_taken(folder)
    bench = prepare(config, watch, model, splits)
    with begin(bench) as prologue, Run.create(folder, manifest_of(bench)) as run:
        return _conduct(bench, prologue, run, watch)


def resume(run: Path, observer: Observer | None = None) -> SearchResult:
    """Go on with a run after any kind of stop; no finished trial is evaluated again.

    Raises:
        RunError: the folder is no run, is in use, is damaged, or something it depends on has changed.
    """
    manifest = read_manifest(run)
    if manifest.version != package_versions().get("autocomp", "unknown"):
        raise RunError(f"{run} was written by autocomp {manifest.version}: go on with that version")
    if manifest.status in ("verified", "unverified") and (run / "result.json").exists():
        return load_result(run)
    config = SearchConfig.from_json(manifest.config)
    if config.model.startswith(LIVE) or config.data.startswith(LIVE):
        raise RunError(f"{run} was started from live objects: call autocomp.search(..., out=...) on a new folder")
    watch = observer or _silent
    with Run.open(run) as opened:
        try:
            bench = prepare(config, watch)
            refuse_changes(opened, bench.digests, bench.backend.device.to_json())
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
    except FileNotFoundError:
        raise RunError(f"{run} has no result ({manifest.status}): go on with 'autocomp resume {run}'") from None
    except ValueError as error:
        raise RunError(f"{run / 'result.json'} is damaged ({error}): run 'autocomp resume {run}' again") from error
    front = tuple(TrialResult.from_json(e["result"]) for e in Run.entries_of(run) if e["kind"] == "trial")
    return SearchResult.from_json({**data, "run": str(run)}, front)


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
    if old.model.startswith(LIVE) or old.data.startswith(LIVE):
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


def finetune(run: Path, settings: Mapping[str, Any], observer: Observer | None = None) -> Finetuned:
    """Train the best model of a finished run, and keep it there where the engine says that it is better.

    Args:
        settings: fields of `autocomp.train.TrainingRecipe`; without ``flip`` digits are not mirrored, all else is.

    Raises:
        InputError: the run is not finished or of live objects, something it depends on has changed, or there are no
            training images.
        CompressError: training diverged; the run is as it was.
    """
    watch = observer or _silent
    result, manifest = load_result(run), read_manifest(run)
    config = SearchConfig.from_json(manifest.config)
    if config.model.startswith(LIVE) or config.data.startswith(LIVE):
        raise RunError(f"{run} was started from live objects: name model and data, and search again")
    recipe = recipe_of(config, settings)
    with Run.open(run) as opened:
        bench = prepare(config, watch)
        refuse_changes(opened, bench.digests, bench.backend.device.to_json())
        with storage_errors(run):
            found = finetune_run(bench, opened, result, recipe, watch)
    if found.replaced:
        write_report(found.result, run)
    return found


def export(run: Path, kinds: Sequence[str], out: Path) -> Card:
    """Write a finished run's model into a new folder as files to deploy, with a card of what they claim.

    Needs the run's folder alone; where its data is at hand the card also says how to prepare images.

    Args:
        kinds: ``onnx`` (the measured file and the uncompressed one), ``torch`` (an ``ExportedProgram`` that computes
            the same, and float weights), ``policy`` (with calibration scales), ``engine`` (of TensorRT).

    Raises:
        InputError: the run is not finished or not whole, a kind is unknown, or ``out`` is taken.
    """
    result = load_result(run)
    _refuse_filled(out)
    with storage_errors(out):
        card = export_run(run, read_manifest(run), result, kinds, out)
        text = render_card(card)
        write_atomic(out / "card.md", text)
        card = replace(card, files={**card.files, "card.md": sha256(text.encode())})
        write_card(card, out)
    return card


def verify_shipped(folder: Path, data: str | None = None, observer: Observer | None = None) -> ShippedVerification:
    """Measure and score what `export` wrote again, and say which claims of its card no longer hold.

    Args:
        data: where the card's data lies now, as in ``--data``; None for where it lay.

    Raises:
        InputError: the folder was not shipped, its engine is not here or only estimates, or the data is not the card's.
    """
    return check_shipped(folder, data, observer or _silent)


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
    if shipped.training is not None:
        raise InputError(f"{policy} is of a fine-tuned model, which only training makes: copy its model.onnx instead")
    bench = prepare(config, _silent, recipe=shipped.recipe if shipped.digests else None)
    for name, digest in (shipped.digests or {}).items():
        if bench.digests.get(name) != digest:
            raise InputError(
                f"the {name} differ from those the policy was made with: give the same --model, --weights and --data "
                f"(it names model {shipped.model}, data {shipped.data})"
            )
    bench.traced.graph.validate(shipped.policy)
    bench.backend.capabilities().validate(shipped.policy)
    out.mkdir(parents=True, exist_ok=True)
    written = write_model(bench, bench.emitter.finish(bench.traced.graph.normalise(shipped.policy)), out)
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


def _conduct(bench: Workbench, prologue: Prologue, run: Run, observer: Observer) -> SearchResult:
    """Search and leave the run in a state that says how it ended."""
    try:
        with storage_errors(run.folder):
            result = run_study(bench, prologue, run, observer)
    except KeyboardInterrupt:
        run.set_status("interrupted")
        raise Interrupted(run.folder) from None
    except InfeasibleError:
        write_table(run, [TrialResult.from_json(entry["result"]) for entry in run.entries("trial")])
        run.set_status("infeasible")
        raise
    except Exception:
        run.set_status("failed")
        raise
    run.set_status("verified" if result.verified else "unverified")
    write_report(result, run.folder)
    return result


def _silent(event: Event) -> None:
    del event
