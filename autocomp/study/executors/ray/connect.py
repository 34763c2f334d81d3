"""A Ray cluster that answers, and has what a search asks of it."""

import logging
import os
import socket
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import ray
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
from ray._private.services import canonicalize_bootstrap_address
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from autocomp.config import SearchConfig
from autocomp.errors import ConfigError, RunError
from autocomp.storage import storage_errors
from autocomp.study.executors.ray.room import check_room
from autocomp.study.worker import line_of

__all__ = ["ANSWER_S", "check"]

ANSWER_S = 5.0
"""Longest wait for an address to accept a connection."""
ATTEMPTS = 3
"""To connect: Ray forks a server for each client while its threads run, and now and then one is dead at once."""
_LOST = "Starting Ray client server failed"
_TOKEN = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to what 'ray get-auth-token' prints on its head"
LOOK_S = 30.0
"""Longest wait for the nodes to say whether they see a folder."""


def check(config: SearchConfig, trains: bool = False) -> None:
    """Connect, and refuse a cluster that cannot do what is asked. A connection that stands is used.

    Args:
        trains: on other nodes, whose checkpoints lie in ``out``.

    Raises:
        ConfigError: no answer, other versions, too few resources, or ``out`` would be lost with a job, or with the
            node that the job runs on, or is not seen by the nodes that train.
        RunError: a node has died meanwhile.
    """
    _refuse_passing_folder(config.out)
    if not ray.is_initialized():
        _connect(config.address)
    if trains or config.resolved_finetune_epochs() or RAY_JOB_CONFIG_JSON_ENV_VAR in os.environ:
        _refuse_unshared_folder(config.out)
    check_room(config)


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
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"no Ray cluster answers at {where} ({line_of(error)}): start one with 'ray start --head', or give "
            "--address local"
        ) from error
    try:
        with _hushed():
            _begin(address, dashboard=None if where != "local" else False)
    except (OSError, ValueError, RuntimeError, RayError) as error:
        raise ConfigError(f"the Ray cluster at {where} cannot be used: {_said(error)}") from error


def _begin(address: str | None, dashboard: bool | None) -> None:
    """As `ray.init`, and again where a client's server was lost at its start."""
    for left in reversed(range(ATTEMPTS)):
        try:
            ray.init(address, include_dashboard=dashboard, logging_level=logging.ERROR, log_to_driver=False)
            return
        except ConnectionAbortedError as error:
            if _LOST not in str(error) or left == 0:
                raise


@contextmanager
def _hushed() -> Iterator[None]:
    """Nothing is printed: Ray repeats a refusal twenty times before it raises it."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            os.dup2(nowhere.fileno(), 2)
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _said(error: BaseException) -> str:
    """What Ray says, with the last line of what it says of the cause, and what to do about a token."""
    said = line_of(error)
    lines = str(error.__cause__ or "").strip().splitlines()
    if lines:
        said += f" ({lines[-1].partition('. ')[0]})"
    if "token" in said.lower():
        return f"{said}: {_TOKEN}"
    return f"{said}: if it asks for a token, {_TOKEN}" if "client connection timeout" in said else said


def _refuse_passing_folder(out: str | None) -> None:
    """Raises: ConfigError if the run folder would lie in a job's copy of its working directory."""
    here = Path.cwd().resolve()
    if "working_dir_files" in here.parts and Path(out or "runs").resolve().is_relative_to(here):
        raise ConfigError(
            "a Ray job's working directory is a copy that is thrown away: give --out a folder on storage that outlives "
            "the job"
        )


def _refuse_unshared_folder(out: str | None) -> None:
    """Raises: ConfigError if another node of the cluster does not see the folder that the run would lie in."""
    folder = Path(os.path.abspath(out or "runs"))
    here = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
    others = {node["NodeID"]: node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"]}
    if not ray.util.client.ray.is_connected():  # whose own node is this process's
        others.pop(ray.get_runtime_context().get_node_id(), None)
    with storage_errors(folder), NamedTemporaryFile(dir=here, prefix=".autocomp-") as mark:
        looks = ray.remote(num_cpus=0)(os.path.exists)
        asked = {
            looks.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(mark.name): node
            for node in others
        }
        answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=LOOK_S) if asked else ([], [])
        blind = sorted({others[asked[ref]] for ref in answered if not _seen(ref, others[asked[ref]], folder)})
    if blind:
        raise ConfigError(
            f"{folder} is not seen by {', '.join(blind)}: give --out a folder on storage that every node reaches, so "
            "that the run outlives this one and can keep what is trained there (or train nothing: --finetune-epochs 0)"
        )


def _seen(answer: Any, host: str, folder: Path) -> bool:
    """Raises: RunError if the node has died."""
    try:
        return bool(ray.get(answer))
    except RayError as error:
        raise RunError(
            f"the node {host} went away while it was asked whether it sees {folder} ({line_of(error)}): start again, "
            "with that node or without it"
        ) from error
