"""Several inputs of a model as one row of numbers for each image, in which they go from data to engines.

What reads, draws, batches and keeps images need not know how many inputs they are. A single input is no row: it stays
as it is.
"""

from collections.abc import Mapping
from itertools import accumulate
from math import prod
from typing import Any

__all__ = ["Inputs", "part", "parts_of", "row_shape", "starts"]

Inputs = Mapping[str, tuple[int, ...]]
"""Name -> shape of each input without the batch axis, in the order in which a row holds them."""


def row_shape(inputs: Inputs) -> tuple[int, ...]:
    """Shape of what one image's inputs travel as."""
    if len(inputs) == 1:
        return next(iter(inputs.values()))
    return (sum(map(prod, inputs.values())),)


def starts(inputs: Inputs) -> dict[str, int]:
    """Name -> how many numbers of a row lie before an input."""
    return dict(zip(inputs, accumulate(map(prod, inputs.values()), initial=0), strict=False))


def part(rows: Any, start: int, shape: tuple[int, ...]) -> Any:
    """One input (n, *shape) of ``rows`` (n, numbers), a tensor or an array."""
    return rows[:, start : start + prod(shape)].reshape(rows.shape[0], *shape)


def parts_of(rows: Any, inputs: Inputs) -> dict[str, Any]:
    """Name -> input (n, *shape). A single input's rows are that input."""
    if len(inputs) == 1:
        return dict.fromkeys(inputs, rows)
    return {name: part(rows, start, inputs[name]) for name, start in starts(inputs).items()}
