"""The joints of the house: what an engine, a controller and an executor must do. Each has a conformance suite."""

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from autocomp.capabilities import Capabilities, DeviceInfo
from autocomp.policy import Policy
from autocomp.results import OperatorTimes, TrialResult

__all__ = ["Backend", "Controller", "Engine", "Executor"]


@runtime_checkable
class Engine(Protocol):
    """A built file, ready to run. A context manager: leaving it frees the device's memory."""

    def run(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits (n, classes) of ``images`` (n, *input_shape); any n, batched as the engine was built.

        Raises:
            EngineError: the shape does not fit, or the runtime failed.
        """
        ...

    def time(self, repeats: int) -> NDArray[np.float64]:
        """Durations in ms of ``repeats`` consecutive runs at the built batch size, host-device copies excluded."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


@runtime_checkable
class Backend(Protocol):
    """Makes engines for one device, with a fixed batch size and number of threads."""

    @property
    def name(self) -> str:
        """As in ``--engine``."""
        ...

    @property
    def device(self) -> DeviceInfo: ...

    @property
    def batch(self) -> int: ...

    @property
    def measures(self) -> bool:
        """False where times are an estimate: nothing can then be verified."""
        ...

    def capabilities(self) -> Capabilities: ...

    def build(self, onnx: bytes) -> Engine:
        """Build an engine from a serialized ONNX model with float or typed Q/DQ weights.

        Raises:
            EngineError: naming the node or layer the runtime refused.
        """
        ...

    def profile(self, onnx: bytes, repeats: int) -> OperatorTimes:
        """What the operators of a model take inside its engine, medians of ``repeats`` runs.

        Raises:
            EngineError: as `build`.
        """
        ...


@runtime_checkable
class Controller(Protocol):
    """Chooses policies. Deterministic for a seed and a history."""

    def ask(self, count: int) -> list[Policy]:
        """A wave of ``count`` policies, or fewer when the controller has no more to propose."""
        ...

    def tell(self, results: Sequence[TrialResult]) -> None:
        """Learn from finished trials, given in trial order."""
        ...


@runtime_checkable
class Executor(Protocol):
    """Evaluates waves of policies somewhere."""

    def run(self, wave: Sequence[tuple[int, str, Policy]]) -> Iterator[Sequence[TrialResult]]:
        """Yield the result of each (number, role, policy), in any order, those together that came together.

        Failures are results.
        """
        ...

    def close(self) -> None: ...
