"""The commands. Heavy imports wait inside them, so that ``--help`` and bad input answer at once."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn, TypeVar

import typer

from autocomp.cli.engines import add_engine_commands
from autocomp.cli.flags import (
    Address,
    AsJson,
    Batch,
    Budgets,
    CalibrationImages,
    Config,
    Data,
    Engine,
    Exclude,
    Hardware,
    Include,
    Mean,
    Model,
    OutputKey,
    Reference,
    Seed,
    Size,
    Space,
    Std,
    Text,
    Threads,
    Weights,
    Whole,
    settings_of,
)
from autocomp.cli.output import INTERRUPTED, NOTHING_VERIFIED, console, fail, print_json, quiet_stdout
from autocomp.cli.profiles import profiles
from autocomp.cli.shipping import add_shipping_commands
from autocomp.cli.spaces import spaces
from autocomp.cli.training import add_training_commands
from autocomp.errors import AutocompError, InfeasibleError, InputError

if TYPE_CHECKING:
    from rich.console import Console

    from autocomp.outcome import Observer, SearchResult
    from autocomp.study.front import Front

Found = TypeVar("Found", "SearchResult", "Front")

__all__ = ["app", "main"]

BAD_INPUT = 2
OLDEST, NEWEST = (3, 11), (3, 13)

app = typer.Typer(
    name="autocomp",
    help="Compress a trained model until its real engine, measured on this device, meets a budget.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.add_typer(spaces, name="spaces")
app.add_typer(profiles, name="profile")
add_engine_commands(app)
add_shipping_commands(app)
add_training_commands(app)


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="print the version")] = False) -> None:
    """Runs before every command."""
    if version:
        from importlib.metadata import PackageNotFoundError
        from importlib.metadata import version as installed

        try:
            print(f"autocomp {installed('autocomp')}")
        except PackageNotFoundError:
            raise InputError("autocomp is not installed, so its version is unknown: run 'pip install .'") from None
        raise typer.Exit


@app.command()
def search(
    context: typer.Context,
    model: Model = None,
    weights: Weights = None,
    output_key: OutputKey = None,
    data: Data = None,
    budget: Budgets = None,
    engine: Engine = None,
    hardware: Hardware = None,
    reference: Reference = None,
    threads: Threads = None,
    batch: Batch = None,
    space: Space = None,
    exclude: Exclude = None,
    include: Include = None,
    controller: Annotated[
        Text, typer.Option(help="guided, evolution, tpe, nsga2, gp, cmaes, ddpg or random [guided]")
    ] = None,
    trials: Annotated[Whole, typer.Option(help="policies to evaluate [12]")] = None,
    baseline_trials: Annotated[Whole, typer.Option(help="policies for each baseline [as --trials]")] = None,
    seed: Seed = None,
    executor: Annotated[Text, typer.Option(help="where trials run: local or ray [local]")] = None,
    address: Address = None,
    workers: Annotated[Whole, typer.Option(help="Ray actors that score [as many as fit]")] = None,
    gpus_per_worker: Annotated[float | None, typer.Option(help="GPUs, or a fraction, for each of them [0]")] = None,
    target_resource: Annotated[Text, typer.Option(help="Ray resource of nodes that measure [this machine]")] = None,
    finetune_epochs: Annotated[
        Whole, typer.Option(help="epochs of training at the end [0; 5 in the default job]")
    ] = None,
    finetune_finalists: Annotated[Whole, typer.Option(help="policies that begin that training [3]")] = None,
    finalists: Annotated[Whole, typer.Option(help="policies that may be verified, at most [3]")] = None,
    wave: Annotated[Whole, typer.Option(help="policies asked for at once [4]")] = None,
    front: Annotated[
        bool | None, typer.Option("--front", help="one search a budget, from 0.25x to 0.9x, instead of --budget")
    ] = None,
    metric: Annotated[Text, typer.Option(help="kl or package.module:function [kl]")] = None,
    mean: Mean = None,
    std: Std = None,
    size: Size = None,
    calibration_images: CalibrationImages = None,
    search_images: Annotated[Whole, typer.Option(help="images that score each trial [2048]")] = None,
    selection_images: Annotated[Whole, typer.Option(help="images that choose the finalists' order [2048]")] = None,
    ranges: Annotated[Text, typer.Option(help="of int8 values: minmax, percentile, entropy or mse [minmax]")] = None,
    out: Annotated[Text, typer.Option(help="run folder [runs/TIME-MODEL-BUDGET]")] = None,
    config: Config = None,
    json: AsJson = None,
) -> None:
    """Find the most accurate compressed model within the budget, and verify it on fresh engines."""
    from autocomp.config import load_config

    settings = load_config(config, settings_of(context))

    from autocomp.report import print_front, print_result

    def work(observer: "Observer") -> "SearchResult":
        from autocomp import api

        return api.run_search(settings, observer)

    def every_budget(observer: "Observer") -> "Front":
        from autocomp import api

        return api.run_front(settings, observer)

    if settings.front:
        _conduct(every_budget, print_front, as_json=settings.json)
    _conduct(work, print_result, as_json=settings.json)


@app.command()
def resume(
    run: Annotated[Path, typer.Argument(help="run folder")],
    address: Address = None,
    json: AsJson = None,
) -> None:
    """Go on with a search that was stopped; no finished trial is lost."""
    from autocomp.report import print_result

    def work(observer: "Observer") -> "SearchResult":
        from autocomp import api

        return api.resume(run, observer, address)

    _conduct(work, print_result, as_json=bool(json))


@app.command()
def retarget(
    run: Annotated[Path, typer.Argument(help="run folder")],
    engine: Engine = None,
    hardware: Hardware = None,
    reference: Reference = None,
    threads: Threads = None,
    budget: Budgets = None,
    out: Annotated[Path | None, typer.Option(help="folder of the new run [runs/TIME-MODEL-BUDGET]")] = None,
    json: AsJson = None,
) -> None:
    """Make a new run for another engine or device from the policies of an old one; scores that still hold are kept."""
    from autocomp.report import print_result

    given = {"engine": engine, "hardware": hardware, "reference": reference, "threads": threads}
    settings = {**given, "budget": tuple(budget or ())}

    def work(observer: "Observer") -> "SearchResult":
        from autocomp import api

        return api.retarget(run, settings, observer, out)

    _conduct(work, print_result, as_json=bool(json))


@app.command()
def apply(
    context: typer.Context,
    policy: Annotated[Path, typer.Argument(help="policy.json of a run")],
    model: Model = None,
    weights: Weights = None,
    output_key: OutputKey = None,
    data: Data = None,
    engine: Engine = None,
    hardware: Hardware = None,
    threads: Threads = None,
    batch: Batch = None,
    mean: Mean = None,
    std: Std = None,
    size: Size = None,
    seed: Seed = None,
    calibration_images: CalibrationImages = None,
    out: Annotated[Path, typer.Option(help="folder for what is written")] = Path("applied"),
    config: Config = None,
) -> None:
    """Write model.onnx, weights.safetensors and policy.json again, from a policy and the original model and data."""
    from autocomp.config import read_config

    settings = read_config(config, settings_of(context, "policy", "out"))
    from autocomp import api

    with quiet_stdout():
        written = api.apply_policy(policy, settings, out)
    print(written)


@app.command()
def sensitivity(
    context: typer.Context,
    model: Annotated[Text, typer.Argument(help="zoo:NAME, torchvision:NAME or package.module:factory")] = None,
    weights: Weights = None,
    output_key: OutputKey = None,
    data: Data = None,
    engine: Engine = None,
    hardware: Hardware = None,
    threads: Threads = None,
    batch: Batch = None,
    space: Space = None,
    exclude: Exclude = None,
    include: Include = None,
    seed: Seed = None,
    mean: Mean = None,
    std: Std = None,
    size: Size = None,
    calibration_images: CalibrationImages = None,
    search_images: Annotated[Whole, typer.Option(help="images that divergences may be measured on [2048]")] = None,
    out: Annotated[Text, typer.Option(help="folder for what is written [runs/sensitivity-TIME-MODEL]")] = None,
    config: Config = None,
    json: AsJson = None,
) -> None:
    """Measure what each single choice of the space costs in accuracy and saves: a table, a CSV and a picture."""
    from autocomp.config import read_config

    settings = read_config(config, settings_of(context))
    from autocomp import api
    from autocomp.report import LiveScreen, print_sensitivity

    try:
        if settings.json:
            with quiet_stdout(), LiveScreen(console(sys.stderr)) as screen:
                found, folder = api.run_sensitivity(settings, screen)
            print_json({**found.to_json(), "folder": str(folder)})
        else:
            screen_and_table = console(sys.stdout)
            with LiveScreen(screen_and_table) as screen:
                found, folder = api.run_sensitivity(settings, screen)
            print_sensitivity(found, screen_and_table)
            print(f"folder: {folder}")
    except KeyboardInterrupt:
        fail("interrupted: nothing was kept, start again", INTERRUPTED)


@app.command()
def measure(
    file: Annotated[Path, typer.Argument(help="ONNX model")],
    reference: Annotated[Path | None, typer.Option(help="ONNX model to compare with, run by run")] = None,
    engine: Engine = None,
    hardware: Hardware = None,
    threads: Threads = None,
    batch: Batch = None,
    statistic: Annotated[str, typer.Option(help="p50, p95 or p99")] = "p50",
    json: AsJson = None,
) -> None:
    """Time an ONNX model on this device, with confidence bounds."""
    if statistic not in ("p50", "p95", "p99"):
        raise InputError(f"unknown statistic {statistic!r}: use p50, p95 or p99")
    from autocomp.config import SearchConfig

    given = {"engine": engine, "hardware": hardware, "threads": threads, "batch": batch}
    settings = SearchConfig(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
    from autocomp import api
    from autocomp.engines import BackendSpec, make_backend
    from autocomp.report import print_estimate

    spec = BackendSpec(
        name=settings.engine, batch=settings.batch or 1, threads=settings.threads, hardware=settings.hardware
    )
    with quiet_stdout():
        predicted = not make_backend(spec).measures
        estimate = api.measure(file, spec, reference, statistic)
    if json:
        asked = {"predicted": predicted, "batch": spec.batch, "threads": spec.threads}
        print_json({"copies": None, **estimate.to_json(), **asked})
    else:
        print_estimate(estimate, console(sys.stdout), predicted=predicted, compared=reference is not None)


@app.command()
def report(run: Annotated[Path, typer.Argument(help="run folder")]) -> None:
    """Write report.md and pareto.png of a finished run again, and print its table."""
    from autocomp import api
    from autocomp.report import print_result, write_report

    result = api.load_result(run)
    write_report(result, run)
    print_result(result, console(sys.stdout))


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and leave with its exit status.

    Args:
        arguments: without the program's name; None for the process's own.
    """
    found = sys.version_info[:2]
    if not OLDEST <= found <= NEWEST:
        fail(f"Python {found[0]}.{found[1]} is not supported: use Python 3.11, 3.12 or 3.13", BAD_INPUT)
    try:
        app(args=None if arguments is None else list(arguments), prog_name="autocomp")
    except InputError as error:
        fail(str(error), BAD_INPUT)
    except AutocompError as error:
        fail(str(error), NOTHING_VERIFIED)
    sys.exit(0)


def _conduct(
    work: Callable[["Observer"], Found], show: Callable[[Found, "Console"], None], *, as_json: bool
) -> NoReturn:
    """Show a search while it runs, print what it found, and exit with its status."""
    from autocomp.report import LiveScreen

    try:
        if as_json:
            with quiet_stdout(), LiveScreen(console(sys.stderr)) as screen:
                result = work(screen)
            print_json(result.to_json())
        else:
            screen_and_table = console(sys.stdout)
            with LiveScreen(screen_and_table) as screen:
                result = work(screen)
            show(result, screen_and_table)
    except AutocompError as error:
        if as_json and not isinstance(error, InputError):
            floor = error.floor if isinstance(error, InfeasibleError) else None
            print_json({"verified": False, "error": str(error), "floor": floor})
        raise
    except KeyboardInterrupt as error:
        # Raised again it would meet the parser's own handler, which knows nothing of the run folder.
        fail(str(error) or "interrupted before the run began: nothing was kept, start again", INTERRUPTED)
    sys.exit(0 if result.verified else NOTHING_VERIFIED)
