import json
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autocomp.errors import InputError
from autocomp.policy import FP32, INT8, Policy, Precision, Recipe, digest_of

names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)
precisions = st.one_of(
    st.sampled_from(["fp32", "fp16", "bf16"]).map(Precision.parse),
    st.builds(lambda w, a: Precision(f"int{w}", f"int{a}"), st.integers(2, 8), st.integers(2, 8)),
)
policies = st.builds(
    Policy,
    kept=st.dictionaries(names, st.integers(1, 4096), max_size=4),
    dropped=st.frozensets(names, max_size=3),
    precisions=st.dictionaries(names, precisions, max_size=4),
)
recipes = st.builds(
    Recipe,
    reconstruction=st.sampled_from(["closed_form", "sequential", "auto", "none"]),
    ridge=st.floats(0, 1),
    recalibration=st.sampled_from(["auto", "always", "never"]),
    ranges=st.sampled_from(["minmax", "percentile", "entropy", "mse"]),
    percentile=st.floats(50, 100),
    images=st.integers(1, 10**6),
    seed=st.integers(0, 2**32),
)


@given(precisions)
def test_a_precision_is_read_as_written(precision: Precision) -> None:
    assert Precision.parse(str(precision)) == precision


@pytest.mark.parametrize("text", ["int9", "int1", "w9a8", "w8a16", "fp64", "", "INT8", "int88", "int8 "])
def test_an_unknown_precision_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="unknown"):
        Precision.parse(text)


@pytest.mark.parametrize(("weight", "activation"), [("int8", "fp32"), ("fp16", "fp32"), ("fp32", "int8")])
def test_mixed_kinds_are_refused(weight: str, activation: str) -> None:
    with pytest.raises(InputError):
        Precision(weight, activation)


@given(policies)
def test_a_policy_survives_json_and_pickle(policy: Policy) -> None:
    again = Policy.from_json(json.loads(json.dumps(policy.to_json())))
    assert again == policy and hash(again) == hash(policy) and again.digest == policy.digest
    assert pickle.loads(pickle.dumps(policy)) == policy


@given(policies, policies)
def test_digests_tell_policies_apart(one: Policy, other: Policy) -> None:
    assert (one == other) == (one.digest == other.digest)


@given(policies)
def test_order_does_not_matter(policy: Policy) -> None:
    backwards = Policy(
        dict(reversed(policy.kept.items())),
        policy.dropped,
        dict(reversed(policy.precisions.items())),
    )
    assert backwards == policy and backwards.digest == policy.digest
    assert list(backwards.kept) == sorted(policy.kept)


def test_fp32_is_no_choice() -> None:
    assert Policy(precisions={"a": FP32, "b": INT8}) == Policy(precisions={"b": INT8})
    assert Policy().precision("anything") == FP32


@pytest.mark.parametrize("count", [0, -1, True, 2.0, "3", None])
def test_a_wrong_count_is_refused_with_the_group(count: Any) -> None:
    with pytest.raises(InputError, match=r"layer1\.0"):
        Policy(kept={"layer1.0": count})


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"format": None},
        {"extra": 1},
        {"kept": [1]},
        {"kept": {"a": 1.5}},
        {"kept": None},
        {"dropped": "abc"},
        {"dropped": [["a"]]},
        {"precisions": {"a": "int99"}},
        {"precisions": {"a": 8}},
        {"precisions": ["a"]},
    ],
)
def test_wrong_data_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        Policy.from_json({**Policy().to_json(), **change})


@pytest.mark.parametrize("key", ["format", "kept", "dropped", "precisions"])
def test_missing_data_is_refused(key: str) -> None:
    data = Policy().to_json()
    del data[key]
    with pytest.raises(InputError):
        Policy.from_json(data)


@pytest.mark.parametrize("data", [[], None, "policy", 3])
def test_other_json_is_refused(data: Any) -> None:
    with pytest.raises(InputError):
        Policy.from_json(data)


@given(recipes)
def test_a_recipe_survives_json(recipe: Recipe) -> None:
    again = Recipe.from_json(json.loads(json.dumps(recipe.to_json())))
    assert again == recipe and again.digest == recipe.digest


def test_every_field_of_a_recipe_counts() -> None:
    changes: list[dict[str, Any]] = [{"ridge": 0.5}, {"images": 3}, {"seed": 1}, {"ranges": "percentile"}]
    assert len({Recipe(**change).digest for change in [{}, *changes]}) == 1 + len(changes)
    with pytest.raises(InputError, match="colour"):
        Recipe.from_json({"colour": "red"})


@pytest.mark.parametrize(
    "change", [{"ranges": "guess"}, {"importance": ""}, {"ridge": -1.0}, {"percentile": 101.0}, {"images": 0}]
)
def test_a_recipe_out_of_range_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(change)).removesuffix("s")):
        Recipe.from_json(change)


def test_a_digest_refuses_what_json_cannot_hold() -> None:
    with pytest.raises(ValueError):
        digest_of({"ridge": float("nan")})
    assert digest_of({"a": 1, "b": 2}) == digest_of({"b": 2, "a": 1})
