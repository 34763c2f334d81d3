"""What controllers find within how many evaluations, and how much time, on one device's profile.

    AUTOCOMP_SHARED=... OMP_NUM_THREADS=1 python -m benchmarks.search --work FOLDER [--case resnet20|resnet56 ...]
        [--controller NAME ...] [--seeds N] [--hardware NAME]

Int8, channels and branches, without training. Latency is what the profile predicts, so it costs nothing and is the
same for all; accuracy is measured with that device's numerics. Blind controllers begin with the policies that
``autocomp search --controller NAME`` gives them. What evaluations found and cost in processor time is kept in
FOLDER and shared by all controllers; a benchmark that was stopped goes on from there. Writes
``benchmarks/results/search.json`` and a picture of the curves beside it.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from time import process_time
from typing import Any

import matplotlib.pyplot as plt

from autocomp.budget import parse_budgets
from autocomp.config import SearchConfig
from autocomp.controllers import make_controller
from autocomp.engines import initializer_bytes, structure_digest
from autocomp.hardware import LatencyTable
from autocomp.policy import Policy, digest_of
from autocomp.protocols import Controller, Engine
from autocomp.results import Score, TimingProtocol, TrialResult
from autocomp.study.guidance import knowledge_of
from autocomp.study.predicted import PredictedBackend
from autocomp.study.score import Scorer, load_metric, predict
from autocomp.study.search import WARM_STARTS
from autocomp.study.starts import initial_policies
from autocomp.study.sweep import QUICK, measure
from autocomp.study.trial import Limits, Trials
from autocomp.study.workbench import Workbench, prepare
from benchmarks.common import RESULTS, cifar10, save, shared, show

BUDGETS = {"resnet20": "0.5x", "resnet56": "0.4x"}
SEEDS = {"resnet20": 3, "resnet56": 1}
EVALUATIONS = {"guided": 100, "tpe": 300, "nsga2": 300, "gp": 300, "ddpg": 300, "random": 300, "evolution": 300}
JUDGED = 30
"""Evaluations of the guided controller that stand against all of the others'."""
WAVE = 4


@dataclass(frozen=True)
class Bench:
    """One model on one profile, and what was evaluated before.

    Attributes:
        selection: scores on the selection split.
        sensitivity_s: processor seconds of the sensitivity, which all controllers begin from.
        make: controllers by name and seed.
        file: of known evaluations, only ever appended to.
        known: policy's digest -> its trial, its selection score where that was asked for, and seconds.
    """

    bench: Workbench
    trials: Trials
    selection: Scorer
    sensitivity_s: float
    make: Callable[[str, int], Controller]
    file: Path
    known: dict[str, dict[str, Any]]

    def evaluate(self, number: int, policy: Policy) -> tuple[TrialResult, float]:
        """The trial, and the processor seconds it took when it was made."""
        row = self.known.get(policy.digest)
        if row is None:
            begun = process_time()
            result = self.trials.evaluate(number, "search", policy)
            row = self._keep(policy, {"trial": result.to_json(), "seconds": process_time() - begun})
        return TrialResult.from_json({**row["trial"], "number": number}), row["seconds"]

    def held_out(self, policy: Policy) -> Score:
        row = self.known[policy.digest]
        if "selection" not in row:
            emitter = self.trials.emitter
            with self.trials.backend.build(emitter.emit(emitter.compress(policy))) as engine:
                row = self._keep(policy, {**row, "selection": self.selection.score(engine).to_json()})
        return Score(**row["selection"])

    def _keep(self, policy: Policy, row: dict[str, Any]) -> dict[str, Any]:
        self.known[policy.digest] = row
        with self.file.open("a") as file:
            file.write(json.dumps({"policy": policy.digest, **row}) + "\n")
        return row


