"""What a finished run is turned into: verified, fine-tuned, exported, rebuilt."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from autocomp.api.common import of_live_objects, refuse_filled, silent
from autocomp.api.searching import load_result
from autocomp.config import SearchConfig
from autocomp.errors import AutocompError, InputError, RunError
from autocomp.outcome import Observer
from autocomp.report import render_card, write_report
from autocomp.storage import storage_errors, write_atomic
from autocomp.study.artefacts import ShippedPolicy, refuse_other_inputs, write_model
from autocomp.study.card import Card, sha256
from autocomp.study.conduct import refuse_changes
from autocomp.study.executors import trainer
from autocomp.study.finetune import Finetuned, finetune_run
from autocomp.study.recheck import Verification, verify_run
from autocomp.study.run import Run, read_manifest
from autocomp.study.ship import export_run, write_card
from autocomp.study.shipped import ShippedVerification
from autocomp.study.shipped import verify_shipped as check_shipped
from autocomp.study.training import Course, recipe_of, training_images
from autocomp.study.workbench import prepare

__all__ = ["apply_policy", "export", "finetune", "verify", "verify_shipped"]


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
        found = verify_run(opened, result, observer or silent)
    if found.changed:
        write_report(found.result, run)
    return found


def finetune(
    run: Path,
    settings: Mapping[str, Any],
    observer: Observer | None = None,
    address: str | None = None,
    finalists: int | None = None,
) -> Finetuned:
    """Train the best models of a finished run, and keep the one that trains best where the engine says it is better.

    Args:
        settings: fields of `autocomp.train.TrainingRecipe`; without ``flip`` digits are not mirrored, all else is.
        address: of another Ray cluster than the run's.
        finalists: policies that are trained until it is clear which deserves all epochs; None for the run's own number.

    Raises:
        InputError: the run is not finished or of live objects, something it depends on has changed, or there are no
            training images.
        CompressError: training diverged; the run is as it was.
    """
    watch = observer or silent
    result, manifest = load_result(run), read_manifest(run)
    config = SearchConfig.from_json(manifest.config)
    config = replace(config, out=str(run), address=address or config.address)
    if of_live_objects(config):
        raise RunError(f"{run} was started from live objects: name model and data, and search again")
    if finalists is not None:
        config = replace(config, finetune_finalists=finalists)
    recipe = recipe_of(config, settings)
    train = trainer(config)
    with Run.open(run) as opened:
        bench = prepare(config, watch)
        refuse_changes(opened, bench)
        with storage_errors(run):
            course = Course(bench, training_images(bench.splits), recipe, watch, run, train)
            found = finetune_run(course, opened, result, config.finetune_finalists)
    if found.replaced or found.contest is not None:
        write_report(found.result, run)
    return found


def export(run: Path, kinds: Sequence[str], out: Path, observer: Observer | None = None) -> Card:
    """Write a finished run's model into a new folder as files to deploy, with a card of what they claim.

    Needs the run's folder alone; where its data is at hand the card also says how to prepare images.

    Args:
        kinds: ``onnx`` (the measured file and the uncompressed one), ``torch`` (an ``ExportedProgram`` that computes
            the same, and float weights), ``policy`` (with calibration scales), ``engine`` (of TensorRT; other engines
            read the ONNX, which a note then says).

    Raises:
        InputError: the run is not finished or not whole, a kind is unknown, or ``out`` is taken.
    """
    result = load_result(run)
    refuse_filled(out)
    with storage_errors(out):
        card = export_run(run, read_manifest(run), result, kinds, out, observer or silent)
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
    return check_shipped(folder, data, observer or silent)


def apply_policy(policy: Path, config: SearchConfig, out: Path) -> Path:
    """Rebuild a compressed model from its policy, the original weights and the calibration data.

    Writes ``model.onnx``, ``weights.safetensors`` and ``policy.json`` into ``out``. With the weights, data and engine
    numerics named in a run's ``policy.json`` the ONNX is the run's, bit for bit.

    Raises:
        InputError: the policy does not fit the model, or weights or data are not those it was made with.
    """
    shipped = ShippedPolicy.read(policy)
    refuse_filled(out)
    if shipped.settings:
        config = SearchConfig.from_json({**config.to_json(), **shipped.settings})
    if shipped.training is not None:
        raise InputError(f"{policy} is of a fine-tuned model, which only training makes: copy its model.onnx instead")
    bench = prepare(config, silent, recipe=shipped.recipe if shipped.digests else None)
    refuse_other_inputs(shipped, policy, bench)
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
