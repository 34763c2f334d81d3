"""What an engine is fed: its inputs' shapes, and fixed noise to time it on."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from autocomp.errors import EngineError
from autocomp.rows import Inputs

__all__ = ["fixed_shape", "noise"]


def fixed_shape(sizes: Sequence[int | str | None], batch: int) -> tuple[int, ...]:
    """Shape of one image's input.

    Args:
        sizes: of the input's axes, the batch first; those that are free are no numbers.

    Raises:
        EngineError: the file has another batch, or other free sizes.
    """
    first, *others = sizes
    if isinstance(first, int) and first != batch:
        raise EngineError(f"the model has batch {first}, not {batch}: give --batch {first} or free that axis")
    fixed = tuple(size for size in others if isinstance(size, int))
    if len(fixed) < len(others):
        raise EngineError(f"the model's input shape {others} is not fixed: export it with fixed sizes")
    return fixed


def noise(inputs: Inputs, batch: int) -> dict[str, NDArray[np.float32]]:
    """Standard normal values (batch, *shape) for each input, always the same."""
    draw = np.random.default_rng(0)
    return {name: draw.standard_normal((batch, *shape)).astype(np.float32) for name, shape in inputs.items()}
