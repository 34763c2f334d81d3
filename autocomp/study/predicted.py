"""A device that is not here: its latencies from a profile, its arithmetic under ONNX Runtime."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from autocomp import resources
from autocomp.capabilities import Capabilities, DeviceInfo
from autocomp.config import SearchConfig
from autocomp.engines import BackendSpec, make_backend
from autocomp.engines.label import policy_of
from autocomp.engines.simulated import SimulatedEngine
from autocomp.errors import ConfigError, EngineError
from autocomp.graph import LayerGraph
from autocomp.hardware import HardwareProfile, Prediction, Predictor, kernels_of
from autocomp.outcome import PREDICTED
from autocomp.policy import Policy
from autocomp.protocols import Backend
from autocomp.results import OperatorTimes

__all__ = ["PredictedBackend", "hardware_profile", "retargeted", "target_of"]


@dataclass(frozen=True)
class PredictedBackend:
    """Builds engines that take as long as a profile predicts, and compute in its engine's numerics.

    A file says which policy it is of; the policy's kernels are looked up. Outputs are those of the Q/DQ pairs in exact
    float, as ONNX Runtime computes them on this machine.

    Attributes:
        name: of the profile's engine.
        batch: images a run.
        graph: of the model whose policies are predicted.
        predictor: of the profile.
        numerics: what the profile's engine runs.
    """

    name: str
    batch: int
    graph: LayerGraph
    predictor: Predictor
    numerics: Capabilities

    @property
    def known(self) -> HardwareProfile:
        return self.predictor.profile

    @property
    def measures(self) -> bool:
        return False

    @property
    def device(self) -> DeviceInfo:
        return self.known.fingerprint

    @property
    def note(self) -> str:
        """What a user should know of results."""
        return (
            f"{PREDICTED}predicted from the profile {self.known.device} ({len(self.known.kernels)} kernels, "
            f"{self.known.engine}, {self.known.date}), nothing is verified; accuracy is of that engine's numerics "
            "under ONNX Runtime, not of the engine itself: run 'autocomp verify' on the run's folder on that device"
        )

    def capabilities(self) -> Capabilities:
        return self.numerics

    def prediction(self, policy: Policy) -> Prediction:
        """Raises: InputError: the profile holds too little, or the policy does not fit the graph."""
        return self.predictor.engine(kernels_of(self.graph, policy, self.batch).values())

    def layer_ms(self, policy: Policy) -> dict[str, float]:
        """Layer -> predicted ms of its kernel, and of what comes before the first layer."""
        kernels = kernels_of(self.graph, policy, self.batch)
        return {name: e.ms for name, e in zip(kernels, self.predictor.kernels(kernels.values()), strict=True)}

    def build(self, onnx: bytes) -> SimulatedEngine:
        """See `autocomp.protocols.Backend`. Raises: EngineError also where the file carries no policy."""
        return SimulatedEngine(onnx, self.batch, self.prediction(policy_of(onnx)).ms)

    def profile(self, onnx: bytes, repeats: int) -> OperatorTimes:
        """Raises: EngineError always: the device is not here."""
        raise EngineError(f"{self.device.name} is not here, so nothing can be timed on it: build its profile there")


def target_of(config: SearchConfig, spec: BackendSpec) -> Callable[[LayerGraph], Backend]:
    """What a configuration's engines are built by, once the model's graph is known.

    Args:
        spec: of the engine, where it is on this machine.

    Raises:
        ConfigError: unknown engine or hardware, or a profile that cannot stand for its device.
    """
    profile = hardware_profile(config)
    batch = spec.batch
    if profile is None:
        backend = make_backend(spec)
        return lambda graph: backend
    numerics = profile.capabilities
    if numerics is None:
        raise ConfigError(
            f"the profile {profile.device} does not say what its engine runs: build it again on its device"
        )
    batches = sorted({entry.kernel.batch for entry in profile.kernels})
    if batch not in batches:
        measured = ", ".join(map(str, batches)) or "nothing"
        raise ConfigError(
            f"the profile {profile.device} was measured with batch {measured}: --batch {batch} is outside it"
        )
    return lambda graph: PredictedBackend(config.engine, batch, graph, Predictor(profile), numerics)


def retargeted(config: SearchConfig, given: Mapping[str, Any]) -> SearchConfig:
    """A configuration for another engine or device; a measured profile brings its engine and its threads.

    Raises:
        ConfigError: nothing differs, or the profile cannot be read.
    """
    name = given.get("hardware")
    profile = _measured_profile(name) if name is not None else None
    own = {} if profile is None else {"engine": profile.engine.partition(" ")[0], "threads": profile.threads}
    changed = replace(config, **{"hardware": None, **own, **given})
    if replace(changed, budget=config.budget) == config:
        raise ConfigError("the run is for this engine and device already: give another --engine or --hardware")
    return changed


def _measured_profile(name: str) -> HardwareProfile | None:
    """The measured profile of a name or folder; None where there is none."""
    own = Path(name)
    folder = own if (own / "profile.toml").is_file() else resources.available("hardware_profiles").get(name)
    profile = HardwareProfile.load(folder) if folder is not None else None
    return profile if profile is not None and profile.measured else None


def hardware_profile(config: SearchConfig) -> HardwareProfile | None:
    """The measured profile that ``--hardware`` names; None where it names none, but what the engine knows itself.

    Raises:
        ConfigError: it cannot be read, or is of another engine or number of threads than the configuration's.
    """
    if config.hardware is None:
        return None
    profile = _measured_profile(config.hardware)
    if profile is None:
        return None
    engine = profile.engine.partition(" ")[0]
    if (config.engine, config.threads) != (engine, profile.threads):
        raise ConfigError(
            f"the profile {profile.device} is of {profile.engine} on {profile.threads} threads: give --engine {engine} "
            f"--threads {profile.threads}"
        )
    return profile
