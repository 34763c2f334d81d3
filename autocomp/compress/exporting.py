"""A user's model through torch.export, or refused by the line of its code that cannot be followed."""

import linecache
import traceback
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from autocomp.compress.naming import op_of, reason_of
from autocomp.errors import ModelError

__all__ = ["export", "state_of", "unused"]

_FOREIGN = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))


def export(model: nn.Module, example: Tensor | Mapping[str, Tensor]) -> fx.GraphModule:
    """The model as a graph of ATen operators with a dynamic batch axis.

    Args:
        model: in eval mode.
        example: (n, ...) with n at least 2, several by name.

    Raises:
        ModelError: the model's code decides by values, fixes the number of images, or cannot be followed for another
            reason; the message names the line.
    """
    # Here, since with sympy and triton behind them they are a fifth of a process, and workers never trace.
    from torch._dynamo.exc import UserError, UserErrorType
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, free_unbacked_symbols

    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            free: Any = {0: torch.export.Dim.DYNAMIC}
            args, kwargs = ((example,), None) if isinstance(example, Tensor) else ((), dict(example))
            dynamic = (free,) if kwargs is None else dict.fromkeys(kwargs, free)
            found = torch.export.export(model, args, kwargs, dynamic_shapes=dynamic).module(check_guards=False)
    except GuardOnDataDependentSymNode as error:
        raise ModelError(
            f"forward() decides by the values of a tensor{_place(error)}: use torch.where, which computes both sides, "
            "or decide outside of the model"
        ) from error
    except Exception as error:  # the user's code runs here: anything can come out of it
        if isinstance(error, UserError) and error.error_type is UserErrorType.CONSTRAINT_VIOLATION:
            raise ModelError(
                "the model cannot be exported with a dynamic batch axis, for forward() makes the number of images a "
                "plain number: write x.shape[0] instead of len(x), and -1 instead of a fixed size in view and reshape"
            ) from error
        raise ModelError(
            f"the model cannot be exported ({reason_of(error)}{_place(error)}): write this part of forward() with "
            "torch's operators alone"
        ) from error
    assert isinstance(found, fx.GraphModule)
    for node in found.graph.nodes:
        if isinstance(value := node.meta.get("val"), Tensor) and free_unbacked_symbols(value.shape):
            raise ModelError(
                f"{op_of(node)} in forward() gives a tensor whose size depends on values{_written(node)}: keep its "
                "size the same for every image, by a mask or torch.where"
            )
    return found


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers as bytes, which compare bit by bit; not copied where they are contiguous."""
    tensors = (*model.named_parameters(), *model.named_buffers())
    return {name: value.detach().reshape(-1).view(torch.uint8) for name, value in tensors}


def unused(model: nn.Module, exported: fx.GraphModule) -> tuple[str, ...]:
    """The outermost modules with parameters, none of which the exported graph reads, and single such parameters."""
    exported.graph.eliminate_dead_code()
    targets = {str(node.target) for node in exported.graph.nodes if node.op == "get_attr"}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tensors = {id(value) for name, value in parameters.items() if name in targets}  # a tied one has several names
    read = [name for name, value in parameters.items() if id(value) in tensors]

    def outermost(name: str) -> str:
        parts = name.split(".")
        prefixes = (".".join(parts[:depth]) for depth in range(1, len(parts)))
        return next((p for p in prefixes if not any(other.startswith(f"{p}.") for other in read)), name)

    return tuple(dict.fromkeys(outermost(name) for name, value in parameters.items() if id(value) not in tensors))


def _place(error: Exception) -> str:
    """The last line of the user's code on the way to an error, as a phrase; empty where there is none."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_users(frame.filename)]
    return f" at {Path(frames[-1].filename).name}:{frames[-1].lineno} ({frames[-1].line})" if frames else ""


def _written(node: fx.Node) -> str:
    """As `_place`, of an operator."""
    places = [
        line.split('"') for line in node.meta.get("stack_trace", "").splitlines() if line.strip().startswith("File")
    ]
    users = [(parts[1], int(parts[2].split()[2].rstrip(","))) for parts in places if _is_users(parts[1])]
    if not users:
        return ""
    path, number = users[-1]
    return f" at {Path(path).name}:{number} ({linecache.getline(path, number).strip()})"


def _is_users(path: str) -> bool:
    return Path(path).is_file() and not path.startswith(_FOREIGN)
