"""The screen of ``autocomp doctor``."""

from rich.console import Console
from rich.table import Table

from autocomp.engines.doctor import Diagnosis, GpuCheck

__all__ = ["print_diagnosis"]


def print_diagnosis(found: Diagnosis, console: Console) -> None:
    """The machine, its engines, and what would make more possible."""
    console.print(f"processor  {found.processor}, {found.cpus} logical CPUs; Python {found.python}")
    console.print(f"GPU        {found.no_gpu if found.gpu is None else _gpu(found.gpu)}", soft_wrap=True)
    console.print(
        f"packages   {', '.join(f'{name} {version}' for name, version in found.packages.items())}", soft_wrap=True
    )
    table = Table(box=None, pad_edge=False)
    for title in ("engine", "version", "runs here", "precisions", "builds ahead for"):
        table.add_column(title, overflow="fold")
    for check in found.engines:
        runs = "yes" if check.runs else "no"
        table.add_row(
            check.name, check.version or "-", runs, ", ".join(check.precisions) or "-",
            ", ".join(check.builds_for).lower() or "-",
        )  # fmt: skip
    console.print()
    console.print(table)
    console.print()
    for check in found.engines:
        if check.missing is not None:
            console.print(f"{check.name}: {check.missing}", soft_wrap=True, markup=False)
    for line in found.advice:
        console.print(line, soft_wrap=True, markup=False)


def _gpu(gpu: GpuCheck) -> str:
    capability = ".".join(map(str, gpu.info.capability))
    parts = [
        f"{gpu.info.name}, compute capability {capability}, {gpu.info.memory_bytes / 2**30:.0f} GiB",
        f"driver {gpu.driver or 'of unknown version'} (CUDA {gpu.info.driver})",
        f"tensor cores: {', '.join(gpu.types) or 'none'}",
        f"through {gpu.access}; clocks {gpu.clocks}",
    ]
    if gpu.state is not None:
        parts.append(f"{gpu.state.sm_mhz} MHz, {gpu.state.power_w:.0f} W, {gpu.state.temperature_c} °C")
    return "; ".join(parts)
