"""A model run for its shapes alone."""

from typing import Any

from torch import Tensor, fx

__all__ = ["Shapes"]


class Shapes(fx.Interpreter):
    """Runs a module on the meta device, where tensors have shapes and no values.

    What its operators make of sizes alone would lie on the CPU; it is moved too.
    """

    def fetch_attr(self, target: str) -> Tensor:
        tensor: Tensor = super().fetch_attr(target)
        return tensor.to("meta")

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        return value.to("meta") if isinstance(value, Tensor) else value
