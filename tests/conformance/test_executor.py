"""What every executor must do, and what a cluster must survive."""

import importlib
import os
import platform
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from autocomp.budget import parse_budgets
from autocomp.compress import Compressed
from autocomp.config import SearchConfig
from autocomp.engines import initializer_bytes, structure_digest
from autocomp.errors import CompressError, ConfigError, DataError
from autocomp.hardware import LatencyTable
from autocomp.outcome import Event, Fleet, SearchResult
from autocomp.policy import Policy
from autocomp.protocols import Executor
from autocomp.results import TimingProtocol, TrialResult
from autocomp.study import executors
from autocomp.study.conduct import conduct, manifest_of
from autocomp.study.executors import Crew, Kit, LocalCrew
from autocomp.study.executors import ray as rays
from autocomp.study.executors.kit import open_kit, receive, send
from autocomp.study.run import Run
from autocomp.study.search import begin
from autocomp.study.trial import Limits, Trials
from autocomp.study.workbench import Workbench, prepare
from autocomp.study.worker import Emitter, Task, TimeTask

CONFIG = SearchConfig(
    model="zoo:resnet8", data="random:3x16x16x10", engine="simulated", batch=2, calibration_images=16, search_images=32,
    selection_images=32, trials=6, baseline_trials=1, finalists=1, budget=("0.7x",), wave=3,
)  # fmt: skip
TARGET, OTHER = "board", "other"
NODE = {"num_cpus": 4, "resources": {TARGET: 1, OTHER: 1}}


@dataclass(frozen=True)
class Deadly:
    """An emitter that fails on one policy, kills its process on another, and once only on a third."""

    inner: Emitter
    refused: str
    killing: str
    killing_once: str
    killed: Path

    def skeleton(self, policy: Policy) -> bytes:
        return self.inner.skeleton(policy)

    def compress(self, policy: Policy) -> Compressed:
        if policy.digest == self.refused:
            raise CompressError("layer1 is not\nfinite")
        if policy.digest == self.killing:
            os._exit(1)
        if policy.digest == self.killing_once and not self.killed.exists():
            self.killed.touch()
            os._exit(1)
        return self.inner.compress(policy)

    def finish(self, policy: Policy) -> Compressed:
        return self.inner.finish(policy)

    def emit(self, compressed: Compressed) -> bytes:
        return self.inner.emit(compressed)


def ignore(event: Event) -> None:
    del event


@pytest.fixture(scope="module")
def bench() -> Workbench:
    return prepare(CONFIG, ignore)


@pytest.fixture(scope="module")
def policies(bench: Workbench) -> list[Policy]:
    """Of distinct structures, all of which can meet the budget."""
    group = bench.traced.graph.groups[0]
    return [Policy({group.name: kept}) for kept in range(1, group.channels)]


@pytest.fixture(scope="module")
def kit(bench: Workbench, policies: list[Policy], tmp_path_factory: pytest.TempPathFactory) -> Kit:
    with begin(bench) as prologue:
        scorer = prologue.scorer
    doomed = [policy.digest for policy in policies[:3]]
    emitter = Deadly(bench.emitter, *doomed, tmp_path_factory.mktemp("killed") / "once")
    return Kit(emitter, bench.spec, bench.backend, bench.reference, scorer, TimingProtocol(blocks=2, block_ms=1.0))


@pytest.fixture
def trials(bench: Workbench, kit: Kit, tmp_path: Path) -> Trials:
    limits = Limits(
        parse_budgets(["1x"]), {"p50": 1.0}, bench.traced.graph.macs(Policy()), initializer_bytes(bench.reference)
    )
    reference = bench.backend.build(bench.reference)
    return Trials(
        kit.emitter, bench.backend, reference, kit.scorer, kit.protocol, bench.traced.graph,
        structure_digest(bench.reference), limits, LatencyTable(tmp_path / "latencies.jsonl"), ignore,
    )  # fmt: skip


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head with room for one worker, and a node that has the targets."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    made.add_node(**NODE)
    ray.init(made.address, logging_level="ERROR", log_to_driver=False)
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.fixture(scope="module")
def on_ray(cluster: Cluster, kit: Kit, bench: Workbench) -> Iterator[rays.RayCrew]:
    config = replace(CONFIG, executor="ray", workers=2, target_resource=TARGET)
    crew = rays.RayCrew(config, kit, bench.backend.device.to_json())
    yield crew
    crew.close()


