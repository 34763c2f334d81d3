"""Divergences of single changes, against compressing and running each model from its input on."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx

from autocomp.compress import compress, divergences, run
from autocomp.compress.recalibrate import divergence
from autocomp.errors import CompressError, DataError
from autocomp.policy import INT8, Policy, Recipe
from tests.compress.conftest import UNSIGNED, Case
from tests.compress.nets import images

LIGHT = Recipe(recalibration="never", bias_correction="never", rounding="nearest")
HELD_OUT = images(70, 16, seed=9)
POLICIES = [
    Policy({"last": 3}),
    Policy(precisions={"hidden": INT8}),
    Policy({"stem": 3}),
    Policy(dropped=frozenset({"plain"})),
    Policy({"inverted.0": 5}),
    Policy(precisions={"stem": INT8}),
    Policy({"left": 2}),
    Policy(precisions={"plain.conv1": INT8}),
    Policy({"last": 4}, frozenset({"plain"}), {"head": INT8}),
    Policy(),
]


def by_hand(case: Case, policy: Policy, recipe: Recipe, held_out: Tensor) -> float:
    module = compress(case.traced, case.statistics, policy, recipe, UNSIGNED, case.images).module
    return divergence(run(case.traced.module, held_out), run(module, held_out))


def measured(case: Case, policies: list[Policy], recipe: Recipe = LIGHT, held_out: Tensor = HELD_OUT) -> list[float]:
    return list(divergences(case.traced, case.statistics, recipe, UNSIGNED, case.images, held_out, policies))


@pytest.mark.parametrize("recipe", [LIGHT, replace(LIGHT, reconstruction="none"), Recipe(recalibration="always")])
def test_each_is_the_divergence_of_the_model_that_compress_gives(mixed: Case, recipe: Recipe) -> None:
    found = measured(mixed, POLICIES, recipe)
    assert found == pytest.approx([by_hand(mixed, policy, recipe, HELD_OUT) for policy in POLICIES], rel=1e-4, abs=1e-7)
    assert found[-1] == 0.0 and all(value > 0 for value in found[:-1])


def test_any_measure_of_outputs_can_take_its_place(mixed: Case) -> None:
    def farthest(reference: np.ndarray, outputs: np.ndarray) -> float:
        return float(np.abs(outputs - reference).max())

    inputs = (mixed.traced, mixed.statistics, LIGHT, UNSIGNED, mixed.images, HELD_OUT)
    found = list(divergences(*inputs, POLICIES[:2], farthest))
    modules = [compress(*inputs[:2], policy, LIGHT, UNSIGNED, mixed.images).module for policy in POLICIES[:2]]
    before = run(mixed.traced.module, HELD_OUT)
    assert found == pytest.approx([float((run(module, HELD_OUT) - before).abs().max()) for module in modules], rel=1e-4)


def test_what_lies_before_a_change_is_not_computed_again(mixed: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    original = fx.Interpreter.run_node

    def counting(self: fx.Interpreter, n: fx.Node) -> Any:
        if n.op == "call_function":
            ran.append(n.name)
        return original(self, n)

    monkeypatch.setattr(fx.Interpreter, "run_node", counting)
    layers = mixed.traced.graph.layer_by_name
    late = [Policy({"last": count}) for count in (6, 4, 2)]
    assert len(measured(mixed, late, held_out=HELD_OUT[:8])) == 3
    assert ran.count(layers["stem"].node) == 1  # on the way to the first change, once
    assert ran.count(layers["last"].node) == ran.count(layers["head"].node) == 3


def test_images_that_do_not_fit_are_refused(mixed: Case) -> None:
    with pytest.raises(DataError, match="shape"):
        measured(mixed, POLICIES, held_out=images(4, 8))
    with pytest.raises(DataError, match="NaN"):
        measured(mixed, POLICIES, held_out=torch.full((4, 3, 16, 16), float("nan")))


def test_outputs_that_are_not_finite_name_the_policy(mixed: Case) -> None:
    huge = torch.full((2, 3, 16, 16), 3e38)  # finite, but sums of it are not
    with pytest.raises(CompressError, match="last"):
        measured(mixed, [Policy({"last": 4})], held_out=huge)
