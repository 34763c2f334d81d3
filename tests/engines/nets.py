"""Small networks written at once as ONNX, as a `LayerGraph` and as an independent torch evaluation."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch.nn import functional as F

from autocomp.capabilities import Numerics
from autocomp.engines.processor import weight_max
from autocomp.graph import Branch, Group, Layer, LayerGraph, Member, Node
from autocomp.policy import Policy
from autocomp.quantization import QuantParams, activation_params, place, quantize_weights

Floats = NDArray[np.float32]
NATIVE = Numerics(signed_activations=False, symmetric_activations=False, weight_max=weight_max())
"""What an engine computes exactly on this processor: only then do its outputs equal fake quantization's."""


@dataclass
class Net:
    """A network under construction; each method adds one operator and returns the name of its value."""

    input_shape: tuple[int, ...]
    seed: int = 0
    nodes: list[Node] = field(default_factory=list)
    layers: list[Layer] = field(default_factory=list)
    branches: list[Branch] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)
    tensors: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    ops: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)
    calls: dict[str, tuple] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)
        self.nodes.append(Node("input", "input", (), self.input_shape))

    def shape(self, value: str) -> tuple[int, ...]:
        return next(node.shape for node in self.nodes if node.name == value)

    def _add(self, op: str, onnx_op: str, inputs: list[str], shape: tuple[int, ...], call, *extra: str, **attributes):
        count = sum(node.op == op for node in self.nodes)
        name = op if not count else f"{op}_{count}"
        self.nodes.append(Node(name, op, tuple(inputs), shape))
        self.ops.append(helper.make_node(onnx_op, [*inputs, *extra], [name], name=f"node_{name}", **attributes))
        self.calls[name] = call
        return name

    def _constant(self, array: NDArray) -> str:
        name = f"val_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(array, name))
        return name

    def conv(self, layer: str, x: str, out: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> str:
        channels, height, width = self.shape(x)
        pad = kernel // 2
        fan = channels // groups * kernel * kernel
        weight = self.rng.normal(0, (2 / fan) ** 0.5, (out, channels // groups, kernel, kernel)).astype(np.float32)
        self.tensors[f"{layer}.weight"] = weight
        self.tensors[f"{layer}.bias"] = self.rng.normal(0, 0.1, out).astype(np.float32)
        size = ((height + 2 * pad - kernel) // stride + 1, (width + 2 * pad - kernel) // stride + 1)

        def call(values, tensors):
            w = tensors[f"{layer}.weight"]
            many = w.shape[0] if groups > 1 else 1
            return F.conv2d(values[0], w, tensors[f"{layer}.bias"], stride, pad, 1, many)

        name = self._add(
            "conv2d", "Conv", [x], (out, *size), call, f"{layer}.weight", f"{layer}.bias",
            group=groups, kernel_shape=[kernel] * 2, pads=[pad] * 4, strides=[stride] * 2, dilations=[1, 1],
        )  # fmt: skip
        self.layers.append(
            Layer(layer, "conv", name, weight.shape, size[0] * size[1], (stride,) * 2, (pad,) * 2, (1, 1), groups)
        )
        return name

    def linear(self, layer: str, x: str, out: int) -> str:
        (features,) = self.shape(x)
        self.tensors[f"{layer}.weight"] = self.rng.normal(0, features**-0.5, (out, features)).astype(np.float32)
        self.tensors[f"{layer}.bias"] = self.rng.normal(0, 0.1, out).astype(np.float32)

        def call(values, tensors):
            return F.linear(values[0], tensors[f"{layer}.weight"], tensors[f"{layer}.bias"])

        name = self._add("linear", "Gemm", [x], (out,), call, f"{layer}.weight", f"{layer}.bias", transB=1)
        self.layers.append(Layer(layer, "linear", name, (out, features), 1))
        return name

    def relu(self, x: str) -> str:
        return self._add("relu", "Relu", [x], self.shape(x), lambda v, t: F.relu(v[0]))

    def relu6(self, x: str) -> str:
        bounds = [self._constant(np.float32(bound)) for bound in (0, 6)]
        return self._add("hardtanh", "Clip", [x], self.shape(x), lambda v, t: F.relu6(v[0]), *bounds)

    def add(self, left: str, right: str) -> str:
        return self._add("add", "Add", [left, right], self.shape(left), lambda v, t: v[0] + v[1])

    def cat(self, left: str, right: str) -> str:
        (a, *rest), (b, *_) = self.shape(left), self.shape(right)
        return self._add("cat", "Concat", [left, right], (a + b, *rest), lambda v, t: torch.cat(v, 1), axis=1)

    def halve(self, x: str, channels: int) -> str:
        """Option A shortcut: every second row and column, channels padded with zeros on both sides."""
        have, height, width = self.shape(x)
        top, two, one = np.array([2**63 - 1]), np.array([2]), np.array([1])
        for axis, shape in ((2, (have, height // 2, width)), (3, (have, height // 2, width // 2))):
            extra = [self._constant(a) for a in (np.array([0]), top, np.array([axis]), two)]
            take = [slice(None)] * axis + [slice(None, None, 2)]
            x = self._add("slice", "Slice", [x], shape, lambda v, t, take=tuple(take): v[0][take], *extra)
        assert one
        before = (channels - have) // 2
        after = channels - have - before
        pads = self._constant(np.array([0, before, 0, 0, 0, after, 0, 0]))
        shape = (channels, height // 2, width // 2)
        return self._add("pad", "Pad", [x], shape, lambda v, t: F.pad(v[0], (0, 0, 0, 0, before, after)), pads)

    def max_pool(self, x: str) -> str:
        channels, height, width = self.shape(x)
        return self._add(
            "max_pool2d", "MaxPool", [x], (channels, height // 2, width // 2), lambda v, t: F.max_pool2d(v[0], 2),
            kernel_shape=[2, 2], strides=[2, 2],
        )  # fmt: skip

    def average(self, x: str) -> str:
        channels, height, width = self.shape(x)
        return self._add(
            "avg_pool2d", "AveragePool", [x], (channels, 1, 1), lambda v, t: F.avg_pool2d(v[0], (height, width)),
            kernel_shape=[height, width], strides=[height, width],
        )  # fmt: skip

    def flatten(self, x: str) -> str:
        features = int(np.prod(self.shape(x)))
        target = self._constant(np.array([-1, features]))
        return self._add("flatten", "Reshape", [x], (features,), lambda v, t: v[0].flatten(1), target, allowzero=1)

    def group(self, name: str, channels: int, *members: tuple[str, int]) -> None:
        """Channels with equal positions on each of the (parameter, axis) pairs."""
        positions = tuple((i,) for i in range(channels))
        self.groups.append(Group(name, channels, tuple(Member(p, axis, positions) for p, axis in members)))

    def branch(self, name: str, add: str, stream: str, branch: str, *layers: str) -> None:
        self.branches.append(Branch(name, add, stream, branch, layers))

    @property
    def graph(self) -> LayerGraph:
        shapes = {name: tensor.shape for name, tensor in self.tensors.items()}
        return LayerGraph(
            tuple(self.nodes), self.nodes[-1].name, tuple(self.layers), tuple(self.groups), tuple(self.branches), shapes
        )

    @property
    def onnx(self) -> bytes:
        output = self.nodes[-1].name
        ops = [onnx.NodeProto.FromString(op.SerializeToString()) for op in self.ops]
        for op in ops:
            op.output[:] = ["logits" if value == output else value for value in op.output]
        initializers = [numpy_helper.from_array(tensor, name) for name, tensor in self.tensors.items()]
        graph = helper.make_graph(
            ops,
            "net",
            [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", *self.input_shape])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", *self.shape(output)])],
            initializers + self.constants,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        return model.SerializeToString()

    def sliced(self, policy: Policy) -> dict[str, NDArray[np.float32]]:
        """The remaining tensors, each pruned group cut to its first channels."""
        gone = self.graph.removed_layers(policy)
        tensors = {name: value for name, value in self.tensors.items() if name.rpartition(".")[0] not in gone}
        for name, count in policy.kept.items():
            for member in self.graph.group_by_name[name].members:
                if member.parameter in tensors:
                    keep = [position for entry in member.positions[:count] for position in entry]
                    tensors[member.parameter] = np.take(tensors[member.parameter], keep, axis=member.axis)
        return tensors

    def values(
        self,
        images: Floats,
        tensors: Mapping[str, Floats],
        policy: Policy = Policy(),  # noqa: B008
        params: Mapping[str, QuantParams] | None = None,
        numerics: Numerics = NATIVE,
    ) -> dict[str, Floats]:
        """Every value computed by torch; with ``params`` int8 layers are fake-quantized as the policy says."""
        graph = self.graph
        plan = place(graph, policy)
        weights = dict(tensors)
        if params is not None:
            codes = quantize_weights(graph, policy, tensors, numerics)
            weights |= {name: weight.real for name, weight in codes.items()}
        torches = {name: torch.from_numpy(np.ascontiguousarray(w)) for name, w in weights.items()}
        bypass = {graph.branch_by_name[b].add: graph.branch_by_name[b].stream for b in policy.dropped}
        gone = graph.removed_layers(policy)
        found = {"input": torch.from_numpy(images)}
        low, high = numerics.activation_range
        for node in graph.nodes:
            if node.name in bypass:
                found[node.name] = found[bypass[node.name]]
                continue
            if node.name != "input":
                layer = graph.layer_by_node.get(node.name)
                if (layer and layer.name in gone) or any(value not in found for value in node.inputs):
                    continue
                found[node.name] = self.calls[node.name]([found[value] for value in node.inputs], torches)
            if params is not None and node.name in plan.values:
                p = params[node.name]
                found[node.name] = torch.fake_quantize_per_tensor_affine(
                    found[node.name], p.scale, p.zero_point, low, high
                )
        return {name: value.numpy() for name, value in found.items()}

    def params(self, images, tensors, policy: Policy, numerics: Numerics = NATIVE) -> dict[str, QuantParams]:
        """Min-max parameters of all values the plan quantizes."""
        found = self.values(images, tensors, policy)
        plan = place(self.graph, policy)
        return {
            value: activation_params(float(found[source].min()), float(found[source].max()), numerics)
            for value, source in plan.values.items()
        }


def resnet(depth: int = 20, width: int = 16, size: int = 32, seed: int = 0) -> Net:
    """The CIFAR ResNet with option A shortcuts, its inner channels prunable and its branches removable."""
    net = Net((3, size, size), seed)
    x = net.relu(net.conv("conv1", "input", width))
    for stage in range(3):
        channels = width * 2**stage
        for index in range((depth - 2) // 6):
            name, stride = f"layer{stage + 1}.{index}", 2 if stage and not index else 1
            y = net.relu(net.conv(f"{name}.conv1", x, channels, stride=stride))
            y = net.conv(f"{name}.conv2", y, channels)
            stream = net.halve(x, channels) if stride == 2 else x
            total = net.add(stream, y)
            net.branch(name, total, stream, y, f"{name}.conv1", f"{name}.conv2")
            net.group(
                f"{name}.conv1", channels, (f"{name}.conv1.weight", 0), (f"{name}.conv1.bias", 0),
                (f"{name}.conv2.weight", 1),
            )  # fmt: skip
            x = net.relu(total)
    net.linear("linear", net.flatten(net.average(x)), 10)
    return net
