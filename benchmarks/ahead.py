"""What it takes to build an engine of ResNet-56 ahead of time, with no GPU.

    python -m benchmarks.ahead [--target sm89] [--repeats 5]

Writes ``benchmarks/results/ahead.json``: wall seconds, and processor seconds, which other work on the machine hardly
changes. Weights are random; a build does not depend on them.
"""

import argparse
import os
import resource
from statistics import median
from time import perf_counter
from typing import Any

import torch

from autocomp.compress import export_onnx, trace
from autocomp.compress.arrays import arrays_of
from autocomp.compress.surgery import tensors_of
from autocomp.engines import BackendSpec, load_template
from autocomp.engines.tensorrt import TensorRtBackend, prepare
from autocomp.models.zoo import CifarResNet
from autocomp.policy import FP32, INT8, Policy
from benchmarks.common import save, show
from benchmarks.gpu.networks import FP16, Network

BATCH = 32


def one(backend: TensorRtBackend, file: bytes, repeats: int) -> dict[str, float]:
    """Medians of several builds, none from a cache, and their least wall time: other work on the machine adds to it."""
    walls, cpus = [], []
    for _ in range(repeats):
        begun, before = perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        backend.plan(file)
        walls.append(perf_counter() - begun)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpus.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return {"wall_s": median(walls), "wall_least_s": min(walls), "cpu_s": median(cpus)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="sm89")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    traced = trace(CifarResNet(56, 10).eval(), torch.randn(2, 3, 32, 32))
    template = load_template(export_onnx(traced), traced.graph)
    made = Network(traced.graph, template, arrays_of(tensors_of(traced.module)))
    backend = TensorRtBackend(BackendSpec("tensorrt-rtx", BATCH, hardware=args.target, fresh=True))
    layers = traced.graph.layers
    kinds = {"fp32": (FP32,), "fp16": (FP16,), "int8": (INT8,), "mixed": (FP32, FP16, INT8)}
    rows: dict[str, Any] = {}
    for name, chosen in kinds.items():
        policy = Policy(precisions={layer.name: chosen[i % len(chosen)] for i, layer in enumerate(layers)})
        rows[name] = one(backend, prepare(made.file(policy, backend), BATCH), args.repeats)
    found = {"engine": backend.device.engine, "target": args.target, "batch": BATCH, "load": os.getloadavg()[0]}
    columns = ["ResNet-56", "wall s", "least wall s", "processor s"]
    show("build ahead of time", columns, [[name, *(f"{s:.2f}" for s in row.values())] for name, row in rows.items()])
    print(f"written: {save('ahead', {**found, 'builds': rows})}")


if __name__ == "__main__":
    main()
