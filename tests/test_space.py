from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autocomp import resources
from autocomp.capabilities import Capabilities
from autocomp.errors import ConfigError, InputError, SpaceError
from autocomp.policy import FP32, INT8, Policy, Precision
from autocomp.space import Decision, PolicySpace, Rule, SearchSpace
from tests.graphs import concat_net, residual_net

BOTH = Capabilities((FP32, INT8), channel_multiple=1)
EIGHTS = Capabilities((FP32, INT8), channel_multiple=8)

precisions = st.lists(
    st.sampled_from([Precision.parse(text) for text in ("fp32", "fp16", "bf16", "int8", "int4", "w4a8")]), min_size=1
).map(tuple)
ratios = st.lists(st.floats(0, 1, exclude_min=True), min_size=1, max_size=5).map(tuple)
texts = st.text(st.characters(codec="utf-8"), max_size=20)
rules = st.builds(
    Rule,
    match=texts.filter(bool),
    kept=st.none() | ratios,
    precisions=st.none() | precisions,
    whole=st.booleans(),
)
spaces = st.builds(
    SearchSpace,
    name=texts,
    description=texts,
    kept=ratios,
    multiple=st.integers(1, 64),
    precisions=precisions,
    drop_branches=st.booleans(),
    exclude=st.lists(texts.filter(bool), max_size=2).map(tuple),
    include=st.lists(texts.filter(bool), max_size=2).map(tuple),
    rules=st.lists(rules, max_size=3).map(tuple),
)


def options(space: PolicySpace) -> dict[tuple[str, str], tuple[object, ...]]:
    return {(decision.kind, decision.name): decision.options for decision in space.decisions}


