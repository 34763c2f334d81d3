"""A search space as its TOML file states it."""

import difflib
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from math import floor, lcm, prod
from pathlib import Path
from typing import Any, Self

from autocomp.capabilities import Capabilities
from autocomp.errors import ConfigError, InputError, SpaceError
from autocomp.graph import Layer, LayerGraph
from autocomp.policy import FP32, Precision, digest_of
from autocomp.space import toml
from autocomp.space.policy_space import Decision, PolicySpace, widest_first

__all__ = ["Rule", "SearchSpace"]

FORMAT = 1
_SHARED = {"kept": toml.numbers, "precisions": toml.precisions, "ranks": toml.numbers}
_RULE = {**_SHARED, "match": toml.string, "whole": toml.boolean}
_SPACE = {
    **_SHARED,
    "format": toml.integer,
    "name": toml.string,
    "description": toml.string,
    "multiple": toml.integer,
    "drop_branches": toml.boolean,
    "exclude": toml.strings,
    "include": toml.strings,
    "rules": toml.tables,
}


@dataclass(frozen=True, slots=True)
class Rule:
    """An exception for the groups, layers and branches whose names match; of two rules the later one wins.

    Attributes:
        match: glob on the name (``layer1.*``).
        kept: ratios instead of the space's.
        precisions: instead of the space's.
        whole: neither pruned nor dropped; its precision is still chosen.
        ranks: instead of the space's.
    """

    match: str
    kept: tuple[float, ...] | None = None
    precisions: tuple[Precision, ...] | None = None
    whole: bool | None = None
    ranks: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not self.match or all(e is None for e in (self.kept, self.precisions, self.whole, self.ranks)):
            raise ConfigError("a rule needs a match and at least one of kept, precisions, whole and ranks")
        if self.ranks is not None:
            object.__setattr__(self, "ranks", _ranks(self.ranks))
        if self.kept is not None:
            object.__setattr__(self, "kept", _largest_first(self.kept))
        if self.precisions is not None:
            object.__setattr__(self, "precisions", _ordered(self.precisions))

    def plain(self) -> dict[str, Any]:
        """What is set, as TOML and JSON know it."""
        fields: dict[str, Any] = {"match": self.match, "kept": self.kept, "whole": self.whole, "ranks": self.ranks}
        if self.precisions is not None:
            fields["precisions"] = _names(self.precisions)
        return {key: value for key, value in fields.items() if value is not None}


