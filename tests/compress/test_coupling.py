"""Channels followed through operators: what may be cut, and that a cut model is the one with zeros in its place."""

from collections.abc import Callable
from itertools import product

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from autocomp.capabilities import Numerics
from autocomp.compress import export_onnx, run, trace
from autocomp.compress.einsum import matrix_product
from autocomp.compress.surgery import kept_positions, masked, rebuild, slice_tensors, tensors_of
from autocomp.compress.tracing import Traced
from autocomp.engines import emit, load_template
from autocomp.policy import Policy
from tests.compress.nets import images, trained


class Shuffled(nn.Module):
    """ShuffleNetV2's unit: half of the channels pass, the other half is worked on, then both are interleaved."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 16, 1), nn.Linear(16, 5)
        self.units = nn.ModuleList(nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU()) for _ in "12")

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for unit in self.units:
            left, right = x.chunk(2, dim=1)
            n, c, h, w = x.shape
            x = (
                torch.cat([left, unit(right)], 1)
                .view(n, 2, c // 2, h, w)
                .transpose(1, 2)
                .contiguous()
                .view(n, -1, h, w)
            )
        return self.head(x.mean((2, 3)))


class Excited(nn.Module):
    """A squeeze-and-excitation block and a spatial gate between grouped convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.grouped, self.gate = (
            nn.Conv2d(3, 8, 1),
            nn.Conv2d(8, 12, 3, 1, 1, groups=4),
            nn.Conv2d(12, 1, 1),
        )
        self.down, self.up, self.head = nn.Conv2d(12, 4, 1), nn.Conv2d(4, 12, 1), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.grouped(F.silu(self.stem(x))))
        x = x * torch.sigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1))))) * self.gate(x).sigmoid()
        return self.head(x.mean((2, 3)))


