"""Tracing: the graph and module of a model, its groups and branches, and what is refused."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch_pruning
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from autocomp.compress import run, trace
from autocomp.compress.coupling import admit
from autocomp.compress.surgery import kept_positions, rebuild, slice_tensors, tensors_of
from autocomp.errors import ModelError
from autocomp.policy import Policy
from tests.compress.conftest import Case
from tests.compress.nets import Block, Chain, Mixed, images, trained


def halves(case: Case) -> dict[str, tuple[int, ...]]:
    return {group.name: tuple(range(0, group.channels, 2)) for group in case.traced.graph.groups}


def pruned(case: Case, kept: dict[str, tuple[int, ...]]) -> nn.Module:
    graph, module = case.traced.graph, case.traced.module
    return rebuild(module, graph, slice_tensors(tensors_of(module), kept_positions(graph, kept)))


def test_folded_module_computes_what_the_model_does(mixed: Case) -> None:
    for count in (1, 3, 17):  # the batch axis is dynamic
        batch = images(count, 16, seed=1)
        with torch.no_grad():
            torch.testing.assert_close(run(mixed.traced.module, batch), mixed.model(batch), rtol=1e-4, atol=1e-5)
    names = set(mixed.traced.module.state_dict())
    assert "block.bn1.weight" not in names  # folded
    assert "joint_bn.weight" in names  # behind a concatenation: stays
    assert set(mixed.traced.norms) >= {"stem", "block.conv1", "block.shortcut.0", "inverted.3"}


def test_every_layer_is_there_with_a_bias(mixed: Case) -> None:
    convolutions_and_linear = [
        name for name, part in mixed.model.named_modules() if isinstance(part, nn.Conv2d | nn.Linear)
    ]
    graph = mixed.traced.graph
    assert sorted(layer.name for layer in graph.layers) == sorted(convolutions_and_linear)
    assert all({layer.weight, layer.bias} <= graph.parameters.keys() for layer in graph.layers)
    assert graph.layer_by_name["right"].padding == (1, 1)  # "same", as numbers
    assert graph.layer_by_name["inverted.3"].depthwise
    assert graph.nodes[0].name == "input"
    assert graph.output == "logits"
    assert {node.op for node in graph.nodes} == {
        "input", "conv2d", "relu", "add", "hardtanh", "cat", "batch_norm", "flatten", "linear",
    }  # fmt: skip


def test_groups_slice_as_torch_pruning_does(mixed: Case) -> None:
    kept = halves(mixed)
    assert set(kept) == {
        "stem", "block.conv1", "block.conv2", "plain.conv1", "inverted.0", "inverted.6",
        "left", "right", "last", "hidden",
    }  # fmt: skip
    assert not mixed.traced.graph.left_whole
    reference = copy.deepcopy(mixed.model).requires_grad_(True)
    batch = images(4, 16, seed=2)
    dependencies = torch_pruning.DependencyGraph().build_dependency(reference, batch)
    for name, channels in kept.items():
        module = reference.get_submodule(name)
        gone = sorted(set(range(mixed.traced.graph.group_by_name[name].channels)) - set(channels))
        pruner = dependencies.get_pruner_of_module(module)
        dependencies.get_pruning_group(module, pruner.prune_out_channels, gone).prune()
    with torch.no_grad():
        expected = reference(batch)
    torch.testing.assert_close(run(pruned(mixed, kept), batch), expected, rtol=1e-4, atol=1e-5)


def test_flattened_channels_take_all_their_columns(mixed: Case) -> None:
    group = mixed.traced.graph.group_by_name["last"]
    (member,) = [member for member in group.members if member.parameter == "hidden.weight"]
    assert member.positions == tuple(tuple(range(16 * channel, 16 * channel + 16)) for channel in range(8))


def test_concatenated_channels_are_read_with_their_offset(mixed: Case) -> None:
    group = mixed.traced.graph.group_by_name["right"]
    positions = {(m.parameter, m.axis): m.positions for m in group.members}
    assert positions["last.weight", 1] == positions["joint_bn.running_var", 0] == ((6,), (7,), (8,), (9,))


@pytest.mark.parametrize("share", [1, 2, 3])
def test_macs_match_an_independent_count(mixed: Case, share: int) -> None:
    kept = {group.name: tuple(range(0, group.channels, share)) for group in mixed.traced.graph.groups}
    module = pruned(mixed, kept)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(images(1, 16))
    policy = Policy({name: len(channels) for name, channels in kept.items()})
    assert mixed.traced.graph.macs(policy) == counter.get_total_flops() // 2
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors_of(pruned(mixed, kept)).items()}  # type: ignore[arg-type]
    assert mixed.traced.graph.parameter_shapes(policy) == shapes


def test_branches_are_those_beside_a_stream_without_layers(mixed: Case) -> None:
    (branch,) = mixed.traced.graph.branches  # not the block with a layer in its shortcut
    assert (branch.name, branch.layers) == ("plain", ("plain.conv1", "plain.conv2"))


def test_dropping_a_branch_is_the_model_without_it(mixed: Case) -> None:
    graph = mixed.traced.graph
    module = rebuild(mixed.traced.module, graph, tensors_of(mixed.traced.module), graph.branches)
    without = copy.deepcopy(mixed.model)
    assert isinstance(without, Mixed)
    without.plain = nn.Sequential(nn.ReLU())  # type: ignore[assignment]
    batch = images(3, 16, seed=3)
    with torch.no_grad():
        torch.testing.assert_close(run(module, batch), without(batch), rtol=1e-4, atol=1e-5)
    assert not any(name.startswith("plain") for name in module.state_dict())


class PaddedShortcut(nn.Module):
    """A residual block whose shortcut picks and pads, as in the CIFAR ResNets."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, 1, 1)
        self.body = nn.Sequential(nn.Conv2d(4, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, 8, 3, 1, 1))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        shortcut = nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
        return self.head(torch.relu(self.body(x) + shortcut).mean((2, 3)))


