"""What a user is told who asks for a cluster that cannot serve."""

import importlib
import os
import socket
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from ray.exceptions import AuthenticationError

from autocomp import api
from autocomp.config import SearchConfig
from autocomp.engines import BackendSpec, make_backend
from autocomp.errors import ConfigError, DataError
from autocomp.policy import INT8, Policy
from autocomp.protocols import Backend
from autocomp.results import TimingProtocol
from autocomp.study import executors
from autocomp.study.executors import Kit
from autocomp.study.executors import ray as rays
from autocomp.study.executors.kit import open_kit, receive, send
from autocomp.study.executors.ray import connect, room
from autocomp.study.executors.ray.room import Node
from autocomp.study.run import Manifest, Run
from autocomp.study.score import Predictions, Scorer
from autocomp.study.workbench import package_versions
from tests.engines.conftest import Case

CONFIG = SearchConfig(executor="ray", finetune_epochs=0)


class Elsewhere:
    """Images that lie on another machine."""

    def batches(self, size: int) -> Any:
        raise DataError("cannot read /here/1.png")


@pytest.fixture
def kit() -> Kit:
    """Only what a worker looks at before it works."""
    found = Predictions(np.zeros((1, 2), np.float32), np.zeros(1, np.int64))
    scorer = Scorer(Elsewhere(), found, True)  # type: ignore[arg-type]
    return Kit(None, BackendSpec("simulated", 1), None, b"", scorer, TimingProtocol())  # type: ignore[arg-type]


def test_without_ray_the_answer_is_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("autocomp.study.executors.ray")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(executors, "ray")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'autocomp\[ray\]'"):
        executors.hire(CONFIG)


@pytest.mark.parametrize(
    ("address", "variable", "words"),
    [
        ("ray://127.0.0.1:9", "", r"ray://127.0.0.1:9"),
        ("auto", "127.0.0.1:9", r":9"),
        (None, "", r":7"),  # a cluster that was killed leaves a record
    ],
)
def test_nobody_at_the_address_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, address: str | None, variable: str, words: str
) -> None:
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("127.0.0.1:7")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setenv("RAY_ADDRESS", variable)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda *arguments, **options: pytest.fail("it waits for minutes"))
    with pytest.raises(ConfigError, match=f"no Ray cluster answers at .*{words} .*ray start --head"):
        rays.check(replace(CONFIG, address=address))


LOST = "Starting Ray client server failed. See ray_client_server_23000.err for detailed logs."


@pytest.mark.parametrize(
    ("said", "calls"), [([LOST], 2), ([LOST, LOST], 3), ([LOST] * 4, 3), (["The client has been refused."] * 2, 1)]
)
def test_a_server_that_ray_loses_at_its_start_is_asked_for_again(
    monkeypatch: pytest.MonkeyPatch, said: list[str], calls: int
) -> None:
    asked, left = [], iter(said)

    def init(address: str, **options: Any) -> None:
        asked.append(address)
        if (words := next(left, None)) is not None:
            raise ConnectionAbortedError(f"Initialization failure from server:\n{words}")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(connect, "check_room", lambda config: None)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"ray://127.0.0.1:{server.getsockname()[1]}"
        answered = (
            nullcontext() if calls > len(said) else pytest.raises(ConfigError, match=f"cannot be used.*{said[0]}")
        )
        with answered:
            rays.check(replace(CONFIG, address=address))
    assert asked == [address] * calls


def test_a_cluster_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private.utils import check_version_info

    def init(*arguments: Any, **options: Any) -> None:
        check_version_info({"ray_version": "1.0.0", "python_version": "3.6.1"}, "here")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(ConfigError, match=r"Version mismatch.*Ray: 1.0.0 Python: 3.6.1") as caught:
        rays.check(replace(CONFIG, address="local"))
    assert "\n" not in str(caught.value)


TOKEN = "InvalidAuthToken: Authentication token is missing or incorrect. Ensure that the token is there."


