"""``autocomp export`` and ``verify``: from a finished run to files that people deploy."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autocomp.cli.flags import AsJson, Text
from autocomp.cli.output import NOTHING_VERIFIED, UNTRUE, print_found, print_json, quiet_stdout, watched
from autocomp.errors import InputError

if TYPE_CHECKING:
    from autocomp.outcome import Event

__all__ = ["add_shipping_commands"]


def add_shipping_commands(app: typer.Typer) -> None:
    """Register the commands of this file."""
    app.command()(export)
    app.command()(verify)


def export(
    run: Annotated[Path, typer.Argument(help="run folder")],
    to: Annotated[str, typer.Option(help="onnx, torch, policy and engine, with commas between")] = "onnx,torch,policy",
    out: Annotated[Path, typer.Option(help="folder for what is written")] = Path("exported"),
    json: AsJson = None,
) -> None:
    """Write a run's model as files to deploy, with a card: what it claims, and the digest of each file."""
    from autocomp import api
    from autocomp.outcome import Note

    told: list[Event] = []
    with quiet_stdout():
        card = api.export(run, [kind.strip() for kind in to.split(",") if kind.strip()], out, told.append)
    if json:
        print_json({**card.to_json(), "folder": str(out)})
    else:
        print(f"{out}: {', '.join(card.files)}, card.json")
        for event in told:
            if isinstance(event, Note):
                print(f"note: {event.text}")


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
    print_found(found, print_verification, as_json=as_json)
    sys.exit(0 if found.verdict.admitted else NOTHING_VERIFIED)


def _verify_exported(folder: Path, data: str | None, *, as_json: bool) -> None:
    from autocomp import api
    from autocomp.report import print_shipped

    with watched("nothing was written, start again", as_json=as_json) as observer:
        found = api.verify_shipped(folder, data, observer)
    print_found(found, print_shipped, as_json=as_json)
    sys.exit(0 if found.holds else UNTRUE)
