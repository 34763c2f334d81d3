"""What a Ray cluster of actors gives a search: scaling, a busy driver, start-up, equal results, kills survived.

    python -m benchmarks.ray [scaling] [many] [search] [memory] [kills]

``scaling`` and ``many`` sleep instead of scoring, so that they measure the executor alone. ``search`` runs the default
job under the simulated engine here and on two actors. ``memory`` takes answers from a formula, so that it measures what
the driver holds. ``kills`` runs searches on a cluster of three nodes on this
machine and kills a worker, a node or the driver at a random moment.
"""

import argparse
import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import ray
from ray.cluster_utils import Cluster

from autocomp.api import load_result
from autocomp.capabilities import DeviceInfo
from autocomp.config import SearchConfig
from autocomp.controllers import make_controller
from autocomp.hardware import LatencyEntry, LatencyKey, LatencyTable
from autocomp.outcome import Event
from autocomp.policy import Policy
from autocomp.protocols import Controller
from autocomp.results import Score, TrialResult
from autocomp.study.artefacts import write_table
from autocomp.study.executors.ray import Pool, RayExecutor
from autocomp.study.run import Manifest, Run
from autocomp.study.study import Plan, Study
from autocomp.study.tasks import Answer, ScoreTask
from autocomp.study.trial import Steps
from autocomp.study.workbench import prepare
from benchmarks.common import save, show

MODEL = SearchConfig(
    model="zoo:resnet20", data="random:3x32x32x10", engine="simulated", budget=("0.7x",), calibration_images=64,
    search_images=64, selection_images=64,
)  # fmt: skip
SEARCHED = 24
"""Trials of a search in which something is killed, before its baselines."""
DEVICE = DeviceInfo("a-device", "an engine", 1, (("driver", "a driver"),))


class Sleeper:
    """Many workers in one process, each of which sleeps instead of scoring."""

    async def load(self, seconds: float) -> tuple[str, dict[str, str]]:
        self._seconds = seconds
        return "", {"engine": ""}

    async def do(self, task: ScoreTask) -> Answer:
        await asyncio.sleep(self._seconds)
        kept = sum(task.policy.kept.values())
        return Answer(score=Score(1.0 / (1 + kept), None, 1), seconds={"score": self._seconds}, stage="score")


@dataclass
class Sleeping:
    """Trials that ask for a score and nothing else."""

    backend: Any = field(default_factory=lambda: SimpleNamespace(measures=False))

    def observer(self, event: Event) -> None:
        del event

    def steps(self, number: int, role: str, policy: Policy) -> Steps:
        answer = yield ScoreTask(policy)
        assert answer.score is not None
        return TrialResult(number, role, policy, "ok", (-0.1,), answer.score.divergence, answer.score, 1.0, 2.0, 5, 7)


@dataclass
class Timed:
    """A controller, with the longest time that an ask and the tell after it took together, in ms a policy."""

    inner: Controller
    waves: list[float] = field(default_factory=list)

    def ask(self, count: int) -> list[Policy]:
        begun = time.perf_counter()
        asked = self.inner.ask(count)
        self.waves.append(1e3 * (time.perf_counter() - begun) / count)
        return asked

    def tell(self, results: Sequence[TrialResult]) -> None:
        begun = time.perf_counter()
        self.inner.tell(results)
        self.waves[-1] += 1e3 * (time.perf_counter() - begun) / max(len(results), 1)


