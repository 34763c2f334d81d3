"""What each single choice of a space costs and saves, as plain data."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from math import ceil, prod
from pathlib import Path
from typing import Any, Literal, Self

from autocomp.errors import InputError
from autocomp.graph import LayerGraph
from autocomp.policy import Policy, Precision
from autocomp.storage import csv_of
from autocomp.study.trust import spearman

__all__ = ["Choice", "Kind", "Sensitivity", "SensitivityRow", "read", "stored_bytes"]

FORMAT = 1
Kind = Literal["channels", "branch", "precision"]
Choice = int | bool | Precision


@dataclass(frozen=True, slots=True)
class SensitivityRow:
    """One choice, made alone on the otherwise uncompressed model.

    Attributes:
        kind, name: of the decision.
        choice: channels kept, True for a dropped branch, or the layer's precision.
        kept: the same as a fraction of the group's channels; None for the other kinds.
        divergence: from the uncompressed model's outputs, KL in nats or the rise of the user's metric; None where it
            was not measured.
        lost_output: least-squares error of the reading layers, as a fraction of their output's variance; None
            where no layer reads the channels, and for the other kinds.
        macs_saved: of one sample.
        bytes_saved: of weights and biases at their stored width.
    """

    kind: Kind
    name: str
    choice: Choice
    kept: float | None
    divergence: float | None
    lost_output: float | None
    macs_saved: int
    bytes_saved: int

    @property
    def count(self) -> int:
        """Channels kept. Raises: TypeError for the other kinds."""
        if self.kind != "channels" or not isinstance(self.choice, int):
            raise TypeError(f"a {self.kind} of {self.name} keeps no number of channels")
        return self.choice

    def to_json(self) -> dict[str, Any]:
        choice = str(self.choice) if isinstance(self.choice, Precision) else self.choice
        return {**asdict(self), "choice": choice}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        choice = data["choice"]
        return cls(**{**data, "choice": Precision.parse(choice) if data["kind"] == "precision" else choice})


@dataclass(frozen=True)
class Sensitivity:
    """What single choices do to one model.

    Attributes:
        key: SHA-256 of all that the numbers depend on.
        model, data: specs.
        images: behind each divergence; of the search split, which the statistics have not seen.
        macs, size_bytes: of the uncompressed model, as the rows count what is saved.
        rows: by kind, then in the space's order, from the least to the most compressed.
        metric: behind each divergence.
    """

    key: str
    model: str
    data: str
    images: int
    macs: int
    size_bytes: int
    rows: tuple[SensitivityRow, ...]
    metric: str = "kl"

    @property
    def unit(self) -> str:
        """Of a divergence."""
        return "nats" if self.metric == "kl" else f"units of {self.metric}"

    @cached_property
    def correlation(self) -> float | None:
        """Spearman's, of the lost output with the divergence over the kept counts; None where it has no meaning."""
        pairs = [
            (row.lost_output, row.divergence)
            for row in self.rows
            if row.lost_output is not None and row.divergence is not None
        ]
        return spearman(*zip(*pairs, strict=True)) if len(pairs) > 2 else None

    def of(self, kind: Kind) -> dict[str, tuple[SensitivityRow, ...]]:
        """Name -> rows of a kind."""
        found: dict[str, list[SensitivityRow]] = {}
        for row in self.rows:
            if row.kind == kind:
                found.setdefault(row.name, []).append(row)
        return {name: tuple(rows) for name, rows in found.items()}

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            **{
                name: getattr(self, name) for name in ("key", "model", "data", "images", "macs", "size_bytes", "metric")
            },
            "correlation": self.correlation,
            "rows": [row.to_json() for row in self.rows],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Raises: InputError if the data is no sensitivity, or one of another format version."""
        try:
            fields = {name: value for name, value in data.items() if name not in ("format", "correlation")}
            if data["format"] != FORMAT:
                raise ValueError(f"format {data['format']}")
            return cls(**{**fields, "rows": tuple(SensitivityRow.from_json(row) for row in fields["rows"])})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"this is no sensitivity ({error!r}): write it with 'autocomp sensitivity'") from error

    def to_csv(self) -> str:
        """One line a row."""
        return csv_of(row.to_json() for row in self.rows)


def read(path: Path, key: str) -> Sensitivity | None:
    """What a file holds; None where it is missing, torn, or of other inputs than ``key`` stands for."""
    try:
        found = Sensitivity.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, InputError):
        return None
    return found if found.key == key else None


def stored_bytes(graph: LayerGraph, policy: Policy) -> int:
    """Bytes of weights and biases, scales not counted: weights at their precision's width, the rest as float32."""
    graph, policy = graph.paired(policy)
    bits = {layer.weight: policy.precision(layer.name).weight_bits for layer in graph.layers}
    shapes = graph.parameter_shapes(policy)
    return sum(ceil(prod(shape) * bits.get(name, 32) / 8) for name, shape in shapes.items())
