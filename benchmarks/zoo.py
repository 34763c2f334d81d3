"""Which of torchvision's classifiers go all the way: traced, pruned, compressed, exported, run at the pruned shapes.

    python -m benchmarks.zoo [--models resnet18 ...] [--size PIXELS]

Writes ``benchmarks/results/zoo.json``. Weights are random, since only shapes and arithmetic are asked about. Each model
has a process of its own, so that its peak of memory is its own. The policy keeps half the channels of every group; its
ONNX file is run on ONNX Runtime and compared with the compressed torch model. ``edited`` says whether the file came
from the template (milliseconds a policy) or from a full export (seconds).
"""

import argparse
import json
import resource
import subprocess
import sys
from math import prod
from time import perf_counter
from typing import Any

from benchmarks.common import save, show

MODELS = (
    "alexnet", "vgg11_bn", "vgg16", "resnet18", "resnet50", "wide_resnet50_2", "resnext50_32x4d", "densenet121",
    "squeezenet1_1", "googlenet", "inception_v3", "shufflenet_v2_x1_0", "mobilenet_v2", "mobilenet_v3_small",
    "mobilenet_v3_large", "mnasnet0_5", "efficientnet_b0", "efficientnet_v2_s", "regnet_x_400mf", "regnet_y_400mf",
    "convnext_tiny", "vit_b_16", "swin_t", "swin_v2_t", "maxvit_t",
)  # fmt: skip
FIXED = {"inception_v3": 299, "vit_b_16": 224, "maxvit_t": 224}
IMAGES = 16  # of noise, for calibration
LIMIT = 1e-3  # of the relative L2 error


def measure(name: str, size: int) -> dict[str, Any]:
    """One model's row; ``refused`` is the sentence it was refused with, if it was."""
    import torch
    import torchvision

    from autocomp.capabilities import Numerics
    from autocomp.compress import collect, compress, export_compressed, export_onnx, trace
    from autocomp.engines import Template, emit, load_template
    from autocomp.errors import EngineError, ModelError
    from autocomp.policy import Policy, Recipe

    torch.manual_seed(0)
    torch.set_num_threads(1)
    given = {"aux_logits": False, "init_weights": False} if name in ("googlenet", "inception_v3") else {}
    model = torchvision.models.get_model(name, **given).eval()
    images = torch.randn(IMAGES, 3, size, size)
    numerics = Numerics(signed_activations=False, symmetric_activations=False, weight_max=127)
    seconds: dict[str, float] = {}

    def timed(stage: str, call: Any) -> Any:
        start = perf_counter()
        result = call()
        seconds[stage] = round(perf_counter() - start, 2)
        return result

    try:
        traced = timed("trace", lambda: trace(model, images[:2]))
    except ModelError as error:
        return {"model": name, "size": size, "refused": str(error)}
    graph = traced.graph
    sliced = {member.parameter for group in graph.groups for member in group.members}
    share = sum(prod(graph.parameters[name]) for name in sliced) / sum(map(prod, graph.parameters.values()))
    recipe = Recipe(
        images=IMAGES, importance="group_l2", recalibration="never"
    )  # of random weights all orders are alike
    statistics = timed("collect", lambda: collect(traced, images, recipe))
    policy = Policy({group.name: max(1, group.channels // 2) for group in graph.groups})
    found = timed("compress", lambda: compress(traced, statistics, policy, recipe, numerics, images))
    template: Template | None = None
    reason = ""
    try:
        template = timed("export", lambda: load_template(export_onnx(traced), graph))
    except EngineError as error:
        reason = str(error)
    if template is not None:
        parts = (template, found.policy, found.tensors, found.weights, found.params, numerics)
        data = timed("emit", lambda: emit(*parts))
    else:
        data = timed("export", lambda: export_compressed(found))
    with torch.no_grad():
        error_l2 = _error(data, found.module, images[:3])
    return {
        "model": name, "size": size, "layers": len(graph.layers), "groups": len(graph.groups),
        "share": round(share, 4), "macs_kept": round(graph.macs(policy) / graph.macs(Policy()), 4), "seconds": seconds,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "edited": template is not None, "why_not_edited": reason, "relative_l2": error_l2,
        "left_whole": dict(graph.left_whole),
    }  # fmt: skip


def _error(data: bytes, module: Any, images: Any) -> float:
    """Relative L2 distance of ONNX Runtime's outputs from torch's."""
    import numpy as np
    import onnxruntime

    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    (outputs,) = session.run(None, {"input": images.numpy()})
    expected = module(images).numpy()
    return float(np.linalg.norm(outputs - expected) / np.linalg.norm(expected))


def row_of(name: str, size: int) -> dict[str, Any]:
    """`measure` in a process of its own; what ended it, where it failed."""
    command = [sys.executable, "-m", "benchmarks.zoo", "--one", name, "--size", str(size)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = found.stdout.strip().splitlines()
    if found.returncode == 0 and lines:
        row: dict[str, Any] = json.loads(lines[-1])
        return row
    last = (found.stderr.strip().splitlines() or ["it ended without a word"])[-1]
    return {"model": name, "size": size, "failed": last}


def cells(row: dict[str, Any]) -> list[object]:
    if "layers" not in row:
        return [row["model"], row.get("refused") or row.get("failed"), *[""] * 7]
    seconds = row["seconds"]
    good = row["relative_l2"] <= LIMIT
    return [
        row["model"], "all the way" if good else "differs", row["groups"], f"{row['share']:.1%}",
        f"{seconds['trace']:.1f}", f"{seconds['compress']:.1f}", row["peak_mb"], row["edited"],
        f"{row['relative_l2']:.1e}",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--size", type=int, default=224, help="of the images, where a model does not fix it")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(given.one, given.size)))
        return
    rows = []
    for name in given.models:
        rows.append(row_of(name, FIXED.get(name, given.size)))
        print(*cells(rows[-1]), flush=True)
    columns = ("model", "result", "groups", "in groups", "trace s", "compress s", "peak MB", "edited", "relative L2")
    show("torchvision, half of every group, fp32", columns, [cells(row) for row in rows])
    save("zoo", {"zoo": rows})


if __name__ == "__main__":
    main()
