"""What ``autocomp profile build`` does: surveys of models and batches, kept in a profile engine by engine."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from functools import partial
from math import isfinite
from pathlib import Path
from time import monotonic
from typing import Any

from autocomp import resources
from autocomp.capabilities import DeviceInfo
from autocomp.config import SearchConfig
from autocomp.engines import make_backend
from autocomp.errors import ConfigError, ModelError
from autocomp.hardware import HardwareProfile
from autocomp.outcome import Note, Observer, Phase
from autocomp.study.guidance import subject_of
from autocomp.study.profiling import PROTOCOL, Survey, survey
from autocomp.study.workbench import Workbench, backend_spec, prepare

__all__ = ["Built", "Job", "Progress", "build_profile", "jobs_like", "jobs_of"]

IMAGES = 64
"""Of each split: times do not depend on what the images show."""
MOST = 10**6
"""Engines: the time ends a build, or that nothing is uncertain any more."""


@dataclass(frozen=True, slots=True)
class Job:
    """One model, measured with several batches.

    Attributes:
        config: its model, data, engine, space and seed.
        batches: images a run, one survey each.
    """

    config: SearchConfig
    batches: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a build stands, after an engine.

    Attributes:
        model, batch: being measured.
        engines: measured by this build.
        kernels: in the profile.
        uncertainty: largest relative deviation of a candidate's prediction before the engine.
        elapsed_s, seconds: of measuring, so far and at most.
    """

    model: str
    batch: int
    engines: int
    kernels: int
    uncertainty: float
    elapsed_s: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Built:
    """What a build leaves.

    Attributes:
        profile: with all that was measured, earlier builds included.
        folder: it is kept in.
        engines: measured by this build.
        busy: of them, while other work slowed the device.
        added: kernels that were not in the profile before.
        seconds: of measuring.
        notes: lines the user should read.
    """

    profile: HardwareProfile
    folder: Path
    engines: int
    busy: int
    added: int
    seconds: float
    notes: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        return {
            "device": self.profile.device,
            "engine": self.profile.engine,
            "threads": self.profile.threads,
            "folder": str(self.folder),
            "engines_measured": self.engines,
            "busy": self.busy,
            "kernels_added": self.added,
            "kernels": len(self.profile.kernels),
            "engines": len(self.profile.engines),
            "seconds": self.seconds,
            "notes": list(self.notes),
        }


def jobs_of(config: SearchConfig, batches: Sequence[int]) -> tuple[Job, ...]:
    """The one job of a configuration; without batches, of the batch that a search would use.

    Raises:
        ConfigError: a batch is less than 1.
    """
    if any(batch < 1 for batch in batches):
        raise ConfigError(f"--batch {','.join(map(str, batches))}: give whole numbers from 1, as in 1,8,32")
    return (Job(config, tuple(dict.fromkeys(batches)) or (config.resolved_batch(),)),)


def jobs_like(config: SearchConfig, profile: HardwareProfile, batches: Sequence[int] = ()) -> tuple[Job, ...]:
    """What another profile was measured with, to be measured here.

    Models get random weights and noise of the recorded input shape: times are taken not to depend on values. The
    space is that of ``config``, which need not be the one that the other profile was built with. Engines of live
    objects, and those without a recorded shape, cannot be built again and are left out.

    Args:
        batches: in place of the profile's.

    Raises:
        ConfigError: the profile names no model that can be built here.
    """
    found: dict[tuple[str, str], list[int]] = {}
    for entry in profile.engines:
        if entry.data and not entry.model.startswith("object:"):
            found.setdefault((entry.model, entry.data), []).append(entry.batch)
    if not found:
        raise ConfigError(f"the profile {profile.device} names no model that can be built here: give --model instead")
    return tuple(
        replace(job, config=replace(config, model=model, data=data, weights=None, mean=None, std=None, size=None))
        for (model, data), own in found.items()
        for job in jobs_of(config, batches or sorted(set(own)))
    )


