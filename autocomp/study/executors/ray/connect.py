"""A Ray cluster that answers, and has what a search asks of it."""

import logging
import os
import socket
from pathlib import Path

import ray
from ray._private.services import canonicalize_bootstrap_address

from autocomp.config import SearchConfig
from autocomp.errors import ConfigError
from autocomp.study.worker import line_of

__all__ = ["ANSWER_S", "check", "workers_of"]

ANSWER_S = 5.0
"""Longest wait for an address to accept a connection."""
_HIDDEN = ("node:", "memory", "object_store_memory", "accelerator_type:")


def check(config: SearchConfig) -> None:
    """Connect, and refuse a cluster that cannot do what is asked. A connection that stands is used.

    Raises:
        ConfigError: no answer, other versions, too few resources, or ``out`` would be lost with a job.
    """
    _refuse_passing_folder(config.out)
    if not ray.is_initialized():
        _connect(config.address)
    has = ray.cluster_resources()
    wanted = workers_of(config)
    for unit, each in (("CPU", 1.0), ("GPU", config.gpus_per_worker)):
        if each * wanted > has.get(unit, 0.0):
            raise ConfigError(
                f"{wanted} workers take {each * wanted:g} {unit}s and the cluster has {has.get(unit, 0.0):g}: "
                "give fewer --workers, or a smaller --gpus-per-worker"
            )
    target = config.target_resource
    if target is not None and has.get(target, 0.0) < 1:
        listed = ", ".join(f"{name} {count:g}" for name, count in sorted(has.items()) if not name.startswith(_HIDDEN))
        raise ConfigError(
            f"no node of the cluster has the resource {target!r}; it has {listed}: start the target's node with "
            f"--resources '{{\"{target}\": 1}}'"
        )


def workers_of(config: SearchConfig) -> int:
    """As many as were asked for, else as fit."""
    if config.workers is not None:
        return config.workers
    has = ray.cluster_resources()
    fitting = int(has.get("CPU", 0.0))
    if config.gpus_per_worker:
        fitting = min(fitting, int(has.get("GPU", 0.0) / config.gpus_per_worker))
    return max(fitting, 1)


def _connect(address: str | None) -> None:
    """Raises: ConfigError if nobody answers, or somebody of another version does."""
    asked = address or os.environ.get("RAY_ADDRESS") or "local"
    where = asked
    try:
        found = asked if asked.startswith("ray://") else canonicalize_bootstrap_address(address)
        where = found or asked if asked in ("auto", "local") else asked
        host, _, port = (found or "").removeprefix("ray://").rpartition(":")
        if host and port.isdigit():  # Ray itself waits for minutes
            socket.create_connection((host.strip("[]"), int(port)), ANSWER_S).close()
        ray.init(address, include_dashboard=None if where != "local" else False, logging_level=logging.ERROR,
                 log_to_driver=False)  # fmt: skip
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"no Ray cluster answers at {where} ({line_of(error)}): start one with 'ray start --head', or give "
            "--address local"
        ) from error
    except RuntimeError as error:
        raise ConfigError(f"the Ray cluster at {where} cannot be used: {line_of(error)}") from error


def _refuse_passing_folder(out: str | None) -> None:
    """Raises: ConfigError if the run folder would lie in a job's copy of its working directory."""
    here = Path.cwd().resolve()
    if "working_dir_files" in here.parts and Path(out or "runs").resolve().is_relative_to(here):
        raise ConfigError(
            "a Ray job's working directory is a copy that is thrown away: give --out a folder on storage that outlives "
            "the job"
        )
