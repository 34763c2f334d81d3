"""What choices save and cost, on times that are known."""

from datetime import date
from math import prod

import pytest

from autocomp.capabilities import Capabilities
from autocomp.graph import LayerGraph
from autocomp.hardware import HardwareProfile, Kernel, KernelTime, Predictor, kernels_of
from autocomp.policy import FP32, INT8, Policy
from autocomp.results import Score, TrialResult
from autocomp.space import SearchSpace
from autocomp.study.explain import effects_of, without_slow_types
from autocomp.study.sensitivity import Sensitivity, SensitivityRow
from autocomp.study.study import FixedList
from autocomp.study.undoing import Undoing
from tests.graphs import residual_net

BATCH = 8
GRAPH = residual_net(3)
INTEGER = dict.fromkeys((layer.name for layer in GRAPH.layers), INT8)


def ms(kernel: Kernel) -> float:
    """int8 is three times as fast, but for the head, which it slows down."""
    speed = {"conv": 3.0, "linear": 0.5}.get(kernel.op, 1.0) if kernel.precision == "int8" else 1.0
    return 0.001 + kernel.batch * prod(kernel.size) * kernel.channels_in * kernel.channels_out / 1e5 / speed


def profile_of(graph: LayerGraph, *policies: Policy) -> HardwareProfile:
    kernels = {kernel for policy in policies for kernel in kernels_of(graph, policy, BATCH).values()}
    times = tuple(KernelTime(kernel, ms(kernel), 0.0, 100) for kernel in kernels)
    return HardwareProfile("box", "runtime 1", 1, date(2026, 1, 31), True, kernels=times)


def total(policy: Policy) -> float:
    return sum(map(ms, kernels_of(GRAPH, GRAPH.normalise(policy), BATCH).values()))


def test_a_choice_saves_what_the_policy_without_it_takes_longer() -> None:
    kept, dropped = {"blocks.0.a": 8}, frozenset({"blocks.2"})
    policy = GRAPH.normalise(Policy(kept, dropped, INTEGER))
    undone = {
        ("channels", "blocks.0.a"): Policy({}, dropped, INTEGER),
        ("branch", "blocks.2"): Policy(kept, frozenset(), INTEGER),  # what comes back runs as most layers do
        **{
            ("precision", name): Policy(kept, dropped, {k: v for k, v in INTEGER.items() if k != name})
            for name in policy.precisions
        },
    }
    known = Predictor(profile_of(GRAPH, policy, *map(GRAPH.normalise, undone.values())))
    found = effects_of(GRAPH, policy, BATCH, None, known)
    assert {(effect.kind, effect.name) for effect in found} == set(undone)
    for effect in found:
        without = undone[effect.kind, effect.name]
        assert effect.saved_ms is not None and effect.loss is None
        assert effect.saved_ms.value == pytest.approx(total(without) - total(policy))
        assert effect.saved_ms.low < effect.saved_ms.value < effect.saved_ms.high
        assert effect.macs_saved == GRAPH.macs(without) - GRAPH.macs(policy)
    by_name = {(effect.kind, effect.name): effect for effect in found}
    head = by_name["precision", "head"].saved_ms
    assert head is not None and head.high < 0  # int8 there costs time, beyond what the kernels' errors explain
    assert by_name["channels", "blocks.0.a"].choice == "8 of 16"
    assert by_name["branch", "blocks.2"].choice == "removed" and by_name["precision", "stem"].choice == "int8"
    assert [effect.name for effect in found][:3] == ["stem", "blocks.0.a", "blocks.0.a"]  # in the graph's order


def test_losses_are_the_measured_ones_or_read_off_a_line() -> None:
    rows = (
        SensitivityRow("channels", "blocks.0.a", 12, 0.75, None, 0.1, 10, 10),
        SensitivityRow("channels", "blocks.0.a", 8, 0.5, 0.2, 0.2, 10, 10),
        SensitivityRow("channels", "blocks.1.a", 8, 0.5, 0.3, 0.2, 10, 10),
        SensitivityRow("branch", "blocks.2", True, None, 0.7, None, 10, 10),
    )
    policy = GRAPH.normalise(Policy({"blocks.0.a": 12, "blocks.1.a": 8}, frozenset({"blocks.2"}), {"stem": INT8}))
    found = effects_of(GRAPH, policy, BATCH, Sensitivity("", "", "", 1, 1, 1, rows), None)
    losses = {effect.name: (effect.loss, effect.loss_measured) for effect in found}
    assert losses["blocks.0.a"] == (pytest.approx(0.1), False)  # divergence in proportion to the lost output
    assert losses["blocks.1.a"] == (0.3, True) and losses["blocks.2"] == (0.7, True)
    assert losses["stem"] == (None, False)
    assert all(effect.saved_ms is None for effect in found)


def test_a_profile_that_holds_too_little_says_nothing() -> None:
    thin = HardwareProfile("box", "runtime 1", 1, date(2026, 1, 31), True)
    (effect,) = effects_of(GRAPH, Policy(precisions={"stem": INT8}), BATCH, None, Predictor(thin))
    assert effect.saved_ms is None


def test_the_last_proposals_take_back_int8_where_it_is_slower() -> None:
    """The best found with the head in float, which int8 slows down, and nothing else changed; then the list goes on."""
    whole = SearchSpace("test", kept=(1.0, 0.5), precisions=(FP32, INT8))
    space, never = (
        chosen.restrict(GRAPH, Capabilities((FP32, INT8)))
        for chosen in (whole, SearchSpace("test", kept=(1.0, 0.5), precisions=(INT8,)))
    )
    listed = [
        Policy({"blocks.0.a": 8}, precisions=INTEGER),
        Policy(precisions=INTEGER),
        Policy(),
        Policy({"blocks.1.a": 8}),
    ]
    single = [Policy(precisions={n: p for n, p in INTEGER.items() if n != name}) for name in ("", *INTEGER)]
    pruned = [Policy({"blocks.0.a": 8}, precisions=policy.precisions) for policy in single]
    predictor = Predictor(profile_of(GRAPH, *listed, *single, *pruned))

    def undone(policy: Policy) -> Policy:
        return without_slow_types(space, policy, BATCH, predictor)

    controller, asked = Undoing(FixedList(listed), undone, trials=5, last=2), []
    for _ in range(5):
        wave = controller.ask(2)
        asked += wave
        controller.tell([
            TrialResult(n, "search", policy, "ok", (-0.1,), 1.0 + n, Score(1.0 + n, 0.9, 10))
            for n, policy in enumerate(wave, len(asked) - len(wave))
        ])  # fmt: skip
    floats = {name: INT8 for name in INTEGER if name != "head"}
    better = [Policy({"blocks.0.a": 8}, precisions=floats), Policy(precisions=floats)]
    assert asked == [*listed[:3], *better, listed[3]]
    assert without_slow_types(never, listed[1], BATCH, predictor) == listed[1]  # there is no float to go back to
