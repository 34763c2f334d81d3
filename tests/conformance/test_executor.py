"""What every executor must do, and what a cluster must survive."""

import importlib
import json
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from ray.cluster_utils import Cluster
from ray.exceptions import NodeDiedError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from autocomp.api import load_result
from autocomp.budget import parse_budgets
from autocomp.config import SearchConfig
from autocomp.data.arrays import ArraySplit
from autocomp.data.preprocess import Preprocess
from autocomp.engines import initializer_bytes, structure_digest
from autocomp.errors import ConfigError, RunError
from autocomp.hardware import LatencyTable
from autocomp.outcome import EpochDone, Event, Fleet, Note, SearchResult, Stage, Step
from autocomp.policy import Policy
from autocomp.protocols import Executor
from autocomp.results import TimingProtocol, TrialResult
from autocomp.study import executors, workbench
from autocomp.study.conduct import conduct, manifest_of
from autocomp.study.executors import Crew, Kit
from autocomp.study.executors import ray as rays
from autocomp.study.executors.kit import receive, send
from autocomp.study.executors.ray import pool
from autocomp.study.executors.ray.tuning import RATES
from autocomp.study.run import Run
from autocomp.study.search import Prologue, begin
from autocomp.study.tasks import Task, TimeTask
from autocomp.study.trial import Limits, Trials
from autocomp.study.workbench import Workbench, prepare
from autocomp.train import Training, TrainingRecipe, finetune
from autocomp.train.maps import stages
from tests.conformance import frail_parts
from tests.conformance.frail_parts import Gone, Refusing, start

CONFIG = SearchConfig(
    model="zoo:resnet8", data="random:3x16x16x10", engine="simulated", batch=32, calibration_images=16,
    search_images=32, selection_images=32, trials=6, baseline_trials=1, finalists=1, budget=("0.7x",), wave=3,
)  # fmt: skip
TARGET = "board"


def ignore(event: Event) -> None:
    del event


@pytest.fixture(scope="module")
def policies() -> list[Policy]:
    """Of distinct structures, all of which can meet the budget."""
    return [Policy({"layer1.0.conv1": kept}) for kept in range(1, 16)]


@pytest.fixture(scope="module")
def bench(policies: list[Policy]) -> Workbench:
    made = prepare(CONFIG, ignore)
    return replace(made, emitter=Refusing(made.emitter, policies[0].digest))


@pytest.fixture(scope="module")
def near(bench: Workbench) -> Iterator[Prologue]:
    """A search of this process."""
    with begin(bench, executors.LocalCrew()) as prologue:
        yield prologue


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head with the target."""
    ray.cloudpickle.register_pickle_by_value(frail_parts)
    head = {"num_cpus": 2, "include_dashboard": True, "resources": {TARGET: 1}}
    made = Cluster(initialize_head=True, head_node_args=head)
    ray.init(made.address, logging_level="ERROR", log_to_driver=False)
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.fixture(scope="module")
def far(cluster: Cluster, bench: Workbench) -> Iterator[Prologue]:
    """A search on the cluster: two workers, and an actor that times."""
    config = replace(CONFIG, executor="ray", workers=2, target_resource=TARGET)
    with closing(executors.hire(config)) as crew, begin(bench, crew) as prologue:
        yield prologue


@pytest.fixture(params=["local", "ray"])
def crew(request: pytest.FixtureRequest) -> Crew:
    prologue: Prologue = request.getfixturevalue("near" if request.param == "local" else "far")
    return prologue.crew


@pytest.fixture
def trials(bench: Workbench, near: Prologue, tmp_path: Path) -> Trials:
    limits = Limits(
        parse_budgets(["1x"]), {"p50": 1.0}, bench.traced.graph.macs(Policy()), initializer_bytes(bench.reference)
    )
    return Trials(
        bench.emitter, bench.backend, near.reference, near.scorer, TimingProtocol(blocks=2, block_ms=1.0),
        bench.traced.graph, structure_digest(bench.reference), limits, LatencyTable(tmp_path / "latencies.jsonl"),
        tmp_path, ignore,
    )  # fmt: skip


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Is there once the policy that kills once has."""
    return tmp_path_factory.mktemp("killed") / "once"


@pytest.fixture(scope="module")
def frail(cluster: Cluster, policies: list[Policy], killed: Path) -> Iterator[rays.Pool]:
    """Two workers that may die, on a node of their own while there is one."""
    node = cluster.add_node(num_cpus=0)
    place = NodeAffinitySchedulingStrategy(node.node_id, soft=True)
    kit = ray.put((policies[1].digest, policies[2].digest, str(killed)))
    pool = rays.Pool(partial(start, scheduling_strategy=place), 2, "frail")
    pool.equip(kit)
    pool.gather()
    yield pool
    pool.close()


