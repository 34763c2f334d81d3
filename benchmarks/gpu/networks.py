"""Networks with random weights, on which latency does not depend, and what is made of them."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
import torchvision

from autocomp.compress import export_onnx, trace
from autocomp.compress.arrays import arrays_of
from autocomp.compress.sparsity import sparse_weights
from autocomp.compress.surgery import tensors_of
from autocomp.engines import Template, emit, load_template
from autocomp.graph import LayerGraph
from autocomp.policy import FP8, INT8, Policy, Precision
from autocomp.protocols import Backend
from autocomp.quantization import QuantParams, fp8_key, place, quantize_weights

__all__ = ["BF16", "FP16", "Network", "Variant", "everywhere", "network", "variants"]

FP16, BF16 = Precision("fp16", "fp16"), Precision("bf16", "bf16")
SPARSE = (replace(FP16, sparse=True), replace(INT8, sparse=True))


@dataclass(frozen=True, slots=True)
class Network:
    """A network that any policy can be written for."""

    graph: LayerGraph
    template: Template
    tensors: Mapping[str, np.ndarray[Any, Any]]

    def file(self, policy: Policy, backend: Backend) -> bytes:
        """The network under a policy, pruned channels simply cut off, int8 with scales that mean nothing."""
        graph, policy = self.graph, self.graph.normalise(policy)
        numerics = backend.capabilities().numerics
        shapes = graph.parameter_shapes(policy)
        kept = {name: array for name, array in self.tensors.items() if name in shapes}
        tensors = {name: array[tuple(map(slice, shapes[name]))] for name, array in kept.items()}
        middle = 0 if numerics.signed_activations else 128 * numerics.symmetric_activations
        plan = place(graph, policy)
        params = {value: QuantParams(0.05, middle) for value in plan.values}
        params |= {fp8_key(value): QuantParams(0.05, 0) for value in plan.fp8.values()}
        tensors |= sparse_weights(graph, policy, tensors)
        weights = quantize_weights(graph, policy, tensors, numerics)
        return emit(self.template, policy, tensors, weights, params, numerics)


@dataclass(frozen=True, slots=True)
class Variant:
    """A policy, and whether TF32 is on."""

    policy: Policy
    tf32: bool = False


@cache
def network(name: str, size: int) -> Network:
    """One of torchvision's classifiers for square images of that side."""
    torch.manual_seed(0)
    traced = trace(torchvision.models.get_model(name, weights=None).eval(), torch.randn(2, 3, size, size))
    return Network(traced.graph, load_template(export_onnx(traced), traced.graph), arrays_of(tensors_of(traced.module)))


def variants(graph: LayerGraph, backend: Backend) -> dict[str, Variant]:
    """Name -> variant; only what the engine runs, what goals are about first."""
    known = backend.capabilities().precisions
    half = Policy({group.name: max(group.channels // 2, 1) for group in graph.groups})
    found = {"fp32": Variant(Policy())}
    for kind in (INT8, FP16):
        if kind in known:
            found[str(kind)] = Variant(everywhere(graph, kind))
    found |= {"fp32, half the channels": Variant(half), "fp32, tf32": Variant(Policy(), tf32=True)}
    for kind in (BF16, FP8, *SPARSE):
        if kind in known:
            found[str(kind)] = Variant(everywhere(graph, kind))
    return found


def everywhere(graph: LayerGraph, kind: Precision) -> Policy:
    """Every layer in one precision; sparse only where channels come in fours."""
    dense = replace(kind, sparse=False)
    return Policy(precisions={layer.name: kind if layer.reads_fours else dense for layer in graph.layers})
