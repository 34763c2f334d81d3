"""ONNX files of a traced model and of a compressed one."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from autocomp.compress.apply import Compressed
from autocomp.compress.naming import reason_of
from autocomp.compress.onnx_sizes import renew_sizes, write_products, write_sizes
from autocomp.compress.surgery import rebuild, tensors_of
from autocomp.compress.tracing import Traced
from autocomp.errors import ModelError
from autocomp.fake_quant import fake_quantize
from autocomp.graph import LayerGraph
from autocomp.rows import part

__all__ = ["export_compressed", "export_onnx"]

MERGED = 4096  # elements of the largest tensors that an exporter may merge with equal ones; it compares up to 1,024


def export_onnx(traced: Traced) -> bytes:
    """The uncompressed model: input ``input``, output ``logits``, dynamic batch, initializers named as parameters.

    Raises:
        ModelError: an operator of the model has no ONNX form.
    """
    tensors = tensors_of(traced.module)
    placeholders = _distinct(tensors, traced.graph)
    module = rebuild(traced.module, traced.graph, {**tensors, **placeholders})
    write_sizes(module, traced.graph)
    return _export(module, traced.graph, {name: tensors[name] for name in placeholders})


def export_compressed(compressed: Compressed) -> bytes:
    """A full export of a compressed model, its fake quantization as Q/DQ pairs, int8 weights too.

    Takes seconds: the way for models whose ONNX graph cannot be edited.

    Raises:
        ModelError: an operator of the model has no ONNX form.
    """
    graph = compressed.graph
    tensors = tensors_of(compressed.module) | {
        name: torch.from_numpy(array) for name, array in compressed.tensors.items()
    }
    tensors |= {name: torch.from_numpy(weight.real) for name, weight in compressed.weights.items()}
    placeholders = _distinct(tensors, graph)
    module = rebuild(compressed.module, graph, {**tensors, **placeholders})
    write_sizes(module, graph)
    _write_pairs(module, compressed)
    return _export(module, graph, {name: tensors[name] for name in placeholders})


def _pair(value: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """QuantizeLinear and DequantizeLinear as themselves: an exporter would write fake quantization as arithmetic."""
    attributes: Any = {"axis": 0} if scale.ndim else {}
    inputs = (scale, zero_point)
    codes = torch.onnx.ops.symbolic(
        "QuantizeLinear", (value, *inputs), attributes, dtype=zero_point.dtype, shape=value.shape
    )
    return torch.onnx.ops.symbolic(
        "DequantizeLinear", (codes, *inputs), attributes, dtype=torch.float32, shape=value.shape
    )


def _write_pairs(module: fx.GraphModule, compressed: Compressed) -> None:
    """Put ONNX pairs in place of fake quantization, and behind the weights of int8 layers. In place."""
    kind = torch.int8 if compressed.numerics.signed_activations else torch.uint8
    weights = {compressed.graph.layer_by_name[name].weight for name in compressed.plan.layers}
    pairs: list[tuple[fx.Node, fx.Node | None, Tensor, Tensor]] = []
    for node in module.graph.nodes:
        if node.target is fake_quantize:
            scale, zero_point = torch.tensor(node.args[1]), torch.tensor(node.args[2], dtype=kind)
            pairs.append((node.args[0], node, scale, zero_point))
        elif node.op == "get_attr" and node.target in weights:
            scales = compressed.weights[node.target].scale
            pairs.append((node, None, torch.from_numpy(scales), torch.zeros(len(scales), dtype=torch.int8)))
    for index, (value, replaced, scale, zero_point) in enumerate(pairs):
        module.register_buffer(f"scale_{index}", scale)
        module.register_buffer(f"zero_point_{index}", zero_point)
        with module.graph.inserting_after(replaced or value):
            pair = module.graph.call_function(_pair, (value,))
        with module.graph.inserting_before(pair):
            pair.args = (value, *(module.graph.get_attr(f"{part}_{index}") for part in ("scale", "zero_point")))
        if replaced is None:
            value.replace_all_uses_with(pair, delete_user_cb=lambda user, own=pair: user is not own)  # type: ignore[misc]
        else:
            replaced.replace_all_uses_with(pair)
            module.graph.erase_node(replaced)
    module.recompile()


def _distinct(tensors: Mapping[str, Tensor], graph: LayerGraph) -> dict[str, Tensor]:
    """Stand-ins for tensors that equal another one (all zero, mostly): the exporter would merge their initializers."""
    seen: set[bytes] = set()
    result = {}
    weights = {layer.weight for layer in graph.layers}
    for index, (name, tensor) in enumerate(tensors.items()):
        if name in weights or tensor.numel() > MERGED or not tensor.is_floating_point():
            continue
        content = tensor.numpy().tobytes()
        if content in seen or not tensor.any():
            result[name] = (torch.arange(1.0, tensor.numel() + 1) / 1024 + index + 1).reshape(tensor.shape)
        seen.add(content)
    return result


def _export(module: fx.GraphModule, graph: LayerGraph, restored: Mapping[str, Tensor]) -> bytes:
    """Export, then give the stand-ins their values back. The module is changed."""
    write_products(module, graph)
    if len(graph.inputs) > 1:
        _part_inputs(module, graph)
    free: Any = {0: torch.export.Dim.DYNAMIC}
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                module,
                tuple(torch.zeros(2, *shape) for shape in graph.inputs.values()),
                dynamo=True,
                dynamic_shapes=tuple(free for _ in graph.inputs),
                input_names=list(graph.inputs),
                output_names=["logits"],
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise ModelError(
            f"the model cannot be written as ONNX ({reason_of(error)}): "
            "replace the operator it names by one that ONNX has"
        ) from error
    assert program is not None
    proto = program.model_proto
    renew_sizes(proto)
    for initializer in proto.graph.initializer:
        if initializer.name in restored:
            initializer.raw_data = restored[initializer.name].numpy().tobytes()
    return bytes(proto.SerializeToString())


def _part_inputs(module: fx.GraphModule, graph: LayerGraph) -> None:
    """Let a module read its inputs themselves in place of the parts of a row. In place."""
    (row,) = (node for node in module.graph.nodes if node.op == "placeholder")
    parts = {node.name: node for node in module.graph.nodes if node.target is part}
    with module.graph.inserting_before(row):
        for name in graph.inputs:
            given = module.graph.placeholder(f"{name}_given")
            if name in parts:
                parts[name].replace_all_uses_with(given)
                module.graph.erase_node(parts[name])
    row.replace_all_uses_with(next(iter(module.graph.nodes)))  # only its batch is still asked for
    module.graph.erase_node(row)
    module.recompile()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No prints, warnings or log lines of the exporter."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
