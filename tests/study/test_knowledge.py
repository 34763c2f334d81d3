"""Factors of a cost against the cost of whole policies."""

from collections.abc import Sequence

import numpy as np
import pytest

from autocomp.capabilities import Capabilities
from autocomp.controllers import Problem
from autocomp.graph import LayerGraph
from autocomp.hardware import Kernel, kernels_of
from autocomp.policy import FP32, INT8, Policy, digest_of
from autocomp.space import PolicySpace, SearchSpace
from autocomp.study.factors import layer_terms
from autocomp.study.knowledge import losses, terms_of
from autocomp.study.sensitivity import Sensitivity, SensitivityRow
from tests.draws import Uniform
from tests.graphs import concat_net, residual_net


def space_of(graph: LayerGraph) -> PolicySpace:
    space = SearchSpace("test", kept=(1.0, 0.75, 0.5, 0.25), precisions=(FP32, INT8), drop_branches=True)
    return space.restrict(graph, Capabilities((FP32, INT8)))


def hashed(kernels: Sequence[Kernel]) -> list[float]:
    """A cost of each kernel that has nothing to do with any other's."""
    return [int(digest_of(str(kernel))[:6], 16) / 2**24 for kernel in kernels]


@pytest.mark.parametrize("graph", [residual_net(2), concat_net()], ids=["residual", "concat"])
def test_factors_add_up_to_the_cost_of_a_policy(graph: LayerGraph) -> None:
    """Exactly where all layers are of one precision, nearly where they are not: which neighbours count is found by
    changing one at a time. These costs are drawn by the context, so one wrong neighbour is off by half a kernel."""
    terms = terms_of(space_of(graph))
    problem = Problem(tuple(np.zeros(len(options)) for options in terms.options), (layer_terms(terms, hashed, 8),))
    errors = []
    for seed in range(60):
        drawn = terms.space.suggest(Uniform(seed))
        alike = dict.fromkeys((layer.name for layer in graph.layers), (INT8, FP32)[seed % 2])
        for precisions in (alike, drawn.precisions):
            policy = Policy(drawn.kept, frozenset(), precisions)
            (found,) = problem.cost(terms.choices(policy))
            errors.append(found / sum(hashed(list(kernels_of(graph, policy, 8).values()))) - 1)
    assert errors[::2] == pytest.approx([0.0] * 60)
    assert np.mean(np.abs(errors[1::2])) < 0.1


def test_a_dropped_branch_costs_nothing_and_changes_its_neighbours() -> None:
    """Exact for one branch alone; with several, and other precisions, neighbours of neighbours count too."""
    graph = residual_net(3)
    terms = terms_of(space_of(graph))
    problem = Problem(tuple(np.zeros(len(options)) for options in terms.options), (layer_terms(terms, hashed, 8),))
    integer = dict.fromkeys((layer.name for layer in graph.layers), INT8)
    for branch in graph.branch_by_name:
        policy = graph.normalise(Policy(dropped=frozenset([branch]), precisions=integer))
        (found,) = problem.cost(terms.choices(policy))
        assert found == pytest.approx(sum(hashed(list(kernels_of(graph, policy, 8).values()))))


def test_choices_and_policies_are_each_others_reverse() -> None:
    terms = terms_of(space_of(residual_net(2)))
    for seed in range(30):
        policy = terms.space.suggest(Uniform(seed))
        assert terms.policy(terms.choices(policy)) == policy


def test_what_lies_in_a_dropped_branch_is_tied_to_it() -> None:
    terms = terms_of(space_of(residual_net(2)))
    names = [f"{decision.kind} {decision.name}" for decision in terms.space.decisions]
    tied = {names[inner]: names[outer] for inner, outer in terms.tied.items()}
    assert tied == {
        f"{kind} blocks.{k}{layer}": f"branch blocks.{k}"
        for k in (0, 1)
        for kind, layer in (("channels", ".a"), ("precision", ".a"), ("precision", ".b"))
    }
    choices = terms.choices(Policy(dropped=frozenset(["blocks.0"])))
    gone = {names[d] for d, choice in enumerate(choices) if terms.options[d][choice] is None}
    assert gone == {"channels blocks.0.a", "precision blocks.0.a", "precision blocks.0.b"}


def test_losses_are_the_measured_divergences() -> None:
    terms = terms_of(space_of(residual_net(1)))
    rows = (
        SensitivityRow("channels", "blocks.0.a", 8, 0.5, 0.2, 0.1, 10, 10),
        SensitivityRow("channels", "blocks.0.a", 4, 0.25, None, 0.2, 10, 10),
        SensitivityRow("branch", "blocks.0", True, None, 0.7, None, 10, 10),
        SensitivityRow("precision", "head", INT8, None, 0.01, None, 0, 10),
    )
    found = losses(terms, Sensitivity("", "", "", 1, 1, 1, rows))
    by_name = {f"{d.kind} {d.name}": row for d, row in zip(terms.space.decisions, found, strict=True)}
    assert by_name["branch blocks.0"].tolist() == [0.0, 0.7]
    whole, _, half, quarter, gone = by_name["channels blocks.0.a"]
    assert (whole, half, gone) == (0.0, 0.2, 0.0) and quarter == pytest.approx(0.4)
    assert by_name["precision head"].tolist() == [0.0, 0.01]
    assert 0 < by_name["precision stem"][1] < 1e-3
