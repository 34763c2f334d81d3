"""What a search decides (`Policy`) and how a decision is turned into weights (`Recipe`)."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal, Self, get_args, get_type_hints

from autocomp.errors import InputError

__all__ = ["FEWER_BITS", "FP8", "FP32", "INT8", "Importance", "Policy", "Precision", "Recipe", "digest_of"]

FORMAT = 1
SPARSE = "-2:4"
_FLOATS = ("fp32", "fp16", "bf16", "fp8")


def digest_of(data: object) -> str:
    """SHA-256 of plain data, independent of key order."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Precision:
    """How a layer is computed: numeric type of its weights and of the activations it reads and writes, and its rank.

    Written ``fp32``, ``fp16``, ``bf16``, ``fp8`` (E4M3), ``int8``, or ``w4a8`` for weights of 4 and activations of 8
    bits. With ``-2:4`` behind it two of every four weights along the input channels are zero; a layer that is computed
    by two smaller ones with 32 values between them is ``fp32@32``.
    """

    weight: str = "fp32"
    activation: str = "fp32"
    sparse: bool = False
    rank: int | None = None

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise InputError(f"rank {self.rank} leaves nothing of a layer: give at least 1")
        both_float = self.weight in _FLOATS and self.activation == self.weight
        both_int = all(re.fullmatch(r"int[2-8]", kind) for kind in (self.weight, self.activation))
        if not (both_float or both_int):
            raise InputError(
                f"precision {self.weight}/{self.activation} is unknown: use fp32, fp16, bf16, fp8, int8 or w4a8"
            )

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises: InputError if ``text`` names no precision."""
        kind, at, rank = text.partition("@")
        if at:
            if not rank.isdecimal():
                raise InputError(f"precision {text!r} has no rank: write it like fp32@32")
            return replace(cls.parse(kind), rank=int(rank))
        types = text.removesuffix(SPARSE)
        if match := re.fullmatch(r"w([2-8])a([2-8])", types):
            return cls(f"int{match[1]}", f"int{match[2]}", types != text)
        return cls(types, types, types != text)

    @property
    def is_integer(self) -> bool:
        return self.weight.startswith("int")

    @property
    def weight_bits(self) -> int:
        return _bits(self.weight)

    @property
    def activation_bits(self) -> int:
        return _bits(self.activation)

    @property
    def full_rank(self) -> Self:
        """What an engine runs or not, whatever the rank."""
        return replace(self, rank=None)

    def __str__(self) -> str:
        types = self.weight if self.weight == self.activation else f"w{self.weight_bits}a{self.activation_bits}"
        rank = "" if self.rank is None else f"@{self.rank}"
        return f"{types}{SPARSE * self.sparse}{rank}"

    @property
    def arithmetic(self) -> str:
        """What an engine computes in: weights of fewer bits are int8 by then."""
        kind = "int8" if self.is_integer else self.weight
        return f"{kind}{SPARSE * self.sparse}"


def _bits(kind: str) -> int:
    return int(re.sub(r"\D", "", kind))


FP32 = Precision("fp32", "fp32")
INT8 = Precision("int8", "int8")
FP8 = Precision("fp8", "fp8")
FEWER_BITS = tuple(Precision(f"int{bits}", "int8") for bits in range(7, 1, -1))
"""Weights stored in fewer bits; engines without such arithmetic compute with them as int8."""


@dataclass(frozen=True, slots=True)
class Policy:
    """One point of the search space. Only deviations from the uncompressed model are stored.

    Attributes:
        kept: group name -> channels kept, for groups that lose some.
        dropped: names of the residual branches removed.
        precisions: layer name -> precision, for layers that do not run in fp32 at full rank.
    """

    kept: Mapping[str, int] = field(default_factory=dict)
    dropped: frozenset[str] = frozenset()
    precisions: Mapping[str, Precision] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, count in self.kept.items():
            if isinstance(count, bool) or not isinstance(count, int):
                raise InputError(f"group {name} would keep {count!r} channels: give a whole number")
            if count < 1:
                raise InputError(f"group {name} would keep no channel: keep at least 1, or drop its branch")
        object.__setattr__(self, "kept", MappingProxyType(dict(sorted(self.kept.items()))))
        object.__setattr__(self, "dropped", frozenset(self.dropped))
        chosen = {name: p for name, p in sorted(self.precisions.items()) if p != FP32}
        object.__setattr__(self, "precisions", MappingProxyType(chosen))

    def precision(self, layer: str) -> Precision:
        return self.precisions.get(layer, FP32)

    @property
    def digest(self) -> str:
        return digest_of(self.to_json())

    def __hash__(self) -> int:
        return hash(self.digest)

    def __reduce__(self) -> tuple[Any, ...]:  # mapping proxies do not pickle
        return (Policy, (dict(self.kept), self.dropped, dict(self.precisions)))

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "kept": dict(self.kept),
            "dropped": sorted(self.dropped),
            "precisions": {name: str(precision) for name, precision in self.precisions.items()},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Raises: InputError if the data is no policy, or one of another format version."""
        if not isinstance(data, Mapping):
            raise InputError(f"this is no policy, but {type(data).__name__}: give the file that a run wrote")
        if data.get("format") != FORMAT:
            raise InputError(f"policy format {data.get('format')!r} is not {FORMAT}: write it again with this version")
        unknown = set(data) - {"format", "kept", "dropped", "precisions"}
        if unknown:
            raise InputError(f"unknown keys in a policy: {', '.join(sorted(unknown))}")
        try:
            if not isinstance(data["dropped"], list):
                raise TypeError("dropped is not a list")
            precisions = {name: Precision.parse(text) for name, text in data["precisions"].items()}
            return cls(dict(data["kept"]), frozenset(data["dropped"]), precisions)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"this is no policy: {error!r}") from error


