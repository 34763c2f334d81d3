"""Measurements without a search."""

from datetime import datetime
from pathlib import Path

from autocomp.api.common import refuse_filled, silent
from autocomp.config import SearchConfig, default_folder
from autocomp.engines import BackendSpec, compare, device_lock, estimate, make_backend, open_engine
from autocomp.errors import EngineError, InputError
from autocomp.outcome import Note, Observer
from autocomp.report import write_sensitivity
from autocomp.results import LatencyEstimate
from autocomp.storage import storage_errors
from autocomp.study.sensitivity import Sensitivity
from autocomp.study.sweep import THOROUGH, obtain
from autocomp.study.verify import verification_protocol
from autocomp.study.workbench import prepare

__all__ = ["measure", "run_sensitivity"]


def run_sensitivity(config: SearchConfig, observer: Observer | None = None) -> tuple[Sensitivity, Path]:
    """Measure what every single choice of the space does to a model, or find it in the user's cache.

    Returns:
        what was measured, and the folder with ``sensitivity.csv``, ``sensitivity.json`` and ``sensitivity.png``.

    Raises:
        InputError: something given does not fit; the message says what to change.
    """
    watch = observer or silent
    folder = Path(config.out) if config.out is not None else default_folder(config, datetime.now(), "sensitivity")
    refuse_filled(folder)
    bench = prepare(config, watch)
    for text in bench.notes:
        watch(Note(text))
    if not bench.splits.labelled:
        watch(Note(f"{bench.splits.source} is no real data: what is found there says little about real images"))
    sensitivity = obtain(bench, THOROUGH, watch)
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_sensitivity(sensitivity, folder)
    return sensitivity, folder


def measure(onnx: Path, spec: BackendSpec, reference: Path | None = None, statistic: str = "p50") -> LatencyEstimate:
    """Time an ONNX file under the verification protocol, in this process.

    Args:
        reference: another file to interleave with and to give the ratio to; the file itself where None.

    Raises:
        InputError: a file is missing, or the runtime refuses it.
    """
    files = [onnx, reference or onnx]
    for path in files:
        if not path.is_file():
            raise InputError(f"no file {path}: give an ONNX model")
    backend = make_backend(spec)
    protocol = verification_protocol((statistic,), builds=1, blocks=30)
    try:
        engines = [open_engine(backend, path) for path in files]
    except EngineError as error:
        raise InputError(str(error)) from error
    with engines[0] as candidate, engines[1] as other:
        with device_lock(backend.device):
            timing = compare(candidate, other, protocol)
        return estimate(timing, statistic)
