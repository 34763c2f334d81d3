"""Profiles of this GPU, and predictions of random policies against measurements."""

from functools import partial

from autocomp.config import SearchConfig
from autocomp.errors import AutocompError
from benchmarks.gpu.job import Job, command
from benchmarks.predict import one

__all__ = ["profile"]

PROFILED = {
    "resnet50": ("--model", "torchvision:resnet50", "--data", "random:3x224x224", "--batch", "8"),
    "resnet20": ("--model", "zoo:resnet20", "--data", "random:3x32x32", "--batch", "32"),
    "resnet56": ("--model", "zoo:resnet56", "--data", "random:3x32x32", "--batch", "32"),
}
SPACE = "gpu"
BUILT, SURVEYED = 1 / 6, 1 / 3
"""Parts of the time that is left: for each profile, and for the one behind the predictions."""
START_S = 90.0
"""For a command to load and trace a model, and to end."""
PREDICTED = SearchConfig(
    model="zoo:resnet56", data="random:3x32x32", budget=("0.5x",), batch=32, space=SPACE,
    calibration_images=64, search_images=64, selection_images=64,
)  # fmt: skip
POLICIES = 50
ERROR = 0.05
"""Of predicted latencies against measured ones, in the mean, at most."""


def profile(job: Job) -> None:
    """Profiles that lie beside the result, and predictions by one of their own."""
    name = job.begin()
    seconds = max(BUILT * job.left_s, 1.0)
    folder = job.file.parent / "hardware_profiles"
    folder.mkdir(exist_ok=True)
    built = dict(job.found().get("built", {}))
    for model, flags in PROFILED.items():
        if "error" not in built.get(model, {"error": ""}):
            continue
        given = ("--engine", name, "--space", SPACE, "--seconds", f"{seconds:.0f}", "--out", str(folder), "--json")
        built[model] = command(job.work, "profile", "build", *flags, *given, seconds=seconds + START_S)
        job.keep(built=built)
    if job.found().get("resnet56", {}).get("policies", 0) >= POLICIES:
        return
    try:
        one(PREDICTED, name, SURVEYED * job.left_s, POLICIES, deadline=job.deadline, keep=partial(_keep, job))
    except AutocompError as error:
        job.keep(resnet56={**job.found().get("resnet56", {}), "error": str(error)})


def _keep(job: Job, row: dict[str, object]) -> None:
    mape = row["mape"]
    assert isinstance(mape, float)
    goal = {"what": "mean error of predictions", "most": ERROR, "found": mape, "met": mape <= ERROR}
    job.keep(resnet56=row, goals=[goal])
