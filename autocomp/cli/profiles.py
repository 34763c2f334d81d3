"""``autocomp profile``: measure this device, and ask what a profile knows."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autocomp.cli.flags import (
    AsJson,
    Config,
    Data,
    Engine,
    Mean,
    Model,
    OutputKey,
    Seed,
    Size,
    Space,
    Std,
    Text,
    Threads,
    Weights,
    settings_of,
)
from autocomp.cli.flags import Batch as OneBatch
from autocomp.cli.output import INTERRUPTED, console, fail, print_found, print_json, quiet_stdout
from autocomp.errors import ConfigError

if TYPE_CHECKING:
    from autocomp.config import SearchConfig
    from autocomp.hardware import HardwareProfile

__all__ = ["profiles"]

profiles = typer.Typer(help="Hardware profiles: what was measured on a device.", no_args_is_help=True)

STALE = 3
"""Exit status of a check that failed."""

Name = Annotated[str, typer.Argument(help="name or folder")]
Profile = Annotated[Text, typer.Option(help="profile, by name or folder [this device's own]")]


@profiles.command("list")
def list_profiles(json: AsJson = None) -> None:
    """Name every hardware profile that is found: measured, described, stale, or of another device."""
    from autocomp.hardware import HardwareProfile
    from autocomp.report import profile_json
    from autocomp.resources import available
    from autocomp.study.profiles import standing

    rows, found = [], []
    for name, path in available("hardware_profiles").items():
        try:
            profile = HardwareProfile.load(path)
            state = standing(profile)
            text = {"foreign": "measured, of another device"}.get(state.kind, state.kind)
            counted = f"{len(profile.kernels)} kernels, {profile.date}" if profile.measured else profile.notes
            found.append({**profile_json(profile, state), "name": name, "folder": str(path)})
        except ConfigError as error:
            text, counted = "unreadable", str(error)
            found.append({"name": name, "folder": str(path), "standing": "unreadable", "error": str(error)})
        rows.append((name, text, f"{counted}  [{path}]"))
    if json:
        print_json(found)
        return
    width, wider = (max((len(row[place]) for row in rows), default=0) for place in (0, 1))
    for name, text, rest in rows:
        print(f"{name:<{width}}  {text:<{wider}}  {rest}")
    if not rows:
        print("no hardware profiles were found", file=sys.stderr)


@profiles.command("show")
def show_profile(name: Name, json: AsJson = None) -> None:
    """Print what is in a profile, and whether it still fits this machine."""
    from autocomp.report import print_profile, profile_json
    from autocomp.study.profiles import standing

    profile = _load(name)
    if json:
        print_json(profile_json(profile, standing(profile)))
    else:
        print_profile(profile, standing(profile), console(sys.stdout))


@profiles.command("diff")
def diff_profiles(
    old: Annotated[str, typer.Argument(help="name or folder")],
    new: Annotated[str, typer.Argument(help="name or folder")],
    json: AsJson = None,
) -> None:
    """Compare two profiles kernel by kernel; ratios are the second's over the first's."""
    from autocomp.hardware import difference
    from autocomp.report import print_difference

    found = difference(_load(old), _load(new))
    print_found(found, print_difference, as_json=bool(json))


@profiles.command()
def check(
    name: Annotated[Text, typer.Argument(help="name or folder [this device's own]")] = None,
    engine: Engine = None,
    threads: Threads = None,
    json: AsJson = None,
) -> None:
    """Time a profile's uncompressed engines again; where it is stale say how to build it, with exit status 3."""
    from autocomp.config import read_config

    flags = {"engine": engine, "threads": threads}
    settings = read_config(None, flags)
    from autocomp import api
    from autocomp.report import BuildScreen, print_checked
    from autocomp.study.profiles import find_profile

    profile = find_profile(name, settings)
    with quiet_stdout(), BuildScreen(console(sys.stderr)) as screen:
        found = api.check_profile(profile, settings, screen)
    if json:
        print_json({"device": profile.device, **found.to_json()})
    else:
        print_checked(profile, found, console(sys.stdout))
    if found.rebuild:
        raise typer.Exit(STALE)


@profiles.command()
def build(
    context: typer.Context,
    model: Model = None,
    weights: Weights = None,
    output_key: OutputKey = None,
    data: Data = None,
    like: Annotated[Text, typer.Option(help="measure the models and batches of this profile")] = None,
    engine: Engine = None,
    hardware: Annotated[Text, typer.Option(help="described device of the simulated engine")] = None,
    threads: Threads = None,
    batch: Annotated[Text, typer.Option(help="images a run, one or several as 1,8,32 [as search]")] = None,
    space: Space = None,
    seconds: Annotated[float, typer.Option(help="of measuring, divided between the batches")] = 600.0,
    mean: Mean = None,
    std: Std = None,
    size: Size = None,
    seed: Seed = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="measure all anew, whatever the profile holds")] = False,
    out: Annotated[Path | None, typer.Option(help="folder that profiles are kept in [the user's own]")] = None,
    config: Config = None,
    json: AsJson = None,
) -> None:
    """Measure the kernels that a model and a space can reach on this device, the most uncertain first."""
    from autocomp.config import read_config

    settings = read_config(config, settings_of(context, "like", "batch", "seconds", "fresh", "out", "json"))
    batches = _batches(batch)
    if like is not None and (model or weights or data):
        raise ConfigError("--like takes models and data from its profile: leave out --model, --weights and --data")
    from autocomp import api
    from autocomp.report import BuildScreen, print_profile
    from autocomp.study.build_profile import jobs_like, jobs_of
    from autocomp.study.profiles import standing

    jobs = jobs_of(settings, batches) if like is None else jobs_like(settings, _load(like), batches)
    try:
        with quiet_stdout(), BuildScreen(console(sys.stderr)) as screen:
            built = api.build_profile(jobs, seconds, out, screen, screen.progress, fresh=fresh)
    except KeyboardInterrupt:
        again = f"the same command{' without --fresh' * fresh} goes on from there"
        fail(f"interrupted: every engine measured so far is kept; {again}", INTERRUPTED)
    if json:
        print_json(built.to_json())
    else:
        print_profile(built.profile, standing(built.profile), console(sys.stdout))
        print(f"{built.engines} engines measured, {built.added} kernels added; profile: {built.folder}")