def wave(policies: list[Policy], first: int = 0) -> list[tuple[int, str, Policy]]:
    return [(first + place, "search", policy) for place, policy in enumerate(policies)]


def found(executor: Executor, asked: list[tuple[int, str, Policy]]) -> list[TrialResult]:
    """Results in trial order, without what differs from run to run."""
    return plain(chain.from_iterable(executor.run(asked)))


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


def test_a_policys_failure_is_its_result_with_a_log(
    crew: Crew, trials: Trials, policies: list[Policy], tmp_path: Path
) -> None:
    failed, fine = found(crew.executor(trials), wave([policies[0], policies[3]]))
    assert (failed.status, failed.stage, failed.error) == ("failed", "compress", "layer1 is not finite")
    assert fine.status == "ok" and fine.log is None
    assert failed.log is not None
    told, *lines = (tmp_path / failed.log).read_text().splitlines()
    assert Policy.from_json(json.loads(told)) == policies[0]
    (raised,) = (place for place, line in enumerate(lines) if "raise CompressError" in line)
    assert "in compress" in lines[raised - 1]


def test_two_trials_of_one_structure_are_timed_once(
    crew: Crew, trials: Trials, policies: list[Policy], tmp_path: Path
) -> None:
    results = found(crew.executor(trials), wave([policies[3], policies[3], policies[4]]))
    assert [result.policy for result in results] == [policies[3], policies[3], policies[4]]
    assert results[0].latency_ms == results[1].latency_ms != results[2].latency_ms
    assert len((tmp_path / "latencies.jsonl").read_text().splitlines()) == 2


def test_another_wave_may_follow_one_that_was_left(crew: Crew, trials: Trials, policies: list[Policy]) -> None:
    left = crew.executor(trials).run(wave(policies[3:7]))
    while not next(left):
        pass
    left.close()  # type: ignore[attr-defined]
    executor = crew.executor(trials)
    assert found(executor, []) == []
    assert [result.policy for result in found(executor, wave(policies[5:7]))] == policies[5:7]


def test_a_lost_workers_trial_runs_elsewhere_and_a_killing_policy_fails(
    frail: rays.Pool, killed: Path, trials: Trials, policies: list[Policy]
) -> None:
    seen: list[Fleet] = []

    def watch(event: Event) -> None:
        if isinstance(event, Fleet):
            seen.append(event)

    _, killing, once, *rest = policies
    executor = rays.RayExecutor(replace(trials, observer=watch), frail, None)
    lost, spared, *others = found(executor, wave([killing, once, *rest[:4]]))
    assert (lost.status, lost.stage) == ("failed", "score")
    assert lost.error is not None and lost.error.startswith(f"it lost {rays.ATTEMPTS} workers")
    assert "\n" not in lost.error
    assert lost.log is not None
    assert (trials.folder / lost.log).read_text().count(f"on {platform.node()}: ") == rays.ATTEMPTS
    assert spared.status == "ok" and killed.exists()
    assert [other.policy for other in others] == rest[:4] and all(other.status == "ok" for other in others)
    assert (seen[-1].lost, seen[-1].retried, seen[-1].in_flight) == (rays.ATTEMPTS + 1, rays.ATTEMPTS, 0)
    assert seen[-1].measuring is None


def test_a_jobs_folder_must_be_seen_from_other_nodes(
    cluster: Cluster, frail: rays.Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    rays.check(replace(CONFIG, executor="ray", workers=1, out=str(tmp_path / "new" / "run")))
    assert list(tmp_path.iterdir()) == []
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"is not seen by .* storage that every node reaches"):
        rays.check(
            replace(CONFIG, executor="ray", workers=1, out="/proc/self/cwd/run")
        )  # each process has another folder there