def sleep_through(processes: int, workers: int, seconds: float, plan: Plan) -> float:
    """Wall seconds of a plan on workers that share processes."""
    each = -(-workers // processes)
    shared = [ray.remote(Sleeper).options(num_cpus=0, max_concurrency=each).remote() for _ in range(processes)]
    turn = cycle(shared)
    pool = Pool(lambda name: next(turn), workers, "worker")
    pool.equip(seconds)
    while len(pool.members) < workers:
        for ref in ray.wait(list(pool.joining))[0]:
            pool.joined(ref)
    with TemporaryDirectory() as folder, Run.create(Path(folder) / "run", Manifest("", {}, [], {}, {}, {})) as run:
        executor = RayExecutor(Sleeping(), pool, None)  # type: ignore[arg-type]
        begun = time.perf_counter()
        results = Study(run, executor, Sleeping().observer).explore(plan)
        elapsed = time.perf_counter() - begun
    assert len({result.policy.digest for result in results}) == plan.trials
    for actor in shared:
        ray.kill(actor)
    return elapsed


def planned(trials: int, wave: int) -> tuple[Plan, Timed]:
    controller = Timed(make_controller("evolution", prepare(MODEL, lambda event: None).space, 0))
    return Plan("search", controller, trials, wave), controller


def scaling() -> dict[str, Any]:
    """1 s evaluations on 1 to 8 actors, sixteen on each."""
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    rows = []
    for actors in (1, 2, 4, 8):
        plan, _ = planned(16 * actors if actors > 1 else 16, 16 * actors)
        elapsed = sleep_through(actors, actors, 1.0, plan)
        rows.append({"actors": actors, "seconds": elapsed, "of_linear": plan.trials / actors / elapsed})
    ray.shutdown()
    show("1 s evaluations", ("actors", "s", "of linear"),
         [(row["actors"], f"{row['seconds']:.1f}", f"{row['of_linear']:.2f}") for row in rows])  # fmt: skip
    return {"scaling": rows}


def many() -> dict[str, Any]:
    """20 s evaluations on 256 workers in 8 processes, four on each."""
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    plan, controller = planned(1024, 256)
    before = _memory_mb("RssAnon")
    elapsed = sleep_through(8, 256, 20.0, plan)
    ray.shutdown()
    bare = "import torch; print(open('/proc/self/status').read().partition('VmHWM:')[2].split()[0])"
    torch_kb = subprocess.run([sys.executable, "-c", bare], capture_output=True, check=True).stdout
    found = {
        "workers": 256,
        "seconds": elapsed,
        "busy": 4 * 20.0 / elapsed,
        "driver_peak_mb": _memory_mb("VmHWM"),
        "of_it_libraries_mb": _memory_mb("RssFile"),
        "of_it_own_mb": _memory_mb("RssAnon"),
        "grown_mb": _memory_mb("RssAnon") - before,
        "import_torch_alone_mb": int(torch_kb) * 1024 / 1e6,
        "ask_tell_ms": max(controller.waves),
    }
    show("256 workers", tuple(found), [tuple(f"{value:.3g}" for value in found.values())])
    return {"many": found}


def search() -> dict[str, Any]:
    """The default job under the simulated engine, alone and with two actors, each from a start without caches.

    The start, until the first wave is asked for, is taken twice, in both orders; the shorter counts.
    """
    starts: dict[str, list[float]] = {"local": [], "ray": []}
    ended_s, contenders = {}, {}
    with TemporaryDirectory() as folder:
        for turn, name in enumerate(("ray", "local", "local", "ray")):
            run = Path(folder) / str(turn)
            begun = time.perf_counter()
            process = _default_job(run, name)
            _wait_for(run / "journal.jsonl", '"wave"')
            starts[name].append(time.perf_counter() - begun)
            if turn < 2:
                process.kill()
            process.wait()
            if turn >= 2:
                ended_s[name], contenders[name] = time.perf_counter() - begun, load_result(run).contenders
    found = {
        "local_s": ended_s["local"],
        "ray_s": ended_s["ray"],
        "ratio": ended_s["ray"] / ended_s["local"],
        "start_s": min(starts["ray"]) - min(starts["local"]),
        "same_best": contenders["ray"] == contenders["local"],
    }
    show("the default job", tuple(found), [tuple(f"{value:.3g}" for value in found.values())])
    return {"search": {**found, "starts_s": starts}}


def _default_job(run: Path, executor: str) -> "subprocess.Popen[bytes]":
    words = ["search", "--engine", "simulated", "--budget", "0.5x", "--batch", "32", "--trials", "32"]
    words += ["--baseline-trials", "8", "--wave", "8", "--out", str(run)]
    if executor == "ray":
        words += ["--executor", "ray", "--address", "local", "--workers", "2"]
    return _autocomp(words, {**os.environ, **dict.fromkeys(("XDG_CACHE_HOME", "XDG_DATA_HOME"), f"{run}-home")})


@dataclass(frozen=True)
class Formula:
    """An executor whose answers cost nothing, and whose latencies are kept as measured ones are."""

    cache: LatencyTable

    def run(self, wave: Sequence[tuple[int, str, Policy]]) -> Iterator[Sequence[TrialResult]]:
        yield [self._of(*trial) for trial in wave]

    def _of(self, number: int, role: str, policy: Policy) -> TrialResult:
        digest = policy.digest
        self.cache.put(LatencyEntry(LatencyKey.of(digest, "reference", DEVICE, 1), 0.5, 2.0 + number % 7))
        value = int(digest[:8], 16) / 2**32  # nothing to find, so that no policy is asked for twice
        return TrialResult(number, role, policy, "ok", (-0.1,), value, Score(value, 0.9, 1), 1.0, 2.0, 5, 7)

    def close(self) -> None:
        """Nothing is held."""


def memory(trials: int) -> dict[str, Any]:
    """What the driver holds of many trials, what one costs it, and what it holds when it goes on after a stop.

    Nothing is compressed, timed or scored.
    """
    plan, controller = planned(trials, 256)
    before = _memory_mb("RssAnon")
    with TemporaryDirectory() as folder:
        own = Path(folder) / "run"
        with Run.create(own, Manifest("", {}, [], {}, {}, {})) as run:
            executor = Formula(LatencyTable(own / "latencies.jsonl"))
            begun = time.perf_counter()
            study = Study(run, executor, Sleeping().observer)
            found: dict[str, Any] = {"trials": len(study.explore(plan))}
            found["ms_a_trial"] = 1e3 * (time.perf_counter() - begun) / trials
            found["grown_mb"] = _memory_mb("RssAnon") - before
            write_table(run, study.results)
        del study, executor, plan
        begun = time.perf_counter()
        with Run.open(own) as run:
            study = Study(run, Formula(LatencyTable(own / "latencies.jsonl")), Sleeping().observer)
            assert len(study.results) == trials
            found["reopened_s"] = time.perf_counter() - begun
        found["journal_mb"] = (own / "journal.jsonl").stat().st_size / 1e6
    found["ask_tell_ms"] = max(controller.waves)
    found["driver_peak_mb"] = _memory_mb("VmHWM")
    found["of_it_libraries_mb"] = _memory_mb("RssFile")
    show("many trials", tuple(found), [tuple(f"{value:.4g}" for value in found.values())])
    return {"memory": found}


def _memory_mb(field: str) -> float:
    """Of this process, as Linux counts it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (found,) = (line.split()[1] for line in lines if line.startswith(f"{field}:"))
    return int(found) * 1024 / 1e6


def kills(runs: int) -> dict[str, Any]:
    """Searches with a worker, a node or the driver killed at a random moment; each must end whole."""
    draw = random.Random(0)
    outcomes = []
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    node = {"num_cpus": 1, "include_dashboard": False}
    for _ in range(2):
        cluster.add_node(**node)
    ray.init(cluster.address, log_to_driver=False)
    with TemporaryDirectory() as folder:
        for turn in range(runs):
            what, run = ("worker", "node", "driver")[turn % 3], Path(folder) / str(turn)
            process = _driver("search", run, cluster.address)
            _wait_for(run / "journal.jsonl", '"kind": "trial"', draw.randrange(SEARCHED))
            time.sleep(draw.uniform(0.0, 0.5))
            if what == "driver":
                os.kill(process.pid, signal.SIGKILL)
                process.wait()
                process = _driver("resume", run, cluster.address)
            elif what == "node":
                cluster.remove_node(
                    draw.choice(sorted(cluster.worker_nodes, key=lambda node: node.node_id)), allow_graceful=False
                )
                cluster.add_node(**node)
            else:
                worker = draw.choice(ray.util.list_named_actors(all_namespaces=True))
                ray.kill(ray.get_actor(**worker))
            status = process.wait()
            trials = [entry["result"] for entry in Run.entries_of(run) if entry["kind"] == "trial"]
            keys = [(trial["role"], str(trial["policy"])) for trial in trials]
            whole = status in (0, 3) and len(keys) == len(set(keys)) and (run / "result.json").exists()
            outcomes.append({"killed": what, "whole": whole, "trials": len(keys)})
            print(outcomes[-1], flush=True)
    ray.shutdown()
    cluster.shutdown()
    show("kills", ("killed", "whole", "trials"), [tuple(outcome.values()) for outcome in outcomes])
    return {"kills": outcomes}


def _driver(verb: str, run: Path, address: str) -> "subprocess.Popen[bytes]":
    flags = ["--executor", "ray", "--address", address, "--model", "zoo:resnet8", "--data", "random:3x16x16x10"]
    flags += ["--engine", "simulated", "--budget", "0.7x", "--trials", str(SEARCHED), "--baseline-trials", "4"]
    flags += ["--wave", "8"]
    flags += ["--calibration-images", "16", "--search-images", "32", "--selection-images", "32", "--finalists", "1"]
    words = [verb, str(run)] if verb == "resume" else [verb, *flags, "--out", str(run)]
    return _autocomp(words, dict(os.environ))


def _autocomp(words: Sequence[str], environment: Mapping[str, str]) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-m", "autocomp", *words], stdout=subprocess.DEVNULL, env=environment)


def _wait_for(path: Path, text: str, times: int = 1) -> None:
    """Until a file is there and holds a text so often."""
    deadline = time.monotonic() + 600
    while not (path.exists() and path.read_text().count(text) >= times):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path} does not hold {text!r}")
        time.sleep(0.05)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="searches in which something is killed [20]")
    parser.add_argument("--trials", type=int, default=100_000, help="of the part memory [100000]")
    parser.add_argument("parts", nargs="*", help="all where none is named")
    given = parser.parse_args()
    parts: dict[str, Callable[[], dict[str, Any]]]
    parts = {"scaling": scaling, "many": many, "search": search, "memory": partial(memory, given.trials)}
    parts["kills"] = partial(kills, given.kills)
    for name in given.parts or parts:
        print(f"wrote {save('ray', parts[name]())}")


if __name__ == "__main__":
    main()
