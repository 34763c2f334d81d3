"""What the engine inspector says, read in both forms that TensorRT has had.

The texts are written after NVIDIA's documentation of the inspector ("Engine Inspector" in the developer guide, and the
guide to moving from TensorRT 10 to 11), for a file of this project. None was recorded on a GPU.
"""

import json
from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from autocomp.engines.attribution import Attribution
from autocomp.engines.template import parse
from autocomp.engines.tensorrt import EngineLayer, inspected, prepare
from autocomp.engines.tensorrt.backend import NUMERICS
from autocomp.errors import EngineError
from autocomp.policy import INT8, Policy
from autocomp.report.layers import layers_text, print_layers
from tests.engines.conftest import Case

LINEAR, VECTOR = "Row major linear FP32", "Thirty-two wide channel vectorized row major Int8 format"


@pytest.fixture(scope="module")
def file(resnet8: Case) -> bytes:
    return prepare(resnet8.emit(Policy(precisions={"conv1": INT8}), NUMERICS), 2)


def names(file: bytes) -> list[str]:
    """The input's quantization, the first convolution and its activation."""
    nodes = parse(file).graph.node
    conv = next(place for place, node in enumerate(nodes) if node.op_type == "Conv")
    relu = next(place for place, node in enumerate(nodes) if node.op_type == "Relu")
    return [nodes[0].name, nodes[conv].name, nodes[relu].name]


def tensor(name: str, form: int, datatype: str, layout: str) -> dict[str, Any]:
    """A tensor of one layer, as TensorRT 10 or 11 writes it."""
    own = {"Name": name, "Location": "Device", "Dimensions": [2, 3, 8, 8]}
    return own | ({"Format/Datatype": layout} if form == 10 else {"DataType": datatype, "Format": layout})


def answer(file: bytes, form: int) -> str:
    quantize, conv, relu = names(file)
    image, codes = tensor("input", form, "Float", LINEAR), tensor("codes", form, "Int8", "Row major Int8 format")
    wide, result = tensor("wide", form, "Int8", VECTOR), tensor("result", form, "Float", LINEAR)
    layers: list[dict[str, Any]] = [
        {"Name": quantize, "LayerType": "Scale", "Inputs": [image], "Outputs": [codes],
         "Metadata": f"[ONNX Layer: {quantize}]"},
        {"Name": f"Reformatting CopyNode for Input Tensor 0 to {conv} + {relu}", "LayerType": "Reformat",
         "Inputs": [codes], "Outputs": [wide], "Origin": "REFORMAT", "Metadata": ""},
        {"Name": f"{conv} + {relu}", "LayerType": "CaskConvolution", "Inputs": [wide], "Outputs": [result],
         "ParameterType": "Convolution", "Weights": {"Type": "Int8", "Count": 216},
         "Bias": {"Type": "Float", "Count": 8}, "HasReLU": 1, "HasSparseWeights": int(form == 11),
         "Metadata": f"[ONNX Layer: {conv}]\x1e[ONNX Layer: {relu}]"},
    ]  # fmt: skip
    return json.dumps({"Layers": layers, "Bindings": ["input", "output"]})


@pytest.mark.parametrize("form", [10, 11])
def test_fusions_precisions_and_reformats_are_read(file: bytes, form: int) -> None:
    quantize, conv, relu = names(file)
    first, reformat, fused = inspected(answer(file, form), file)
    assert (first.operators, first.reads, first.writes, first.weights) == ((quantize,), ("fp32",), ("int8",), None)
    assert reformat.reformats and reformat.operators == () and reformat.feeds == (f"{conv} + {relu}",)
    assert (fused.operators, fused.layers, fused.precision) == ((conv, relu), ("conv1",), "int8")
    assert (fused.reads, fused.writes, fused.feeds, fused.sparse) == (("int8",), ("fp32",), (), form == 11)
    assert [EngineLayer.from_json(json.loads(json.dumps(found.to_json()))) for found in (reformat, fused)] == [
        reformat,
        fused,
    ]


def test_the_table_names_layers_and_counts_reformats(file: bytes) -> None:
    _, conv, relu = names(file)
    found = inspected(answer(file, 11), file)
    screen = StringIO()
    print_layers(found, Console(file=screen, width=200))
    for text in (screen.getvalue(), layers_text(found)):
        assert "3 launches for 3 operators, 1 of them reformats" in text
        row = next(line for line in text.splitlines() if "conv1" in line and "2:4" in line)
        assert "int8, 2:4 sparse" in row and f"{conv}, {relu}" in row
        assert any("reformat for" in line and "int8 to int8" in line for line in text.splitlines())


def test_operators_are_found_by_name_where_there_is_no_metadata(file: bytes) -> None:
    _, conv, relu = names(file)
    data = json.loads(answer(file, 10))
    for layer in data["Layers"]:
        layer.pop("Metadata")
    assert inspected(json.dumps(data), file)[2].operators == (conv, relu)


def test_times_go_to_the_operators_that_the_inspector_names(file: bytes) -> None:
    """Whatever an engine calls its layers; a reformat counts to what ran before it."""
    quantize, conv, relu = names(file)
    values = {node.name: node.output[0] for node in parse(file).graph.node}
    reformat = f"Reformatting CopyNode for Input Tensor 0 to {conv} + {relu}"
    ran = [quantize, reformat, "__myl_ConvRelu_0x1", f"{conv} + {relu}", "__myl_Move_0x2"]
    found = Attribution(file).of_names(ran, {"__myl_ConvRelu_0x1": (conv, relu), reformat: ()})
    assert [found[name] for name in ran] == [values[quantize], values[quantize], *[values[conv]] * 3]
    assert Attribution(file).of_names(["nothing"], {}) == {"nothing": "input"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no JSON", "no answer of TensorRT's engine inspector"),
        ('{"Layers": null}', "no answer of TensorRT's engine inspector"),
        ('{"Layers": [{"LayerType": "Reformat"}]}', "no answer of TensorRT's engine inspector"),
        ('{"Layers": ["conv1 + relu"]}', "keeps only the names of its layers"),
        ('{"Layers": []}', "keeps only the names of its layers"),
    ],
)
def test_other_answers_are_refused(file: bytes, text: str, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        inspected(text, file)