class TestFiles:
    @given(spaces)
    def test_a_space_survives_its_toml(self, space: SearchSpace) -> None:
        again = SearchSpace.from_toml(space.to_toml())
        assert again == space
        assert again.digest == space.digest

    def test_the_digest_counts_choices_not_names(self) -> None:
        space = SearchSpace("a", "one", kept=(0.5,))
        assert space.digest == SearchSpace("b", "two", kept=(0.5, 0.5)).digest
        assert space.digest != SearchSpace("a", "one", kept=(0.25,)).digest
        assert space.digest != SearchSpace("a", "one", kept=(0.5,), rules=(Rule("x", whole=True),)).digest

    @pytest.mark.parametrize(
        ("text", "complaint"),
        [
            ("keep = [0.5]", "unknown key 'keep': did you mean kept?"),
            ("zzz = 1", "unknown key 'zzz': known are"),
            ('[[rules]]\nmatch = "a"\nhole = true', "unknown key 'hole': did you mean whole?"),
            ("[[rules]]\nwhole = true", "a rule needs a match"),
            ('[[rules]]\nmatch = "a"', "a rule needs a match"),
            ("kept = [1.5]", "at most 1"),
            ("kept = [0.0]", "above 0"),
            ("kept = [nan]", "above 0"),
            ("kept = []", "at least one"),
            ("kept = 0.5", "a list of numbers"),
            ("kept = [true]", "a list of numbers"),
            ("multiple = 0", "1 or more"),
            ("multiple = 2.0", "a whole number"),
            ("multiple = true", "a whole number"),
            ("drop_branches = 1", "true or false"),
            ('exclude = "layer3.*"', "a list of texts"),
            ('include = [""]', "a list of texts"),
            ("description = 3", "a text in quotes"),
            ('precisions = ["int9"]', "int9"),
            ("precisions = []", "precisions is empty"),
            ('precisions = "int8"', "a list"),
            ("rules = 3", "tables"),
            ("format = 2", "format is not 1"),
            ("kept = [", "kept"),
        ],
    )
    def test_a_wrong_file_is_refused_by_name(self, tmp_path: Path, text: str, complaint: str) -> None:
        path = tmp_path / "mine.toml"
        path.write_text(text)
        with pytest.raises(ConfigError) as caught:
            SearchSpace.load(path)
        assert str(path) in str(caught.value)
        if text != "kept = [":  # the parser's own words
            assert complaint in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_an_unreadable_file_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(SpaceError, match=r"nothing\.toml"):
            SearchSpace.load(tmp_path / "nothing.toml")
        (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(SpaceError, match=r"binary\.toml"):
            SearchSpace.load(tmp_path / "binary.toml")

    def test_the_file_names_an_unnamed_space(self, tmp_path: Path) -> None:
        (tmp_path / "mine.toml").write_text("kept = [0.5]")
        assert SearchSpace.load(tmp_path / "mine.toml").name == "mine"


class TestShipped:
    def load(self, name: str) -> SearchSpace:
        return SearchSpace.load(resources.find("search_spaces", name))

    def test_each_has_a_line_and_a_choice(self) -> None:
        shipped = Path(__file__).resolve().parents[1] / "search_spaces"
        names = {path.stem for path in shipped.glob("*.toml")}
        assert {"default", "int8", "prune"} <= names
        for name in names:
            space = SearchSpace.load(shipped / f"{name}.toml")
            assert space.name == name
            assert space.description and "\n" not in space.description
            assert space.restrict(residual_net(2), EIGHTS).size > 1

    def test_what_they_promise(self) -> None:
        graph = residual_net(2)
        assert {kind for kind, _ in options(self.load("default").restrict(graph, EIGHTS))} == {
            "branch",
            "channels",
            "precision",
        }
        assert {kind for kind, _ in options(self.load("int8").restrict(graph, EIGHTS))} == {"precision"}
        assert {kind for kind, _ in options(self.load("prune").restrict(graph, EIGHTS))} == {"branch", "channels"}


class TestRestrict:
    @given(st.integers(1, 300), ratios, st.integers(1, 20), st.integers(1, 20))
    def test_counts_are_the_legal_ones_nearest_to_each_ratio(
        self, channels: int, kept: tuple[float, ...], own: int, engine: int
    ) -> None:
        graph = residual_net(1, channels=channels)
        space = SearchSpace("s", kept=kept, multiple=own, precisions=(FP32, INT8))
        found = options(space.restrict(graph, Capabilities((FP32, INT8), channel_multiple=engine)))
        counts = found.get(("channels", "blocks.0.a"), (channels,))
        legal = [c for c in range(1, channels) if c % own == 0 and c % engine == 0] + [channels]
        assert counts[0] == channels
        assert list(counts) == sorted(set(counts), reverse=True)
        assert set(counts) <= set(legal)
        for ratio in kept:  # no legal count lies nearer than the nearest one offered
            offered = min(abs(count - ratio * channels) for count in counts)
            # all channels need be no multiple, so the multiple just below them may be offered beside them
            assert offered <= min(abs(count - ratio * channels) for count in legal) + 1e-9

    def test_only_what_the_engine_runs(self) -> None:
        space = SearchSpace("s", kept=(0.5,), precisions=(FP32, INT8, Precision.parse("fp16")))
        found = options(space.restrict(residual_net(1), Capabilities((FP32, Precision.parse("fp16")))))
        assert found["precision", "head"] == (FP32, Precision.parse("fp16"))

    def test_a_layer_without_a_precision_is_named(self) -> None:
        with pytest.raises(SpaceError, match=r"wants stem in int8, but the engine runs fp32"):
            SearchSpace("s", kept=(0.5,), precisions=(INT8,)).restrict(residual_net(1), Capabilities())

    @pytest.mark.parametrize("kept", [(1.0,), (0.5,)])
    def test_nothing_left_to_choose(self, kept: tuple[float, ...]) -> None:
        with pytest.raises(SpaceError, match="nothing to choose"):
            SearchSpace("s", kept=kept).restrict(residual_net(1, channels=8), EIGHTS)

    def test_the_later_rule_wins_and_wholes_stay(self) -> None:
        space = SearchSpace(
            "s",
            kept=(0.5,),
            precisions=(FP32, INT8),
            drop_branches=True,
            rules=(
                Rule("blocks.*", kept=(0.25,)),
                Rule("blocks.1.*", kept=(0.75,)),
                Rule("blocks.2*", whole=True),
                Rule("stem", precisions=(FP32,)),
                Rule("head", precisions=(INT8,)),
            ),
        )
        restricted = space.restrict(residual_net(3), BOTH)
        found = options(restricted)
        assert found["channels", "blocks.0.a"] == (16, 4)
        assert found["channels", "blocks.1.a"] == (16, 12)
        assert ("channels", "blocks.2.a") not in found
        assert ("branch", "blocks.2") not in found and ("branch", "blocks.1") in found
        assert found["precision", "blocks.2.a"] == (FP32, INT8)
        assert ("precision", "stem") not in found
        assert found["precision", "head"] == (INT8,)
        assert not restricted.contains(Policy())  # the head is int8 in every policy
        assert restricted.contains(Policy(precisions={"head": INT8}))
        assert all(policy.precision("head") == INT8 for policy in restricted.uniform())

    @pytest.mark.parametrize(
        ("exclude", "include", "channels", "int8"),
        [
            ((), (), "left right", "left right depth head"),
            (("left",), (), "right", "right depth head"),
            (("depth",), (), "left", "left right head"),  # writes the channels of right as well
            (("head",), (), "left right", "left right depth"),  # what it reads may still be pruned
            ((), ("*ight",), "", "right"),  # depth would lose channels
            ((), ("right", "depth"), "right", "right depth"),
            (("right",), ("*",), "left", "left depth head"),  # exclude wins
        ],
    )
    def test_layers_excluded_or_not_included_keep_channels_and_type(
        self, exclude: tuple[str, ...], include: tuple[str, ...], channels: str, int8: str
    ) -> None:
        space = SearchSpace("s", kept=(0.5,), precisions=(FP32, INT8)).narrowed(exclude, include)
        found = options(space.restrict(concat_net(), BOTH))
        assert [name for kind, name in found if kind == "channels"] == channels.split()
        assert [name for kind, name in found if kind == "precision"] == int8.split()

    def test_a_branch_with_an_excluded_layer_stays(self) -> None:
        space = SearchSpace("s", kept=(0.5,), precisions=(INT8,), drop_branches=True, exclude=("blocks.0.b",))
        restricted = space.restrict(residual_net(2), BOTH)
        found = options(restricted)
        assert [name for kind, name in found if kind == "branch"] == ["blocks.1"]
        assert ("precision", "blocks.0.b") not in found  # float in every policy, in a space of int8 alone
        assert found["precision", "blocks.0.a"] == (INT8,)
        assert all(policy.precision("blocks.0.b") == FP32 for policy in restricted.uniform())

    @pytest.mark.parametrize(
        ("fields", "words"),
        [
            (
                {"exclude": ("block.0.*",)},
                r"exclude: .*'block\.0\.\*': the nearest are blocks\.0\.[ab], blocks\.0\.[ab]",
            ),
            ({"include": ("heads",)}, "include: .*'heads': the nearest are head,"),
            ({"exclude": ("stem", "blocks.0")}, "exclude: .*'blocks.0'"),  # a branch, not a layer
            ({"rules": (Rule("blocks.7*", whole=True),)}, "rules: .*'blocks.7\\*'"),
        ],
    )
    def test_a_glob_that_matches_nothing_is_refused(self, fields: dict[str, Any], words: str) -> None:
        with pytest.raises(SpaceError, match=words) as caught:
            SearchSpace("s", kept=(0.5,), **fields).restrict(residual_net(2), BOTH)
        assert "\n" not in str(caught.value)

    def test_what_is_held_may_be_all(self) -> None:
        with pytest.raises(SpaceError, match=r"nothing to choose .* or exclude fewer than 4 layers"):
            SearchSpace("s", kept=(0.5,), exclude=("*",)).restrict(residual_net(1), BOTH)


@pytest.fixture(scope="module")
def space() -> PolicySpace:
    whole = SearchSpace("s", kept=(1.0, 0.75, 0.5, 0.25), precisions=(INT8, FP32), drop_branches=True)
    return whole.restrict(residual_net(2), BOTH)


class TestPolicySpace:
    def test_size_counts_every_combination(self, space: PolicySpace) -> None:
        assert space.size == 2**2 * 4**2 * 2**6

    def test_every_point_round_trips(self) -> None:
        small = SearchSpace("s", kept=(0.5,), precisions=(INT8, FP32), drop_branches=True)
        space = small.restrict(residual_net(1), BOTH)
        points = list(product(*(range(len(decision.options)) for decision in space.decisions)))
        assert len(points) == space.size == 2 * 2 * 2**4
        policies = set()
        for point in points:
            policy = space.decode(point)
            assert space.contains(policy)
            assert space.graph.normalise(policy) == policy
            assert space.decode(space.encode(policy)) == policy
            policies.add(policy)
        # with the branch dropped only the precisions of stem and head are left to choose
        assert len(policies) == 2 * 2**4 + 2**2

    @pytest.mark.parametrize(
        "policy",
        [
            Policy(kept={"blocks.0.a": 15}),
            Policy(kept={"blocks.0.a": 17}),
            Policy(kept={"nowhere": 1}),
            Policy(dropped=frozenset({"nowhere"})),
            Policy(precisions={"nowhere": INT8}),
            Policy(precisions={"stem": Precision.parse("fp16")}),
        ],
    )
    def test_other_policies_are_outside(self, space: PolicySpace, policy: Policy) -> None:
        assert not space.contains(policy)
        with pytest.raises(InputError):
            space.encode(policy)

    def test_what_has_no_decision_must_stay_as_it_is(self) -> None:
        only_head = SearchSpace("s", rules=(Rule("head", precisions=(FP32, INT8)),)).restrict(residual_net(1), BOTH)
        assert only_head.contains(Policy(precisions={"head": INT8}))
        assert not only_head.contains(Policy(precisions={"head": INT8, "stem": INT8}))
        assert not only_head.contains(Policy(kept={"blocks.0.a": 8}))
        assert not only_head.contains(Policy(dropped=frozenset({"blocks.0"})))

    @pytest.mark.parametrize("indices", [[], [0] * 9, [0] * 11, [9] + [0] * 9, [-1] + [0] * 9])
    def test_wrong_indices_are_refused(self, space: PolicySpace, indices: list[int]) -> None:
        assert len(space.decisions) == 10
        with pytest.raises(SpaceError):
            space.decode(indices)

    def test_suggest_asks_every_decision_once_in_order(self, space: PolicySpace) -> None:
        asked: list[Decision] = []

        class Last:
            def choose(self, decision: Decision) -> int:
                asked.append(decision)
                return len(decision.options) - 1 if decision.kind == "channels" else 0

        assert space.suggest(Last()) == Policy(kept={"blocks.0.a": 4, "blocks.1.a": 4})
        assert tuple(asked) == space.decisions

    def test_uniform_is_the_whole_ladder_in_order(self, space: PolicySpace) -> None:
        layers = [layer.name for layer in space.graph.layers]
        expected = {
            Policy({f"blocks.{k}.a": count for k in range(2) if count < 16}, frozenset(), dict.fromkeys(layers, kind))
            for count in (16, 12, 8, 4)
            for kind in (FP32, INT8)
        }
        uniform = space.uniform()
        assert set(uniform) == expected and len(uniform) == len(expected)
        assert uniform[0] == Policy()
        assert uniform[-1] == Policy({"blocks.0.a": 4, "blocks.1.a": 4}, precisions=dict.fromkeys(layers, INT8))
        work = [
            sum(macs * (8 if policy.precisions else 32) for macs in space.graph.layer_macs(policy).values())
            for policy in uniform
        ]
        assert work == sorted(work, reverse=True)

    def test_uniform_merges_equals(self) -> None:
        # with multiples of 8 three ratios of 16 channels are 16 or 8
        space = SearchSpace("s", kept=(1.0, 0.75, 0.5, 0.25)).restrict(concat_net(), BOTH)
        assert len(space.uniform()) == 4
        eights = SearchSpace("s", kept=(1.0, 0.75, 0.5, 0.25)).restrict(residual_net(1), EIGHTS)
        assert eights.uniform() == (Policy(), Policy({"blocks.0.a": 8}))

    def test_the_digest_follows_the_decisions(self, space: PolicySpace) -> None:
        same = SearchSpace("t", kept=(1.0, 0.75, 0.5, 0.25), precisions=(FP32, INT8), drop_branches=True)
        assert same.restrict(residual_net(2), BOTH).digest == space.digest
        assert same.restrict(residual_net(2), EIGHTS).digest != space.digest
