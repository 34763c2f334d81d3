"""A search in its run folder: how it is begun, how it ends, and when it may go on."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from autocomp.errors import InfeasibleError, RunError
from autocomp.outcome import Observer, SearchResult
from autocomp.results import TrialResult
from autocomp.storage import storage_errors
from autocomp.study.artefacts import write_table
from autocomp.study.run import Manifest, Run
from autocomp.study.search import Prologue, search
from autocomp.study.study import journaled_trials
from autocomp.study.workbench import Workbench, package_versions

__all__ = ["Interrupted", "conduct", "manifest_of", "refuse_changes"]

COMPRESSED_BY = ("autocomp", "torch", "onnx")
"""Packages that the weights and files of trials come from; the engine's version is part of the device."""


class Interrupted(KeyboardInterrupt):
    """The user stopped a search; everything finished so far is kept in ``run``."""

    def __init__(self, run: Path, how: str = "autocomp resume {run}") -> None:
        super().__init__(f"stopped; go on with: {how.format(run=run)}")
        self.run = run


def conduct(
    bench: Workbench, prologue: Prologue, run: Run, observer: Observer, earlier: Sequence[TrialResult] = ()
) -> SearchResult:
    """Search and leave the run in a state that says how it ended."""
    try:
        with storage_errors(run.folder):
            result = search(bench, prologue, run, observer, earlier)
    except KeyboardInterrupt:
        run.set_status("interrupted")
        raise Interrupted(run.folder) from None
    except InfeasibleError:
        write_table(run, journaled_trials(Run.entries_of(run.folder)))
        run.set_status("infeasible")
        raise
    except Exception:
        run.set_status("failed")
        raise
    run.set_status("verified" if result.verified else "unverified")
    return result


def manifest_of(bench: Workbench) -> Manifest:
    versions = package_versions()
    return Manifest(
        version=versions.get("autocomp", "unknown"),
        config=bench.config.to_json(),
        command=[Path(sys.argv[0]).name, *map(shlex.quote, sys.argv[1:])],
        versions=versions,
        device=bench.backend.device.to_json(),
        digests=bench.digests,
    )


def refuse_changes(run: Run, bench: Workbench) -> None:
    """A run goes on only where what its cached results depend on is what it was."""
    before, now = run.manifest.digests, bench.digests
    for name, digest in before.items():
        if now.get(name) != digest:
            raise RunError(f"the {name} changed since {run.folder} was started: restore it, or start a new search")
    versions = package_versions()
    for name in COMPRESSED_BY:
        if versions.get(name) != run.manifest.versions.get(name):
            raise RunError(
                f"{run.folder} was started with {name} {run.manifest.versions.get(name)}, and this is "
                f"{versions.get(name)}: install that version, or start a new search"
            )
    if run.manifest.device != bench.backend.device.to_json():
        raise RunError(f"{run.folder} was measured on another device or engine version: start a new search here")
