"""What an NVIDIA GPU does with the engines of this project; each part takes less than ten minutes.

    python -m benchmarks.gpu --out DIR [--part engines|profile|search|finetune ...] [--engine NAME] [--minutes M]
        [--work FOLDER]

Writes ``DIR/gpu_<part>.json`` for every part, after every figure, and profiles under ``DIR/hardware_profiles``. A part
that was stopped, or had no time for all, goes on with the same command: what the file has is not measured again. A part
that cannot run says why in its file, under ``cannot_run``. Without ``--engine`` the first that runs is taken, of
tensorrt, tensorrt-rtx and torch-cuda; what the others answered is written down word by word.

Networks of the parts engines and profile have random weights, which latency does not depend on. The parts that search
and train need the CIFAR-10 images and weights that ``AUTOCOMP_SHARED`` names.
"""

import argparse
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic

from autocomp.engines.doctor import diagnose
from autocomp.errors import AutocompError
from benchmarks.common import machine
from benchmarks.gpu.job import CannotRunError, Job

__all__ = ["PARTS", "main", "record"]


# A part imports what it needs when it begins, so that a package that is missing costs that part alone.
def engines(job: Job) -> None:
    from benchmarks.gpu.engines import engines

    engines(job)


def profile(job: Job) -> None:
    from benchmarks.gpu.profile import profile

    profile(job)


def search(job: Job) -> None:
    from benchmarks.gpu.search import search

    search(job)


def finetune(job: Job) -> None:
    from benchmarks.gpu.training import finetune

    finetune(job)


PARTS: Mapping[str, Callable[[Job], None]] = {
    "engines": engines,
    "profile": profile,
    "search": search,
    "finetune": finetune,
}


def record(part: str, job: Job) -> None:
    """Run a part; whatever ends it is in its file."""
    begun = monotonic()
    stamp = {"date": datetime.now(UTC).strftime("%Y-%m-%d"), "machine": machine(), "doctor": diagnose().to_json()}
    job.keep(**stamp, complete=False, cannot_run=None)
    try:
        PARTS[part](job)
        job.keep(complete=True)
    except (CannotRunError, AutocompError) as error:
        job.keep(cannot_run=str(error))
    except Exception:  # a fault of one part must not cost the others their time on the machine
        job.keep(cannot_run=traceback.format_exc())
    job.keep(seconds=round(job.found().get("seconds", 0.0) + monotonic() - begun, 1))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--part", action="append", choices=list(PARTS), help="may be repeated; all by default")
    parser.add_argument("--engine", help="to measure; the first that runs by default")
    parser.add_argument("--minutes", type=float, default=8.0, help="that a part may take, about")
    parser.add_argument("--work", type=Path, help="folder for runs, checkpoints and data [work in DIR]")
    args = parser.parse_args(arguments)
    out = args.out.resolve()
    work = (args.work or out / "work").resolve()
    for folder in (out, work):
        folder.mkdir(parents=True, exist_ok=True)
    for part in args.part or PARTS:
        job = Job(out / f"gpu_{part}.json", work, args.engine, monotonic() + 60 * args.minutes)
        record(part, job)
        found = job.found()
        print(f"{part}: {found.get('cannot_run', 'done')}; {job.file}", flush=True)


if __name__ == "__main__":
    main()