@pytest.mark.parametrize(
    ("error", "cause", "words"),
    [
        (
            ConnectionError("Failed to connect to Ray cluster at h:1"),
            RuntimeError(f"Traceback:\n  File\nray.exceptions.AuthenticationError: {TOKEN}\n"),
            r"Failed to connect to Ray cluster at h:1 \(.*InvalidAuthToken: Authentication token is missing or incor"
            r"rect\): set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to what 'ray get-auth-token' prints",
        ),
        (AuthenticationError(TOKEN), None, "InvalidAuthToken.*: set RAY_AUTH_MODE=token"),
        (ConnectionError("ray client connection timeout"), None, "timeout: if it asks for a token, set RAY_AUTH_MODE="),
        (ConnectionError("another protocol"), None, "another protocol$"),
    ],
)
def test_a_cluster_that_answers_and_refuses_is_told_apart_and_in_rays_words(
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    error: Exception,
    cause: Exception | None,
    words: str,
) -> None:
    def init(*arguments: Any, **options: Any) -> None:
        os.write(2, b"gcs_client.cc:210: Failed to get cluster ID\n")
        raise error from cause

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(ConfigError, match=f"the Ray cluster at local cannot be used: .*{words}") as caught:
        rays.check(replace(CONFIG, address="local"))
    assert "\n" not in str(caught.value)
    print("heard", file=sys.stderr)
    assert capfd.readouterr().err == "heard\n"


def test_a_package_that_only_the_driver_has_is_named(kit: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "only_here.py").write_text("def metric(a, b, c):\n    return 0.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    metric = importlib.import_module("only_here").metric
    parcel = send(replace(kit, scorer=replace(kit.scorer, metric=metric)), ray.cloudpickle.dumps)
    monkeypatch.delitem(sys.modules, "only_here")
    (tmp_path / "only_here.py").unlink()
    importlib.invalidate_caches()
    with pytest.raises(ConfigError, match="package only_here is missing"):
        receive(parcel)


def test_images_that_only_the_driver_can_read_are_named(kit: Kit) -> None:
    with pytest.raises(DataError, match=r"/here/1.png.*storage that every node reaches"):
        open_kit(kit)


@pytest.mark.parametrize("out", [None, "here", "./deep/er"])
def test_a_run_folder_in_a_jobs_copy_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str | None
) -> None:
    copy = tmp_path / "working_dir_files" / "_ray_pkg_1"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    with pytest.raises(ConfigError, match="outlives"):
        rays.check(replace(CONFIG, out=out))


def test_a_run_that_goes_on_is_refused_by_where_it_lies_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "working_dir_files" / "_ray_pkg_1"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    config = replace(CONFIG, out=str(tmp_path / "kept"))
    Run.create(copy / "run", Manifest(package_versions()["autocomp"], config.to_json(), [], {}, {}, {})).close()
    with pytest.raises(ConfigError, match="outlives"):
        api.resume(Path("run"))


