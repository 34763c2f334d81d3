"""What users hand in that is not as it should be: handled, or refused by name, and their model left alone."""

import copy
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autocomp.compress import Compressed, calibration_notes, collect, compress, equalize, run, trace
from autocomp.compress.damping import damped_cholesky
from autocomp.compress.moments import Sums
from autocomp.errors import CompressError, ModelError
from autocomp.models import check_logits, wrap_model
from autocomp.policy import INT8, Policy, Precision, Recipe
from tests.compress.conftest import UNSIGNED, Case
from tests.compress.nets import Chain, Mixed, images, trained


def compressed(model: nn.Module, calibration: Tensor, recipe: Recipe, precision: Precision | None = None) -> Compressed:
    """Half of every group, every branch dropped."""
    traced = equalize(trace(model, calibration[:2]), recipe)
    kept = {group.name: max(1, group.channels // 2) for group in traced.graph.groups}
    dropped = frozenset(branch.name for branch in traced.graph.branches)
    kinds = {layer.name: precision for layer in traced.graph.layers} if precision else {}
    policy, statistics = Policy(kept, dropped, kinds), collect(traced, calibration, recipe)
    return compress(traced, statistics, policy, recipe, UNSIGNED, calibration)


def doubled() -> nn.Module:
    """Channels that are copies of others: their second moments are singular."""
    model = trained(Mixed())
    with torch.no_grad():
        for block in (model.block, model.plain):
            for tensor in (block.conv1.weight, *(t for t in block.bn1.state_dict().values() if t.ndim)):
                tensor[5:] = tensor[:5]
    return model


def dead() -> nn.Module:
    """Channels, and all of a branch, that a ReLU cuts off."""
    model = trained(Mixed())
    with torch.no_grad():
        for norm, count in ((model.stem_bn, 6), (model.plain.bn1, 10)):
            norm.weight[:count], norm.bias[:count] = 0.0, -1.0
    return model


HARD: dict[str, tuple[Callable[[], nn.Module] | None, Tensor]] = {
    "a single image": (None, images(1, 16)),
    "one image again and again": (None, images(1, 16).repeat(40, 1, 1, 1)),
    "blank images": (None, torch.full((40, 3, 16, 16), 0.7)),
    "dead channels": (dead, images(40, 16)),
    "doubled channels": (doubled, images(40, 16)),
}


@pytest.mark.parametrize("kind", HARD)
def test_statistics_without_full_rank_are_solved_all_the_same(kind: str, mixed: Case) -> None:
    make, calibration = HARD[kind]
    traced = trace(make(), calibration[:2]) if make else mixed.traced
    graph, recipe = traced.graph, Recipe(ridge=0.0, rounding="nearest")
    kept = {group.name: max(1, group.channels // 2) for group in graph.groups}
    dropped = frozenset(branch.name for branch in graph.branches)
    statistics = collect(traced, calibration, recipe)
    for reconstruction in ("closed_form", "auto", "sequential"):
        chosen = replace(recipe, reconstruction=reconstruction)  # type: ignore[arg-type]
        found = compress(traced, statistics, Policy(kept, dropped), chosen, UNSIGNED, calibration)
        logits = run(found.module, calibration)
        assert float((logits - statistics.logits).norm() / statistics.logits.norm()) < 0.25
    kinds = {layer.name: Precision.parse("w4a8") for layer in graph.layers}
    found = compress(traced, statistics, Policy(kept, frozenset(), kinds), recipe, UNSIGNED, calibration)
    assert run(found.module, images(20, 16, seed=9)).isfinite().all()


@pytest.mark.parametrize("ridge", [0.0, 1e-3])
def test_a_factor_is_that_of_the_damped_matrix(ridge: float) -> None:
    rows = torch.randn(3, 40, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole = rows.transpose(1, 2) @ rows / 40
    factor = damped_cholesky(whole, ridge)
    means = np.array([np.trace(entry) / 6 for entry in whole.numpy()])
    expected = np.linalg.cholesky(whole.numpy() + ridge * means[:, None, None] * np.eye(6))
    np.testing.assert_allclose(factor.numpy(), expected, rtol=1e-12, atol=1e-12)
    rows[1, :, 3:] = rows[1, :, :3]  # one of the three loses rank: no factor without damping
    single = rows.transpose(1, 2) @ rows / 40 - 1e-12 * torch.eye(6, dtype=torch.float64)
    factor = damped_cholesky(single, ridge)
    torch.testing.assert_close(factor @ factor.transpose(1, 2), single, rtol=2e-3, atol=2e-3)
    assert damped_cholesky(torch.zeros(4, 4), ridge).isfinite().all()
    assert damped_cholesky(torch.full((4, 4), torch.nan), ridge).isnan().all()


def test_rounding_of_constant_inputs_is_no_variance() -> None:
    """What a layer reads differs in the last bits only: a solve must not take that for a signal."""
    graph = trace(trained(Chain()), images(2, 8)).graph
    sums = Sums.of(graph.layer_by_name["head"], graph, 64)
    constant = torch.tensor([0.1, 3.0, 700.0, -2.0, 0.0]).expand(64, 5)
    noise = 1e-7 * torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
    signal = torch.linspace(-1, 1, 64)[:, None]
    for part in torch.cat([constant * (1 + noise), signal], 1).split(16):  # type: ignore[no-untyped-call]
        sums.add(part, torch.Generator())
    gram = sums.moments().gram
    assert not gram[:5].any() and not gram[:, :5].any()
    assert float(gram[5, 5]) == pytest.approx(float(signal.var(correction=0)), rel=1e-5)


def test_values_too_small_for_float32_are_no_variance() -> None:
    """As in the last layers of a deep network that begins with small weights: a solve of their squares gives NaN."""
    graph = trace(trained(Chain()), images(2, 8)).graph
    sums = Sums.of(graph.layer_by_name["head"], graph, 64)
    sizes = torch.tensor([1e-22, 1e-21, 1e-20, 1e-18, 1e-3, 1.0])
    sums.add(sizes * torch.randn(64, 6, generator=torch.Generator().manual_seed(0)), torch.Generator())
    kept = sums.moments().gram.diagonal() > 0
    assert kept.tolist() == [False, False, False, True, True, True]


def test_images_that_are_all_alike_are_told(mixed: Case) -> None:
    graph = mixed.traced.graph
    for calibration, told in ((images(1, 16).repeat(300, 1, 1, 1), True), (images(300, 16), False)):
        found = collect(mixed.traced, calibration, Recipe())
        notes = calibration_notes(graph, found.ranges, found.logits)
        assert any("all 300 calibration images alike" in note for note in notes) == told


@pytest.mark.parametrize("bad", [torch.nan, -torch.inf])
def test_the_first_layer_without_finite_outputs_is_named(bad: float) -> None:
    model = trained(Chain())
    with torch.no_grad():
        model.bn2.running_mean[3] = bad
    with pytest.raises(ModelError, match="first behind bn2"):
        check_logits(wrap_model(model, 4), (3, 8, 8))
    with pytest.raises(ModelError, match="first behind bn2"):
        trace(model, images(2, 8))
    assert not any(part._forward_hooks for part in model.modules())


def test_a_layer_that_overflows_on_calibration_images_only_is_named(chain: Case) -> None:
    with pytest.raises(CompressError, match="output of conv1 is NaN or infinite"):
        collect(chain.traced, torch.cat([chain.images, torch.full((1, 3, 8, 8), 3e38)]), Recipe())


class Unused(Chain):
    """Has a layer that never runs, and one whose output nobody reads."""

    def __init__(self) -> None:
        super().__init__()
        self.never, self.ignored = nn.Conv2d(3, 5, 3), nn.Conv2d(3, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.ignored(x)
        return super().forward(x)


def test_a_layer_that_never_runs_does_not_exist() -> None:
    model, plain = trained(Unused(), seed=1), trained(Chain())
    plain.load_state_dict({n: t for n, t in model.state_dict().items() if not n.startswith(("never", "ignored"))})
    calibration = images(40, 8)
    found, expected = (compressed(m, calibration, Recipe(rounding="nearest"), INT8) for m in (model, plain))
    assert found.graph.groups == expected.graph.groups and found.tensors.keys() == expected.tensors.keys()
    torch.testing.assert_close(run(found.module, calibration), run(expected.module, calibration))


class Shared(nn.Module):
    """A branch, and behind it one convolution used twice. Input (n, 3, 6, 6)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch, self.twice = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1)
        self.inner, self.outer, self.head = nn.Conv2d(6, 8, 1), nn.Conv2d(8, 6, 1), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = x + self.branch(x)
        x = self.twice(F.relu(self.twice(x)))
        return self.head(self.outer(F.relu(self.inner(x))).mean((2, 3)))


class Grouped(nn.Module):
    """A stream read by grouped and by depthwise convolutions. Input (n, 3, 6, 6)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)
        self.grouped, self.depthwise = nn.Conv2d(8, 12, 1, groups=2), nn.Conv2d(12, 12, 1, groups=12)
        self.straight = nn.Conv2d(8, 8, 1, groups=8)
        self.head = nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = x + self.branch(x)
        return self.head(torch.cat([self.depthwise(self.grouped(x)), self.straight(x)], 1).mean((2, 3)))


@pytest.mark.parametrize("reconstruction", ["closed_form", "auto", "sequential"])
def test_shared_weights_keep_what_they_have(reconstruction: str) -> None:
    model, calibration = trained(Shared()), images(60, 6)
    recipe = Recipe(reconstruction=reconstruction, recalibration="never")  # type: ignore[arg-type]
    found = compressed(model, calibration, recipe)
    assert found.policy.dropped == {"branch"}
    for part in ("weight", "bias"):
        np.testing.assert_array_equal(found.tensors[f"twice.{part}"], model.state_dict()[f"twice.{part}"].numpy())


def test_the_mean_of_a_branch_reaches_grouped_and_depthwise_layers() -> None:
    """All is linear behind the branch, so that logits stay the same on average."""
    model, calibration = trained(Grouped()), images(200, 6)
    traced, recipe = trace(model, calibration[:2]), Recipe(recalibration="never")
    statistics = collect(traced, calibration, recipe)
    assert [(group.name, group.channels) for group in traced.graph.groups] == [("stem", 2)]  # by groups of the next
    for kept in ({}, {"stem": 1}):
        policy = Policy(kept, frozenset(["branch"]))
        found = compress(traced, statistics, policy, recipe, UNSIGNED, calibration)
        torch.testing.assert_close(
            run(found.module, calibration).mean(0), run(model, calibration).mean(0), rtol=1e-3, atol=1e-4
        )


class Tokens(nn.Module):
    """Linear residual branches on (n, tokens, features): means by channel are not those of a linear layer's outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.first, self.second = nn.Conv2d(3, 6, 2, 2), nn.Linear(6, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = x + self.first(x)
        x = x + self.second(x)
        return self.head(x.mean(1))


def test_branches_of_tokens_can_be_dropped() -> None:
    model, calibration = trained(Tokens()), images(60, 8)
    graph = trace(model, calibration[:2]).graph
    assert len(graph.branches) == 2
    traced, recipe = trace(model, calibration[:2]), Recipe(reconstruction="auto")
    policy = Policy({}, frozenset(["first"]))
    found = compress(traced, collect(traced, calibration, recipe), policy, recipe, UNSIGNED, calibration)
    assert run(found.module, calibration).isfinite().all()


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_models_of_other_precision_work_as_float32(kind: torch.dtype) -> None:
    model = trained(Chain()).to(kind)
    wrapped = wrap_model(model, 4)
    check_logits(wrapped, (3, 8, 8))
    expected = copy.deepcopy(model).float()
    torch.testing.assert_close(run(wrapped.module, images(4, 8)), run(expected, images(4, 8)))
    assert all(parameter.dtype == kind for parameter in model.parameters())


@pytest.mark.parametrize("part", ["conv2", ""])
def test_a_model_without_values_is_refused_by_the_name_of_its_tensor(part: str) -> None:
    model = Chain()
    model.get_submodule(part).to("meta")
    with pytest.raises(
        ModelError, match=rf"conv{2 if part else 1}\.weight of live:Chain is on the meta device"
    ) as caught:
        wrap_model(model, 4)
    assert "\n" not in str(caught.value)
    assert model.conv2.weight.is_meta


def test_a_model_in_training_comes_back_bit_for_bit() -> None:
    model = trained(Mixed()).train()
    model.plain.eval()  # some parts frozen, as in fine-tuning
    model.stem.weight.requires_grad_(False)
    model.last.weight.grad = torch.ones_like(model.last.weight)

    def seen() -> list[object]:
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        flags = [(p.requires_grad, p.grad is None, p.data_ptr(), p.device) for p in model.parameters()]
        hooks = [len(part._forward_hooks) for part in model.modules()]
        return [state, flags, hooks, [part.training for part in model.modules()]]

    before, generator = seen(), torch.get_rng_state()
    wrapped = wrap_model(model, 5)
    check_logits(wrapped, (3, 16, 16))
    compressed(model, images(40, 16), Recipe(reconstruction="sequential"), INT8)
    after = seen()
    assert after[1:] == before[1:]
    assert all(torch.equal(after[0][name], tensor) for name, tensor in before[0].items())  # type: ignore[index, attr-defined]
    assert torch.equal(torch.get_rng_state(), generator)
