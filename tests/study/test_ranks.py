"""Ranks to begin a search with: against every combination of a small space."""

from dataclasses import replace
from itertools import product
from math import prod
from typing import Any

import pytest
import torch

from autocomp.budget import parse_budgets
from autocomp.capabilities import Capabilities
from autocomp.compress import energies
from autocomp.config import SearchConfig
from autocomp.data import DataOptions, splits_from_objects
from autocomp.errors import CompressError
from autocomp.models import wrap_model
from autocomp.outcome import Event, Note, Observer
from autocomp.policy import INT8, Policy, Precision
from autocomp.space import Rule, SearchSpace
from autocomp.study import starts
from autocomp.study.ranks import with_ranks
from autocomp.study.starts import SHARES, TARGETS, allocated, initial_policies, starting_points
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
    kept = energies(bench.traced, bench.statistics, compressed.kept, compressed.tensors, wide)
    allowed = {d.name: d.options for d in bench.space.decisions if d.kind == "precision"}
    best: tuple[float, Policy] | None = None
    for chosen in product(*(allowed[name] for name in wide)):
        tried = Policy(base.kept, frozenset(), dict(zip(wide, chosen, strict=True)))  # type: ignore[arg-type]
        tried = graph.normalise(tried)
        if graph.macs(tried) <= target * graph.macs(Policy()):
            ranks = {name: tried.precision(name).rank for name in wide}
            score = prod(float(kept[name][rank - 1]) for name, rank in ranks.items() if rank)
            best = max(best or (0.0, tried), (score, tried), key=lambda pair: pair[0])
    found = with_ranks(bench, base, target)
    assert (found is None) == (best is None)
    if found is not None and best is not None:
        ranks = {name: found.precision(name).rank for name in wide}
        assert prod(float(kept[name][rank - 1]) for name, rank in ranks.items() if rank) == pytest.approx(best[0])
        assert graph.macs(found) <= target * graph.macs(Policy())
        assert bench.space.contains(found)


def begun(bench: Workbench, budget: str, observer: Observer = lambda event: None) -> tuple[Policy, ...]:
    sensitivity = measure(bench, QUICK, lambda event: None)
    limits = Limits(parse_budgets([budget]), {"p50": 10.0}, bench.traced.graph.macs(Policy()), 1)
    return initial_policies(bench, limits, sensitivity, observer, 24)


def ranks_of(policy: Policy) -> list[int]:
    return [found.rank for found in policy.precisions.values() if found.rank]


@pytest.mark.parametrize("kind", ["fp32", "int8"])
def test_a_search_with_ranks_begins_with_channels_and_ranks(plain: Workbench, kind: str) -> None:
    """With every share where MACs are asked for, else one for each target, in turn with the other policies."""
    precisions = (Precision.parse(kind),)
    bench = over(plain, SearchSpace("s", kept=KEPT, ranks=(0.75, 0.5, 0.25), precisions=precisions, drop_branches=True))
    graph, whole = bench.traced.graph, bench.traced.graph.macs(Policy())
    sensitivity = measure(bench, QUICK, lambda event: None)

    def expected(target: float, share: float) -> Policy | None:
        (milder,) = allocated(bench.space, sensitivity, (target**share,))
        return with_ranks(bench, milder, target)

    asked, other = begun(bench, "0.6xMACs"), begun(bench, "5ms")
    for found in (asked, other):
        assert len(found) == len(set(found)) == 24 and all(map(bench.space.contains, found))
    wanted = [policy for share in SHARES if (policy := expected(0.6, share)) is not None]
    assert len(wanted) >= 3 and list(asked[: len(wanted)]) == wanted
    assert wanted[0].kept and ranks_of(wanted[0]) and graph.macs(wanted[0]) <= 0.6 * whole
    assert all(wanted[0].precision(name).full_rank == precisions[0] for name in graph.layer_macs(wanted[0]))
    plainly = starting_points(bench.space, sensitivity, 24, (0.6, *TARGETS))
    assert asked[len(wanted) :] == tuple(policy for policy in plainly if policy not in wanted)[: 24 - len(wanted)]
    assert other[0] == starting_points(bench.space, sensitivity, 24)[0] and other[1] == expected(TARGETS[0], SHARES[0])


def test_where_channels_do_not_reach_ranks_do(plain: Workbench) -> None:
    bench = over(plain, SearchSpace("s", ranks=(0.75, 0.5, 0.25)))
    whole = bench.traced.graph.macs(Policy())
    found = [policy for policy in begun(bench, "5ms") if ranks_of(policy)]
    assert {round(bench.traced.graph.macs(policy) / whole, 1) for policy in found} >= {0.5, 0.7, 0.9}


def test_one_that_cannot_be_compressed_is_left_out(plain: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*parts: Any) -> Policy:
        raise CompressError("NaN in block.conv1")

    events: list[Event] = []
    monkeypatch.setattr(starts, "with_ranks", failing)
    found = begun(over(plain, SearchSpace("s", kept=KEPT, ranks=(0.5,))), "0.6xMACs", events.append)
    assert found and all(isinstance(event, Note) and "NaN in block.conv1" in event.text for event in events) and events


def test_without_ranks_nothing_changes(plain: Workbench) -> None:
    bench = over(plain, SearchSpace("s", kept=KEPT))
    sensitivity = measure(bench, QUICK, lambda event: None)
    assert begun(bench, "0.6xMACs") == starting_points(bench.space, sensitivity, 24, (0.6, *TARGETS))
