"""Which of torchvision's classifiers go all the way: traced, searched, exported, run at the pruned shapes.

    python -m benchmarks.zoo [--models resnet18 ...] [--trials 20] [--images 2]

Writes ``benchmarks/results/zoo.json``: rows of the models asked for, those of others kept. Weights are random, since
only shapes and arithmetic are asked about. Each model has a process of its own, so that its peak of memory is its
own, and one thread; seconds are processor seconds. A model is traced and searched for 20 trials on the simulated
engine (pruning only, budget 0.7x, no baselines, few images, channels in the order of their weights' norms: scores of
noise say nothing, and of random weights all orders are alike). The best policy's file is then run on ONNX Runtime and
compared with its torch twin. ``edited`` says whether files come from the template (milliseconds a policy) or from a
full export each (seconds); ``compress`` is one policy that keeps half of every group.
"""

import argparse
import json
import resource
import subprocess
import sys
from collections import Counter
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from time import process_time
from typing import Any

from benchmarks.common import RESULTS, save, show

MODELS = (
    "alexnet", "vgg11_bn", "vgg16", "resnet18", "resnet50", "wide_resnet50_2", "resnext50_32x4d", "densenet121",
    "squeezenet1_1", "googlenet", "inception_v3", "shufflenet_v2_x1_0", "mobilenet_v2", "mobilenet_v3_small",
    "mobilenet_v3_large", "mnasnet0_5", "efficientnet_b0", "efficientnet_v2_s", "regnet_x_400mf", "regnet_y_400mf",
    "convnext_tiny", "vit_b_16", "swin_t", "swin_v2_t", "maxvit_t", "ssdlite",
)  # fmt: skip
SIZE = {"inception_v3": 299, "ssdlite": 320}
CALIBRATION = 8  # images
BUDGET = "0.7x"
LIMIT = 1e-3  # of the relative L2 error


