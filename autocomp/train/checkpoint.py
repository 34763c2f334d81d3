"""What training needs to go on from a step as if it had never stopped."""

import io
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from glob import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autocomp.errors import RunError
from autocomp.storage import write_atomic

__all__ = ["State", "load", "save"]


@dataclass(frozen=True)
class State:
    """Training after some steps. Nothing else varies: order and augmentation follow from the seed and the step.

    Attributes:
        key: of all that training depends on; a state of another key is of no use.
        step: steps done.
        weights, average: parameter -> tensor.
        optimizers: their own states.
        scaler: of the loss, where it is scaled.
        losses: mean of each finished epoch, and sum and steps of the one under way.
    """

    key: str
    step: int
    weights: Mapping[str, Tensor]
    average: Mapping[str, Tensor]
    optimizers: Sequence[Mapping[str, Any]]
    losses: tuple[tuple[float, ...], float, int]
    scaler: Mapping[str, Any] = field(default_factory=dict)


def save(state: State, path: Path) -> None:
    """Replace the file as a whole: a kill leaves the one before."""
    file = io.BytesIO()
    torch.save({name: getattr(state, name) for name in state.__dataclass_fields__}, file)
    write_atomic(path, file.getvalue())


def load(path: Path, key: str) -> State | None:
    """The state kept under ``key``; None where there is none, or one of something else. What a kill left of writing it
    is removed.

    Raises:
        RunError: the file is damaged.
    """
    for unfinished in path.parent.glob(f".{escape(path.name)}.????????"):
        unfinished.unlink(missing_ok=True)
    if not path.exists():
        return None
    try:
        state = State(**torch.load(path, weights_only=True, map_location="cpu"))
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, ValueError, pickle.UnpicklingError) as error:
        raise RunError(f"{path} is no checkpoint of training: remove it to begin again") from error
    return state if state.key == key else None
