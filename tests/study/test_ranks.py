"""Ranks to begin a search with: against every combination of a small space."""

from dataclasses import replace
from itertools import product
from math import prod

import pytest
import torch

from autocomp.budget import parse_budgets
from autocomp.capabilities import Capabilities
from autocomp.compress import energies
from autocomp.config import SearchConfig
from autocomp.data import DataOptions, splits_from_objects
from autocomp.models import wrap_model
from autocomp.policy import INT8, Policy, Precision
from autocomp.space import Rule, SearchSpace
from autocomp.study.ranks import reduced
from autocomp.study.starts import TARGETS, allocated, initial_policies, starting_points
from autocomp.study.sweep import QUICK, measure
from autocomp.study.trial import Limits
from autocomp.study.workbench import Workbench, prepare
from tests.compress.nets import Mixed, images, trained

KEPT = (1.0, 0.75, 0.5)


@pytest.fixture(scope="module")
def plain() -> Workbench:
    dataset = torch.utils.data.TensorDataset(images(320, 16), torch.arange(320) % 5)
    config = SearchConfig(calibration_images=64, batch=8, space="prune")
    splits = splits_from_objects((dataset, dataset), DataOptions(calibration=64, search=64, selection=64), classes=5)
    return prepare(config, lambda event: None, wrap_model(trained(Mixed())), splits)


def over(bench: Workbench, space: SearchSpace) -> Workbench:
    return replace(bench, space=space.restrict(bench.traced.graph, Capabilities((Precision(), INT8))))


@pytest.mark.parametrize("base", [Policy(), Policy({"block.conv1": 5, "last": 6})], ids=["whole", "pruned"])
@pytest.mark.parametrize("target", [0.95, 0.85, 0.75, 0.1])
def test_it_is_the_best_of_all_combinations(plain: Workbench, base: Policy, target: float) -> None:
    wide = ("block.conv2", "plain.conv1", "last")
    rules = tuple(Rule(name, ranks=(0.75, 0.5, 0.25)) for name in wide)
    bench = over(plain, SearchSpace("s", kept=KEPT, rules=rules))
    graph, compressed = bench.traced.graph, bench.emitter.compress(base)
    kept = energies(bench.traced, bench.statistics, compressed.kept, compressed.tensors)
    allowed = {d.name: d.options for d in bench.space.decisions if d.kind == "precision"}
    best: tuple[float, Policy] | None = None
    for chosen in product(*(allowed[name] for name in wide)):
        tried = Policy(base.kept, frozenset(), dict(zip(wide, chosen, strict=True)))  # type: ignore[arg-type]
        tried = graph.normalise(tried)
        if graph.macs(tried) <= target * graph.macs(Policy()):
            ranks = {name: tried.precision(name).rank for name in wide}
            score = prod(float(kept[name][rank - 1]) for name, rank in ranks.items() if rank)
            best = max(best or (0.0, tried), (score, tried), key=lambda pair: pair[0])
    found = reduced(bench, base, target)
    assert (found is None) == (best is None)
    if found is not None and best is not None:
        ranks = {name: found.precision(name).rank for name in wide}
        assert prod(float(kept[name][rank - 1]) for name, rank in ranks.items() if rank) == pytest.approx(best[0])
        assert graph.macs(found) <= target * graph.macs(Policy())
        assert bench.space.contains(found)


@pytest.mark.parametrize("budget", ["0.6xMACs", "5ms"])
@pytest.mark.parametrize("kind", ["fp32", "int8"])
def test_a_search_with_ranks_begins_with_channels_and_ranks(plain: Workbench, budget: str, kind: str) -> None:
    precisions = (Precision.parse(kind),)
    bench = over(plain, SearchSpace("s", kept=KEPT, ranks=(0.75, 0.5, 0.25), precisions=precisions, drop_branches=True))
    graph = bench.traced.graph
    sensitivity = measure(bench, QUICK, lambda event: None)
    whole = graph.macs(Policy())
    limits = Limits(parse_budgets([budget]), {"p50": 10.0}, whole, 1)
    found = initial_policies(bench, limits, sensitivity, 24)
    assert len(found) == len(set(found)) == 24 and all(map(bench.space.contains, found))
    both = [policy for policy in found[:3] if policy.kept and any(p.rank for p in policy.precisions.values())]
    assert len(both) >= 2
    targets = [0.6] if budget == "0.6xMACs" else TARGETS
    assert graph.macs(found[0]) <= targets[0] * whole
    assert all(found[0].precision(name).full_rank == precisions[0] for name in graph.layer_macs(found[0]))
    (narrow,) = allocated(bench.space, sensitivity, (targets[0] ** 0.5,))
    assert found[0] == reduced(bench, narrow, targets[0])
    others = starting_points(bench.space, sensitivity, 24, (*([0.6] if len(targets) == 1 else []), *TARGETS))
    assert found[-1] in others


def test_without_ranks_nothing_changes(plain: Workbench) -> None:
    bench = over(plain, SearchSpace("s", kept=KEPT))
    sensitivity = measure(bench, QUICK, lambda event: None)
    limits = Limits(parse_budgets(["0.6xMACs"]), {}, bench.traced.graph.macs(Policy()), 1)
    found = initial_policies(bench, limits, sensitivity, 12)
    assert found == starting_points(bench.space, sensitivity, 12, (0.6, *TARGETS))
