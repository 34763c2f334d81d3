"""A search through Ray's client port, from a process that is no part of the cluster."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from autocomp.study.run import Run
from autocomp.study.study import journaled_trials

STARTED_S = 120.0
"""Longest wait for a head on a busy machine."""


def free_ports(count: int) -> list[int]:
    """Held together, so that all differ."""
    held = [socket.create_server(("", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return ports


@pytest.fixture
def environment() -> dict[str, str]:
    """Without the token that another cluster of this machine may have left."""
    return {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": ""}


@dataclass(frozen=True)
class Head:
    """Of a cluster of its own.

    Attributes:
        port: for clients.
        logs: of what it has started.
    """

    port: int
    logs: Path

    def said(self) -> str:
        """By the servers that it starts for clients: a client is told no more than that one has failed."""
        return "".join(f"{path.name}:\n{path.read_text()}\n" for path in self.logs.glob("ray_client_server*"))


@pytest.fixture
def head(environment: dict[str, str]) -> Iterator[Head]:
    """It ends with the process that started it."""
    port, client, agent = free_ports(3)
    with TemporaryDirectory(prefix="ray", dir="/tmp") as folder:  # a short name, as it holds sockets
        started = subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}",
             f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}", "--num-cpus=1",
             "--include-dashboard=false", "--disable-usage-stats", f"--temp-dir={folder}"],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        assert started.stdout is not None
        said = next((line for line in started.stdout if "Ray runtime started" in line), None)
        try:
            assert said is not None, "the head has ended"
            yield Head(client, Path(folder) / "session_latest" / "logs")
        finally:
            started.terminate()  # with --block it ends all that it has started
            started.communicate(timeout=STARTED_S)


@pytest.mark.slow
def test_a_search_may_use_a_clusters_client_port(head: Head, environment: dict[str, str], tmp_path: Path) -> None:
    flags = (
        "--model=zoo:resnet8 --data=random:3x16x16x10 --engine=simulated --batch=32 --calibration-images=16 "
        "--search-images=32 --selection-images=32 --trials=2 --baseline-trials=0 --finalists=1 --budget=0.7x "
        f"--executor=ray --address=ray://127.0.0.1:{head.port} --out={tmp_path / 'run'}"
    )
    done = subprocess.run(
        [sys.executable, "-m", "autocomp", "search", *flags.split()],
        env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 3, done.stdout + done.stderr + head.said()  # a simulated engine verifies nothing
    assert "on 1 workers" in done.stdout + done.stderr
    assert any(trial.status == "ok" for trial in journaled_trials(Run.entries_of(tmp_path / "run")))
