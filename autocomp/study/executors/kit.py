"""What a worker on another machine is given once: all it needs to time files and to score policies."""

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autocomp.engines import BackendSpec, make_backend
from autocomp.errors import AutocompError, ConfigError, DataError
from autocomp.protocols import Backend
from autocomp.results import TimingProtocol
from autocomp.study.score import Scorer
from autocomp.study.worker import Emitter, Worker

__all__ = ["Kit", "Parcel", "lacks", "open_kit", "receive", "send"]

Parcel = tuple[bytes, Sequence[NDArray[np.uint8]]]
"""A pickle and the arrays it refers to, which a machine's workers share where they lie."""


@dataclass(frozen=True)
class Kit:
    """Plain data from which a `Worker` is made.

    Attributes:
        emitter: policies -> files.
        spec, backend: of the target; the engines of one that measures are made anew by ``spec``.
        reference: the uncompressed model's file.
        scorer: on the search split.
        protocol: of a trial's timing.
    """

    emitter: Emitter
    spec: BackendSpec
    backend: Backend | None
    reference: bytes
    scorer: Scorer
    protocol: TimingProtocol


def send(kit: Kit, dumps: Callable[..., bytes]) -> Parcel:
    """A kit ready to travel, without a copy of its arrays.

    Args:
        dumps: as `pickle.dumps`, for code that only this process has.
    """
    buffers: list[pickle.PickleBuffer] = []
    head = dumps(kit, protocol=5, buffer_callback=buffers.append)
    return head, [np.frombuffer(buffer.raw(), np.uint8) for buffer in buffers]


def receive(parcel: Parcel) -> Kit:
    """Raises: ConfigError if code it needs is missing here."""
    head, arrays = parcel
    try:
        kit: Any = pickle.loads(head, buffers=arrays)
    except ModuleNotFoundError as error:
        raise ConfigError(lacks(str(error.name))) from error
    assert isinstance(kit, Kit)
    return kit


def lacks(package: str) -> str:
    return (
        f"the package {package} is missing there: install it in the workers' image, or submit it with the job "
        "(--working-dir)"
    )


def open_kit(kit: Kit) -> Worker:
    """A worker on this machine; where the target engine is missing it scores the same files under ONNX Runtime.

    Raises:
        DataError: the images of the search split cannot be read from here.
    """
    backend = kit.backend or _engine_here(kit.spec)
    try:
        next(iter(kit.scorer.split.batches(1)))
    except (DataError, OSError) as error:
        raise DataError(f"it cannot read the data ({error}): put it on storage that every node reaches") from error
    return Worker(kit.emitter, backend, backend.build(kit.reference), kit.scorer, kit.protocol)


def _engine_here(spec: BackendSpec) -> Backend:
    try:
        return make_backend(spec)
    except AutocompError:
        return make_backend(BackendSpec("simulated", spec.batch))  # its outputs are ONNX Runtime's, in exact float
