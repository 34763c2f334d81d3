"""Optuna's samplers behind the `Controller` protocol (needs Optuna 5: constraints belong to its trials)."""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import optuna
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.trial import Trial, TrialState

from autocomp.controllers.initial import checked
from autocomp.controllers.random import fresh
from autocomp.policy import Policy, digest_of
from autocomp.results import TrialResult
from autocomp.space import Decision, PolicySpace

__all__ = ["NSGA2", "TPE", "Method", "SamplerController"]

# Proposals of a sampler that were tried before until a uniform draw takes their place.
ATTEMPTS = 10
# A generation of NSGA-II: small, because a search has tens to hundreds of trials, not thousands.
POPULATION = 20


@dataclass(frozen=True, slots=True)
class Method:
    """What tells one sampler from another.

    Attributes:
        objectives: numbers to minimise.
        proposing: makes the sampler of one wave, from a seed.
        recording: makes the sampler that sees every told trial come in.
        values: the objectives of a scored result; None where one is missing.
    """

    objectives: int
    proposing: Callable[[int], BaseSampler]
    recording: Callable[[int], BaseSampler]
    values: Callable[[TrialResult], tuple[float, ...] | None]


class SamplerController:
    """Proposes the initial policies, then what an Optuna sampler makes of the results told so far.

    Each wave has a sampler of its own, seeded by the search's seed and the number of results told, and all results
    enter Optuna's study in the order told, whoever asked for them: history and seed alone decide the next wave.
    """

    def __init__(self, space: PolicySpace, seed: int, initial: Sequence[Policy], method: Method) -> None:
        self._space = space
        self._seed = seed
        self._initial = checked(space, initial)
        self._method = method
        self._distributions: dict[str, BaseDistribution] = {_key(d): _distribution(d) for d in space.decisions}
        with _quiet():
            self._study = optuna.create_study(directions=["minimize"] * method.objectives)
        self._recording = method.recording(_derived(seed))
        self._seen: set[Policy] = set()
        self._pending: dict[Policy, Trial] = {}
        self._told = 0

    def ask(self, count: int) -> list[Policy]:
        wave = [policy for policy in self._initial if policy not in self._seen][:count]
        self._seen.update(wave)
        if len(wave) == count:
            return wave
        place = (self._told, len(self._seen))
        self._study.sampler = self._method.proposing(_derived(self._seed, *place))
        generator = random.Random(_derived(self._seed, *place, 1))
        while len(wave) < count:
            policy = self._propose() or fresh(self._space, generator, self._seen)
            if policy is None:
                break
            self._seen.add(policy)
            wave.append(policy)
        return wave

    def tell(self, results: Sequence[TrialResult]) -> None:
        for result in results:
            self._told += 1
            self._seen.add(result.policy)
            if result.policy in self._pending:
                # The result enters the study below as a trial of its own, in the order told.
                self._study.tell(self._pending.pop(result.policy), state=TrialState.FAIL)
            values = self._values(result)
            if values is not None and self._space.contains(result.policy):
                self._record(result, values)

    def _propose(self) -> Policy | None:
        """A new policy from the sampler. Its trial keeps running in the study until the result is told, so that
        the next proposals stay away from it; so do, for the moment, the old policies proposed on the way."""
        repeated: list[Trial] = []
        proposal: Policy | None = None
        while proposal is None and len(repeated) < ATTEMPTS:
            trial = self._study.ask()
            policy = self._space.suggest(_TrialSource(trial))
            if policy in self._seen:
                repeated.append(trial)
            else:
                self._pending[policy] = trial
                proposal = policy
        for trial in repeated:
            self._study.tell(trial, state=TrialState.FAIL)
        return proposal

    def _values(self, result: TrialResult) -> tuple[float, ...] | None:
        """The objectives told to Optuna; None for a result that teaches nothing."""
        if result.status == "failed" or not all(map(math.isfinite, result.violations)):
            return None
        if result.status == "infeasible":
            # Optuna ranks infeasible trials by their violations alone, so any values will do here.
            over_budget = any(violation > 0 for violation in result.violations)
            return (0.0,) * self._method.objectives if over_budget else None
        values = self._method.values(result)
        return values if values is not None and all(map(math.isfinite, values)) else None

    def _record(self, result: TrialResult, values: tuple[float, ...]) -> None:
        indices = self._space.encode(result.policy)
        self._study.sampler = self._recording
        self._study.enqueue_trial(dict(zip(self._distributions, indices, strict=True)))
        trial = self._study.ask(self._distributions)
        for position, violation in enumerate(result.violations):
            trial.set_constraint(str(position), violation)
        self._study.tell(trial, values)


@dataclass(frozen=True, slots=True)
class _TrialSource:
    trial: Trial

    def choose(self, decision: Decision) -> int:
        return self.trial.suggest_int(_key(decision), 0, len(decision.options) - 1)


def _key(decision: Decision) -> str:
    """Groups and layers share names."""
    return f"{decision.kind} {decision.name}"


def _distribution(decision: Decision) -> IntDistribution:
    """Indices as an ordered range: options go from the least to the most compressed, and neighbours are alike."""
    return IntDistribution(0, len(decision.options) - 1)


def _objective(result: TrialResult) -> tuple[float, ...] | None:
    return None if result.objective is None else (result.objective,)


def _divergence_and_latency(result: TrialResult) -> tuple[float, ...] | None:
    if result.score is None or result.ratio is None:
        return None
    return result.score.divergence, result.ratio


def _tpe(seed: int) -> BaseSampler:
    # Multivariate: independent estimates for tens of decisions cost ten times as much, and soon only repeat the best.
    return TPESampler(seed=seed, multivariate=True, constant_liar=True)


def _nsga2(seed: int) -> BaseSampler:
    return NSGAIISampler(seed=seed, population_size=POPULATION)


def _random(seed: int) -> BaseSampler:
    return RandomSampler(seed=seed)


# TPE looks at finished trials only when it proposes, so a sampler without work records them for it.
TPE = Method(1, _tpe, _random, _objective)
# NSGA-II numbers the generation of every trial that comes in.
NSGA2 = Method(2, _nsga2, _nsga2, _divergence_and_latency)


def _derived(*parts: int) -> int:
    """A seed of 32 bits that depends on all parts."""
    return int(digest_of(parts)[:8], 16)


@contextmanager
def _quiet() -> Iterator[None]:
    """Optuna announces every study on standard error; its level is put back afterwards."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(level)