@dataclass(frozen=True, slots=True)
class SearchSpace:
    """What may be chosen for any model.

    Attributes:
        name: of the file.
        description: one line.
        kept: fractions in (0, 1] of a group's channels; all of them is always allowed.
        multiple: channels kept are multiples of it, and of the engine's own multiple.
        precisions: a layer may have, where the engine runs them.
        drop_branches: residual branches may be removed whole.
        exclude: globs on layers that stay as they are: all output channels, float32, and no branch with one of them
            is dropped. A `Rule` holds channels or precision alone.
        include: globs on the only layers that are compressed, but for those in ``exclude``; none means all.
        rules: exceptions by name.
        ranks: fractions in (0, 1) of a layer's full rank, at which it may be computed by a pair of smaller layers; the
            full rank is always allowed.
    """

    name: str
    description: str = ""
    kept: tuple[float, ...] = (1.0,)
    multiple: int = 1
    precisions: tuple[Precision, ...] = (FP32,)
    drop_branches: bool = False
    exclude: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    rules: tuple[Rule, ...] = ()
    ranks: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "kept", _largest_first(self.kept))
        object.__setattr__(self, "ranks", _ranks(self.ranks))
        object.__setattr__(self, "precisions", _ordered(self.precisions))
        if self.multiple < 1:
            raise ConfigError(f"multiple = {self.multiple}: it must be 1 or more")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a file; its name without the suffix names the space where the text does not.

        Raises:
            ConfigError: no TOML, an unknown key, a wrong value or another format; the message names the file.
            SpaceError: the file cannot be read.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise SpaceError(f"cannot read the search space {path}: {error}") from error
        return cls.from_toml(text, where=str(path), name=path.stem)

    @classmethod
    def from_toml(cls, text: str, where: str = "search space", name: str = "unnamed") -> Self:
        """Read a text; ``where`` is what an error calls it, ``name`` is used where the text gives none.

        Raises:
            ConfigError: as `load`.
        """
        try:
            fields = {"name": name, **toml.read(tomllib.loads(text), _SPACE)}
            if fields.pop("format", FORMAT) != FORMAT:
                raise ConfigError(f"its format is not {FORMAT}: write it again for this version of autocomp")
            rules = (toml.read(rule, _RULE) for rule in fields.get("rules", ()))
            fields["rules"] = tuple(Rule(**{"match": "", **rule}) for rule in rules)
            return cls(**fields)
        except (tomllib.TOMLDecodeError, InputError) as error:
            raise ConfigError(f"{where}: {error}") from error

    def to_toml(self) -> str:
        """The space as a text that `from_toml` reads back as an equal one."""
        fields = {"format": FORMAT, **self._plain()}
        rules = fields.pop("rules")
        lines = [f"{key} = {toml.write(value)}" for key, value in fields.items()]
        for rule in rules:
            lines += ["", "[[rules]]", *(f"{key} = {toml.write(value)}" for key, value in rule.items())]
        return "\n".join(lines) + "\n"

    @property
    def digest(self) -> str:
        """SHA-256 of what may be chosen; name and description do not count."""
        return digest_of(replace(self, name="", description="")._plain())

    def narrowed(self, exclude: tuple[str, ...], include: tuple[str, ...]) -> Self:
        """The same space with more globs in `exclude` and in `include`."""
        return replace(self, exclude=(*self.exclude, *exclude), include=(*self.include, *include))

    def restrict(self, graph: LayerGraph, capabilities: Capabilities) -> PolicySpace:
        """The choices there are for one model on one engine.

        Raises:
            SpaceError: nothing is left to choose, a glob matches nothing, or a layer has no precision that the engine
                runs.
        """
        self._refuse_globs_without_match(graph)
        held = self._held(graph)
        multiple = lcm(self.multiple, capabilities.channel_multiple)
        decisions = [
            Decision("branch", branch.name, (False, True))
            for branch in graph.branches
            if self.drop_branches and not self._whole(branch.name) and held.isdisjoint(branch.layers)
        ]
        for group in graph.groups:
            whole = self._whole(group.name) or not held.isdisjoint(group.writers)
            kept = (1.0,) if whole else self._kept(group.name)
            decisions.append(Decision("channels", group.name, _counts(group.channels, kept, multiple)))
        for layer in graph.layers:
            allowed = (FP32,) if layer.name in held else self._precisions(layer.name)
            runs = tuple(
                precision
                for precision in allowed
                if precision in capabilities.precisions and (layer.reads_fours or not precision.sparse)
            )
            if not runs:
                raise SpaceError(
                    f"search space {self.name} wants {layer.name} in {' or '.join(_names(allowed))}, but the engine "
                    f"runs {', '.join(_names(capabilities.precisions))}: allow one of these"
                )
            ranks = () if layer.name in held else self._ranks_of(graph, layer, multiple)
            dense = [precision for precision in runs if not precision.sparse]
            pairs = {replace(precision, rank=rank) for precision in dense for rank in ranks}
            decisions.append(Decision("precision", layer.name, widest_first({*runs, *pairs})))
        # A single option that compresses belongs to every policy; one that does not needs no decision.
        decisions = [d for d in decisions if len(d.options) > 1 or (d.kind == "precision" and d.options != (FP32,))]
        if all(len(decision.options) == 1 for decision in decisions):
            raise SpaceError(
                f"search space {self.name} leaves nothing to choose for this model on this engine: allow smaller kept "
                f"ratios (channels go in multiples of {multiple}), another precision, or dropped branches"
                + (f", or exclude fewer than {len(held)} layers" if held else "")
            )
        return PolicySpace(graph, tuple(decisions), self.kept)

    def _held(self, graph: LayerGraph) -> frozenset[str]:
        """The layers that stay as they are."""
        names = frozenset(layer.name for layer in graph.layers)
        included = _matched(names, self.include) if self.include else names
        return names - included | _matched(names, self.exclude)

    def _refuse_globs_without_match(self, graph: LayerGraph) -> None:
        layers = [layer.name for layer in graph.layers]
        parts = [*layers, *(group.name for group in graph.groups), *(branch.name for branch in graph.branches)]
        rules = tuple(rule.match for rule in self.rules)
        for key, globs, names in (
            ("exclude", self.exclude, layers),
            ("include", self.include, layers),
            ("rules", rules, parts),
        ):
            for glob in globs:
                if not _matched(names, (glob,)):
                    near = difflib.get_close_matches(glob, dict.fromkeys(names), n=3, cutoff=0.0)
                    raise SpaceError(
                        f"{key}: no layer of this model matches {glob!r}: the nearest are {', '.join(near)}"
                    )

    def _matching(self, name: str) -> Iterator[Rule]:
        """The rules for a name, the strongest first."""
        return (rule for rule in reversed(self.rules) if fnmatchcase(name, rule.match))

    def _whole(self, name: str) -> bool:
        return next((rule.whole for rule in self._matching(name) if rule.whole is not None), False)

    def _kept(self, name: str) -> tuple[float, ...]:
        return next((rule.kept for rule in self._matching(name) if rule.kept is not None), self.kept)

    def _precisions(self, name: str) -> tuple[Precision, ...]:
        return next((rule.precisions for rule in self._matching(name) if rule.precisions is not None), self.precisions)

    def _ranks_of(self, graph: LayerGraph, layer: Layer, multiple: int) -> tuple[int, ...]:
        """The ranks that a layer may have; none where they would save nothing."""
        ranks = next((rule.ranks for rule in self._matching(layer.name) if rule.ranks is not None), self.ranks)
        full = min(layer.weight_shape[0], prod(layer.weight_shape[1:]))
        return tuple(rank for rank in _counts(full, ranks, multiple)[1:] if rank <= graph.most_rank(layer.name))

    def _plain(self) -> dict[str, Any]:
        """The fields as TOML and JSON know them."""
        fields = {**asdict(self), "precisions": _names(self.precisions)}
        if not self.ranks:
            del fields["ranks"]
        fields["rules"] = [rule.plain() for rule in self.rules]
        return fields