@profiles.command()
def lookup(
    context: typer.Context,
    op: Annotated[Text, typer.Option(help="conv, linear or entry")] = None,
    channels_in: Annotated[int | None, typer.Option("--in", help="channels read")] = None,
    channels_out: Annotated[int | None, typer.Option("--out", help="channels written")] = None,
    kernel: Annotated[str, typer.Option(help="as 3 or 3x3")] = "",
    stride: Annotated[str, typer.Option(help="as 2 or 2x2 [1]")] = "",
    groups: Annotated[int, typer.Option(help="of a conv")] = 1,
    size: Annotated[str, typer.Option(help="side of the conv's output, or of the images with --policy")] = "",
    batch: OneBatch = None,
    precision: Annotated[str, typer.Option(help="fp32, int8, ...")] = "fp32",
    around: Annotated[Text, typer.Option("--context", help="all or a part of a measured context")] = None,
    policy: Annotated[Path | None, typer.Option(help="policy.json: predict a whole policy")] = None,
    model: Model = None,
    weights: Weights = None,
    output_key: OutputKey = None,
    data: Data = None,
    mean: Mean = None,
    std: Std = None,
    hardware: Profile = None,
    engine: Engine = None,
    threads: Threads = None,
    config: Config = None,
    json: AsJson = None,
) -> None:
    """Say what a kernel takes, or with --policy a whole policy: in ms, with a 95 % interval, measured or not."""
    from autocomp.config import read_config

    names = ("model", "weights", "output_key", "data", "mean", "std", "engine", "threads", "batch")
    flags = {name: value for name, value in settings_of(context).items() if name in names}
    if policy is not None:
        if op is not None or around is not None:
            raise ConfigError("--policy asks for a whole model: leave out --op and --context")
        settings = read_config(config, {**flags, "size": _whole(size)})
        _lookup_policy(policy, settings, hardware, as_json=bool(json))
        return
    if op is None or channels_in is None or channels_out is None:
        raise ConfigError("give --op, --in and --out of a kernel, or --policy of a whole model")
    settings = read_config(config, flags)
    from autocomp.hardware import Predictor, Question, kernel_asked
    from autocomp.report import estimate_json, print_estimated

    profile = _own(hardware, settings)
    sizes = (kernel, stride, groups, size, settings.batch or 1)
    asked = kernel_asked(profile, Question(op, channels_in, channels_out, *sizes, precision, around))
    found = Predictor(profile).kernel(asked)
    if json:
        print_json(estimate_json(asked, found, profile))
    else:
        print_estimated(asked, found, console(sys.stdout), chosen=around is not None)


def _lookup_policy(policy: Path, settings: "SearchConfig", hardware: str | None, *, as_json: bool) -> None:
    from autocomp import api
    from autocomp.report import BuildScreen, print_policy
    from autocomp.study.artefacts import ShippedPolicy

    shipped = ShippedPolicy.read(policy)
    profile = _own(hardware, settings)
    with quiet_stdout(), BuildScreen(console(sys.stderr)) as screen:
        predicted = api.predict_policy(shipped.policy, settings, profile, screen)
    if as_json:
        print_json({"device": profile.device, **predicted.to_json()})
    else:
        print_policy(predicted, console(sys.stdout))


def _own(hardware: str | None, settings: "SearchConfig") -> "HardwareProfile":
    """The profile to ask, with a note where it is not, or no longer, this machine's."""
    from autocomp.study.profiles import find_profile, standing

    profile = find_profile(hardware, settings)
    found = standing(profile)
    if found.kind == "stale":
        print(
            f"note: the profile {profile.device} is stale ({'; '.join(found.differences)}): run '{found.rebuild}'",
            file=sys.stderr,
        )
    elif found.kind == "foreign":
        print(f"note: the profile {profile.device} is of another device than this one", file=sys.stderr)
    return profile


def _load(name: str) -> "HardwareProfile":
    from autocomp.hardware import HardwareProfile
    from autocomp.resources import find

    return HardwareProfile.load(find("hardware_profiles", name))


def _batches(text: str | None) -> tuple[int, ...]:
    try:
        return tuple(map(int, text.split(","))) if text is not None else ()
    except ValueError:
        raise ConfigError(f"--batch {text}: give whole numbers from 1, as in 1,8,32") from None


def _whole(text: str) -> int | None:
    try:
        return int(text) if text else None
    except ValueError:
        raise ConfigError(f"--size {text}: give the side of the images, as 224") from None
