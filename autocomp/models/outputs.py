"""What a model returns: one tensor of logits, or one of several by name."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from torch import Tensor, nn

from autocomp.errors import ModelError

__all__ = ["OutputKey", "logits_in"]


@dataclass(frozen=True, slots=True)
class OutputKey:
    """A forward hook that replaces what a module returns by one part of it, so that parameters keep their names.

    Attributes:
        key: of a mapping, name of a field, or position in a tuple.
    """

    key: str

    def __call__(self, module: nn.Module, inputs: object, outputs: object) -> object:
        """Raises: ModelError if there is no such part."""
        parts = _parts(outputs)
        if self.key not in parts:
            there = f"a {type(outputs).__name__} with {', '.join(parts)}" if parts else f"a {type(outputs).__name__}"
            raise ModelError(f"output-key is {self.key}, but the model returns {there}: name the part with the logits")
        return parts[self.key]


def logits_in(outputs: object, images: int, what: str) -> Tensor:
    """What a model returned for some images, if it is a float tensor (images, outputs).

    Args:
        what: the model, for the message.

    Raises:
        ModelError: it is something else.
    """
    if not isinstance(outputs, Tensor):
        kind, parts = type(outputs).__name__, _parts(outputs)
        way = "return one tensor of logits"
        if parts:
            kind, way = f"{kind} with {', '.join(parts)}", "name the part with the logits with --output-key"
        raise ModelError(f"{what} returns a {kind}: {way}")
    if outputs.is_complex():
        raise ModelError(
            f"{what} returns complex numbers ({outputs.dtype}): return real ones, such as their magnitude, or their "
            "real and imaginary parts side by side"
        )
    if not outputs.is_floating_point() or outputs.ndim != 2 or len(outputs) != images:
        raise ModelError(
            f"{what} returns {outputs.dtype} {tuple(outputs.shape)} for {images} images: it must return float logits "
            "(images, classes); flatten other outputs to one row an image, and give a metric for them"
        )
    return outputs


def _parts(outputs: object) -> Mapping[str, Any]:
    """Name or position -> part."""
    if isinstance(outputs, Mapping):
        return {str(name): value for name, value in outputs.items()}
    if is_dataclass(outputs):
        return {field.name: getattr(outputs, field.name) for field in fields(outputs)}
    if isinstance(outputs, tuple | list):
        names = getattr(outputs, "_fields", range(len(outputs)))
        return {str(name): value for name, value in zip(names, outputs, strict=True)}
    return {}