def build_profile(
    jobs: Sequence[Job],
    seconds: float,
    root: Path | None,
    observer: Observer,
    progress: Callable[[Progress], None],
    clock: Callable[[], float] = monotonic,
    *,
    fresh: bool = False,
) -> Built:
    """Measure the kernels of each job's model and space, the most uncertain first, for each batch in turn.

    What is left of the time is divided evenly between the batches to come, so that one that is done early leaves its
    rest to the others. The profile is saved after every engine: whatever stops a build, the next one goes on from it.

    Args:
        jobs: all for one engine and device.
        seconds: of measuring; loading and tracing come on top.
        root: the folder that profiles are kept in; None for the user's own.
        observer: told of phases and notes.
        progress: told after every engine.
        fresh: begin with an empty profile, whatever the folder holds.

    Raises:
        InputError: something does not fit, or the profile there cannot be read or written.
        EngineError: an engine cannot be built, or failed.
    """
    if not (isfinite(seconds) and seconds > 0):
        raise ConfigError(f"--seconds {seconds:g}: give more than 0")
    notes: list[str] = []

    def note(text: str) -> None:
        notes.append(text)
        observer(Note(text))

    backend = make_backend(backend_spec(jobs[0].config))
    device = backend.device
    empty = HardwareProfile.of(device, date.today(), str(PROTOCOL), backend.capabilities())
    profile = empty if fresh else _existing(empty, device, root, note)
    place = root if root is not None else resources.writable("hardware_profiles")
    known, spent, engines, busy = len(profile.kernels), 0.0, 0, 0
    left = sum(len(job.batches) for job in jobs)
    for job in jobs:
        small = replace(job.config, calibration_images=IMAGES, search_images=IMAGES, selection_images=IMAGES)
        bench = prepare(replace(small, batch=job.batches[0]), observer)
        for batch in job.batches:
            begun = clock()
            before = Progress(job.config.model, batch, engines, len(profile.kernels), 0.0, spent, seconds)
            step = partial(_keep, place, progress, before, begun, clock)
            share = max(seconds - spent, 0.0) / left
            observer(Phase("profile"))
            last = _surveyed(_with_batch(bench, batch), profile, share, step, clock)
            profile, engines, busy = last.profile, engines + last.engines, busy + last.busy
            spent, left = spent + clock() - begun, left - 1
    if busy:
        note(f"{busy} of {engines} engines were measured while the device was busy: build again when it is quiet")
    folder = profile.save(place)
    return Built(profile, folder, engines, busy, len(profile.kernels) - known, spent, tuple(notes))


def _keep(
    place: Path,
    progress: Callable[[Progress], None],
    before: Progress,
    begun: float,
    clock: Callable[[], float],
    found: Survey,
) -> None:
    """Save what a survey has found so far, and tell where the build stands since it began at ``before``."""
    found.profile.save(place)
    progress(
        replace(
            before,
            engines=before.engines + found.engines,
            kernels=len(found.profile.kernels),
            uncertainty=found.uncertainty,
            elapsed_s=before.elapsed_s + clock() - begun,
        )
    )


def _surveyed(
    bench: Workbench,
    profile: HardwareProfile,
    seconds: float,
    step: Callable[[Survey], None],
    clock: Callable[[], float],
) -> Survey:
    """One survey, from the uncompressed engine to its end.

    Raises:
        ModelError: the model's kernels cannot be told apart.
    """
    last = Survey(profile, 0, 0.0)

    def keep(found: Survey) -> None:
        nonlocal last
        last = found
        step(found)

    with bench.backend.build(bench.reference) as reference:
        subject = subject_of(bench, reference)
        if subject is None:
            raise ModelError(f"the kernels of {bench.config.model} cannot be told apart: {' '.join(bench.notes)}")
        survey(subject, profile, seconds, MOST, keep, bench.config.seed, clock)
    return last


def _with_batch(bench: Workbench, batch: int) -> Workbench:
    """The same workbench for another batch: graph, statistics and files do not depend on it."""
    config = replace(bench.config, batch=batch)
    spec = backend_spec(config)
    return replace(bench, config=config, spec=spec, backend=make_backend(spec))


def _existing(
    empty: HardwareProfile, device: DeviceInfo, root: Path | None, note: Callable[[str], None]
) -> HardwareProfile:
    """The device's profile so far; the empty one where there is none, or where it belongs to another device.

    Raises:
        ConfigError: it cannot be read.
    """
    folder = root / device.name if root is not None else resources.available("hardware_profiles").get(device.name)
    if folder is None or not (folder / "profile.toml").exists():
        return empty
    try:
        profile = HardwareProfile.load(folder)
    except ConfigError as error:
        raise ConfigError(f"{error}; delete {folder} and build again") from error
    differences = profile.differences(device)
    if profile.measured and not differences:
        return replace(profile, capabilities=empty.capabilities)
    why = f"stale ({'; '.join(differences)})" if profile.measured else "described, not measured"
    note(f"the profile {device.name} was {why}: it is replaced")
    return empty