class Stages:
    """Processor seconds of a search's stages, and the peak of memory at the end of each."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.peak_mb: dict[str, int] = {}
        self._stage, self._start = "", 0.0

    def begin(self, stage: str) -> None:
        now = process_time()
        if self._stage:
            self.seconds[self._stage] = round(self.seconds.get(self._stage, 0.0) + now - self._start, 2)
            self.peak_mb[self._stage] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        self._stage, self._start = stage, now

    def __call__(self, event: Any) -> None:
        from autocomp.outcome import Phase

        if isinstance(event, Phase):
            self.begin(event.name)


def measure(name: str, trials: int, images: int) -> dict[str, Any]:
    """One model's row; ``refused`` is the sentence it was refused with, if it was."""
    import torch
    import torchvision

    from autocomp.config import SearchConfig
    from autocomp.errors import AutocompError
    from autocomp.models import wrap_model
    from autocomp.policy import Policy, Recipe
    from autocomp.study.conduct import conduct, manifest_of
    from autocomp.study.executors import LocalCrew
    from autocomp.study.run import Run
    from autocomp.study.search import begin
    from autocomp.study.workbench import EditEmitter, prepare

    torch.manual_seed(0)
    torch.set_num_threads(1)
    size = SIZE.get(name, 224)
    given = {"aux_logits": False, "init_weights": False} if name in ("googlenet", "inception_v3") else {}
    module = ssdlite() if name == "ssdlite" else torchvision.models.get_model(name, **given).eval()
    for layer in module.modules():
        if isinstance(layer, torch.nn.Linear) and not layer.weight.any():  # a head that begins with zeros
            torch.nn.init.normal_(layer.weight, std=0.02)
    model = wrap_model(module)
    config = SearchConfig(
        model=f"torchvision:{name}", data=f"random:3x{size}x{size}", budget=(BUDGET,), engine="simulated",
        space="prune", trials=trials, baseline_trials=0, finalists=1,
        calibration_images=CALIBRATION, search_images=images, selection_images=images,
    )  # fmt: skip
    recipe = Recipe(importance="group_l2", reconstruction="auto", rounding="nearest", images=CALIBRATION)
    stages = Stages()
    row: dict[str, Any] = {"model": name, "size": size, "seconds": stages.seconds, "peak_mb": stages.peak_mb}
    try:
        bench = prepare(config, stages, model, recipe=recipe)
    except AutocompError as error:
        return {**row, "refused": str(error)}
    stages.begin("compress")
    graph, emitter = bench.traced.graph, bench.emitter
    half = emitter.compress(Policy({group.name: max(1, group.channels // 2) for group in graph.groups}))
    stages.begin("emit")
    emitter.emit(half)
    stages.begin("search")
    sliced = {member.parameter for group in graph.groups for member in group.members}
    row |= {
        "layers": len(graph.layers), "groups": len(graph.groups), "edited": isinstance(emitter, EditEmitter),
        "share": round(sum(prod(graph.parameters[n]) for n in sliced) / sum(map(prod, graph.parameters.values())), 4),
        "left_whole": dict(Counter(graph.left_whole.values())), "notes": [n for n in bench.notes if "whole" not in n],
    }  # fmt: skip
    with TemporaryDirectory() as folder:
        try:
            with begin(bench, LocalCrew()) as prologue, Run.create(Path(folder) / "run", manifest_of(bench)) as run:
                best = conduct(bench, prologue, run, stages).best
        except AutocompError as error:
            return {**row, "failed": str(error)}
        if best is None:
            return {**row, "failed": "the search found no policy within the budget"}
        stages.begin("engine")
        file = (Path(folder) / "run" / "model.onnx").read_bytes()
    twin = emitter.finish(best.policy).module
    row["macs_kept"] = round(graph.macs(best.policy) / graph.macs(Policy()), 4)
    row["relative_l2"] = _error(file, twin, torch.randn(3, 3, size, size))
    stages.begin("")
    return row


def ssdlite() -> Any:
    """Backbone and heads of torchvision's detector, their outputs as one row an image.

    Its norms take the statistics of noise: with those that they begin with its values vanish, layer by layer.
    """
    import torch

    from examples.detection.ssdlite import model

    module = model().train()
    for norm in module.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.momentum = None
    with torch.no_grad():
        module(torch.randn(16, 3, 320, 320))
    return module.eval()


def _error(data: bytes, module: Any, images: Any) -> float:
    """Relative L2 distance of ONNX Runtime's outputs from torch's."""
    import numpy as np
    import onnxruntime
    import torch

    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    (outputs,) = session.run(None, {"input": images.numpy()})
    with torch.no_grad():
        expected = module(images).numpy()
    return float(np.linalg.norm(outputs - expected) / np.linalg.norm(expected))


def row_of(name: str, trials: int, images: int) -> dict[str, Any]:
    """`measure` in a process of its own; what ended it, where it failed."""
    command = [sys.executable, "-m", "benchmarks.zoo", "--one", name, "--trials", str(trials), "--images", str(images)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = found.stdout.strip().splitlines()
    if found.returncode == 0 and lines:
        row: dict[str, Any] = json.loads(lines[-1])
    else:
        row = {"model": name, "failed": (found.stderr.strip().splitlines() or ["it ended without a word"])[-1]}
    return {**row, "trials": trials, "images": images}


def cells(row: dict[str, Any]) -> list[object]:
    if "relative_l2" not in row:
        return [row["model"], row.get("refused") or row.get("failed"), *[""] * 7]
    seconds = row["seconds"]
    good = row["relative_l2"] <= LIMIT
    return [
        row["model"], "all the way" if good else "differs", row["groups"], f"{row['share']:.1%}",
        f"{seconds['trace']:.1f}", f"{seconds['compress']:.1f}", row["peak_mb"]["trace"], row["edited"],
        f"{row['relative_l2']:.1e}",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--images", type=int, default=2, help="that trials are scored on")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(given.one, given.trials, given.images)))
        return
    path = RESULTS / "zoo.json"
    rows = {row["model"]: row for row in json.loads(path.read_text())["zoo"]} if path.exists() else {}
    for name in given.models:
        rows[name] = row_of(name, given.trials, given.images)
        print(*cells(rows[name]), flush=True)
        save("zoo", {"zoo": [rows[known] for known in MODELS if known in rows]})
    columns = ("model", "result", "groups", "in groups", "trace s", "compress s", "trace MB", "edited", "relative L2")
    show("torchvision, 20 trials on the simulated engine, fp32", columns, [cells(rows[n]) for n in given.models])


if __name__ == "__main__":
    main()
