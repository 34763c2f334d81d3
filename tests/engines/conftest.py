"""Networks that several tests of the engines share."""

from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray

from autocomp.capabilities import Numerics
from autocomp.engines import Template, emit, load_template
from autocomp.policy import Policy
from autocomp.quantization import QuantParams, QuantWeight, quantize_weights, round_biases
from tests.engines.nets import NATIVE, Net, resnet


@dataclass(frozen=True)
class Case:
    """A network with its template and some images to calibrate and run on."""

    net: Net
    template: Template
    images: NDArray[np.float32]

    def parts(
        self, policy: Policy, numerics: Numerics = NATIVE
    ) -> tuple[dict[str, NDArray[np.float32]], dict[str, QuantWeight], dict[str, QuantParams]]:
        """Tensors as a compressed model has them, biases on the engine's grid; codes; and the values' parameters."""
        tensors = self.net.sliced(policy)
        params = self.net.params(self.images, tensors, policy, numerics)
        weights = quantize_weights(self.net.graph, policy, tensors, numerics)
        return tensors | round_biases(self.net.graph, policy, tensors, weights, params), weights, params

    def emit(self, policy: Policy, numerics: Numerics = NATIVE) -> bytes:
        return emit(self.template, policy, *self.parts(policy, numerics), numerics)

    def expected(self, policy: Policy, numerics: Numerics = NATIVE) -> NDArray[np.float32]:
        """Logits of the fake-quantized torch evaluation."""
        tensors, _, params = self.parts(policy, numerics)
        return self.net.values(self.images, tensors, policy, params, numerics)[self.net.graph.output]


def case(net: Net, images: int = 8) -> Case:
    draw = np.random.default_rng(5).standard_normal((images, *net.input_shape)).astype(np.float32)
    return Case(net, load_template(net.onnx, net.graph), draw)


@pytest.fixture(scope="session")
def resnet20() -> Case:
    return case(resnet(depth=20, size=16))


@pytest.fixture(scope="session")
def resnet8() -> Case:
    return case(resnet(depth=8, width=8, size=8))
