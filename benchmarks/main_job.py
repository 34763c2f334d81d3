"""The main job's numbers: the default search, CIFAR-10 ResNet-20 at half its latency, int8 alone, agreement.

    AUTOCOMP_SHARED=... python -m benchmarks.main_job [--part default|cifar|numerics ...]

Writes ``benchmarks/results/main_job.json``. Accuracies are of the engine over a whole test split.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import pandas as pd

from autocomp.compress import logits_of
from autocomp.config import SearchConfig
from autocomp.controllers import make_controller
from autocomp.policy import INT8, Policy
from autocomp.study.score import predict
from autocomp.study.workbench import Workbench, prepare
from benchmarks.common import cifar10, save, shared, show


def search(arguments: list[str], out: Path) -> dict[str, Any]:
    """Run ``autocomp search`` as a user would; its JSON, wall time and peak resident memory."""
    command = [sys.executable, "-m", "autocomp", "search", *arguments, "--json", "--out", str(out)]
    begun = perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    wall = perf_counter() - begun
    if done.returncode not in (0, 3) or not done.stdout:
        raise SystemExit(f"{' '.join(command)} ended with status {done.returncode}")
    result = json.loads(done.stdout)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    trials = pd.read_csv(out / "results.csv")
    evaluated = trials[(trials.status == "ok") & (trials.seconds > 0)]
    return {
        "exit_status": done.returncode,
        "wall_s": round(wall, 1),
        "peak_rss_bytes": peak,
        "overhead_s_median": round(median(evaluated.overhead_s), 3),
        "overhead_s_max": round(max(evaluated.overhead_s), 3),
        "result": {key: value for key, value in result.items() if key != "run"},
    }


def bounded(interval: dict[str, float] | None, form: str, factor: float = 1.0) -> str:
    """A value with its bounds, as ``0.51 [0.49, 0.53]``."""
    if interval is None:
        return "-"
    value, low, high = (form.format(factor * interval[key]) for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def describe(title: str, found: dict[str, Any]) -> None:
    rows = []
    for role in ("reference", "best", "uniform", "random"):
        row = found["result"][role]
        if row is None:
            rows.append([role, *["-"] * 6])
            continue
        timing, accuracy = row["timing"], row["accuracy"]
        rows.append(
            [
                role,
                bounded(timing["latency_ms"], "{:.2f}"),
                bounded(timing["ratio"], "{:.3f}"),
                f"{100 * accuracy['test']:.2f}",
                bounded(accuracy["test_delta"], "{:+.2f}", 100),
                f"{row['macs'] / 1e6:.1f}",
                f"{row['size_bytes'] / 1e6:.3f}",
            ]
        )
    columns = ["", "latency ms", "ratio", "test top-1 %", "vs. reference", "MMACs", "MB"]
    show(
        f"{title}: {found['wall_s']} s, {found['peak_rss_bytes'] / 1e9:.2f} GB, verified {found['result']['verified']}",
        columns,
        rows,
    )


def cifar_config(data: Path) -> SearchConfig:
    weights = shared() / "weights" / "cifar10_resnet20.safetensors"
    return SearchConfig(
        model="zoo:resnet20", weights=str(weights), data=f"npz:{data}", budget=("0.5x",), batch=32, trials=100
    )


def agreement(bench: Workbench, policy: Policy) -> dict[str, float]:
    """Top-1 of the engine and of the fake-quantized torch model, and how often they agree, on the test split."""
    compressed = bench.emitter.compress(policy)
    with bench.backend.build(bench.emitter.emit(compressed)) as engine:
        found = predict(engine, bench.splits.test)
    torch_logits = np.concatenate(
        [logits_of(compressed.module, images) for images, _ in bench.splits.test.batches(500)]
    )
    same = found.logits.argmax(axis=1) == torch_logits.argmax(axis=1)
    torch_accuracy = float((torch_logits.argmax(axis=1) == found.labels).mean())
    return {"engine": found.accuracy, "torch": torch_accuracy, "agreement": float(same.mean())}


def numerics(data: Path, best: Policy | None) -> dict[str, Any]:
    bench = prepare(cifar_config(data), lambda event: None)
    graph = bench.traced.graph
    rows = {"unpruned fp32": agreement(bench, Policy())}
    rows["unpruned int8"] = agreement(bench, Policy(precisions={layer.name: INT8 for layer in graph.layers}))
    if best is not None:
        rows["best of the search"] = agreement(bench, best)
    for number, policy in enumerate(make_controller("random", bench.space, 7).ask(10)):
        rows[f"random {number}"] = agreement(bench, policy)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=["default", "cifar", "numerics"])
    parser.add_argument("--work", type=Path, help="folder for CIFAR-10 and the runs; a temporary one by default")
    args = parser.parse_args()
    parts = args.part or ["default", "cifar", "numerics"]
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        found: dict[str, Any] = {}
        best: Policy | None = None
        if "default" in parts:
            found["default"] = search(["--budget", "15ms", "--finetune-epochs", "0"], Path(temporary) / "default")
            describe("autocomp search --budget 15ms --finetune-epochs 0", found["default"])
        if "cifar" in parts:
            config = cifar_config(cifar10(work))
            arguments = ["--model", config.model, "--weights", str(config.weights), "--data", config.data]
            arguments += ["--budget", "0.5x", "--batch", "32", "--trials", "100"]
            found["cifar_resnet20_0.5x"] = search(arguments, Path(temporary) / "cifar")
            describe("CIFAR-10 ResNet-20, --budget 0.5x, 100 trials", found["cifar_resnet20_0.5x"])
            row = found["cifar_resnet20_0.5x"]["result"]["best"]
            best = Policy.from_json(row["policy"]) if row else None
        if "numerics" in parts:
            found["numerics"] = numerics(cifar10(work), best)
            rows = [
                [name, *(f"{100 * row[key]:.2f}" for key in ("engine", "torch", "agreement"))]
                for name, row in found["numerics"].items()
            ]
            show("CIFAR-10 ResNet-20, all test images", ["policy", "engine %", "torch %", "same top-1 %"], rows)
        print(f"written: {save('main_job', found)}")


if __name__ == "__main__":
    main()
