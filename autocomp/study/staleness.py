"""When a profile no longer says what its device does, and the command that measures it again."""

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from time import sleep
from typing import Any

from autocomp.graph import LayerGraph
from autocomp.hardware import HardwareProfile, Predictor, kernels_of
from autocomp.policy import Policy
from autocomp.protocols import Engine
from autocomp.study.profiling import quiet_ms
from autocomp.study.steady import DRIFT, WAITS_S

__all__ = ["Drift", "expected_ms", "rebuild_command", "settled_ms"]


@dataclass(frozen=True, slots=True)
class Drift:
    """An uncompressed engine as a profile has it, and as it runs now.

    Attributes:
        model, batch: of the engine.
        predicted_ms: by the profile.
        measured_ms: now.
    """

    model: str
    batch: int
    predicted_ms: float
    measured_ms: float

    @property
    def off(self) -> float:
        """How much slower than predicted, as a fraction; negative where it is faster."""
        return self.measured_ms / self.predicted_ms - 1

    @property
    def stale(self) -> bool:
        return abs(self.off) > DRIFT

    def __str__(self) -> str:
        return (
            f"the uncompressed {self.model} at batch {self.batch} takes {self.measured_ms:.3g} ms, the profile says "
            f"{self.predicted_ms:.3g} ms ({100 * self.off:+.0f}%)"
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "batch": self.batch,
            "predicted_ms": self.predicted_ms,
            "measured_ms": self.measured_ms,
            "off": self.off,
            "stale": self.stale,
        }


def expected_ms(profile: HardwareProfile, graph: LayerGraph, batch: int, policy: Policy | None = None) -> float | None:
    """What a profile says an uncompressed engine takes.

    Args:
        policy: of the engine; None for that of fp32.

    Returns:
        None where the profile would have to guess, for it lacks some of the engine's kernels.
    """
    kernels = tuple(kernels_of(graph, policy or Policy(), batch).values())
    if not {entry.kernel for entry in profile.kernels}.issuperset(kernels):
        return None
    return Predictor(profile).engine(kernels).ms


def settled_ms(reference: Engine, expected_ms: float, pause: Callable[[float], None] = sleep) -> float:
    """What an engine takes; one that is slower than expected is timed again after pauses, for other work may end.

    The fastest of the attempts counts: other work only adds to a time.
    """
    found = quiet_ms(reference)
    for wait in WAITS_S:
        if found <= (1 + DRIFT) * expected_ms:
            break
        pause(wait)
        found = min(found, quiet_ms(reference))
    return found


def rebuild_command(profile: HardwareProfile) -> str:
    """The command that measures a profile's device anew, with the models and batches it was measured with."""
    engine = profile.engine.partition(" ")[0]
    words = ["autocomp", "profile", "build", "--fresh"]
    if any(entry.data and not entry.model.startswith("object:") for entry in profile.engines):
        words += ["--like", profile.device]
    words += ["--engine", engine, "--threads", str(profile.threads)]
    if engine == "simulated":
        words += ["--hardware", profile.device.removesuffix(f"-{profile.threads}t")]
    return shlex.join(words)
