"""A finished run's model as files that people deploy."""

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from autocomp.config import SearchConfig
from autocomp.data import load_data
from autocomp.engines import make_backend
from autocomp.errors import ConfigError, DataError, InputError, RunError
from autocomp.outcome import Note, Observer, SearchResult
from autocomp.storage import write_atomic
from autocomp.study.card import CARD, Card, DataCard, sha256
from autocomp.study.loading import data_options
from autocomp.study.provenance import trained_by
from autocomp.study.recheck import shipped_files
from autocomp.study.run import Manifest
from autocomp.study.workbench import backend_spec

__all__ = ["KINDS", "export_run", "write_card"]

Files = dict[str, bytes]


def export_run(
    run: Path, manifest: Manifest, result: SearchResult, kinds: Sequence[str], out: Path, observer: Observer
) -> Card:
    """Write the files of each kind into ``out``, a new folder, and say what they claim; nothing of it where one fails.

    Args:
        kinds: of `KINDS`; ``engine`` beside others is left out, with a note, where the run's engine keeps no files.

    Raises:
        InputError: an unknown kind, or ``engine`` alone and the run's keeps no files.
        RunError: the run shipped nothing, or its files are not what it shipped.
        EngineError: an operator is not known to torch, or the engine could not be built.
    """
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise InputError(f"unknown kind {', '.join(unknown) or repr('')} in --to: use {', '.join(KINDS)}")
    if result.best is None:
        raise RunError(f"{run} shipped no model: there is nothing to export")
    config = SearchConfig.from_json(manifest.config)
    onnx, reference = shipped_files(run)
    wanted, notes = list(dict.fromkeys(kinds)), result.notes
    if "engine" in wanted and not hasattr(make_backend(backend_spec(config)), "save"):
        said = f"the engine {config.engine} keeps no engine files, it reads model.onnx"
        wanted.remove("engine")
        if not wanted:
            raise ConfigError(f"{said}: give onnx in --to")
        observer(Note(said))
        notes = (*notes, said)
    files: Files = {}
    for kind in wanted:
        files |= KINDS[kind](run, config, onnx, reference)
    training = trained_by(run, config)
    out.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_atomic(out / name, content)
    return Card(
        budgets=result.budgets,
        verified=result.verified,
        predicted=result.predicted,
        model=result.best,
        reference=result.reference,
        data=_data_card(config, manifest.digests.get("data", "")),
        device=result.device,
        config=manifest.config,
        digests=manifest.digests,
        versions=manifest.versions,
        command=manifest.command,
        notes=notes,
        files={name: sha256(content) for name, content in sorted(files.items())},
        training=None if training is None else training.to_json(),
    )


def write_card(card: Card, out: Path) -> None:
    """Write ``card.json``, last of all: a folder without it was not shipped."""
    write_atomic(out / CARD, json.dumps(card.to_json(), indent=2))


def _data_card(config: SearchConfig, digest: str) -> DataCard:
    asked = DataCard(config.data, digest, None, config.mean, config.std, config.size)
    try:
        splits = load_data(config.data, data_options(config))
    except DataError:
        return asked
    if splits.digest != digest:
        return asked
    how = getattr(splits.test, "preprocess", None)
    ready = (None, None, None) if how is None else (how.mean, how.std, how.size)
    return DataCard(config.data, digest, len(splits.test), *ready)


def _onnx(run: Path, config: SearchConfig, onnx: bytes, reference: bytes) -> Files:
    return {"model.onnx": onnx, "reference.onnx": reference}


def _torch(run: Path, config: SearchConfig, onnx: bytes, reference: bytes) -> Files:
    from autocomp.engines.torch_cuda import exported_program

    return {"model.pt2": exported_program(onnx), "weights.safetensors": _read(run / "weights.safetensors")}


def _policy(run: Path, config: SearchConfig, onnx: bytes, reference: bytes) -> Files:
    text = _read(run / "policy.json")
    scales: Any = json.loads(text)["scales"]
    return {"policy.json": text, "scales.json": json.dumps(scales, indent=2).encode()}


def _engine(run: Path, config: SearchConfig, onnx: bytes, reference: bytes) -> Files:
    backend: Any = make_backend(backend_spec(config))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.engine"
        backend.save(onnx, path)
        return {path.name: path.read_bytes()}


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise RunError(f"{path} cannot be read ({error.strerror}): copy the whole run folder") from error


KINDS: Mapping[str, Callable[[Path, SearchConfig, bytes, bytes], Files]] = {
    "onnx": _onnx,
    "torch": _torch,
    "policy": _policy,
    "engine": _engine,
}
"""What ``--to`` takes -> the files of that kind."""
