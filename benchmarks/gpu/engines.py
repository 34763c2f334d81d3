"""Every network, batch and precision beside fp32 without TF32, and one engine in several processes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

from autocomp.engines import BackendSpec, compare, copies_of, estimate, make_backend
from autocomp.errors import AutocompError
from autocomp.policy import Policy
from autocomp.protocols import Engine
from autocomp.results import TimingProtocol
from benchmarks.common import show
from benchmarks.gpu.job import Job, command
from benchmarks.gpu.networks import Network, Variant, network, variants

__all__ = ["engines", "goals", "repeated", "rows_of", "table"]

NETWORKS = ("resnet50", "resnet101", "resnet18", "mobilenet_v2")
BATCHES = (8, 1, 32)
SIZE = 224
PROTOCOL = TimingProtocol(warmup_ms=200, blocks=7, block_ms=100)
PROCESSES = 3
COMPILING_S = 150.0
"""That must be left to begin with networks that are compiled."""
GOALS = (  # network, batch, what, least speedup over fp32 without TF32
    ("resnet50", 8, "int8", 2.0),
    ("resnet101", 8, "int8", 2.0),
    ("resnet50", 8, "fp16", 1.8),
    ("resnet101", 8, "fp16", 1.8),
    ("resnet101", 8, "fp32, half the channels", 1.74),
)
SPREAD = 0.01
"""Of one engine's medians in fresh processes, at most."""

Row = dict[str, Any]


def engines(job: Job) -> None:
    """What the goals are about first; rows that the file has already are not measured again."""
    name = job.begin()
    rows: list[Row] = [row for row in job.found().get("rows", []) if "error" not in row]
    tables = [(name, model, batch) for batch, model in product(BATCHES, NETWORKS)]
    if name == "torch-cuda":
        tables += [(f"{name}-compiled", model, BATCHES[0]) for model in NETWORKS]
    skipped: list[str] = []
    for engine, model, batch in tables:
        spec = BackendSpec(engine, batch)
        if job.left_s <= (COMPILING_S if engine.endswith("compiled") else 0.0):
            skipped.append(f"{engine}, {model}, batch {batch}")
            continue
        for row in rows_of(network(model, SIZE), model, spec, rows, job):
            rows.append(row)
            job.keep(rows=rows, goals=goals(rows))
        if (engine, model, batch) == tables[0] and "spread" not in job.found().get("fresh", {}):
            job.keep(fresh=repeated(network(model, SIZE), model, spec, job))
    job.keep(not_measured=skipped)
    table(job.found())


def rows_of(made: Network, model: str, spec: BackendSpec, known: Sequence[Row], job: Job) -> Iterator[Row]:
    """One row a variant that is not known yet, as long as there is time; one that fails has its error instead."""
    keys = {"engine": spec.name, "network": model, "batch": spec.batch}
    try:
        backend = make_backend(spec)
        done = {row["variant"] for row in known if keys.items() <= row.items()}
        todo = {name: variant for name, variant in variants(made.graph, backend).items() if name not in done}
        if not todo:
            return
        with backend.build(made.file(Policy(), backend)) as reference:
            for name, variant in todo.items():
                if job.left_s <= 0:
                    return
                yield {**keys, "variant": name, **_measured(made, spec, variant, reference)}
    except AutocompError as error:
        yield {**keys, "variant": "fp32", "error": str(error)}


def _measured(made: Network, spec: BackendSpec, variant: Variant, reference: Engine) -> Row:
    try:
        backend = make_backend(replace(spec, tf32=variant.tf32))
        with backend.build(made.file(variant.policy, backend)) as candidate:
            found = replace(estimate(compare(candidate, reference, PROTOCOL), "p50"), copies=copies_of(candidate))
    except AutocompError as error:
        return {"error": str(error)}
    return {
        "ms": found.latency_ms.to_json(),
        "fp32_ms": found.reference_ms.to_json(),
        "speedup": 1 / found.ratio.value,
        "rejected_blocks": found.rejected,
        "copies": found.to_json().get("copies"),
    }


def repeated(made: Network, model: str, spec: BackendSpec, job: Job) -> Row:
    """Medians of one engine in fresh processes, and how far they lie apart, as a fraction."""
    file = job.work / f"{model}.onnx"
    file.write_bytes(made.file(Policy(), make_backend(spec)))
    medians: list[float] = []
    for _ in range(PROCESSES):
        flags = ("--engine", spec.name, "--batch", str(spec.batch), "--json")
        found = command(job.work, "measure", file.name, *flags, seconds=job.left_s)
        if "latency_ms" not in found:
            return {"network": model, "batch": spec.batch, "medians_ms": medians, "error": found.get("error", "")}
        medians.append(found["latency_ms"]["value"])
    spread = max(medians) / min(medians) - 1
    return {"network": model, "batch": spec.batch, "medians_ms": medians, "spread": spread, "met": spread <= SPREAD}


def goals(rows: Sequence[Row]) -> list[Row]:
    """Whether the rows are as much faster than fp32 as they should be; None where one was not measured."""
    found = []
    for model, batch, variant, least in GOALS:
        keys = {"network": model, "batch": batch, "variant": variant}
        speedups = [row["speedup"] for row in rows if keys.items() <= row.items() and "speedup" in row]
        best = max(speedups, default=None)
        found.append({**keys, "least": least, "speedup": best, "met": None if best is None else best >= least})
    return found


def table(found: Mapping[str, Any]) -> None:
    columns = ("engine", "network", "batch", "", "ms", "speedup")
    lines = []
    for row in found["rows"]:
        times = [row["error"], ""] if "error" in row else [f"{row['ms']['value']:.3f}", f"{row['speedup']:.2f}"]
        lines.append([row["engine"], row["network"], row["batch"], row["variant"], *times])
    show(f"{found['engine']}: ms, and speedup over {found['reference']}", columns, lines)
