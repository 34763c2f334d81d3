"""Profiles and this machine: which one is its own, whether one still fits, and what one says of a policy."""

import re
from dataclasses import dataclass
from typing import Any, Literal

from autocomp import resources
from autocomp.capabilities import DeviceInfo
from autocomp.config import SearchConfig
from autocomp.engines import BACKENDS, BackendSpec, make_backend
from autocomp.errors import ConfigError, InputError
from autocomp.hardware import HardwareProfile, Kernel, KernelEstimate, Prediction, Predictor, kernels_of
from autocomp.outcome import Observer
from autocomp.policy import Policy
from autocomp.study.loading import load
from autocomp.study.workbench import backend_spec

__all__ = ["PolicyLatency", "Standing", "find_profile", "predict_policy", "standing"]


@dataclass(frozen=True, slots=True)
class Standing:
    """How a profile stands to this machine.

    Attributes:
        kind: ``described`` where nothing was measured, ``measured`` where it fits this machine, ``stale`` where this
            machine is no longer what was measured, ``foreign`` where it was taken on another device.
        differences: of a stale one.
        here: this machine's name for the profile's engine; empty where that engine is not known.
    """

    kind: Literal["described", "measured", "stale", "foreign"]
    differences: tuple[str, ...] = ()
    here: str = ""


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
    return Standing("stale" if differences else "measured", differences, device.name)


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
    name = profile.engine.partition(" ")[0]
    if name not in BACKENDS:
        return None
    hardware = re.sub(r"-\d+t$", "", profile.device) if name == "simulated" else None
    try:
        return make_backend(BackendSpec(name, threads=profile.threads, hardware=hardware)).device
    except InputError:
        return None