def test_padded_channels_stay_and_those_between_them_follow_the_shortcut() -> None:
    traced = trace(trained(PaddedShortcut()), images(2, 8))
    graph = traced.graph
    assert [group.name for group in graph.groups] == ["stem", "body.0"]
    positions = {(m.parameter, m.axis): m.positions for m in graph.group_by_name["stem"].members}
    assert positions["body.2.weight", 0] == positions["head.weight", 1] == ((2,), (3,), (4,), (5,))
    (branch,) = graph.branches
    assert (branch.name, graph.node_by_name[branch.stream].op) == ("body", "pad")


def test_tracing_leaves_the_callers_model_alone() -> None:
    model = trained(Mixed())
    model.train()
    model.stem.weight.requires_grad_(False)
    model.block.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [part.training for part in model.modules()]
    grads = [parameter.requires_grad for parameter in model.parameters()]
    trace(model, images(2, 16))
    assert modes == [part.training for part in model.modules()]
    assert grads == [parameter.requires_grad for parameter in model.parameters()]
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_tracing_is_deterministic(chain: Case) -> None:
    again = trace(copy.deepcopy(chain.model), chain.images[:2])
    assert again.graph == chain.traced.graph
    assert again.graph.digest == chain.traced.graph.digest


class Shared(nn.Module):
    """Two convolutions with one weight between two others."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice = nn.Conv2d(3, 6, 3, 1, 1), nn.Conv2d(6, 6, 3, 1, 1)
        self.third, self.fourth, self.head = nn.Conv2d(6, 8, 1), nn.Conv2d(8, 4, 1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.twice(torch.relu(self.twice(torch.relu(self.first(x))))))
        return self.head(self.fourth(torch.relu(self.third(x))).mean((2, 3)))


def test_shared_weights_are_left_whole_and_named() -> None:
    graph = trace(Shared().eval(), images(2, 8)).graph
    assert {group.name for group in graph.groups} == {"third", "fourth"}
    assert "twice" in graph.left_whole and "first" in graph.left_whole
    assert graph.layer_by_name["twice"].positions == 2 * 64  # both uses count


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 6, 1), nn.ReLU())
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.body(x).chunk(2, 1)
        return self.head(torch.cat([second, first], 1).mean((2, 3)))


def test_grouped_convolutions_lose_whole_groups_and_splits_follow_what_is_left() -> None:
    """Against the model written for the pruned sizes."""
    model = Grouped().eval()
    traced = trace(model, images(2, 8))
    graph = traced.graph
    assert [(group.name, group.channels) for group in graph.groups] == [("body.0", 2), ("body.2", 3), ("body.2:2", 3)]
    assert not graph.left_whole
    assert graph.node_by_name["chunk"].shape == ()  # several tensors: no shape of its own
    kept = {"body.0": (1,), "body.2": (0, 2), "body.2:2": (1,)}
    tensors = slice_tensors(tensors_of(traced.module), kept_positions(graph, kept))
    found = run(rebuild(traced.module, graph, tensors), images(3, 8))
    first, grouped, last = (model.body[i] for i in range(3))
    with torch.no_grad():
        x = nn.functional.conv2d(images(3, 8), first.weight[4:], first.bias[4:])
        x = nn.functional.conv2d(x, grouped.weight[4:], grouped.bias[4:])
        x = torch.relu(nn.functional.conv2d(x, last.weight[[0, 2, 4], 4:], last.bias[[0, 2, 4]]))
        expected = nn.functional.linear(x.mean((2, 3))[:, [2, 0, 1]], model.head.weight[:, [1, 3, 5]], model.head.bias)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


class Coupled(nn.Module):
    """A normalisation over channels: removing one changes the others."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x = x / (1 + x.abs().mean(1, keepdim=True))
        return self.head(torch.relu(self.conv2(x)).mean((2, 3)))


