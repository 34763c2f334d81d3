"""What an NVIDIA GPU does with the engines of this project; each part takes less than ten minutes.

    python -m benchmarks.gpu --out DIR [--part engines|profile|search|finetune ...] [--engine NAME] [--minutes M]

Writes ``DIR/gpu_<part>.json`` for every part, and profiles under ``DIR/hardware_profiles``. A part that cannot run says
why in its file, under ``cannot_run``. Without ``--engine`` the first that runs is taken, of tensorrt, tensorrt-rtx and
torch-cuda; what the others answered is written down word by word.

Networks of the engines part have random weights, which latency does not depend on. The parts that search need the
CIFAR-10 images and weights that ``AUTOCOMP_SHARED`` names.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import torch
import torchvision

from autocomp.compress import export_onnx, trace
from autocomp.compress.arrays import arrays_of
from autocomp.compress.sparsity import sparse_weights
from autocomp.compress.surgery import tensors_of
from autocomp.engines import BackendSpec, Template, compare, emit, estimate, load_template, make_backend, measure_fresh
from autocomp.engines.doctor import diagnose
from autocomp.errors import AutocompError
from autocomp.graph import LayerGraph
from autocomp.policy import FP8, INT8, Policy, Precision
from autocomp.protocols import Backend
from autocomp.quantization import QuantParams, fp8_key, place, quantize_weights
from autocomp.results import TimingProtocol
from benchmarks.common import cifar10, machine, shared, show

ENGINES = ("tensorrt", "tensorrt-rtx", "torch-cuda")
NETWORKS = ("resnet50", "resnet101", "resnet18", "mobilenet_v2")
BATCHES = (8, 1, 32)
FP16, BF16 = Precision("fp16", "fp16"), Precision("bf16", "bf16")
SPARSE = (replace(FP16, sparse=True), replace(INT8, sparse=True))
PROTOCOL = TimingProtocol(warmup_ms=200, blocks=7, block_ms=100)
FRESH = TimingProtocol(warmup_ms=200, blocks=5, block_ms=100, builds=3)
GOALS = (  # network, batch, what, least speedup over fp32 without TF32
    ("resnet50", 8, "int8", 2.0),
    ("resnet101", 8, "int8", 2.0),
    ("resnet50", 8, "fp16", 1.8),
    ("resnet101", 8, "fp16", 1.8),
    ("resnet101", 8, "fp32, half the channels", 1.74),
)


class CannotRunError(Exception):
    """Why a part has no result."""


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


def network(name: str, size: int) -> Network:
    torch.manual_seed(0)
    traced = trace(torchvision.models.get_model(name, weights=None).eval(), torch.randn(2, 3, size, size))
    return Network(traced.graph, load_template(export_onnx(traced), traced.graph), arrays_of(tensors_of(traced.module)))


def variants(graph: LayerGraph, backend: Backend) -> dict[str, tuple[Policy, bool]]:
    """Name -> policy, and whether TF32 is on; only what the engine runs."""
    known = backend.capabilities().precisions
    half = Policy({group.name: max(group.channels // 2, 1) for group in graph.groups})
    found = {"fp32, tf32": (Policy(), True), "fp32, half the channels": (half, False)}
    for kind in (FP16, BF16, INT8, FP8, *SPARSE):
        if kind in known:
            dense = replace(kind, sparse=False)
            kinds = {layer.name: kind if layer.reads_fours else dense for layer in graph.layers}
            found[str(kind)] = (Policy(precisions=kinds), False)
    return found


def first_that_runs(wanted: str | None) -> tuple[str, dict[str, str]]:
    """The engine to measure, and what those before it answered, word by word.

    Raises:
        CannotRunError: none runs here.
    """
    answers: dict[str, str] = {}
    present: dict[str, Backend] = {}
    for name in (wanted,) if wanted else ENGINES:
        try:
            present[name] = make_backend(BackendSpec(name))
        except AutocompError as error:
            answers[name] = str(error)
    for name, backend in present.items():
        try:
            with backend.build(network("resnet18", 64).file(Policy(), backend)) as engine:
                engine.time(1)
            return name, answers
        except AutocompError as error:
            answers[name] = str(error)
    raise CannotRunError("; ".join(f"{name}: {answer}" for name, answer in answers.items()))


def engines(out: Path, wanted: str | None, seconds: float) -> dict[str, Any]:
    """Every network, batch and precision beside fp32 without TF32, and how far fresh processes differ."""
    del out
    name, answers = first_that_runs(wanted)
    deadline = monotonic() + seconds
    rows: list[dict[str, Any]] = []
    skipped: list[str] = []
    fresh: dict[str, Any] = {}
    for model in NETWORKS:
        made = network(model, 224)
        for batch in BATCHES:
            if monotonic() > deadline:
                skipped.append(f"{model}, batch {batch}: no time was left")
                continue
            rows += table(made, model, BackendSpec(name, batch))
            if name == "torch-cuda" and batch == BATCHES[0]:
                rows += table(made, model, BackendSpec(f"{name}-compiled", batch))
            if not fresh:
                fresh = {"network": model, "batch": batch, **repeated(made, BackendSpec(name, batch))}
    goals = [goal(rows, *entry) for entry in GOALS]
    return {"engine": name, "refused": answers, "rows": rows, "fresh": fresh, "goals": goals, "skipped": skipped}


def table(made: Network, model: str, spec: BackendSpec) -> list[dict[str, Any]]:
    """One row a variant; one that fails has its error instead of a time."""
    backend = make_backend(spec)
    rows: list[dict[str, Any]] = []
    with backend.build(made.file(Policy(), backend)) as reference:
        for name, (policy, tf32) in variants(made.graph, backend).items():
            row: dict[str, Any] = {"engine": spec.name, "network": model, "batch": spec.batch, "variant": name}
            try:
                other = make_backend(replace(spec, tf32=tf32))
                with other.build(made.file(policy, other)) as candidate:
                    found = estimate(compare(candidate, reference, PROTOCOL), "p50")
                row |= {
                    "ms": found.latency_ms.to_json(),
                    "fp32_ms": found.reference_ms.to_json(),
                    "speedup": 1 / found.ratio.value,
                    "rejected_blocks": found.rejected,
                }
            except AutocompError as error:
                row["error"] = str(error)
            rows.append(row)
    return rows


def repeated(made: Network, spec: BackendSpec) -> dict[str, Any]:
    """Medians of the same network built anew in fresh processes, and how far they lie apart, as a fraction."""
    file = made.file(Policy(), make_backend(spec))
    try:
        timing = measure_fresh(spec, file, file, FRESH)
    except AutocompError as error:
        return {"error": str(error)}
    builds = sorted({block.build for block in timing.blocks})
    medians = [
        float(np.median([ms for block in timing.blocks if block.build == build for ms in block.candidate_ms]))
        for build in builds
    ]
    return {"medians_ms": medians, "spread": max(medians) / min(medians) - 1}


def goal(rows: list[dict[str, Any]], model: str, batch: int, variant: str, least: float) -> dict[str, Any]:
    """Whether a row is as much faster than fp32 as it should be; None where it was not measured."""
    keys = {"network": model, "batch": batch, "variant": variant}
    row = next((row for row in rows if keys.items() <= row.items()), {})
    speedup = row.get("speedup")
    return {**keys, "least": least, "speedup": speedup, "met": None if speedup is None else speedup >= least}


def profile(out: Path, wanted: str | None, seconds: float) -> dict[str, Any]:
    """A profile of the CIFAR ResNet-20 and of ResNet-50, and predictions of 50 policies against measurements."""
    from benchmarks.predict import one

    name, answers = first_that_runs(wanted)
    (out / "hardware_profiles").mkdir(exist_ok=True)
    share = str(int(seconds / 4))
    built = [
        command(out, "profile", "build", "--engine", name, "--json", "--seconds", share, *flags)
        for flags in (
            ("--model", "torchvision:resnet50", "--data", "random:3x224x224", "--batch", "8"),
            ("--model", "zoo:resnet20", "--data", "random:3x32x32", "--batch", "32"),
        )
    ]
    predicted = one("resnet56", out, name, seconds / 4, 50) if "AUTOCOMP_SHARED" in os.environ else None
    return {"engine": name, "refused": answers, "built": built, "resnet56": predicted}


def search(out: Path, wanted: str | None, seconds: float) -> dict[str, Any]:
    """ResNet-56 on CIFAR-10 at half the latency, and ResNet-50 with random weights for its latency."""
    del seconds
    name, answers = first_that_runs(wanted)
    runs = {}
    half = ("--budget", "0.5x", "--json", "--engine", name)
    if "AUTOCOMP_SHARED" in os.environ:
        weights = str(shared() / "weights" / "cifar10_resnet56.safetensors")
        given = ("--model", "zoo:resnet56", "--weights", weights, "--data", f"npz:{cifar10(out)}", "--batch", "32")
        runs["resnet56"] = command(out, "search", *given, *half, "--trials", "48", "--out", "resnet56")
    plain = ("--model", "torchvision:resnet50", "--data", "random:3x224x224", "--batch", "8")
    few = ("--trials", "16", "--baseline-trials", "4", "--calibration-images", "64", "--search-images", "64")
    runs["resnet50"] = command(out, "search", *plain, *half, *few, "--selection-images", "64", "--out", "resnet50")
    return {"engine": name, "refused": answers, "runs": runs}


def finetune(out: Path, wanted: str | None, seconds: float) -> dict[str, Any]:
    del out, wanted, seconds
    raise CannotRunError("this part is not written yet: run 'autocomp finetune' on the run of the part search")


PARTS: Mapping[str, Callable[[Path, str | None, float], dict[str, Any]]] = {
    "engines": engines,
    "profile": profile,
    "search": search,
    "finetune": finetune,
}


def command(folder: Path, *arguments: str) -> dict[str, Any]:
    """What an autocomp command printed as JSON; its last words where it failed."""
    done = subprocess.run(
        [sys.executable, "-m", "autocomp", *arguments], cwd=folder, capture_output=True, text=True, check=False
    )
    try:
        found: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        found = {"error": " ".join(done.stderr.split()[-60:])}
    return {"command": ["autocomp", *arguments], "status": done.returncode, **found}


def record(part: str, out: Path, wanted: str | None, seconds: float) -> Path:
    """Run a part and write its file."""
    begun = monotonic()
    try:
        found = PARTS[part](out, wanted, seconds)
    except (CannotRunError, AutocompError) as error:
        found = {"cannot_run": str(error)}
    stamp = {"date": datetime.now(UTC).strftime("%Y-%m-%d"), "seconds": round(monotonic() - begun, 1)}
    path = out / f"gpu_{part}.json"
    about = {"machine": machine(), "doctor": diagnose().to_json()}
    path.write_text(json.dumps({**found, **stamp, **about}, indent=2) + "\n")
    return path


COLUMNS = ("engine", "network", "batch", "", "ms", "speedup")


def shown(row: Mapping[str, Any]) -> list[object]:
    times = [row["error"], ""] if "error" in row else [f"{row['ms']['value']:.3f}", f"{row['speedup']:.2f}"]
    return [row["engine"], row["network"], row["batch"], row["variant"], *times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for everything that is written")
    parser.add_argument("--part", action="append", choices=sorted(PARTS), help="may be repeated; all by default")
    parser.add_argument("--engine", help="to measure; the first that runs by default")
    parser.add_argument("--minutes", type=float, default=8.0, help="that a part may take, about")
    args = parser.parse_args()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for part in args.part or PARTS:
        path = record(part, out, args.engine, 60 * args.minutes)
        found = json.loads(path.read_text())
        if "cannot_run" in found:
            print(f"{part}: {found['cannot_run']}")
        elif part == "engines":
            show(f"{found['engine']}: ms, and speedup over fp32", COLUMNS, [shown(row) for row in found["rows"]])
        print(f"written: {path}")


if __name__ == "__main__":
    main()