def prepared(case: str, hardware: str, work: Path, images: int) -> tuple[Bench, Engine]:
    weights = shared() / "weights" / f"cifar10_{case}.safetensors"
    config = SearchConfig(
        model=f"zoo:{case}", weights=str(weights), data=f"npz:{cifar10(work)}", budget=(BUDGETS[case],), batch=32,
        hardware=hardware, search_images=images,
    )  # fmt: skip
    bench = prepare(config, lambda event: None)
    backend = bench.backend
    if not isinstance(backend, PredictedBackend):
        raise SystemExit(f"{hardware} is not a measured profile")
    reference = backend.build(bench.reference)
    limits = Limits(
        parse_budgets(config.budget), {"p50": backend.prediction(Policy()).ms}, bench.traced.graph.macs(Policy()),
        initializer_bytes(bench.reference),
    )  # fmt: skip
    scorers = [
        Scorer(split, predict(reference, split), True, load_metric("kl"))
        for split in (bench.splits.search, bench.splits.selection)
    ]
    folder = work / f"search-{case}-{hardware}-{digest_of(dict(bench.digests))[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    trials = Trials(
        emitter=bench.emitter, backend=backend, reference=reference, scorer=scorers[0], protocol=TimingProtocol(),
        graph=bench.traced.graph, reference_structure=structure_digest(bench.reference), limits=limits,
        cache=LatencyTable(folder / "latencies.jsonl"), folder=folder, observer=lambda event: None,
    )  # fmt: skip
    begun = process_time()
    sensitivity = measure(bench, QUICK, lambda event: None)
    knowledge = knowledge_of(bench, limits, sensitivity, backend.predictor)
    spent = process_time() - begun

    def make(name: str, seed: int) -> Controller:
        if name == "guided":
            return make_controller(name, bench.space, seed, (), knowledge)
        return make_controller(
            name, bench.space, seed, initial_policies(bench, limits, sensitivity, lambda event: None, WARM_STARTS)
        )

    file = folder / "evaluations.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    known = {row.pop("policy"): row for row in rows}
    return Bench(bench, trials, scorers[1], spent, make, file, known), reference


@dataclass(frozen=True, slots=True)
class Point:
    """The best feasible policy from some evaluation on.

    Attributes:
        evaluations: made until it was known.
        seconds: of processor time until then, the sensitivity included.
        divergence, accuracy: on the selection split.
    """

    evaluations: int
    seconds: float
    divergence: float
    accuracy: float


@dataclass(frozen=True, slots=True)
class Curve:
    """One controller's search.

    Attributes:
        points: every improvement.
        seconds: of processor time after each wave, by the number of evaluations.
    """

    points: tuple[Point, ...]
    seconds: dict[int, float]

    def after(self, evaluations: int) -> Point | None:
        """The best of the first evaluations."""
        return self._last(lambda point: point.evaluations <= evaluations)

    def within(self, seconds: float) -> Point | None:
        """The best that was known by then."""
        return self._last(lambda point: point.seconds <= seconds)

    def _last(self, kept: Callable[[Point], bool]) -> Point | None:
        return next((point for point in reversed(self.points) if kept(point)), None)


def search(bench: Bench, name: str, seed: int, evaluations: int) -> Curve:
    """Let one controller search, on evaluations that are known already where they can be."""
    begun, spent = process_time(), bench.sensitivity_s
    controller = bench.make(name, seed)
    spent += process_time() - begun
    points: list[Point] = []
    times: dict[int, float] = {}
    best, done = float("inf"), 0
    while done < evaluations:
        begun = process_time()
        wave = controller.ask(min(WAVE, evaluations - done))
        spent += process_time() - begun
        if not wave:
            break
        results = []
        for policy in wave:
            result, seconds = bench.evaluate(done, policy)
            done, spent = done + 1, spent + seconds
            results.append(result)
            if result.feasible and result.objective is not None and result.objective < best:
                best = result.objective
                score = bench.held_out(policy)
                points.append(Point(done, spent, score.divergence, score.accuracy or 0.0))
        begun = process_time()
        controller.tell(results)
        spent += process_time() - begun
        times[done] = spent
    return Curve(tuple(points), times)


