"""Measurements without a search."""

from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from autocomp.api.common import of_live_objects, refuse_filled, silent
from autocomp.config import SearchConfig, default_folder, read_config
from autocomp.engines import BackendSpec, compare, copies_of, device_lock, estimate, make_backend, open_engine
from autocomp.errors import EngineError, InputError, RunError
from autocomp.outcome import Note, Observer
from autocomp.report import write_sensitivity
from autocomp.results import LatencyEstimate
from autocomp.storage import storage_errors
from autocomp.study.artefacts import ShippedPolicy, refuse_other_inputs
from autocomp.study.debug import AccuracyGap, debug
from autocomp.study.predicted import hardware_profile
from autocomp.study.run import read_manifest
from autocomp.study.sensitivity import Sensitivity
from autocomp.study.sweep import THOROUGH, obtain
from autocomp.study.verify import verification_protocol
from autocomp.study.workbench import prepare

__all__ = ["debug_accuracy", "measure", "run_sensitivity"]


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
        return replace(estimate(timing, statistic), copies=copies_of(candidate))


def debug_accuracy(
    target: Path,
    settings: Mapping[str, Any],
    toml: Path | None = None,
    file: Path | None = None,
    observer: Observer | None = None,
) -> AccuracyGap:
    """Say what an engine's accuracy differs by from the torch model's, and at which layer it goes wrong.

    Args:
        target: a run's folder, or another with ``policy.json`` and ``model.onnx``; or a ``policy.json``, whose file is
            written anew.
        settings: fields of `SearchConfig` that differ from the run's, or from the defaults.
        toml: of more settings, where the target is no run.
        file: ONNX in place of the target's.

    Raises:
        InputError: the target holds no policy, or model, weights, data or engine are not those it was made with.
        EngineError: the engine refuses the file.
    """
    watch = observer or silent
    path = target / "policy.json" if target.is_dir() else target
    shipped = ShippedPolicy.read(path)
    if file is None and (target / "model.onnx").is_file():
        file = target / "model.onnx"
    given = {name: value for name, value in settings.items() if value is not None}
    if (target / "manifest.json").is_file():
        config = SearchConfig.from_json({**read_manifest(target).config, **given})
    else:
        config = SearchConfig.from_json({**read_config(toml, given).to_json(), **(shipped.settings or {})})
    if of_live_objects(config):
        raise RunError(f"{target} is of live objects: name --model, --weights and --data")
    if hardware_profile(config) is not None:
        config = replace(config, hardware=None)  # the engine itself, not what a profile says of it
    try:
        data = None if file is None else file.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}") from error
    bench = prepare(config, watch, recipe=shipped.recipe if shipped.digests else None)
    refuse_other_inputs(shipped, path, bench)
    bench.traced.graph.validate(shipped.policy)
    bench.backend.capabilities().validate(shipped.policy)
    return debug(bench, shipped, data, watch)
