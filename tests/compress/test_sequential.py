"""Solving in sequence, against least squares on the values that the compressed model really has."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autocomp.compress import Traced, compress, prune, run, sequential, trace
from autocomp.compress.sequential import solve_in_sequence
from autocomp.compress.surgery import kept_positions, rebuild, slice_tensors, tensors_of
from autocomp.errors import CompressError
from autocomp.policy import Policy, Precision, Recipe
from tests.compress.conftest import UNSIGNED, Case
from tests.compress.nets import images, trained

SEQUENTIAL = Recipe(reconstruction="sequential", recalibration="never", ridge=1e-6)


def error(case: Case, policy: Policy, recipe: Recipe) -> float:
    compressed = compress(case.traced, case.statistics, policy, recipe, UNSIGNED, case.images)
    return float((run(compressed.module, case.images) - run(case.traced.module, case.images)).square().mean())


@pytest.mark.parametrize("share", [0.75, 0.5])
def test_it_brings_the_output_nearer_than_statistics_of_the_whole_model(mixed: Case, share: float) -> None:
    policy = Policy({group.name: int(group.channels * share) for group in mixed.traced.graph.groups})
    assert error(mixed, policy, SEQUENTIAL) < 0.8 * error(
        mixed, policy, replace(SEQUENTIAL, reconstruction="closed_form")
    )


def test_it_makes_up_for_dropped_branches(mixed: Case) -> None:
    policy = Policy({}, frozenset([mixed.traced.graph.branches[0].name]))
    assert error(mixed, policy, SEQUENTIAL) < 0.5 * error(mixed, policy, replace(SEQUENTIAL, reconstruction="none"))


def solved(traced: Traced, kept: dict[str, tuple[int, ...]], inputs: Tensor) -> dict[str, Tensor]:
    policy = Policy({name: len(channels) for name, channels in kept.items()})
    positions = kept_positions(traced.graph, kept)
    module = rebuild(traced.module, traced.graph, slice_tensors(tensors_of(traced.module), positions))
    return solve_in_sequence(traced, module, policy, positions, inputs, SEQUENTIAL)


class Residual(nn.Module):
    """A block whose sum meets no ReLU. Input (n, 3, 5, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 8, 3, padding=1)
        self.outer, self.head = nn.Conv2d(8, 6, 1), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = x + self.outer(torch.tanh(self.inner(x)))
        return self.head(x.mean((2, 3)))


def test_a_layer_is_the_least_squares_solution_on_its_real_inputs() -> None:
    model, inputs = trained(Residual()), images(40, 5)
    found = solved(trace(model, inputs[:2]), {"inner": (0, 2, 3, 6)}, inputs)
    with torch.no_grad():
        stream = F.relu(model.stem(inputs))
        inner = torch.tanh(model.inner(stream))
        wanted = model.outer(inner)

    def rows(value: Tensor) -> np.ndarray:
        return value.movedim(1, -1).flatten(0, -2).double().numpy()

    design = np.c_[rows(inner[:, [0, 2, 3, 6]]), np.ones(40 * 25)]
    expected, *_ = np.linalg.lstsq(design, rows(wanted), rcond=None)
    np.testing.assert_allclose(found["outer.weight"].flatten(1).numpy(), expected[:-1].T, rtol=1e-2, atol=1e-3)
    np.testing.assert_allclose(found["outer.bias"].numpy(), expected[-1], rtol=1e-2, atol=1e-3)


def test_a_layer_of_reduced_rank_is_the_least_squares_solution_of_that_rank() -> None:
    """Reduced-rank regression: what least squares gives, on its principal axes."""
    model, inputs, kept = trained(Residual()), images(40, 5), [0, 2, 3, 6]
    traced = trace(model, inputs[:2])
    positions = kept_positions(traced.graph, {"inner": tuple(kept)})
    module = rebuild(traced.module, traced.graph, slice_tensors(tensors_of(traced.module), positions))
    policy = Policy({"inner": 4}, frozenset(), {"outer": Precision(rank=2)})
    found = solve_in_sequence(traced, module, policy, positions, inputs, SEQUENTIAL)
    with torch.no_grad():
        inner = torch.tanh(model.inner(F.relu(model.stem(inputs))))
        wanted = model.outer(inner)
    design, targets = (value.movedim(1, -1).flatten(0, -2).double().numpy() for value in (inner[:, kept], wanted))
    centred = design - design.mean(0)
    best, *_ = np.linalg.lstsq(centred, targets - targets.mean(0), rcond=None)
    axes = np.linalg.svd(centred @ best)[2][:2]
    expected = best @ axes.T @ axes
    weight = found["outer.weight"].flatten(1).double().numpy()
    np.testing.assert_allclose(weight, expected.T, rtol=1e-2, atol=1e-3)
    np.testing.assert_allclose(found["outer.bias"].numpy() + weight @ design.mean(0), targets.mean(0), atol=1e-3)
    assert np.linalg.matrix_rank(weight, tol=1e-4) == 2