class Halves(nn.Module):
    """Channels picked by slices, and others whose positions are named."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.every, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(5, 8, 1), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.every(F.gelu(x[:, 3:]))[:, ::2] + self.every.bias[:4, None, None]
        return self.head(torch.cat([y, x[:, :3], y[:, 1:]], 1)[:, :10].mean((2, 3)))[:, :5]


class Tokens(nn.Module):
    """A transformer's encoder with a class token, by PyTorch's own attention."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.token = nn.Conv2d(3, 16, 4, 4), nn.Parameter(torch.randn(1, 1, 16))
        self.place = nn.Parameter(torch.randn(1, 5, 16))
        self.norm, self.attention = nn.LayerNorm(16), nn.MultiheadAttention(16, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.place
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return self.head((x + self.mlp(x))[:, 0])


class Windows(nn.Module):
    """Attention of shifted windows with a bias for every head and a mask that is written part by part."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.qkv, self.out = nn.Conv2d(3, 12, 2, 2), nn.Linear(12, 36), nn.Linear(12, 12)
        self.table, self.head = nn.Parameter(torch.randn(16, 3)), nn.Linear(12, 5)
        self.register_buffer("index", torch.arange(16).reshape(4, 4).flip(0).reshape(-1))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.roll(self.patches(x).flatten(2).mT, 1, 1)
        mask = x.new_zeros(4, 4)
        mask[:2, 2:] = -5.0
        q, k, v = self.qkv(x).reshape(x.shape[0], 4, 3, 3, 4).permute(2, 0, 3, 1, 4).unbind()
        scores = (
            torch.einsum("b h i d, b h j d -> b h i j", F.normalize(q, dim=-1), k)
            + self.table[self.index].view(4, 4, -1).permute(2, 0, 1)[None]
            + mask
        )
        x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(x.shape[0], 4, 12))
        return self.head(x.mean(1))


CASES: dict[str, tuple[Callable[[], nn.Module], int, dict[str, int]]] = {
    "shuffle": (Shuffled, 4, {"stem": 4, "stem:2": 4, "stem:3": 8}),
    "excitation": (Excited, 4, {"stem": 4, "down": 4}),
    "attention": (Tokens, 8, {"attention.in_proj": 4, "mlp.1": 32}),
    "slices": (Halves, 4, {"stem": 3, "stem:2": 5}),
    "windows": (Windows, 4, {"patches": 12, "qkv": 3}),
}


def traced_case(name: str) -> tuple[nn.Module, Traced, Tensor, dict[str, int]]:
    make, size, groups = CASES[name]
    torch.manual_seed(0)
    model, batch = trained(make()), images(3, size)
    return model, trace(model, batch[:2]), batch, groups


@pytest.mark.parametrize("name", CASES)
def test_a_cut_model_is_the_one_with_zeros_in_its_place(name: str) -> None:
    model, traced, batch, expected = traced_case(name)
    graph, tensors = traced.graph, tensors_of(traced.module)
    with torch.no_grad():
        torch.testing.assert_close(run(traced.module, batch), model(batch), rtol=1e-4, atol=1e-5)
    assert {group.name: group.channels for group in graph.groups} == expected
    kept = {group.name: tuple(range(group.channels))[1::2] for group in graph.groups}
    zeros = run(rebuild(traced.module, graph, masked(graph, tensors, graph.groups, kept)), batch)
    small = slice_tensors(tensors, kept_positions(graph, kept))
    cut = run(rebuild(traced.module, graph, small), batch)
    torch.testing.assert_close(cut, zeros, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(cut, run(traced.module, batch), rtol=1e-2)


@pytest.mark.parametrize("name", ["shuffle", "excitation", "attention", "windows"])
def test_an_exported_file_is_edited_to_the_cut_model(name: str) -> None:
    _, traced, batch, _ = traced_case(name)
    graph = traced.graph
    kept = {
        group.name: (0,) if index else tuple(range(group.channels)[::2]) for index, group in enumerate(graph.groups)
    }
    small = slice_tensors(tensors_of(traced.module), kept_positions(graph, kept))
    policy = Policy({group: len(channels) for group, channels in kept.items()})
    arrays = {parameter: tensor.numpy() for parameter, tensor in small.items()}
    data = emit(load_template(export_onnx(traced), graph), policy, arrays, {}, {}, Numerics(False, False, 127))
    (found,) = onnxruntime.InferenceSession(data).run(None, {"input": batch.numpy()})
    expected = run(rebuild(traced.module, graph, small), batch).numpy()
    assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)


def test_a_head_takes_its_queries_keys_values_and_the_columns_that_read_it() -> None:
    graph = traced_case("attention")[1].graph
    positions = {(m.parameter, m.axis): m.positions[1] for m in graph.group_by_name["attention.in_proj"].members}
    rows = tuple(start + place for start in (0, 16, 32) for place in range(4, 8))
    assert positions == {
        ("attention.in_proj.weight", 0): rows, ("attention.in_proj.bias", 0): rows,
        ("attention.out_proj.weight", 1): (4, 5, 6, 7),
    }  # fmt: skip


def test_what_stops_a_channel_is_named() -> None:
    graph = traced_case("attention")[1].graph
    assert graph.left_whole == dict.fromkeys(
        ("patches", "attention.out_proj", "mlp.3"), "its channels are mixed by layer_norm"
    )
    assert traced_case("slices")[1].graph.left_whole == {"every": "its channels are picked by slice"}


WORK = {
    "attention": 4 * 16 * 48 + 5 * (48 * 16 + 16 * 16 + 2 * 16 * 32) + 16 * 5,  # patches, tokens, head
    "windows": 4 * (12 * 12 + 36 * 12 + 12 * 12) + 12 * 5,
}


@pytest.mark.parametrize("name", WORK)
def test_work_is_counted_for_one_image_wherever_the_batch_is(name: str) -> None:
    """PyTorch's attention has the batch second, then as one axis with the sequence."""
    graph = traced_case(name)[1].graph
    assert graph.macs(Policy()) == WORK[name]
    assert all(min(node.shape, default=1) > 0 for node in graph.nodes)


class Computed(nn.Module):
    """A weight and a bias that are computed from parameters, as a weight norm and Swin V2 do."""

    def __init__(self) -> None:
        super().__init__()
        self.normed = weight_norm(nn.Conv2d(3, 8, 3))
        self.plain, self.head = nn.Conv2d(8, 6, 1), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        bias = self.plain.bias.clone()
        bias[2:4].zero_()
        return self.head(F.relu(F.conv2d(F.silu(self.normed(x)), self.plain.weight, bias)).mean((2, 3)))


def test_what_is_computed_from_parameters_is_a_parameter() -> None:
    torch.manual_seed(0)
    model, batch = Computed().eval(), images(3, 6)
    traced = trace(model, batch[:2])
    graph, tensors = traced.graph, tensors_of(traced.module)
    assert {group.name: group.channels for group in graph.groups} == {"normed": 8, "plain": 6}
    assert graph.left_whole == {} and not tensors["plain.bias"][2:4].any()
    torch.testing.assert_close(tensors["normed.weight"], model.normed.weight)  # type: ignore[arg-type]
    with torch.no_grad():
        torch.testing.assert_close(run(traced.module, batch), model(batch), rtol=1e-4, atol=1e-5)


def test_sums_over_products_are_products_of_matrices() -> None:
    size = dict(zip("bhijk", range(2, 7), strict=True))
    for lead, left, right, out in product(("", "b", "bh"), ("ik", "ki"), ("kj", "jk"), ("ij", "ji")):
        for operands in ((lead + left, lead + right), (lead + right, lead + left)):
            equation = f"{operands[0]}, {operands[1]} -> {lead + out}"
            values = [torch.randn([size[letter] for letter in operand]) for operand in operands]
            sides = matrix_product(equation)
            assert sides is not None
            one, other = (values[side.operand].mT if side.turned else values[side.operand] for side in sides)
            torch.testing.assert_close(one @ other, torch.einsum(equation, *values))
    others = ["bi,bj->bij", "bii,bij->bij", "bij,jk->bik", "...ij,...jk->...ik", "bij,bij->bij", "bik,bkj->bi"]
    assert {matrix_product(equation) for equation in (*others, "bij->bji", "bhij,hbjk->bhik", "ij,jk")} == {None}


class Sorted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 6, 1), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).mean((2, 3)).sort(dim=1)[0])


def test_an_unknown_operator_keeps_what_it_reads() -> None:
    graph = trace(trained(Sorted()), images(2, 4)).graph
    assert graph.groups == () and graph.left_whole == {"conv": "its channels cannot be followed through sort"}