@pytest.fixture(params=["local", "ray"])
def crew(request: pytest.FixtureRequest) -> Crew:
    return LocalCrew() if request.param == "local" else request.getfixturevalue("on_ray")


def wave(policies: list[Policy], first: int = 0) -> list[tuple[int, str, Policy]]:
    return [(first + place, "search", policy) for place, policy in enumerate(policies)]


def found(executor: Executor, asked: list[tuple[int, str, Policy]]) -> list[TrialResult]:
    """Results in trial order, without what differs from run to run."""
    return plain(executor.run(asked))


def plain(results: Iterable[TrialResult]) -> list[TrialResult]:
    found = [replace(result, seconds={}, cached_timing=False) for result in results]
    return sorted(found, key=lambda result: result.number)


def test_every_trial_has_the_result_that_this_process_finds(
    crew: Crew, trials: Trials, policies: list[Policy], tmp_path: Path
) -> None:
    executor = crew.executor(trials)
    assert isinstance(executor, Executor)
    asked = wave(policies[3:9])
    again = replace(trials, cache=LatencyTable(tmp_path / "again.jsonl"))
    expected = plain(again.evaluate(*trial) for trial in asked)
    assert found(executor, asked) == expected
    assert {result.status for result in expected} == {"ok"}
    assert len(trials.cache) == len(again.cache) > 1
    executor.close()


def test_a_policys_failure_is_its_result(crew: Crew, trials: Trials, policies: list[Policy]) -> None:
    failed, fine = found(crew.executor(trials), wave([policies[0], policies[3]]))
    assert (failed.status, failed.stage, failed.error) == ("failed", "compress", "layer1 is not finite")
    assert fine.status == "ok"


def test_another_wave_may_follow_one_that_was_left(crew: Crew, trials: Trials, policies: list[Policy]) -> None:
    left = crew.executor(trials).run(wave(policies[3:7]))
    next(left)
    left.close()  # type: ignore[attr-defined]
    executor = crew.executor(trials)
    assert found(executor, []) == []
    assert [result.policy for result in found(executor, wave(policies[5:7]))] == policies[5:7]


def test_a_lost_workers_trial_runs_elsewhere_and_a_killing_policy_fails(
    on_ray: rays.RayCrew, kit: Kit, trials: Trials, policies: list[Policy]
) -> None:
    seen: list[Fleet] = []

    def watch(event: Event) -> None:
        if isinstance(event, Fleet):
            seen.append(event)

    _, killing, once, *rest = policies
    killed, spared, *others = found(on_ray.executor(replace(trials, observer=watch)), wave([killing, once, *rest[:4]]))
    assert (killed.status, killed.stage) == ("failed", "score")
    assert killed.error is not None and killed.error.startswith(f"it lost {rays.ATTEMPTS} workers")
    assert "\n" not in killed.error
    assert spared.status == "ok" and kit.emitter.killed.exists()  # type: ignore[attr-defined]
    assert [other.policy for other in others] == rest[:4] and all(other.status == "ok" for other in others)
    assert (seen[-1].lost, seen[-1].retried, seen[-1].in_flight) == (rays.ATTEMPTS + 1, rays.ATTEMPTS, 0)


def test_nobody_scores_on_this_machine_while_it_is_measured(
    on_ray: rays.RayCrew, trials: Trials, policies: list[Policy], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(trials.backend), "measures", True)
    workers, busy = on_ray.pools[0], []

    def do(own: Trials, task: Task, announce: Any) -> Any:
        assert isinstance(task, TimeTask)
        busy.append([member.busy for member in workers.members])
        return inner(own, task, announce)

    inner = Trials.do
    monkeypatch.setattr(Trials, "do", do)
    results = found(rays.RayExecutor(trials, workers, None), wave(policies[3:9]))
    assert [result.status for result in results] == ["ok"] * 6
    assert {member.host for member in workers.members} == {platform.node()}
    assert len(busy) == 6 and not any(map(any, busy))