def test_a_reduced_layer_that_reads_no_numbers_is_told() -> None:
    traced, inputs = trace(trained(Residual()), images(2, 5)), images(40, 5)
    inputs[0] = torch.nan
    with pytest.raises(CompressError, match="solving stem in sequence gave NaN: raise the recipe's ridge"):
        policy = Policy(precisions={"stem": Precision(rank=1)})
        solve_in_sequence(traced, traced.module, policy, {}, inputs, SEQUENTIAL)


@pytest.mark.parametrize("share", [0.9, 0.8])
def test_layers_behind_make_up_for_what_lost_rank_changes(mixed: Case, share: float) -> None:
    graph = mixed.traced.graph
    ranks = {layer.name: int(share * graph.most_rank(layer.name)) for layer in graph.layers}
    policy = Policy(precisions={name: Precision(rank=rank) for name, rank in ranks.items() if rank})
    assert error(mixed, policy, SEQUENTIAL) < 0.8 * error(
        mixed, policy, replace(SEQUENTIAL, reconstruction="closed_form")
    )


def test_a_branch_makes_up_for_what_its_stream_lacks() -> None:
    """The stem is pruned with the whole stream left: its loss is added to what the branch is solved for."""
    model, inputs = trained(Residual()), images(40, 5)
    traced = trace(model, inputs[:2])
    module = rebuild(traced.module, traced.graph, {**tensors_of(traced.module), "stem.bias": torch.zeros(6)})
    found = solve_in_sequence(traced, module, Policy({"inner": 7}), {}, inputs, SEQUENTIAL)
    tensors = {**tensors_of(module), **found}
    again = rebuild(module, traced.graph, tensors)
    whole, left = run(traced.module, inputs), run(module, inputs)
    assert float((run(again, inputs) - whole).square().mean()) < 0.05 * float((left - whole).square().mean())


def test_an_unpruned_model_stays_as_it_is(mixed: Case) -> None:
    assert solve_in_sequence(mixed.traced, mixed.traced.module, Policy(), {}, mixed.images, Recipe()) == {}


