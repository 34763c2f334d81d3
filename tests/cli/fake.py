"""A stand-in for `autocomp.api`, and what it answers."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from autocomp.budget import parse_budgets
from autocomp.cli import main
from autocomp.config import SearchConfig
from autocomp.hardware import HardwareProfile
from autocomp.outcome import Contender, Note, Phase, SearchResult, Step
from autocomp.policy import Policy
from autocomp.results import Contest, Entrant, Interval, LatencyEstimate
from autocomp.study.build_profile import Progress
from autocomp.study.card import Card, DataCard
from autocomp.study.finetune import Finetuned
from autocomp.study.recheck import Verification
from autocomp.study.sensitivity import Sensitivity, SensitivityRow
from autocomp.study.sparsify import Sparsified
from autocomp.study.verify import Verdict
from autocomp.train import TrainingRecipe

ROOT = Path(__file__).parents[2]
CONTEST = Contest((1,), tuple(Entrant(number, 0.1, (0.9,)) for number in range(3)), 0.33, 0.5, 1.0)


def estimate(ratio: float) -> LatencyEstimate:
    def around(value: float) -> Interval:
        return Interval(value, 0.99 * value, 1.01 * value)

    return LatencyEstimate("p50", around(20 * ratio), around(20), around(ratio), 100)


def finished(budget: tuple[str, ...] = ("15ms",), *, verified: bool = True) -> SearchResult:
    def row(role: str, ratio: float) -> Contender:
        return Contender(role, Policy(), estimate(ratio), 0.9, 0.9, 0.9, None, 1000, 4000, verified, 5)

    rows = {"reference": row("reference", 1.0), "best": row("best", 0.5)}
    budgets = parse_budgets(budget)
    return SearchResult(verified, budgets, rows, {"search": 5}, (), 12.0, Path("runs/x"), (), {"name": "cpu"})


@dataclass
class FakeApi:
    """Records its calls; ``outcome`` is returned, or raised where it is an exception."""

    outcome: Any = field(default_factory=finished)
    calls: list[tuple[Any, ...]] = field(default_factory=list)

    def _answer(self, *call: Any) -> Any:
        self.calls.append(call)
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.outcome

    def run_search(self, config: SearchConfig, observer: Callable[..., None]) -> Any:
        observer(Phase("trace"))
        observer(Note("a note"))
        print("a library chats")
        os.write(1, b"a native library chats\n")
        return self._answer("run_search", config)

    def resume(self, run: Path, observer: Callable[..., None], address: str | None) -> Any:
        observer(Phase("search", 4))
        return self._answer("resume", run, *([] if address is None else [address]))

    def retarget(self, run: Path, settings: dict[str, Any], observer: Callable[..., None], out: Path | None) -> Any:
        return self._answer("retarget", run, settings, out)

    def verify(self, run: Path, observer: Callable[..., None]) -> Any:
        observer(Phase("verify"))
        print("a library chats")
        return self._answer("verify", run)

    def verify_shipped(self, folder: Path, data: str | None, observer: Callable[..., None]) -> Any:
        print("a library chats")
        return self._answer("verify_shipped", folder, data)

    def finetune(self, run: Path, settings: dict[str, Any], observer: Callable[..., None], *given: Any) -> Any:
        observer(Phase("finetune", 2))
        observer(Step())
        print("a library chats")
        return self._answer("finetune", run, settings, *(value for value in given if value is not None))

    def sparsify(self, config: SearchConfig, settings: dict[str, Any], out: Path, observer: Callable[..., None]) -> Any:
        observer(Phase("finetune", 2))
        print("a library chats")
        return self._answer("sparsify", config, settings, out)

    def export(self, run: Path, kinds: list[str], out: Path, observer: Callable[..., None]) -> Any:
        observer(Phase("test"))
        if "engine" in kinds:
            observer(Note("no engine files"))
        print("a library chats")
        return self._answer("export", run, kinds, out)

    def load_result(self, run: Path) -> Any:
        return self._answer("load_result", run)

    def apply_policy(self, policy: Path, config: SearchConfig, out: Path) -> Any:
        self._answer("apply_policy", policy, config, out)
        return out

    def run_sensitivity(self, config: SearchConfig, observer: Callable[..., None]) -> Any:
        observer(Phase("sensitivity", 1))
        observer(Step())
        print("a library chats")
        return self._answer("run_sensitivity", config), Path("runs/s")

    def check_profile(self, profile: HardwareProfile, config: SearchConfig, observer: Any) -> Any:
        return self._answer("check_profile", profile, config)

    def build_profile(
        self, jobs: Any, seconds: float, root: Path | None, observer: Any, progress: Any, *, fresh: bool
    ) -> Any:
        observer(Note("a note"))
        progress(Progress("m:f", 1, 7, 5, 0.1, 9.0, 9.0))
        print("a library chats")
        return self._answer("build_profile", jobs, seconds, root, *["fresh"] * fresh)

    def predict_policy(self, policy: Policy, config: SearchConfig, profile: Any, observer: Any) -> Any:
        return self._answer("predict_policy", policy, config, profile)

    def debug_accuracy(
        self, target: Path, settings: dict[str, Any], toml: Path | None, file: Path | None, observer: Any
    ) -> Any:
        observer(Note("a note"))
        given = {name: value for name, value in settings.items() if value is not None}
        return self._answer("debug_accuracy", target, given, toml, file)

    def measure(self, onnx: Path, spec: Any, reference: Path | None, statistic: str) -> Any:
        return self._answer("measure", onnx, spec, reference, statistic)


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    code = left.value.code
    assert isinstance(code, int)
    return code


def sensitivity() -> Sensitivity:
    row = SensitivityRow("channels", "layer1.0.conv1", 8, 0.5, 0.0123, 0.2, 100, 400)
    return Sensitivity("key", "m:f", "d:f", 64, 1000, 4000, (row,))


def verification(reason: str | None = None) -> Verification:
    return Verification(
        Verdict(reason is None, estimate(0.5), 4000, reason), 0.95, {"name": "cpu", "engine": "e 1"}, finished(), True
    )


def finetuned(reason: str | None = None) -> Finetuned:
    change = Interval(0.02, 0.01, 0.03) if reason is None else None
    return Finetuned(finished(), reason is None, reason, (0.8, 0.82), change, (1.5, 0.5), TrainingRecipe(), CONTEST)


def sparsified() -> Sparsified:
    counts = (32, 0, 7), (16, 1, 5)
    return Sparsified(Path("w.safetensors"), (0.8, 0.79), *counts, (1.5, 0.5), TrainingRecipe(slimming=1e-4))


def card() -> Card:
    rows = finished().contenders
    data = DataCard("digits", "d" * 64, 500, (0.3,), (0.3,))
    return Card(
        parse_budgets(["0.5x"]), True, False, rows["best"], rows["reference"], data, {"name": "cpu", "engine": "e 1"},
        SearchConfig().to_json(), {}, {}, ["autocomp"], (), {"model.onnx": "0" * 64},
    )  # fmt: skip
