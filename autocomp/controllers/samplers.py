"""Optuna's samplers behind the `Controller` protocol (needs Optuna 5: constraints belong to its trials)."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from optuna.distributions import BaseDistribution, IntDistribution
from optuna.samplers import BaseSampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from autocomp.controllers.gaussian import Climber
from autocomp.controllers.initial import checked
from autocomp.controllers.memory import Elites, Generations, Memory, Observation, Successors, new_study
from autocomp.controllers.random import derived, fresh
from autocomp.policy import Policy
from autocomp.results import TrialResult
from autocomp.space import Decision, PolicySpace

__all__ = ["GP", "NSGA2", "TPE", "Method", "SamplerController"]

ATTEMPTS = 10
"""Proposals of a sampler that were tried before until a uniform draw takes their place."""
POPULATION = 20
"""A generation of NSGA-II: small, because a search has tens to hundreds of trials, not thousands."""
LEAST = 1e-6
"""Below it the Gaussian process sees no difference between objectives."""


@dataclass(frozen=True, slots=True)
class Method:
    """What tells one sampler from another.

    Attributes:
        sampler: makes the sampler of one wave, from a seed.
        memory: makes what is kept of the results told, for that sampler to look at.
        values: the numbers to minimise of a scored result; None where one is missing.
        objectives: how many numbers.
    """

    sampler: Callable[[int], BaseSampler]
    memory: Callable[[], Memory]
    values: Callable[[TrialResult], tuple[float, ...] | None]
    objectives: int = 1


class SamplerController:
    """Proposes the initial policies, then what an Optuna sampler makes of the results told so far.

    Each wave has a sampler and a study of its own. The sampler is seeded by the search's seed and the number of
    results told, the study holds what the method's memory kept of them: history and seed alone decide the next wave,
    and its cost does not grow with the history.
    """

    def __init__(self, space: PolicySpace, seed: int, initial: Sequence[Policy], method: Method) -> None:
        self._space = space
        self._seed = seed
        self._initial = checked(space, initial)
        self._method = method
        self._memory = method.memory()
        self._distributions: dict[str, BaseDistribution] = {_key(d): _distribution(d) for d in space.decisions}
        self._seen: set[Policy] = set()
        self._pending: dict[Policy, None] = {}
        self._told = 0

    def ask(self, count: int) -> list[Policy]:
        wave = [policy for policy in self._initial if policy not in self._seen][:count]
        self._seen.update(wave)
        if len(wave) < count:
            place = (self._told, len(self._seen))
            study = self._study(derived(self._seed, *place))
            generator = random.Random(derived(self._seed, *place, 1))
            while len(wave) < count:
                policy = self._propose(study) or fresh(self._space, generator, self._seen)
                if policy is None:
                    break
                self._seen.add(policy)
                wave.append(policy)
        self._pending.update(dict.fromkeys(wave))
        return wave

    def tell(self, results: Sequence[TrialResult]) -> None:
        for result in results:
            self._told += 1
            self._seen.add(result.policy)
            self._pending.pop(result.policy, None)
            if _teaches(result) and self._space.contains(result.policy):
                values = self._method.values(result) if result.status == "ok" else None
                if result.status == "infeasible" or (values is not None and all(map(math.isfinite, values))):
                    indices = self._space.encode(result.policy)
                    self._memory.add(Observation(indices, values, result.violations))

    def _study(self, seed: int) -> Study:
        """What the memory kept, as finished trials, and what was asked and not told yet, as running ones."""
        study = new_study(self._method.objectives, self._method.sampler(seed))
        kept = self._memory.kept()
        scored = [observation.values for observation in kept if observation.values is not None]
        unknown = tuple(map(median, zip(*scored, strict=True))) or (0.0,) * self._method.objectives
        study.add_trials(self._trial(observation.indices, observation, unknown) for observation in kept)
        study.add_trials(self._trial(self._space.encode(policy)) for policy in self._pending)
        return study

    def _trial(
        self, indices: Sequence[int], observation: Observation | None = None, unknown: tuple[float, ...] = ()
    ) -> FrozenTrial:
        """A finished trial, or a running one where nothing was observed.

        TPE and NSGA-II rank infeasible trials by their violations alone; only the Gaussian process looks at the value
        of one, and a middling value of the others neither draws it there nor away.
        """
        params = dict(zip(self._distributions, indices, strict=True))
        if observation is None:
            return create_trial(state=TrialState.RUNNING, params=params, distributions=self._distributions)
        return create_trial(
            values=observation.values or unknown,
            params=params,
            distributions=self._distributions,
            constraints={str(position): violation for position, violation in enumerate(observation.violations)},
        )

    def _propose(self, study: Study) -> Policy | None:
        """A new policy from the sampler. Its trial keeps running in the study, so that the next proposals of the wave
        stay away from it; so do, for the moment, the old policies proposed on the way."""
        repeated: list[Trial] = []
        proposal: Policy | None = None
        while proposal is None and len(repeated) < ATTEMPTS:
            trial = study.ask(self._distributions)
            policy = self._space.decode([trial.params[name] for name in self._distributions])
            if policy in self._seen:
                repeated.append(trial)
            else:
                proposal = policy
        for trial in repeated:
            study.tell(trial, state=TrialState.FAIL)
        return proposal


def _teaches(result: TrialResult) -> bool:
    if result.status == "failed" or not all(map(math.isfinite, result.violations)):
        return False
    return result.status == "ok" or any(violation > 0 for violation in result.violations)


def _key(decision: Decision) -> str:
    """Groups and layers share names."""
    return f"{decision.kind} {decision.name}"


def _distribution(decision: Decision) -> IntDistribution:
    """Indices as an ordered range: options go from the least to the most compressed, and neighbours are alike."""
    return IntDistribution(0, len(decision.options) - 1)


def _objective(result: TrialResult) -> tuple[float, ...] | None:
    return None if result.objective is None else (result.objective,)


def _log_objective(result: TrialResult) -> tuple[float, ...] | None:
    """Divergences of one space span orders of magnitude, which a stationary kernel cannot follow."""
    return None if result.objective is None else (math.log(max(result.objective, LEAST)),)


def _divergence_and_latency(result: TrialResult) -> tuple[float, ...] | None:
    if result.score is None or result.ratio is None:
        return None
    return result.score.divergence, result.ratio


def _tpe(seed: int) -> BaseSampler:
    # Multivariate: independent estimates for tens of decisions cost ten times as much, and soon only repeat the best.
    return TPESampler(seed=seed, multivariate=True, constant_liar=True)


def _gp(seed: int) -> BaseSampler:
    return Climber(seed=seed, warn_independent_sampling=False)


TPE = Method(_tpe, lambda: Elites(best=100, recent=100), _objective)
GP = Method(_gp, lambda: Elites(best=50, recent=50), _log_objective)
NSGA2 = Method(
    lambda seed: Successors(seed=seed, population_size=POPULATION),
    lambda: Generations(POPULATION, objectives=2),
    _divergence_and_latency,
    objectives=2,
)