@pytest.mark.parametrize("changed", [Policy({"last": 4}), Policy({}, frozenset(["plain"]))], ids=["pruned", "dropped"])
def test_what_lies_before_the_first_change_is_skipped(
    changed: Policy, mixed: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rest is what it is when nothing is skipped, up to rounding."""
    graph, original = mixed.traced.graph, tensors_of(mixed.traced.module)
    kept = {name: tuple(range(count)) for name, count in changed.kept.items()}
    positions = kept_positions(graph, kept)
    branches = [graph.branch_by_name[name] for name in changed.dropped]
    module = rebuild(mixed.traced.module, graph, slice_tensors(original, positions), branches)
    skipping = solve_in_sequence(mixed.traced, module, changed, positions, mixed.images, SEQUENTIAL)
    monkeypatch.setattr(sequential._Solver, "_equal", lambda *_: False)
    whole = solve_in_sequence(mixed.traced, module, changed, positions, mixed.images, SEQUENTIAL)
    before = whole.keys() - skipping.keys()
    names = [layer.name for layer in graph.layers if layer.weight in whole]
    first = "last" if changed.kept else "inverted.0"
    assert before == {f"{name}.{part}" for name in names[: names.index(first)] for part in ("weight", "bias")}
    for name, tensor in skipping.items():
        torch.testing.assert_close(tensor, whole[name], rtol=1e-2, atol=1e-3)


def test_trials_solve_in_sequence_where_a_branch_goes_and_only_there(
    mixed: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sequential, "RECTIFIED", sequential.RECTIFIED_TRIAL)
    graph = mixed.traced.graph
    pruned = {group.name: group.channels // 2 for group in graph.groups}
    dropping = Policy(pruned, frozenset(["plain"]))

    def tensors(policy: Policy, recipe: Recipe) -> dict[str, np.ndarray]:
        compressed = compress(mixed.traced, mixed.statistics, policy, recipe, UNSIGNED, mixed.images)
        return dict(compressed.tensors)

    automatic = replace(SEQUENTIAL, reconstruction="auto")
    for policy, same, other in (
        (Policy(pruned), "closed_form", "sequential"),
        (dropping, "sequential", "closed_form"),  # there are 64 images: as many as a trial takes
    ):
        found = tensors(policy, automatic)
        equal, unequal = (tensors(policy, replace(SEQUENTIAL, reconstruction=kind)) for kind in (same, other))  # type: ignore[arg-type]
        assert all(np.array_equal(found[name], equal[name]) for name in equal)
        assert not all(np.array_equal(found[name], unequal[name]) for name in unequal)
    # A model so large that a pass over four images would take more than all the rest keeps the closed form.
    monkeypatch.setattr(prune, "SEQUENCE_MACS", 4 * graph.macs(Policy()) - 1)
    found, closed = (tensors(dropping, replace(automatic, reconstruction=kind)) for kind in ("auto", "closed_form"))
    assert all(np.array_equal(found[name], closed[name]) for name in closed)


def test_samples_fewer_than_twice_the_features_are_not_followed() -> None:
    """A head that reads one row an image keeps its weights where images are few."""
    model, inputs = trained(Residual()), images(40, 5)
    traced = trace(model, inputs[:2])
    module = rebuild(traced.module, traced.graph, {**tensors_of(traced.module), "stem.bias": torch.zeros(6)})
    for count, solved_too in ((11, False), (12, True)):
        found = solve_in_sequence(traced, module, Policy({"inner": 7}), {}, inputs[:count], SEQUENTIAL)
        assert ("head.weight" in found) == solved_too and "outer.weight" in found


def test_equal_seeds_give_equal_weights_and_the_model_is_untouched(mixed: Case) -> None:
    policy = Policy({group.name: group.channels // 2 for group in mixed.traced.graph.groups})
    before = {name: tensor.clone() for name, tensor in tensors_of(mixed.traced.module).items()}
    first, second = (
        compress(mixed.traced, mixed.statistics, policy, SEQUENTIAL, UNSIGNED, mixed.images) for _ in range(2)
    )
    assert all(np.array_equal(first.tensors[name], second.tensors[name]) for name in first.tensors)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors_of(mixed.traced.module).items())


def test_fewer_images_where_their_maps_would_not_fit(mixed: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Policy({group.name: group.channels // 2 for group in mixed.traced.graph.groups})
    monkeypatch.setattr(sequential, "ACTIVATIONS_BYTES", 10 * sequential._live_bytes(mixed.traced.graph))
    few = compress(mixed.traced, mixed.statistics, policy, SEQUENTIAL, UNSIGNED, mixed.images)
    monkeypatch.setattr(sequential, "PATCHES_BYTES", 1)
    none = compress(mixed.traced, mixed.statistics, policy, SEQUENTIAL, UNSIGNED, mixed.images)
    plain = compress(
        mixed.traced,
        mixed.statistics,
        policy,
        replace(SEQUENTIAL, reconstruction="closed_form"),
        UNSIGNED,
        mixed.images,
    )
    assert all(np.array_equal(none.tensors[name], plain.tensors[name]) for name in plain.tensors)
    assert not all(np.array_equal(few.tensors[name], plain.tensors[name]) for name in plain.tensors)


def test_outputs_of_the_unpruned_model_may_be_known_before(mixed: Case) -> None:
    graph = mixed.traced.graph
    dropped = Policy({}, frozenset([graph.branches[0].name]))
    module = rebuild(mixed.traced.module, graph, tensors_of(mixed.traced.module), (graph.branches[0],))
    known, some = mixed.statistics.outputs, mixed.images[: sequential_images(mixed)]
    assert {layer.node for layer in graph.layers} <= set(known)
    anew = solve_in_sequence(mixed.traced, module, dropped, {}, some, SEQUENTIAL)
    reused = solve_in_sequence(mixed.traced, module, dropped, {}, some, SEQUENTIAL, known)
    assert anew.keys() == reused.keys() and anew
    for name, tensor in anew.items():
        torch.testing.assert_close(reused[name], tensor, rtol=1e-4, atol=1e-5)
    wrong = {name: value + 1.0 for name, value in known.items()}
    moved = solve_in_sequence(mixed.traced, module, dropped, {}, some, SEQUENTIAL, wrong)
    assert any(not torch.allclose(moved[name], tensor, atol=1e-2) for name, tensor in anew.items())


def test_known_outputs_of_fewer_images_are_not_used(mixed: Case) -> None:
    graph = mixed.traced.graph
    dropped = Policy({}, frozenset([graph.branches[0].name]))
    module = rebuild(mixed.traced.module, graph, tensors_of(mixed.traced.module), (graph.branches[0],))
    few = {name: value[:2] + 1.0 for name, value in mixed.statistics.outputs.items()}
    anew = solve_in_sequence(mixed.traced, module, dropped, {}, mixed.images, SEQUENTIAL)
    reused = solve_in_sequence(mixed.traced, module, dropped, {}, mixed.images, SEQUENTIAL, few)
    assert all(torch.equal(reused[name], tensor) for name, tensor in anew.items())


def sequential_images(case: Case) -> int:
    return min(len(value) for value in case.statistics.outputs.values())