def _matched(names: Iterable[str], globs: tuple[str, ...]) -> frozenset[str]:
    """The names that match any of the globs."""
    return frozenset(name for name in names if any(fnmatchcase(name, glob) for glob in globs))


def _largest_first(kept: tuple[float, ...]) -> tuple[float, ...]:
    if not kept or not all(0 < ratio <= 1 for ratio in kept):
        raise ConfigError(f"kept = {list(kept)}: give at least one fraction above 0 and at most 1")
    return tuple(sorted(set(kept), reverse=True))


def _ranks(fractions: tuple[float, ...]) -> tuple[float, ...]:
    if not all(0 < fraction < 1 for fraction in fractions):
        raise ConfigError(f"ranks = {list(fractions)}: give fractions above 0 and below 1")
    return tuple(sorted(set(fractions), reverse=True))


def _ordered(precisions: tuple[Precision, ...]) -> tuple[Precision, ...]:
    if not precisions:
        raise ConfigError('precisions is empty: give at least one, as in ["int8", "fp32"]')
    if any(precision.rank is not None for precision in precisions):
        raise ConfigError("precisions have no ranks in a space: give fractions, as in ranks = [0.5, 0.25]")
    return widest_first(set(precisions))


def _counts(channels: int, kept: tuple[float, ...], multiple: int) -> tuple[int, ...]:
    """All channels, and the multiples nearest to each ratio of them: at least one multiple, halves rounded up."""
    near = {max(1, floor(ratio * channels / multiple + 0.5)) * multiple for ratio in kept}
    return (channels, *sorted((count for count in near if count < channels), reverse=True))


def _names(precisions: tuple[Precision, ...]) -> list[str]:
    return [str(precision) for precision in precisions]