Importance = Literal[
    "least_error",
    "group_l2",
    "group_l1",
    "bn_gamma",
    "taylor",
    "fpgm",
    "thinet",
    "lasso",
    "discrimination",
    "activation",
    "random",
]


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a policy is turned into weights. With policy, weights and data it rebuilds the same model bit for bit.

    Attributes:
        importance: which channels of a group go first (see ``compress/importance.py``).
        reconstruction: ``closed_form`` solves each reading layer for the original output from statistics of the
            unpruned model; ``sequential`` solves every layer again on what the compressed layers before it really
            give, in seconds instead of milliseconds; ``auto`` does so, on few images, for policies that drop
            branches and takes the closed form for all others; ``none`` only slices.
        ridge: of the closed-form solve, as a fraction of the mean variance of the layer's inputs.
        recalibration: of the normalised layers' statistics; ``auto`` keeps it where it lowers the divergence
            on the calibration split.
        ranges: of integer activations: ``minmax``, ``percentile``, ``entropy`` or ``mse``.
        percentile: of the activations kept inside the range, in percent; both tails lose alike.
        bias_correction: of the mean shift that quantization leaves in a layer's output. ``auto`` looks at policies
            with a weight below 8 bits only, and keeps it where it lowers the divergence on held-out images of the
            calibration split; with 8 bits there is too little to gain for what it costs a trial.
        equalization: of weight ranges across layers before anything else; ``auto`` in models with depthwise layers.
        rounding: of weights below 8 bits: ``nearest`` in milliseconds, or ``adaround``, which learns it layer by
            layer on the calibration split in about a second a layer.
        images: calibration images used.
        seed: of every draw made while compressing.

    Raises:
        InputError: a choice is unknown, or a number out of range.
    """

    importance: Importance = "least_error"
    reconstruction: Literal["closed_form", "sequential", "auto", "none"] = "closed_form"
    ridge: float = 1e-3
    recalibration: Literal["auto", "always", "never"] = "auto"
    ranges: Literal["minmax", "percentile", "entropy", "mse"] = "minmax"
    percentile: float = 99.99
    bias_correction: Literal["auto", "always", "never"] = "auto"
    equalization: Literal["auto", "always", "never"] = "auto"
    rounding: Literal["nearest", "adaround"] = "adaround"
    images: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(Recipe).items():
            allowed, given = get_args(kind), getattr(self, name)
            if allowed and given not in allowed:
                raise InputError(f"{name} {given!r} of a recipe is unknown: use {', '.join(allowed)}")
        if not (self.ridge >= 0 and 50 <= self.percentile <= 100 and self.images > 0):
            raise InputError("a recipe needs ridge >= 0, 50 <= percentile <= 100 and at least one image")

    @property
    def digest(self) -> str:
        return digest_of(self.to_json())

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        try:
            return cls(**data)
        except TypeError as error:
            raise InputError(f"this is no recipe: {error}") from error
