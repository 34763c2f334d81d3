"""What the forward() of a user's model may do, and the sentence with which the rest is refused."""

import copy
import inspect
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from autocomp.compress import export_onnx, run, trace
from autocomp.errors import ModelError
from autocomp.policy import INT8, Policy, Recipe
from tests.compress.nets import images
from tests.compress.test_bad_input import compressed

Rest = Callable[["Net", Tensor, Tensor], Tensor]


class Net(nn.Module):
    """Two convolutions and a head; ``rest`` makes the logits from the images (n, 3, 6, 6) and features (n, 8)."""

    def __init__(self, rest: Rest) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 8, 3), nn.Linear(8, 4)
        self.scale, self.token = nn.Parameter(torch.ones(8)), nn.Parameter(torch.ones(1, 1, 8))
        self.register_buffer("calls", torch.zeros(()))
        self.rest = rest

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(torch.relu(self.first(x))).mean((2, 3)) * self.scale
        y = y + 0 * self.token[0]
        return self.rest(self, x, self.head(y))


def decides(net: Net, x: Tensor, y: Tensor) -> Tensor:
    return y if x.sum() > 0 else 2 * y


def repeats(net: Net, x: Tensor, y: Tensor) -> Tensor:
    for _ in range(int(y.abs().max())):
        y = y + 1
    return y


def selects(net: Net, x: Tensor, y: Tensor) -> Tensor:
    return y[x.mean((1, 2, 3)) > -100]


def counts(net: Net, x: Tensor, y: Tensor) -> Tensor:
    net.calls += 1
    return y


def rebinds(net: Net, x: Tensor, y: Tensor) -> Tensor:
    net.calls = net.calls + 1
    return y


def clamps(net: Net, x: Tensor, y: Tensor) -> Tensor:
    net.second.weight.data.mul_(0.5)
    return y


def takes_length(net: Net, x: Tensor, y: Tensor) -> Tensor:
    return y + torch.zeros(len(x), 4)


def leaves_torch(net: Net, x: Tensor, y: Tensor) -> Tensor:
    return y + torch.from_numpy(np.tanh(y.numpy()))


def transforms(net: Net, x: Tensor, y: Tensor) -> Tensor:
    return torch.fft.fft(y)


@pytest.mark.parametrize(
    ("rest", "words", "line"),
    [
        (decides, "decides by the values of a tensor", "return y if x.sum() > 0 else 2 * y"),
        (repeats, "decides by the values of a tensor", "for _ in range(int(y.abs().max())):"),
        (selects, "index in forward() gives a tensor whose size depends on values", "(return self.rest("),
        (counts, "forward() changes calls in place", "if self.training:"),
        (rebinds, "forward() changes calls in place", "if self.training:"),
        (clamps, "forward() changes second.weight in place", "if self.training:"),
        (takes_length, "dynamic batch axis", "write x.shape[0] instead of len(x)"),
        (leaves_torch, "cannot be exported", "return y + torch.from_numpy(np.tanh(y.numpy()))"),
        (transforms, "torch.complex64", "real and imaginary"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name_and_line(rest: Rest, words: str, line: str) -> None:
    model = Net(rest).eval().requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ModelError) as caught:
        trace(model, images(2, 6))
    message = str(caught.value)
    assert words in message and line in message and "\n" not in message
    if line in inspect.getsource(rest):
        assert f"{Path(__file__).name}:{rest.__code__.co_firstlineno + 1} " in message
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def counts_images(net: Net, x: Tensor, y: Tensor) -> Tensor:
    """Tensors made of Python sizes, in three ways."""
    y = y + torch.zeros(x.size(0), 4).cos() + torch.arange(x.shape[0]).float()[:, None]
    return torch.cat([net.token[..., :4].expand(x.shape[0], -1, -1), y[:, None]], 1).sum(1)


class Tied(nn.Module):
    """Two layers with one weight and each its bias, and two that forward() does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, 1, 1)
        self.right, self.last = nn.Conv2d(6, 6, 3, 1, 1), nn.Conv2d(6, 8, 1)
        self.right.weight = self.left.weight
        self.auxiliary = nn.Sequential(nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.right(torch.relu(self.left(x))))
        return self.head(torch.relu(self.last(x)).mean((2, 3)))


class Twice(nn.Module):
    """A module used twice, its weight read by a matrix product as well."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.twice, self.last = nn.Conv2d(3, 6, 1), nn.Linear(6, 6), nn.Linear(6, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x)).mean((2, 3))
        x = torch.relu(self.twice(torch.relu(self.twice(x)))) @ self.twice.weight
        return self.head(torch.relu(self.last(x)))


@pytest.mark.parametrize(
    ("make", "notes"),
    [
        (lambda: Net(counts_images), []),
        (Tied, ["auxiliary is left out: forward() does not use it", "left whole: its weight is shared with"]),
        (Twice, ["twice is left whole: forward() uses it several times"]),
    ],
    ids=["sizes", "tied", "twice"],
)
def test_what_is_handled_is_computed_and_named(make: Callable[[], nn.Module], notes: list[str]) -> None:
    torch.manual_seed(0)
    model, calibration = make().eval().requires_grad_(False), images(40, 6)
    traced = trace(model, calibration[:2])
    assert all(any(note in found for found in traced.notes) for note in notes)
    assert any("left out" in found for found in traced.notes) == any("left out" in note for note in notes)
    for count in (1, 5):
        torch.testing.assert_close(run(traced.module, images(count, 6)), model(images(count, 6)))
    found = compressed(model, calibration, Recipe(rounding="nearest"), INT8)
    assert run(found.module, images(7, 6)).isfinite().all()
    assert traced.graph.groups and found.graph.macs(found.policy) < found.graph.macs(Policy())


def test_tensors_made_of_sizes_are_exported() -> None:
    model = Net(counts_images).eval().requires_grad_(False)
    onnx = export_onnx(trace(model, images(2, 6)))
    session = onnxruntime.InferenceSession(onnx, providers=["CPUExecutionProvider"])
    for count in (1, 5):
        (found,) = session.run(None, {"input": images(count, 6).numpy()})
        np.testing.assert_allclose(found, model(images(count, 6)).numpy(), rtol=1e-4, atol=1e-5)
