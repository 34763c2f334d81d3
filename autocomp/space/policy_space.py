"""Every policy that a search may propose for one model on one engine."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, prod
from typing import Literal, Protocol

from autocomp.errors import InputError, SpaceError
from autocomp.graph import LayerGraph
from autocomp.policy import FP32, Policy, Precision, digest_of

__all__ = ["Decision", "PolicySpace", "Source", "widest_first"]

_FLOAT_BITS = {"fp32": 32, "fp16": 16, "bf16": 16, "fp8": 8}


@dataclass(frozen=True, slots=True)
class Decision:
    """One choice to make; its options go from the least to the most compressed.

    Attributes:
        kind: ``channels`` of a group, whether a ``branch`` is dropped, ``precision`` of a layer, its rank with it.
        name: of the group, branch or layer.
        options: channels kept, starting with all of them; (False, True); or precisions, the widest first.
    """

    kind: Literal["channels", "branch", "precision"]
    name: str
    options: tuple[int | bool | Precision, ...]


class Source(Protocol):
    """Whatever makes the choices: a random generator, a sampler's trial."""

    def choose(self, decision: Decision) -> int:
        """Index of one of the decision's options."""
        ...


@dataclass(frozen=True)
class PolicySpace:
    """Every policy a search may propose for one model on one engine.

    Attributes:
        graph: of the model.
        decisions: branches, then groups, then layers, each in the graph's order; one with a single option is the
            same in every policy.
        ratios: kept fractions the uniform policies use, largest first.
    """

    graph: LayerGraph
    decisions: tuple[Decision, ...]
    ratios: tuple[float, ...] = (1.0,)

    @property
    def size(self) -> int:
        """Points of the space: one for each combination of options. Policies that differ only inside dropped
        branches are one model, so there may be fewer distinct policies than points."""
        return prod(len(decision.options) for decision in self.decisions)

    @property
    def digest(self) -> str:
        """SHA-256 of the decisions; the graph has its own."""
        return digest_of([(d.kind, d.name, [str(option) for option in d.options]) for d in self.decisions])

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """Every precision some layer may have, the widest first; ranks apart."""
        options = {option.full_rank for d in self.decisions for option in d.options if isinstance(option, Precision)}
        return widest_first(options or {FP32})

    @property
    def ranks(self) -> frozenset[int]:
        """Every reduced rank some layer may have."""
        options = [option for d in self.decisions for option in d.options if isinstance(option, Precision)]
        return frozenset(option.rank for option in options if option.rank is not None)

    def contains(self, policy: Policy) -> bool:
        """Whether some combination of options gives this model."""
        try:
            self.encode(policy)
        except InputError:
            return False
        return True

    def suggest(self, source: Source) -> Policy:
        """The normalised policy of the options that ``source`` chooses, one for every decision."""
        return self.decode([source.choose(decision) for decision in self.decisions])

    def encode(self, policy: Policy) -> tuple[int, ...]:
        """Index of the option taken for each decision; 0 where a dropped branch leaves the choice without effect.

        Raises:
            SpaceError: the space does not hold the policy.
            InputError: the policy does not fit the model.
        """
        self.graph.validate(policy)
        policy = self.graph.normalise(policy)
        gone = self.graph.removed_layers(policy)
        indices: list[int] = []
        for decision in self.decisions:
            taken = self._taken(policy, decision)
            if decision.kind == "precision" and decision.name in gone:
                indices.append(0)
            elif taken in decision.options:
                indices.append(decision.options.index(taken))
            else:
                raise SpaceError(f"the space has no option {taken} for the {decision.kind} of {decision.name}")
        if self.decode(indices) != policy:
            raise SpaceError("the policy changes a part of the model that the space leaves as it is")
        return tuple(indices)

    def decode(self, indices: Sequence[int]) -> Policy:
        """The normalised policy of one index per decision.

        Raises:
            SpaceError: too many or too few indices, or one without an option.
        """
        if len(indices) != len(self.decisions):
            raise SpaceError(f"{len(indices)} indices for {len(self.decisions)} decisions: give one for each")
        kept: dict[str, int] = {}
        dropped: set[str] = set()
        precisions: dict[str, Precision] = {}
        for decision, index in zip(self.decisions, indices, strict=True):
            if not 0 <= index < len(decision.options):
                raise SpaceError(f"{decision.name} has {len(decision.options)} options, none of index {index}")
            option = decision.options[index]
            if isinstance(option, Precision):
                precisions[decision.name] = option
            elif decision.kind == "channels":
                kept[decision.name] = option
            elif option:
                dropped.add(decision.name)
        return self.graph.normalise(Policy(kept, frozenset(dropped), precisions))

    def nearest(self, kept: Mapping[str, float], precision: Precision) -> Policy:
        """The policy nearest to a wish, with every branch in place.

        Args:
            kept: group -> fraction of its channels to keep; groups not named stay whole. Of two options equally
                near the one that keeps more is taken.
            precision: of every layer; a layer that may not have it gets its widest.
        """
        indices = []
        for decision in self.decisions:
            index = 0
            if decision.kind == "channels" and decision.name in kept:
                wished = kept[decision.name] * self.graph.group_by_name[decision.name].channels
                distances = [abs(count - wished) for count in decision.options if isinstance(count, int)]
                index = distances.index(min(distances))
            elif decision.kind == "precision" and precision in decision.options:
                index = decision.options.index(precision)
            indices.append(index)
        return self.decode(indices)

    def narrowest(self, policy: Policy) -> Policy:
        """The policy with every layer at the lowest rank that it may have in its precision."""
        lowest = dict(policy.precisions)
        for decision in self.decisions:
            own = policy.precision(decision.name).arithmetic
            found = [o for o in decision.options if isinstance(o, Precision) and o.arithmetic == own]
            if found:
                lowest[decision.name] = found[-1]
        return self.graph.normalise(Policy(policy.kept, policy.dropped, lowest))

    def uniform(self) -> tuple[Policy, ...]:
        """Every policy with one kept ratio for all groups and one precision for all layers, no branch dropped,
        from the least to the most compressed (see `work`). Groups and layers that cannot follow come nearest."""
        groups = [decision.name for decision in self.decisions if decision.kind == "channels"]
        wishes = ((ratio, precision) for precision in self.precisions for ratio in self.ratios)
        policies = dict.fromkeys(self.nearest(dict.fromkeys(groups, ratio), wish) for ratio, wish in wishes)
        return tuple(sorted(policies, key=self.work, reverse=True))

    def work(self, policy: Policy) -> int:
        """Multiply-accumulates of one sample, each times the bits of its wider operand: an order, not a time."""
        return sum(macs * max(_bits(policy.precision(layer))) for layer, macs in self.graph.layer_macs(policy).items())

    def _taken(self, policy: Policy, decision: Decision) -> int | bool | Precision:
        if decision.kind == "channels":
            return policy.kept.get(decision.name, self.graph.group_by_name[decision.name].channels)
        if decision.kind == "branch":
            return decision.name in policy.dropped
        return policy.precision(decision.name)


def widest_first(precisions: set[Precision]) -> tuple[Precision, ...]:
    """The precisions by falling activation and weight bits, fp16 before bf16, fp8 before int8, dense before sparse, and
    by falling rank.
    """

    def width(precision: Precision) -> tuple[float, ...]:
        rank = inf if precision.rank is None else precision.rank
        return *_bits(precision), precision.weight in ("fp16", "fp8"), not precision.sparse, rank

    return tuple(sorted(precisions, key=width, reverse=True))


def _bits(precision: Precision) -> tuple[int, int]:
    """Bits of activations and of weights."""
    if precision.is_integer:
        return precision.activation_bits, precision.weight_bits
    bits = _FLOAT_BITS[precision.weight]
    return bits, bits
