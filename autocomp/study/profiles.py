"""Profiles and this machine: which one is its own, whether one still fits, and what one says of a policy."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from time import sleep
from typing import Any, Literal

from autocomp import resources
from autocomp.capabilities import DeviceInfo
from autocomp.config import SearchConfig
from autocomp.engines import BACKENDS, BackendSpec, make_backend
from autocomp.errors import ConfigError, InputError
from autocomp.hardware import HardwareProfile, Kernel, KernelEstimate, Prediction, Predictor, kernels_of
from autocomp.outcome import Note, Observer
from autocomp.policy import Policy
from autocomp.study.build_profile import IMAGES, jobs_like
from autocomp.study.loading import load
from autocomp.study.staleness import Drift, expected_ms, rebuild_command, settled_ms
from autocomp.study.workbench import backend_spec, prepare

__all__ = ["Checked", "PolicyLatency", "Standing", "check_profile", "find_profile", "predict_policy", "standing"]


@dataclass(frozen=True, slots=True)
class Standing:
    """How a profile stands to this machine.

    Attributes:
        kind: ``described`` where nothing was measured, ``measured`` where it fits this machine, ``stale`` where this
            machine is no longer what was measured, ``foreign`` where it was taken on another device.
        differences: of a stale one.
        here: this machine's name for the profile's engine; empty where that engine is not known.
        rebuild: the command that measures a stale one anew; empty for others.
    """

    kind: Literal["described", "measured", "stale", "foreign"]
    differences: tuple[str, ...] = ()
    here: str = ""
    rebuild: str = ""


@dataclass(frozen=True, slots=True)
class Checked:
    """A profile held against the device.

    Attributes:
        standing: by its fingerprint.
        drifts: of the uncompressed engines that the profile has all kernels of.
        rebuild: the command that measures the profile anew; empty where it is not stale.
    """

    standing: Standing
    drifts: tuple[Drift, ...]
    rebuild: str

    def to_json(self) -> dict[str, Any]:
        return {
            "standing": "stale" if self.rebuild else self.standing.kind,
            "differences": list(self.standing.differences),
            "drifts": [drift.to_json() for drift in self.drifts],
            "rebuild": self.rebuild or None,
        }


@dataclass(frozen=True, slots=True)
class PolicyLatency:
    """What a profile says of a whole policy.

    Attributes:
        prediction: of the engine.
        batch: images a run.
        kernels: layer -> its kernel and what that takes; an empty name for what comes before the first layer.
        overhead_ms: beside the kernels.
    """

    prediction: Prediction
    batch: int
    kernels: dict[str, tuple[Kernel, KernelEstimate]]
    overhead_ms: float

    def to_json(self) -> dict[str, Any]:
        low, high = self.prediction.interval_ms
        return {
            "ms": self.prediction.ms,
            "low_ms": low,
            "high_ms": high,
            "measured": self.prediction.measured,
            "overhead_ms": self.overhead_ms,
            "batch": self.batch,
            "kernels": [
                {
                    "layer": name,
                    "kernel": str(kernel),
                    "ms": entry.ms,
                    "low_ms": entry.interval_ms[0],
                    "high_ms": entry.interval_ms[1],
                    "source": entry.source,
                }
                for name, (kernel, entry) in self.kernels.items()
            ],
        }


def find_profile(hardware: str | None, config: SearchConfig) -> HardwareProfile:
    """A profile by name or folder, else this device's own for the configuration's engine and threads.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    if hardware is None:
        hardware = make_backend(backend_spec(config)).device.name
        if hardware not in resources.available("hardware_profiles"):
            raise ConfigError(
                f"this device ({hardware}) has no profile: build one with 'autocomp profile build', or give --hardware"
            )
    return HardwareProfile.load(resources.find("hardware_profiles", hardware))


def standing(profile: HardwareProfile) -> Standing:
    """Whether a profile is of this machine, and still fits it."""
    if not profile.measured:
        return Standing("described")
    device = _device_here(profile)
    if device is None or device.name != profile.device:
        return Standing("foreign", here=device.name if device is not None else "")
    differences = profile.differences(device)
    if differences:
        return Standing("stale", differences, device.name, rebuild_command(profile))
    return Standing("measured", here=device.name)


def check_profile(
    profile: HardwareProfile, config: SearchConfig, observer: Observer, pause: Callable[[float], None] = sleep
) -> Checked:
    """Time the uncompressed engines that a profile was measured with, and compare them with what it says.

    An engine that is too slow is timed again after pauses, for other work may keep the device busy.

    Args:
        config: whose space and seed are used; model, data, engine and threads are the profile's.
        pause: in place of ``time.sleep``.

    Raises:
        ConfigError: nothing was measured, the profile is of another device, or its engines cannot be built again.
    """
    found = standing(profile)
    if found.kind == "described":
        raise ConfigError(f"{profile.device} is only described, nothing was measured: there is nothing to check")
    if found.kind == "foreign":
        raise ConfigError(f"the profile {profile.device} is of another device than this one: check it there")
    if found.kind == "stale":
        return Checked(found, (), found.rebuild)
    name, hardware = _engine_of(profile)
    config = replace(config, engine=name, threads=profile.threads, hardware=hardware, calibration_images=IMAGES)
    drifts = []
    for job in jobs_like(replace(config, search_images=IMAGES, selection_images=IMAGES), profile):
        for batch in job.batches:
            bench = prepare(replace(job.config, batch=batch), observer)
            with bench.backend.build(bench.reference) as reference:
                expected = expected_ms(profile, bench.traced.graph, batch)
                if expected is not None:
                    taken = settled_ms(reference, expected, pause)
                    drifts.append(Drift(job.config.model, batch, expected, taken))
    if not drifts:
        observer(Note("the profile lacks kernels of every uncompressed engine: build it further to have it checked"))
    return Checked(found, tuple(drifts), rebuild_command(profile) if any(drift.stale for drift in drifts) else "")


def predict_policy(policy: Policy, config: SearchConfig, profile: HardwareProfile, observer: Observer) -> PolicyLatency:
    """Latency of a policy of the configuration's model and batch. No engine is built.

    Raises:
        InputError: the policy does not fit the model, or the profile holds too little.
    """
    _, _, traced = load(config, observer)
    batch = config.resolved_batch()
    kernels = kernels_of(traced.graph, traced.graph.normalise(policy), batch)
    predictor = Predictor(profile)
    found = dict(zip(kernels, predictor.kernels(kernels.values()), strict=True))
    prediction = predictor.engine(kernels.values())
    table = {name: (kernel, found[name]) for name, kernel in kernels.items()}
    return PolicyLatency(prediction, batch, table, prediction.ms - sum(entry.ms for entry in found.values()))


def _device_here(profile: HardwareProfile) -> DeviceInfo | None:
    """This machine as the profile's engine calls it; None where that engine is not known or not installed."""
    name, hardware = _engine_of(profile)
    if name not in BACKENDS:
        return None
    try:
        return make_backend(BackendSpec(name, threads=profile.threads, hardware=hardware)).device
    except InputError:
        return None


def _engine_of(profile: HardwareProfile) -> tuple[str, str | None]:
    """Name of the backend, and the described device of a simulated one."""
    name = profile.engine.partition(" ")[0]
    return name, re.sub(r"-\d+t$", "", profile.device) if name == "simulated" else None