def test_a_folder_that_others_train_into_must_be_seen_from_there(
    cluster: Cluster, frail: rays.Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = replace(CONFIG, executor="ray", workers=1, out="/proc/self/cwd/run")
    rays.check(config)
    with pytest.raises(ConfigError, match=r"is not seen by .* storage that every node reaches"):
        executors.trainer(config)
    with pytest.raises(ConfigError, match=r"is not seen by .* storage that every node reaches"):
        rays.check(replace(config, finetune_epochs=1))


def test_a_node_that_dies_while_it_is_asked_for_the_folder_is_told_of(
    cluster: Cluster, frail: rays.Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def get(answer: Any) -> Any:
        raise NodeDiedError("Task failed because the node it was running on is dead")

    monkeypatch.setattr("autocomp.study.executors.ray.connect.ray.get", get)
    with pytest.raises(RunError, match=rf"the node {platform.node()} went away .* is dead.*: start again"):
        rays.check(replace(CONFIG, executor="ray", workers=1, finetune_epochs=1, out=str(tmp_path / "run")))


def test_a_device_that_goes_away_stops_measuring_but_not_scoring(
    frail: rays.Pool, trials: Trials, policies: list[Policy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert all(result.latency_ms for result in map(trials.evaluate, *zip(*wave(policies[3:7]), strict=True)))
    meters = rays.Pool(partial(start, kind=Gone), 1, "meter")
    meters.equip(str(tmp_path / "gone"))
    meters.gather()
    frail.gather()  # those that an earlier test lost
    monkeypatch.setattr(pool, "START_S", 1.0)
    done: list[TrialResult] = []
    with pytest.raises(RunError, match=r"no meter is left .* 'autocomp resume'"):
        for results in rays.RayExecutor(trials, frail, meters).run(wave([policies[9], *policies[3:7]])):
            done += results
    meters.close()
    assert [(result.policy, result.status) for result in plain(done)] == [(policy, "ok") for policy in policies[3:7]]
    assert meters.lost == 1


def test_a_node_lost_while_workers_start_stops_nothing(cluster: Cluster, tmp_path: Path) -> None:
    node = cluster.add_node(num_cpus=0)
    place = NodeAffinitySchedulingStrategy(node.node_id, soft=True)
    (tmp_path / "gone").touch()  # they load as long as it is there
    pool = rays.Pool(partial(start, kind=Gone, scheduling_strategy=place), 3, "worker")
    pool.equip(str(tmp_path / "gone"))
    ray.wait(list(pool.joining), timeout=3.0)  # until they have started there
    cluster.remove_node(node, allow_graceful=False)
    (tmp_path / "gone").unlink()
    pool.gather()
    while pool.joining:
        for ref in ray.wait(list(pool.joining))[0]:
            pool.joined(ref)
    assert len(pool.members) == 3 and pool.lost == 0
    pool.close()


def test_a_lost_node_loses_no_trial(cluster: Cluster, frail: rays.Pool, trials: Trials, policies: list[Policy]) -> None:
    results = chain.from_iterable(rays.RayExecutor(trials, frail, None).run(wave(policies[3:12])))
    numbers = [next(results).number]
    (node,) = cluster.worker_nodes
    cluster.remove_node(node, allow_graceful=False)
    finished = list(results)
    assert sorted(numbers + [result.number for result in finished]) == list(range(9))
    assert all(result.status == "ok" for result in finished)


def test_a_closed_pool_leaves_no_actor_and_opens_again(frail: rays.Pool) -> None:
    def left() -> list[str]:
        return [name for name in ray.util.list_named_actors() if "frail" in name]

    assert left()
    frail.close()
    deadline = time.monotonic() + 60
    while left() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left()
    frail.equip(ray.put(("", "", "")))
    frail.gather()
    assert len(frail.members) == 2


def test_nobody_scores_on_this_machine_while_it_is_measured(
    far: Prologue, trials: Trials, policies: list[Policy], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(trials.backend), "measures", True)
    assert isinstance(far.crew, rays.RayCrew)
    workers, busy, shares = far.crew.workers, list[list[bool]](), list[float | None]()

    def watch(event: Event) -> None:
        if isinstance(event, Fleet):
            shares.append(event.measuring)

    def do(own: Trials, task: Task, announce: Any) -> Any:
        assert isinstance(task, TimeTask)
        busy.append([member.busy for member in workers.members])
        return inner(own, task, announce)

    inner = Trials.do
    monkeypatch.setattr(Trials, "do", do)
    results = found(rays.RayExecutor(replace(trials, observer=watch), workers, None), wave(policies[3:9]))
    assert [result.status for result in results] == ["ok"] * 6
    assert {member.host for member in workers.members} == {platform.node()}
    assert len(busy) == 6 and not any(map(any, busy))
    assert shares and all(share is not None and 0 < share < 1 for share in shares)


def test_nobody_scores_beside_a_meter_of_the_same_machine(
    far: Prologue, trials: Trials, policies: list[Policy], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(trials.backend), "measures", True)
    assert isinstance(far.crew, rays.RayCrew) and far.crew.meters is not None
    workers, meters, seen = far.crew.workers, far.crew.meters, list[tuple[int, int]]()

    def watch(event: Event) -> None:
        if isinstance(event, Stage):
            timing, scoring = (sum(member.busy for member in pool.members) for pool in (meters, workers))
            seen.append((timing, scoring))

    results = found(rays.RayExecutor(replace(trials, observer=watch), workers, meters), wave(policies[3:9]))
    assert [result.status for result in results] == ["ok"] * 6
    assert {member.host for member in (*workers.members, *meters.members)} == {platform.node()}
    assert not any(timing and scoring for timing, scoring in seen)


def test_workers_without_the_targets_engine_are_told_of(
    far: Prologue, trials: Trials, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(far.crew, rays.RayCrew)
    notes: list[Event] = []
    far.crew.executor(replace(trials, observer=notes.append))
    assert notes == []
    monkeypatch.setattr(far.crew.workers.members[0], "engine", "onnxruntime 1.0")
    far.crew.executor(replace(trials, observer=notes.append))
    (note,) = notes
    assert isinstance(note, Note)
    assert note.text.startswith(
        f"1 of 2 workers lack {trials.device.engine} and score the same files under onnxruntime"
    )


def test_the_clusters_own_list_names_actors_and_tasks(far: Prologue, trials: Trials, policies: list[Policy]) -> None:
    from ray.util.state import list_actors, list_tasks

    found(far.crew.executor(trials), wave(policies[3:4]))
    names = [actor.name for actor in list_actors(filters=[("state", "=", "ALIVE")])]
    assert sum(name.startswith("autocomp worker") for name in names) == 2
    assert sum(name.startswith("autocomp meter") for name in names) == 1
    deadline, tasks = time.monotonic() + 30, set[str]()
    while not {"time search 0", "score search 0"} <= tasks and time.monotonic() < deadline:  # told with a delay
        tasks = {task.name for task in list_tasks(limit=1000)}
    assert {"time search 0", "score search 0"} <= tasks


def searched(bench: Workbench, prologue: Prologue, folder: Path) -> SearchResult:
    with Run.create(folder, manifest_of(bench)) as run:
        return conduct(bench, prologue, run, ignore)


def test_a_search_ends_with_the_result_of_the_local_one(
    near: Prologue, far: Prologue, bench: Workbench, tmp_path: Path
) -> None:
    local, remote = (searched(bench, prologue, tmp_path / name) for name, prologue in (("near", near), ("far", far)))
    assert remote.contenders == local.contenders and remote.trials == local.trials
    assert plain(remote.front) == plain(local.front)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"workers": 99}, r"99 workers take 99 CPUs and the cluster has 2"),
        ({"workers": 1, "gpus_per_worker": 0.5}, r"0.5 GPUs and the cluster has 0"),
        ({"workers": 1, "target_resource": "jetson"}, r"no node .*'jetson'; it has CPU 2, board 1: start"),
    ],
)
def test_a_cluster_that_does_not_suffice_is_refused(cluster: Cluster, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        rays.check(replace(CONFIG, executor="ray", **changes))


def test_a_target_that_is_another_device_is_refused(cluster: Cluster, bench: Workbench) -> None:
    pool = rays.Pool(start, 1, "meter")
    pool.equip(ray.put(("", "", "")), bench.backend.device.to_json())
    with pytest.raises(ConfigError, match="start the search on a node that has the target"):
        pool.gather()
    pool.close()


def test_code_that_the_workers_image_lacks_is_named(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "only_on_the_driver.py").write_text("class Station:\n    def load(self, kit):\n        return '', {}\n")
    monkeypatch.syspath_prepend(tmp_path)
    lacking = importlib.import_module("only_on_the_driver").Station
    pool = rays.Pool(partial(start, kind=lacking), 1, "worker")
    pool.equip(ray.put(()))
    with pytest.raises(ConfigError, match="the package only_on_the_driver is missing there: install it in the workers"):
        pool.gather()
    pool.close()


def test_what_is_computed_sooner_than_sent_does_not_travel(
    bench: Workbench, near: Prologue, monkeypatch: pytest.MonkeyPatch
) -> None:
    kit = Kit(bench.emitter, bench.spec, bench.backend, bench.reference, near.scorer, TimingProtocol())
    parcel = send(kit, ray.cloudpickle.dumps)

    def outputs(of: Kit) -> Mapping[str, Any]:
        found: Mapping[str, Any] = of.emitter.inner.statistics.outputs  # type: ignore[attr-defined]
        return found

    there = outputs(receive(parcel))
    assert there and there.keys() == outputs(kit).keys()
    assert all(np.array_equal(there[name], value) for name, value in outputs(kit).items())
    monkeypatch.setattr(workbench, "kept_outputs", lambda traced, images: {})
    assert not outputs(receive(parcel))


def test_fine_tuning_goes_on_from_its_checkpoints_and_the_lowest_loss_counts(
    far: Prologue, bench: Workbench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw = np.random.default_rng(0)
    pixels, labels = draw.integers(0, 256, (48, 16, 16, 3)).astype(np.uint8), np.arange(48) % 10
    images = ArraySplit(pixels, labels, np.arange(48), Preprocess((0.5,) * 3, (0.5,) * 3), "noise")
    recipe = TrainingRecipe(epochs=2, batch=16, lr=0.03, ema=0.0, crop=0, flip=0.0, distillation=0.0, hints=0.01)
    module, shapes = bench.traced.module, bench.traced.graph.node_by_name
    last = stages(module, module, torch.zeros(1, 3, 16, 16))[-1]
    channels = {last: np.arange(shapes[last].shape[0])}  # maps before it are not compared
    recipes = [replace(recipe, lr=rate * recipe.lr) for rate in RATES]

    def stop(event: Event) -> None:
        if isinstance(event, EpochDone):
            raise KeyboardInterrupt

    for folder in (tmp_path / "near", tmp_path / "far"):
        folder.mkdir()
        for own in recipes[1:]:  # the first one had not begun
            with pytest.raises(KeyboardInterrupt):
                kept = folder / f"finetune.{own.lr:g}.pt"
                finetune(Training(module, module, images, own, kept, channels=channels), stop)
    marked = tmp_path / "far" / f"finetune.{recipes[-1].lr:g}.pt"
    state = torch.load(marked, weights_only=True)
    torch.save({**state, "losses": ((9.0,), 0.0, 0)}, marked)
    local = [
        finetune(Training(module, module, images, own, kept, channels=channels), ignore)
        for own in recipes
        for kept in [tmp_path / "near" / f"finetune.{own.lr:g}.pt"]
    ]
    assert all(other.losses > local[-1].losses for other in local[:-1])  # so that it cannot be stopped early
    events: list[Event] = []
    found = far.crew.trainer()(
        Training(module, module, images, recipe, tmp_path / "far" / "finetune.pt", channels=channels), events.append
    )
    assert capsys.readouterr().out == ""
    assert found.recipe == recipes[-1]
    assert found.losses == (9.0, local[-1].losses[1])
    assert all(np.array_equal(found.tensors[name], value) for name, value in local[-1].tensors.items())
    assert not any(isinstance(event, Step) for event in events)
    assert {path.suffix for path in (tmp_path / "far").iterdir()} == {".pt"}


@pytest.mark.slow
def test_a_search_may_be_a_job_with_code_of_its_own(cluster: Cluster, tmp_path: Path) -> None:
    """Last in this file: the cluster's processors are free then."""
    sent, kept = tmp_path / "sent", tmp_path / "kept"
    sent.mkdir()
    (sent / "own.py").write_text("def metric(found, wanted, labels):\n    return 0.25\n")
    small = {
        **CONFIG.to_json(), "trials": 1, "baseline_trials": 0, "metric": "own:metric", "executor": "ray",
        "target_resource": TARGET,
    }  # fmt: skip
    flags = [
        f"--{name.replace('_', '-')}={','.join(value) if isinstance(value, list) else value}"
        for name, value in small.items()
        if value != [] and value != getattr(SearchConfig(), name)
    ]
    deadline, said = time.monotonic() + 120, "No available agent"
    while "No available agent" in said and time.monotonic() < deadline:  # a head that has just started has none yet
        done = subprocess.run(
            [sys.executable, "-m", "ray.scripts.scripts", "job", "submit",
             f"--address=http://{cluster.head_node.webui_url}", f"--working-dir={sent}",
             f'--entrypoint-resources={{"{TARGET}": 0.01}}', "--", sys.executable, "-m", "autocomp", "search",
             *flags, f"--out={kept}"],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        said = done.stdout + done.stderr
    assert "exit code 3" in said, said  # a simulated engine verifies nothing
    (trial,) = load_result(kept).front
    assert trial.score is not None and trial.score.divergence == 0.25
