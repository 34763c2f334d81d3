"""A latency's key: equal where an engine cannot tell the difference, different where it can."""

from dataclasses import replace

import numpy as np
import pytest

from autocomp.engines import emit, initializer_bytes, structure_digest
from autocomp.errors import EngineError
from autocomp.policy import INT8, Policy
from autocomp.quantization import QuantParams, quantize_weights
from tests.engines.conftest import Case
from tests.engines.nets import NATIVE


def test_values_do_not_count(resnet8: Case) -> None:
    policy = Policy(precisions={layer.name: INT8 for layer in resnet8.net.graph.layers})
    tensors, weights, params = resnet8.parts(policy)
    first = structure_digest(emit(resnet8.template, policy, tensors, weights, params, NATIVE))
    rng = np.random.default_rng(1)
    others = {name: rng.standard_normal(tensor.shape).astype(np.float32) for name, tensor in tensors.items()}
    scaled = {name: QuantParams(entry.scale * 1.5, entry.zero_point) for name, entry in params.items()}
    codes = quantize_weights(resnet8.net.graph, policy, others, NATIVE)
    assert structure_digest(emit(resnet8.template, policy, others, codes, scaled, NATIVE)) == first


def test_everything_an_engine_sees_counts(resnet8: Case) -> None:
    everywhere = {layer.name: INT8 for layer in resnet8.net.graph.layers}
    policies = [
        Policy(),
        Policy(precisions=everywhere),
        Policy(precisions={name: INT8 for name in everywhere if name != "layer1.0.conv1"}),
        Policy(kept={"layer2.0.conv1": 8}),
        Policy(kept={"layer2.0.conv1": 8}, precisions=everywhere),
        Policy(dropped=frozenset({"layer2.0"})),
    ]
    digests = {structure_digest(resnet8.emit(policy)) for policy in policies}
    assert len(digests) == len(policies)


def test_zero_point_kind_sharing_and_type_count(resnet8: Case) -> None:
    policy = Policy(precisions={layer.name: INT8 for layer in resnet8.net.graph.layers})
    tensors, weights, params = resnet8.parts(policy)

    def digest(changed: dict[str, QuantParams]) -> str:
        return structure_digest(emit(resnet8.template, policy, tensors, weights, {**params, **changed}, NATIVE))

    base = digest({})
    assert params["relu"].zero_point == 0
    assert digest({"relu": QuantParams(params["relu"].scale, 128)}) != base
    assert digest({"relu": params["relu_1"]}) != base  # two values now share their parameters
    signed = replace(NATIVE, signed_activations=True)
    with pytest.raises(EngineError, match="not of this engine"):
        emit(resnet8.template, policy, tensors, weights, params, signed)
    shifted = {name: QuantParams(entry.scale, entry.zero_point - 128) for name, entry in params.items()}
    assert structure_digest(emit(resnet8.template, policy, tensors, weights, shifted, signed)) != base


def test_bytes_are_those_of_the_arrays(resnet8: Case) -> None:
    data = resnet8.emit(Policy())
    weights = sum(tensor.nbytes for tensor in resnet8.net.tensors.values())
    assert weights < initializer_bytes(data) < weights + 500  # and the constants of slices, pads and the reshape
    with pytest.raises(EngineError, match="no ONNX model"):
        initializer_bytes(b"\x00\x01garbage")
