"""What a dropped branch gave on average comes back through the layers behind it."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autocomp.compress import collect, compress, run, trace
from autocomp.policy import Policy, Recipe
from tests.compress.conftest import UNSIGNED
from tests.compress.nets import images, trained

RECIPE = Recipe(recalibration="never")


class Stream(nn.Module):
    """Two linear branches on a stream that is never negative, then one that is. Input (n, 3, 6, 6), output (n, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1)
        self.widened, self.head = nn.Conv2d(8, 8, 1), nn.Linear(8, 4)

    def streams(self, x: Tensor, first: float = 1.0) -> tuple[Tensor, Tensor]:
        x = F.relu(self.stem(x))
        x = F.relu(x + first * self.first(x).abs())
        one = x + self.second(x)
        wide = F.pad(F.avg_pool2d(one, 2), [0, 0, 0, 0, 1, 1])
        return one, wide + self.widened(wide)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.streams(x)[1].mean((2, 3)))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return trained(Stream(), seed=3)


def mean_logits(model: nn.Module, policy: Policy, recipe: Recipe = RECIPE) -> Tensor:
    inputs = images(200, 6)
    traced = trace(model, inputs[:2])
    compressed = compress(traced, collect(traced, inputs, recipe), policy, recipe, UNSIGNED, inputs)
    return run(compressed.module, inputs).mean(0)


@pytest.mark.parametrize("dropped", [["first"], ["second"], ["widened"], ["first", "second"], ["second", "widened"]])
def test_linear_layers_give_the_same_on_average(model: nn.Module, dropped: list[str]) -> None:
    with torch.no_grad():
        whole = model(images(200, 6)).mean(0)
    recovered = mean_logits(model, Policy({}, frozenset(dropped)))
    torch.testing.assert_close(recovered, whole, rtol=1e-3, atol=1e-3)
    without = mean_logits(model, Policy({}, frozenset(dropped)), Recipe(recalibration="never", reconstruction="none"))
    assert float((without - whole).abs().max()) > 0.1


def test_a_pruned_stream_is_followed_by_its_kept_channels(model: nn.Module) -> None:
    inputs = images(200, 6)
    graph = trace(model, inputs[:2]).graph
    kept = {group.name: group.channels - 1 for group in graph.groups}
    assert mean_logits(model, Policy(kept, frozenset(["first"]))).isfinite().all()