def searched(bench: Workbench, folder: Path) -> SearchResult:
    with begin(bench) as prologue, Run.create(folder, manifest_of(bench)) as run:
        return conduct(bench, prologue, run, ignore)


def test_a_search_ends_with_the_result_of_the_local_one(cluster: Cluster, bench: Workbench, tmp_path: Path) -> None:
    before = sorted(ray.util.list_named_actors())
    local = searched(bench, tmp_path / "local")
    far = searched(replace(bench, config=replace(CONFIG, executor="ray", workers=2)), tmp_path / "far")
    assert far.contenders == local.contenders and far.trials == local.trials
    assert plain(far.front) == plain(local.front)
    deadline = time.monotonic() + 20
    while sorted(ray.util.list_named_actors()) != before and time.monotonic() < deadline:
        time.sleep(0.1)
    assert sorted(ray.util.list_named_actors()) == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"workers": 99}, r"99 workers take 99 CPUs and the cluster has 5"),
        ({"workers": 1, "gpus_per_worker": 0.5}, r"0.5 GPUs and the cluster has 0"),
        ({"workers": 1, "target_resource": "jetson"}, r"no node .*'jetson'; it has CPU 5, board 1, other 1: start"),
    ],
)
def test_a_cluster_that_does_not_suffice_is_refused(cluster: Cluster, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        rays.check(replace(CONFIG, executor="ray", **changes))


def test_a_target_that_is_another_device_is_refused(cluster: Cluster, kit: Kit) -> None:
    config = replace(CONFIG, executor="ray", workers=1, target_resource=OTHER)
    with pytest.raises(ConfigError, match="start the search on a node that has the target"):
        rays.RayCrew(config, kit, {"name": "another"})


def test_a_lost_node_loses_no_trial(
    cluster: Cluster, on_ray: rays.RayCrew, trials: Trials, policies: list[Policy]
) -> None:
    results = on_ray.executor(trials).run(wave(policies[3:12]))
    numbers = [next(results).number]
    (node,) = cluster.worker_nodes
    cluster.remove_node(node, allow_graceful=False)
    cluster.add_node(**NODE)
    finished = list(results)
    assert sorted(numbers + [result.number for result in finished]) == list(range(9))
    assert all(result.status == "ok" for result in finished)


def test_without_ray_the_answer_is_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("autocomp.study.executors.ray")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(executors, "ray")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'autocomp\[ray\]'"):
        executors.check_executor(replace(CONFIG, executor="ray"))


def test_nobody_at_the_address_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(ConfigError, match=r"no Ray cluster answers at ray://127.0.0.1:9 .*ray start --head"):
        rays.check(replace(CONFIG, executor="ray", address="ray://127.0.0.1:9"))


def test_a_cluster_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private.utils import check_version_info

    def init(*arguments: Any, **options: Any) -> None:
        check_version_info({"ray_version": "1.0.0", "python_version": "3.6.1"}, "here")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(ConfigError, match=r"Version mismatch.*Ray: 1.0.0 Python: 3.6.1") as caught:
        rays.check(replace(CONFIG, executor="ray", address="auto"))
    assert "\n" not in str(caught.value)


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
    class Elsewhere:
        def batches(self, size: int) -> Any:
            raise DataError("cannot read /here/1.png")

    with pytest.raises(DataError, match=r"/here/1.png.*storage that every node reaches"):
        open_kit(replace(kit, scorer=replace(kit.scorer, split=Elsewhere())))  # type: ignore[arg-type]


@pytest.mark.parametrize("out", [None, "here", "./deep/er"])
def test_a_run_folder_in_a_jobs_copy_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str | None
) -> None:
    copy = tmp_path / "working_dir_files" / "_ray_pkg_1"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    with pytest.raises(ConfigError, match="outlives"):
        rays.check(replace(CONFIG, executor="ray", out=out))
