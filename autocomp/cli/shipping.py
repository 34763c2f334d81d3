"""``autocomp finetune``, ``export`` and ``verify``: from a finished run to files that people deploy."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from autocomp.cli.flags import Address, AsJson, Text
from autocomp.cli.output import NOTHING_VERIFIED, UNTRUE, console, print_json, quiet_stdout, watched
from autocomp.errors import InputError

__all__ = ["add_shipping_commands"]


def add_shipping_commands(app: typer.Typer) -> None:
    """Register the commands of this file."""
    app.command()(finetune)
    app.command()(export)
    app.command()(verify)


def finetune(
    context: typer.Context,
    run: Annotated[Path, typer.Argument(help="run folder")],
    epochs: Annotated[int | None, typer.Option(help="over the training images [5]")] = None,
    lr: Annotated[float | None, typer.Option(help="the highest learning rate [0.01]")] = None,
    optimizer: Annotated[Text, typer.Option(help="sgd or adamw [sgd]")] = None,
    schedule: Annotated[Text, typer.Option(help="cosine or one_cycle [cosine]")] = None,
    distillation: Annotated[float | None, typer.Option(help="weight of the uncompressed model's say [0.9]")] = None,
    quantization: Annotated[Text, typer.Option(help="learned (train int8 as int8) or calibrated [learned]")] = None,
    crop: Annotated[int | None, typer.Option(help="pixels that images are shifted by, at most [4]")] = None,
    flip: Annotated[float | None, typer.Option(help="probability of mirroring [0.5; 0 for digits]")] = None,
    finalists: Annotated[int | None, typer.Option(min=1, help="policies that begin; one goes on [3]")] = None,
    address: Address = None,
    json: AsJson = None,
) -> None:
    """Train a run's best models, quantize them again, and keep the one that trains best where the engine says that it
    is better.

    Images that the search scored with are never trained on. Stopped, the same command goes on.
    """
    others = ("run", "finalists", "address", "json")
    given = {name: value for name, value in context.params.items() if name not in others and value is not None}
    from autocomp import api
    from autocomp.report import print_finetuned

    with watched("the run is as it was, and the same command goes on", as_json=bool(json)) as observer:
        found = api.finetune(run, given, observer, address, finalists)
    if json:
        print_json(found.to_json())
    else:
        print_finetuned(found, console(sys.stdout))


def export(
    run: Annotated[Path, typer.Argument(help="run folder")],
    to: Annotated[str, typer.Option(help="onnx, torch, policy and engine, with commas between")] = "onnx,torch,policy",
    out: Annotated[Path, typer.Option(help="folder for what is written")] = Path("exported"),
    json: AsJson = None,
) -> None:
    """Write a run's model as files to deploy, with a card: what it claims, and the digest of each file."""
    from autocomp import api

    with quiet_stdout():
        card = api.export(run, [kind.strip() for kind in to.split(",") if kind.strip()], out)
    if json:
        print_json({**card.to_json(), "folder": str(out)})
    else:
        print(f"{out}: {', '.join(card.files)}, card.json")


def verify(
    path: Annotated[Path, typer.Argument(help="run folder, or a folder that was exported")],
    data: Annotated[Text, typer.Option(help="of an exported folder: where its data lies now")] = None,
    json: AsJson = None,
) -> None:
    """Measure what was shipped again on this device, on fresh engines in fresh processes, and judge its budgets.

    Of an exported folder the digests and the accuracy too; exit status 1 then says that its card is not true here.
    """
    from autocomp.study.card import CARD

    if (path / CARD).is_file():
        _verify_exported(path, data, as_json=bool(json))
    elif data is not None:
        raise InputError("--data is for exported folders: leave it out, a run is verified without data")
    else:
        _verify_run(path, as_json=bool(json))


def _verify_run(run: Path, *, as_json: bool) -> None:
    from autocomp import api
    from autocomp.report import print_verification

    with watched("the run is as it was, start again", as_json=as_json) as observer:
        found = api.verify(run, observer)
    if as_json:
        print_json(found.to_json())
    else:
        print_verification(found, console(sys.stdout))
    sys.exit(0 if found.verdict.admitted else NOTHING_VERIFIED)


def _verify_exported(folder: Path, data: str | None, *, as_json: bool) -> None:
    from autocomp import api
    from autocomp.report import print_shipped

    with watched("nothing was written, start again", as_json=as_json) as observer:
        found = api.verify_shipped(folder, data, observer)
    if as_json:
        print_json(found.to_json())
    else:
        print_shipped(found, console(sys.stdout))
    sys.exit(0 if found.holds else UNTRUE)
