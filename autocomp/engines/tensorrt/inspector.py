"""What an engine is made of: which operators were fused, what each part computes in, and where layouts change."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from onnx import ModelProto, NodeProto

from autocomp.engines.attribution import layer_of
from autocomp.engines.template import parse
from autocomp.errors import EngineError

__all__ = ["EngineLayer", "inspected"]

# As TensorRT calls types: before 11 within a sentence about the layout, since then in a field of its own.
_TYPES = (
    (r"fp8|float8|e4m3", "fp8"),
    (r"bf16|bfloat16", "bf16"),
    (r"fp16|half", "fp16"),
    (r"int8", "int8"),
    (r"int32", "int32"),
    (r"int64", "int64"),
    (r"fp32|float", "fp32"),
)


@dataclass(frozen=True, slots=True)
class EngineLayer:
    """What an engine launches at once.

    Attributes:
        name: TensorRT's own.
        kind: of its implementation, as ``CaskConvolution``.
        operators: nodes of the file that were fused into it, in their order; empty for what TensorRT inserted.
        layers: of the model, that these belong to by the weights they read.
        reads, writes: numeric types of its inputs and outputs.
        weights: numeric type of its weights; None where it has none.
        sparse: whether it skips the zeros of 2:4 sparse weights.
        feeds: names of those that read what it writes.
    """

    name: str
    kind: str
    operators: tuple[str, ...]
    layers: tuple[str, ...]
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    weights: str | None
    sparse: bool
    feeds: tuple[str, ...]

    @property
    def reformats(self) -> bool:
        """Whether it only changes the type or the memory layout of a tensor."""
        return self.kind == "Reformat"

    @property
    def precision(self) -> str:
        """What it computes in: the type of its weights, else of what it reads."""
        return self.weights or ", ".join(dict.fromkeys(self.reads)) or "?"

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "precision": self.precision, "reformats": self.reformats}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        own: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}
        return cls(**{name: value for name, value in own.items() if name not in ("precision", "reformats")})


def inspected(text: str, onnx: bytes) -> tuple[EngineLayer, ...]:
    """Read what TensorRT's engine inspector says of a whole engine, in the order in which it runs.

    Args:
        text: JSON of `IEngineInspector`, of an engine that was built with detailed verbosity; ``trtexec
            --exportLayerInfo`` writes the same.
        onnx: the file that the engine was built from.

    Raises:
        EngineError: no such JSON, or of an engine that keeps names only.
    """
    try:
        entries = list(json.loads(text)["Layers"])
        if not entries or not all(isinstance(entry, dict) for entry in entries):
            raise EngineError("the engine keeps only the names of its layers: build it with detailed verbosity")
        return _read(entries, parse(onnx))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise EngineError(f"this is no answer of TensorRT's engine inspector ({error!r}): export it again") from error


def _read(entries: Sequence[Mapping[str, Any]], model: ModelProto) -> tuple[EngineLayer, ...]:
    readers: dict[str, list[str]] = {}
    for entry in entries:
        for tensor in entry.get("Inputs", ()):
            readers.setdefault(tensor["Name"], []).append(entry["Name"])
    place = {node.name: index for index, node in enumerate(model.graph.node)}
    found = []
    for entry in entries:
        operators = tuple(name for name in _operators(entry) if name in place)
        owners = (layer_of(model, place[name]) for name in operators if _computes(model.graph.node[place[name]]))
        outputs, weights = entry.get("Outputs", ()), entry.get("Weights")
        fed = (name for tensor in outputs for name in readers.get(tensor["Name"], ()))
        found.append(
            EngineLayer(
                name=entry["Name"],
                kind=entry.get("LayerType", "?"),
                operators=operators,
                layers=tuple(dict.fromkeys(owner for owner in owners if owner is not None)),
                reads=tuple(map(_type_of, entry.get("Inputs", ()))),
                writes=tuple(map(_type_of, outputs)),
                weights=_type(weights["Type"]) if isinstance(weights, dict) and weights.get("Count") else None,
                sparse=bool(entry.get("HasSparseWeights")),
                feeds=tuple(dict.fromkeys(fed)),
            )
        )
    return tuple(found)


def _operators(entry: Mapping[str, Any]) -> Iterable[str]:
    """Names of nodes of the file: from the metadata, else from those that TensorRT joins to its own name.

    A reformat is named after the layer that it stands in front of, which is another one.
    """
    if entry.get("LayerType") == "Reformat":
        return ()
    marked: list[str] = re.findall(r"\[ONNX Layer: ([^\]\x1e]+)\]", entry.get("Metadata", ""))
    return marked or re.split(r"[^\w.:/-]+", entry["Name"])


def _computes(node: NodeProto) -> bool:
    return node.op_type in ("Conv", "Gemm", "MatMul")


def _type_of(tensor: Mapping[str, Any]) -> str:
    return _type(str(tensor.get("DataType") or tensor.get("Format/Datatype") or ""))


def _type(text: str) -> str:
    """The name that precisions have here; TensorRT's own where it is none of them."""
    return next((name for pattern, name in _TYPES if re.search(pattern, text, re.IGNORECASE)), text or "?")