def judged_s(curves: Sequence[Curve]) -> float:
    """Mean processor seconds of the first `JUDGED` evaluations."""
    return mean(max(spent for done, spent in own.seconds.items() if done <= JUDGED) for own in curves)


def summary(found: Mapping[str, Sequence[Curve]], seconds: float) -> list[list[object]]:
    """Means over seeds: after `JUDGED` evaluations, within a time, and after all."""
    rows: list[list[object]] = []
    for name, curves in found.items():
        early = [own.after(JUDGED) for own in curves]
        timely, ends = ([own.within(limit) for own in curves] for limit in (seconds, float("inf")))
        rows.append([name, len(curves), *_means(early), *_means(timely), *_means(ends)])
    return rows


def _means(points: Sequence[Point | None]) -> list[str]:
    reached = [point for point in points if point is not None]
    if len(reached) < len(points):
        return ["-", "-"]
    return [f"{mean(p.divergence for p in reached):.4f}", f"{100 * mean(p.accuracy for p in reached):.2f}"]


def picture(title: str, found: Mapping[str, Sequence[Curve]], path: Path) -> None:
    """Divergence of the best so far by evaluations and by processor seconds."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True, constrained_layout=True)
    for place, (name, curves) in enumerate(found.items()):
        for number, own in enumerate(curves):
            ends = zip(axes, ("evaluations", "seconds"), (max(own.seconds), max(own.seconds.values())), strict=True)
            best = [point.divergence for point in own.points]
            if not best:
                continue
            for axis, across, end in ends:
                axis.step(
                    [*(getattr(point, across) for point in own.points), end], [*best, *best[-1:]],
                    where="post", color=f"C{place}", alpha=0.8, label=name if number == 0 else None,
                )  # fmt: skip
    for axis, label in zip(axes, ("evaluations", "processor seconds, sensitivity included"), strict=True):
        axis.set(xscale="log", yscale="log", xlabel=label)
    axes[0].set_ylabel("divergence on the selection split, nats")
    axes[0].legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=list(BUDGETS))
    parser.add_argument("--controller", action="append", choices=list(EVALUATIONS))
    parser.add_argument("--seeds", type=int, help="3 for resnet20 and 1 for resnet56 by default")
    parser.add_argument("--hardware", default="amd-epyc-1t")
    parser.add_argument("--images", type=int, default=1024, help="of the search split")
    parser.add_argument("--work", type=Path, required=True, help="folder for CIFAR-10 and the evaluations")
    args = parser.parse_args()
    for case in args.case or BUDGETS:
        bench, reference = prepared(case, args.hardware, args.work, args.images)
        found: dict[str, list[Curve]] = {}
        with reference:
            for name in args.controller or EVALUATIONS:
                for seed in range(args.seeds or SEEDS[case]):
                    own = search(bench, name, seed, EVALUATIONS[name])
                    found.setdefault(name, []).append(own)
                    last = own.points[-1] if own.points else "nothing feasible"
                    print(case, name, seed, last, f"{max(own.seconds.values()):.0f} s", flush=True)
        title = f"{case} at {BUDGETS[case]} of {args.hardware}"
        seconds = judged_s(found.get("guided") or next(iter(found.values())))
        columns = ["", "seeds", f"KL at {JUDGED}", "top-1 %", f"KL in {seconds:.0f} s", "top-1 %", "KL at the end"]
        show(f"{title}: best feasible, on the selection split", [*columns, "top-1 %"], summary(found, seconds))
        picture(title, found, RESULTS / f"search_{case}.png")
        kept = {
            name: [
                [[p.evaluations, round(p.seconds, 1), p.divergence, p.accuracy] for p in own.points] for own in curves
            ]
            for name, curves in found.items()
        }
        spent = {name: [max(own.seconds.values()) for own in curves] for name, curves in found.items()}
        data = {"sensitivity_s": round(bench.sensitivity_s, 1), "curves": kept, "seconds": spent, "judged_s": seconds}
        print(f"written: {save('search', {f'{case}, {args.hardware}': data})}")


if __name__ == "__main__":
    main()
