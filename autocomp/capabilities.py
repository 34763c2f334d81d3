"""What a backend can run, and the arithmetic its int8 really computes with."""

from dataclasses import asdict, dataclass
from typing import Any

from autocomp.errors import InputError
from autocomp.policy import FP32, Policy, Precision

__all__ = ["Capabilities", "DeviceInfo", "Numerics"]


@dataclass(frozen=True, slots=True)
class Numerics:
    """The int8 scheme of an engine; part of every accuracy's key. Weights are symmetric, one scale per output
    channel; activations have one scale per tensor; bias stays float.

    Attributes:
        signed_activations: int8 instead of uint8.
        symmetric_activations: zero point fixed (0 when signed).
        weight_max: largest weight code; 127, or 63 where 8-bit dot products saturate (x86 without VNNI).
    """

    signed_activations: bool
    symmetric_activations: bool
    weight_max: int

    @property
    def activation_range(self) -> tuple[int, int]:
        """Smallest and largest activation code."""
        return (-128, 127) if self.signed_activations else (0, 255)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a search may choose for a backend.

    Attributes:
        precisions: that the engine runs; weights below 8 bits may be stored so and computed with as int8.
        channel_multiple: kept channels are multiples of it (or all of a group's).
        numerics: of int8.
    """

    precisions: tuple[Precision, ...] = (FP32,)
    channel_multiple: int = 1
    numerics: Numerics = Numerics(signed_activations=False, symmetric_activations=False, weight_max=127)

    def validate(self, policy: Policy) -> None:
        """Raises: InputError naming the first layer whose precision the engine does not run."""
        for name, precision in policy.precisions.items():
            if precision.full_rank not in self.precisions:
                known = ", ".join(str(entry) for entry in self.precisions)
                raise InputError(f"{name} cannot run as {precision} on this engine: it runs {known}")


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """Fingerprint of what a latency was measured on.

    Attributes:
        name: readable and stable, also the profile folder's name (``intel-xeon-2c``).
        engine: backend and its version (``onnxruntime 1.31.1``).
        threads: used by the engine.
        details: driver, instruction sets and what else tells two devices apart.
    """

    name: str
    engine: str
    threads: int
    details: tuple[tuple[str, str], ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "engine": self.engine, "threads": self.threads, "details": dict(self.details)}