def test_channels_that_meet_in_a_mean_are_left_whole_and_named() -> None:
    graph = trace(Coupled().eval(), images(2, 8)).graph
    assert [group.name for group in graph.groups] == ["conv2"]
    assert graph.left_whole == {"conv1": "its channels are mixed by mean"}


@pytest.mark.parametrize("bad", [set(), {3}, {0, 7}, {1, 2, 5}, set(range(8))])
def test_admission_drops_exactly_what_fails(bad: set[int]) -> None:
    assert admit(range(8), lambda part: not bad & set(part)) == tuple(sorted(set(range(8)) - bad))


class Returns(nn.Module):
    def __init__(self, shape: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.shape = nn.Conv2d(3, 4, 1), shape

    def forward(self, x: Tensor) -> Any:
        return self.shape(self.conv(x))


class Branching(Returns):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x) * (1 if x.sum() > 0 else 2)


MEAN = Returns(lambda x: x.mean((2, 3)))


@pytest.mark.parametrize(
    ("model", "example", "says"),
    [
        (Returns(lambda x: (x.mean((2, 3)), x)), images(2, 8), "returns a tuple"),
        (Returns(lambda x: {"logits": x.mean((2, 3))}), images(2, 8), "returns a dict"),
        (Returns(lambda x: x), images(2, 8), r"\(2, 4, 8, 8\)"),
        (Returns(lambda x: x.mean((2, 3)).argmax(1, keepdim=True)), images(2, 8), "int64"),
        (Returns(lambda x: x.mean((2, 3)) * float("nan")), images(2, 8), "NaN"),
        (Returns(lambda x: x.reshape(2, -1)), images(2, 8), "dynamic batch"),
        (Branching(lambda x: x.mean((2, 3))), images(2, 8), "decides by the values"),
        (Returns(lambda x: nn.functional.dropout(x).mean((2, 3))), images(2, 8), "randomness"),
        (nn.Sequential(nn.Flatten(), nn.ReLU()), images(2, 8), "no convolution or linear"),
        (MEAN, images(2, 8)[:, :2], "does not run on images"),
        (MEAN, images(0, 8), "at least 1"),
        (MEAN, images(2, 8).long(), "float tensor"),
    ],
)
def test_unfit_models_are_refused_in_one_line(model: nn.Module, example: Tensor, says: str) -> None:
    with pytest.raises(ModelError, match=says) as caught:
        trace(model.eval(), example)
    assert "\n" not in str(caught.value)


def test_one_example_image_is_enough() -> None:
    traced = trace(trained(Chain()), images(1, 8))
    assert run(traced.module, images(5, 8)).shape == (5, 4)


def test_in_place_operators_become_pure() -> None:
    block = nn.Sequential(Block(3, 4, 3, nn.Identity(), 1), nn.Flatten(), nn.Linear(3 * 8 * 8, 3))
    traced = trace(trained(block), images(2, 8))
    batch = images(2, 8, seed=5)
    untouched = batch.clone()
    run(traced.module, batch)
    assert torch.equal(batch, untouched)


class Normed(nn.Module):
    """A stream under a norm over its channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.head = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.flatten(2).mT)
        return self.head((x + self.inner(self.norm(x))).mean(1))


def test_what_stays_whole_is_told_with_the_operator_that_keeps_it() -> None:
    told = trace(Normed().eval(), images(2, 8)).graph.left_whole
    assert set(told) == {"first", "inner"} and all("layer_norm" in reason for reason in told.values())