def test_a_worker_without_the_targets_engine_runs_the_file_under_onnx_runtime(
    kit: Kit, model: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lacking(spec: BackendSpec) -> Backend:
        if spec.name == "tensorrt":
            raise ConfigError("no GPU")
        return make_backend(spec)

    class Here:
        def batches(self, size: int) -> Any:
            yield np.zeros((size, 3, 16, 16), np.float32), np.zeros(size, np.int64)

    monkeypatch.setattr("autocomp.study.executors.kit.make_backend", lacking)
    file = model.emit(Policy(precisions=dict.fromkeys(model.net.graph.layer_by_name, INT8)))
    scorer = replace(kit.scorer, split=Here())  # type: ignore[arg-type]
    worker = open_kit(replace(kit, spec=BackendSpec("tensorrt", 4), reference=file, scorer=scorer))
    images = np.random.default_rng(0).normal(size=(4, 3, 16, 16)).astype(np.float32)
    with make_backend(BackendSpec("simulated", 4)).build(file) as engine:
        assert np.array_equal(worker.reference.run(images), engine.run(images))
    assert not worker.backend.measures


def node(host: str, cpu: float, gpu: float, free_cpu: float | None = None, **others: tuple[float, float]) -> Node:
    """With a part that others hold; other resources by how much there is and how much of it is free."""
    has = {"CPU": cpu, "GPU": gpu, **{name: pair[0] for name, pair in others.items()}}
    free = {
        "CPU": cpu if free_cpu is None else free_cpu,
        "GPU": gpu,
        **{name: pair[1] for name, pair in others.items()},
    }
    return Node(host, has, free)


def cluster(monkeypatch: pytest.MonkeyPatch, *nodes: Node) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(room, "nodes", lambda: list(nodes))
    monkeypatch.setattr(room, "FREE_S", 0.0)


@pytest.mark.parametrize(("share", "fitting"), [(0.0, 8), (0.5, 4), (0.6, 2), (2.0, 1)])
def test_as_many_workers_start_as_fit(monkeypatch: pytest.MonkeyPatch, share: float, fitting: int) -> None:
    cluster(monkeypatch, node("a", 8, 2))
    config = replace(CONFIG, gpus_per_worker=share)
    rays.check(config)
    assert room.room_for(config) == room.Room(fitting, 0)
    with pytest.raises(ConfigError, match=rf"{9} workers take .* and the cluster has"):
        rays.check(replace(config, workers=9))


def test_workers_that_fit_in_sum_but_not_on_the_nodes_are_fewer_and_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster(monkeypatch, node("a", 4, 1), node("b", 4, 1), node("c", 4, 1, free_cpu=0))
    config = replace(CONFIG, gpus_per_worker=0.6, workers=4)
    rays.check(config)
    found = room.room_for(config)
    assert (found.workers, found.note) == (
        2,
        "2 workers start in place of 4, as no more fit; free are a: CPU 4 of 4, GPU 1 of 1; b: CPU 4 of 4, GPU 1 of 1; "
        "c: CPU 0 of 4, GPU 1 of 1",
    )


def test_a_worker_that_no_node_can_hold_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster(monkeypatch, node("a", 4, 1), node("b", 4, 1))
    words = r"no node can hold a worker, which takes a CPU and 2 GPUs; free are a: CPU 4 of 4, GPU 1 of 1; b: .*smaller"
    with pytest.raises(ConfigError, match=words):
        rays.check(replace(CONFIG, gpus_per_worker=2.0, workers=1))


@pytest.mark.parametrize(("free", "meters"), [(1.0, 1), (0.99, 1), (0.5, 0)])
def test_a_device_may_be_held_a_little_by_the_job_that_runs_there(
    monkeypatch: pytest.MonkeyPatch, free: float, meters: int
) -> None:
    cluster(monkeypatch, node("a", 4, 0), node("b", 0, 0, target=(1.0, free)))
    config = replace(CONFIG, target_resource="target")
    rays.check(config)
    if meters:
        assert room.room_for(config).meters == meters
    else:
        with pytest.raises(ConfigError, match=r"no node has 0.9 of the resource 'target'.* target 0.5 of 1: wait"):
            room.room_for(config)


def test_processors_that_others_hold_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster(monkeypatch, node("a", 4, 0, free_cpu=0.5))
    rays.check(CONFIG)
    with pytest.raises(ConfigError, match=r"no node has room for a worker; free are a: CPU 0.5 of 4, GPU 0 of 0: wait"):
        room.room_for(CONFIG)


def test_room_that_comes_within_seconds_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster(monkeypatch)
    looks = [[node("a", 4, 0, free_cpu=0)], [node("a", 4, 0, free_cpu=1)], [node("a", 4, 0)]]
    monkeypatch.setattr(room, "nodes", lambda: looks.pop(0))
    monkeypatch.setattr(room, "FREE_S", 60.0)
    assert room.room_for(CONFIG) == room.Room(4, 0) and not looks
