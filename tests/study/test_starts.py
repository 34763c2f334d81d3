"""What a search begins with: against every combination of a small space, under the same additive model."""

import random
from itertools import product

import pytest

from autocomp.controllers import warm_start
from autocomp.policy import INT8, Policy
from autocomp.space import PolicySpace
from autocomp.study.sensitivity import Sensitivity, SensitivityRow
from autocomp.study.starts import TARGETS, allocated, losses_of, starting_points
from tests.controllers.problem import policy_space


def row(name: str, count: int, divergence: float | None, lost: float | None, saved: int = 0) -> SensitivityRow:
    return SensitivityRow("channels", name, count, count / 16, divergence, lost, saved, 0)


def drawn(space: PolicySpace, seed: int) -> Sensitivity:
    """Made-up divergences: more for fewer channels, and for a whole branch."""
    generator, graph, rows = random.Random(seed), space.graph, []
    whole = graph.macs(Policy())
    for decision in space.decisions:
        scale = generator.uniform(0.1, 1.0)
        for place, option in enumerate(decision.options[1:], 1):
            if decision.kind == "channels":
                assert isinstance(option, int)
                saved = whole - graph.macs(Policy({decision.name: option}))
                rows.append(row(decision.name, option, scale * place**2, 0.1 * place, saved))
            elif decision.kind == "branch":
                saved = whole - graph.macs(Policy(dropped=frozenset([decision.name])))
                rows.append(SensitivityRow("branch", decision.name, True, None, 12 * scale, None, saved, 0))
    return Sensitivity("key", "m", "d", 32, whole, 1, tuple(rows))


def loss(sensitivity: Sensitivity, policy: Policy) -> float:
    taken = {(name, count) for name, count in policy.kept.items()} | {(name, True) for name in policy.dropped}
    return sum(row.divergence or 0.0 for row in sensitivity.rows if (row.name, row.choice) in taken)


def every_policy(space: PolicySpace) -> list[Policy]:
    decisions = [d for d in space.decisions if d.kind != "precision"]
    places = [space.decisions.index(decision) for decision in decisions]
    found = []
    for choice in product(*(range(len(decision.options)) for decision in decisions)):
        indices = [len(d.options) - 1 if d.kind == "precision" else 0 for d in space.decisions]
        for place, index in zip(places, choice, strict=True):
            indices[place] = index
        found.append(space.decode(indices))
    return list(dict.fromkeys(found))


@pytest.mark.parametrize("seed", range(4))
def test_each_target_gets_the_policy_of_least_summed_divergence(seed: int) -> None:
    space = policy_space(blocks=3)
    sensitivity, whole = drawn(space, seed), space.graph.macs(Policy())
    possible = every_policy(space)
    for target in TARGETS:
        affordable = [policy for policy in possible if space.graph.macs(policy) <= target * whole]
        (found,) = allocated(space, sensitivity, [target]) or (None,)
        if not affordable:
            assert found is None
            continue
        assert found is not None and space.contains(found)
        assert space.graph.macs(found) <= target * whole
        assert loss(sensitivity, found) == pytest.approx(min(loss(sensitivity, policy) for policy in affordable))
        assert all(found.precision(layer.name) == INT8 for layer in space.graph.layers
                   if layer.name not in space.graph.removed_layers(found))  # fmt: skip


def test_starting_points_put_them_before_the_ladder() -> None:
    space = policy_space(blocks=6)
    sensitivity = drawn(space, 1)
    found = starting_points(space, sensitivity, 24, (0.45, *TARGETS))
    best = allocated(space, sensitivity, (0.45, *TARGETS))
    assert len(found) == 24 == len(set(found)) and found[: len(best)] == best
    whole = space.graph.macs(Policy())
    assert 0.40 <= space.graph.macs(found[0]) / whole <= 0.45
    costs = {name: rows[0].divergence or 0 for name, rows in sensitivity.of("branch").items()}
    ladder = warm_start(space, 24, sorted(costs, key=lambda name: costs[name]))
    assert list(found[len(best) :]) == [policy for policy in ladder if policy not in best][: 24 - len(best)]
    assert found == starting_points(space, sensitivity, 24, (0.45, *TARGETS))
    assert len(starting_points(space, sensitivity, 3)) == 3


def test_an_unmeasured_branch_stays() -> None:
    space = policy_space(blocks=3)
    sensitivity = drawn(space, 0)
    rows = tuple(
        SensitivityRow("branch", r.name, True, None, None, None, r.macs_saved, 0) if r.kind == "branch" else r
        for r in sensitivity.rows
    )
    unknown = Sensitivity("key", "m", "d", 32, sensitivity.macs, 1, rows)
    assert not any(policy.dropped for policy in allocated(space, unknown, TARGETS))


def test_a_model_without_choices_of_channels_has_the_ladder_only() -> None:
    space = policy_space(blocks=2, kept=(1.0,), drop_branches=False)
    empty = Sensitivity("key", "m", "d", 32, space.graph.macs(Policy()), 1, ())
    assert starting_points(space, empty, 24) == warm_start(space, 24)


def test_unmeasured_counts_follow_the_lost_output() -> None:
    power = [row("g", count, 3.0 * lost**1.5, lost) for count, lost in ((12, 0.1), (8, 0.2), (4, 0.5))]
    rows = [power[0], row("g", 10, None, 0.15), power[1], row("g", 6, None, 0.3), power[2], row("g", 2, None, 1.0)]
    found = losses_of([row("g", 14, None, 0.05), *rows])
    assert [found[r.count] for r in power] == [r.divergence for r in power]
    assert found[10] == pytest.approx(3.0 * 0.15**1.5) and found[6] == pytest.approx(3.0 * 0.3**1.5)
    assert found[14] == pytest.approx(found[12] / 2) and found[2] == pytest.approx(found[4] * 2)


def test_counts_without_evidence_are_left_out() -> None:
    assert losses_of([row("g", 8, None, None), row("g", 4, 0.5, None)]) == {4: 0.5}
    assert losses_of([row("g", 8, None, 0.3), row("g", 4, None, 0.5)]) == {}
