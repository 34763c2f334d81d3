"""Which channels a compressed model's maps still have, against the unpruned model with zeros in the others' place."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from autocomp.compress import channels_left, trace
from autocomp.compress.surgery import kept_positions, masked, rebuild, slice_tensors, tensors_of
from autocomp.compress.tracing import Traced
from autocomp.models.zoo import build_zoo
from tests.compress.nets import Mixed, images, trained


class ChannelsLast(nn.Module):
    """Maps, then linear layers over their channels as the last axis, as ConvNeXt has them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide, self.narrow = nn.Conv2d(3, 6, 2, 2), nn.Linear(6, 12), nn.Linear(12, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.narrow(self.wide(x.permute(0, 2, 3, 1)).relu()).permute(0, 3, 1, 2)
        logits: Tensor = self.head((x + y).relu().mean((2, 3)))
        return logits


CASES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "blocks": (Mixed, 16),
    "padded shortcuts": (lambda: build_zoo("resnet8", 10), 32),
    "channels last": (ChannelsLast, 8),
}


def maps(module: torch.fx.GraphModule, batch: Tensor) -> dict[str, Tensor]:
    found = {}

    class Watch(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Tensor:
            found[n.name] = super().run_node(n)
            return found[n.name]

    with torch.no_grad():
        Watch(module).run(batch)
    return found


@pytest.mark.parametrize("name", CASES)
def test_they_are_where_the_masked_model_has_them(name: str) -> None:
    make, size = CASES[name]
    torch.manual_seed(0)
    traced: Traced = trace(trained(make()), images(2, size))
    graph, tensors = traced.graph, tensors_of(traced.module)
    kept = {group.name: tuple(range(group.channels))[1::2] for group in graph.groups}
    small = rebuild(traced.module, graph, slice_tensors(tensors, kept_positions(graph, kept)))
    zeros = rebuild(traced.module, graph, masked(graph, tensors, graph.groups, kept))
    cut, whole = maps(small, images(3, size)), maps(zeros, images(3, size))
    found = channels_left(graph, kept)
    for value, left in found.items():
        torch.testing.assert_close(cut[value], whole[value][:, torch.from_numpy(left)], rtol=1e-4, atol=1e-5)
    written = {node.name for node in graph.nodes if node.op in ("conv2d", "add") and len(node.shape) == 3}
    active = {node.name for node in graph.nodes if node.op == "relu" and set(node.inputs) <= written}
    assert written | active <= found.keys()
    assert any(len(left) < whole[value].shape[1] for value, left in found.items())
