"""ONNX files say what torch computes."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray

from autocomp.compress import compress, export_compressed, export_onnx, run
from autocomp.policy import INT8, Policy, Recipe
from tests.compress.conftest import UNSIGNED, Case


def logits(model: bytes, batch: torch.Tensor) -> NDArray[np.float32]:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    found: NDArray[np.float32] = session.run(["logits"], {"input": batch.numpy()})[0]
    return found


@pytest.fixture(scope="module")
def exported(mixed: Case) -> bytes:
    return export_onnx(mixed.traced)


def test_the_export_agrees_with_torch_at_any_batch(mixed: Case, exported: bytes) -> None:
    for count in (1, 7):
        expected = run(mixed.traced.module, mixed.images[:count]).numpy()
        np.testing.assert_allclose(logits(exported, mixed.images[:count]), expected, rtol=1e-3, atol=1e-4)


def test_every_layers_tensors_are_initializers_of_their_own(mixed: Case, exported: bytes) -> None:
    found = {
        entry.name: onnx.numpy_helper.to_array(entry) for entry in onnx.load_from_string(exported).graph.initializer
    }
    for layer in mixed.traced.graph.layers:  # the head's and others' biases are all zero, and must not be merged
        for name in (layer.weight, layer.bias):
            np.testing.assert_array_equal(found[name], mixed.traced.module.get_parameter(name).numpy())


def test_exporting_prints_nothing(chain: Case, capfd: pytest.CaptureFixture[str]) -> None:
    export_onnx(chain.traced)
    assert capfd.readouterr() == ("", "")


def test_a_full_export_holds_the_int8_model(chain: Case) -> None:
    policy = Policy({"conv1": 4}, precisions={layer.name: INT8 for layer in chain.traced.graph.layers})
    compressed = compress(chain.traced, chain.statistics, policy, Recipe(), UNSIGNED, chain.images)
    model = export_compressed(compressed)
    expected = run(compressed.module, chain.images).numpy()
    found = logits(model, chain.images)
    assert np.abs(found - expected).max() < 0.05 * expected.std()
    graph = onnx.load_from_string(model).graph
    kinds = [node.op_type for node in graph.node]
    layers = len(chain.traced.graph.layers)
    assert kinds.count("QuantizeLinear") == kinds.count("DequantizeLinear") == len(compressed.params) + layers
