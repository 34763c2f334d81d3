"""The field's reinforcement-learning baseline: DDPG over the decisions, one after the other."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import isfinite, log10, prod

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri
from torch import Tensor
from torch.nn.functional import linear, mse_loss, relu

from autocomp.controllers.initial import checked
from autocomp.controllers.random import derived, fresh
from autocomp.graph import Layer
from autocomp.policy import Policy
from autocomp.results import TrialResult
from autocomp.space import Decision, PolicySpace

__all__ = ["DdpgController"]

WARM_UP = 20
"""Results before the actor proposes."""
NOISE, DECAY = 0.5, 0.97
"""Standard deviation of the exploration noise when the actor begins, and what each result leaves of it."""
ROLLOUTS = 8
"""Walks of the actor, each noisier than the one before, from which the first new policy is taken."""
EPISODES = 128
"""Results kept in the replay buffer, the most recent ones."""
WIDTH = 64
"""Units of each of the two hidden layers."""
UPDATES, BATCH = 4, 128
"""Gradient steps for a result, and transitions in each."""
ACTOR_RATE, CRITIC_RATE, TARGET_RATE = 1e-3, 3e-3, 0.02
DISCOUNT = 0.9
BASELINE = 0.95
"""What the moving average of rewards keeps of its past."""

Array = NDArray[np.float32]
Network = list[Tensor]


class DdpgController:
    """An actor-critic that walks the decisions layer by layer, in the manner of AMC and HAQ.

    AMC (He et al. 2018, arXiv:1802.03494, sections 3.1 to 3.3) and HAQ (Wang et al. 2019, arXiv:1811.08886, section 3)
    learn by DDPG (Lillicrap et al. 2016, arXiv:1509.02971). A step is a decision; its state tells where and what the
    layer is, what was reduced before and what is left, and the last action. An action in [0, 1] is rounded to one of
    the decision's options, which go from the least to the most compressed. Exploration draws from a normal
    distribution around the actor's action, truncated to [0, 1], that narrows with every result. Every step of a trial
    has the trial's reward less a moving average, as in AMC's equation 5.

    Where it differs, because a trial here is a measurement and not a forward pass: rewards are -log10 of the
    objective, and infeasible trials, which have none, get less than any feasible one, the less the further over the
    budgets they are. AMC's clipping of actions to what the budget still allows needs a model of costs, which a
    controller has not. What was reduced is the share of the multiply-accumulates that each action touches times the
    action. Networks are smaller and the discount is less than 1, since there are hundreds of trials instead of
    thousands.

    Training happens in `tell`, one result after the other, from seeds derived from the search's and the number of
    results told: the same history in any portions leads to the same networks.
    """

    def __init__(self, space: PolicySpace, seed: int, initial: Sequence[Policy] = ()) -> None:
        self._space = space
        self._seed = seed
        self._initial = checked(space, initial)
        self._walk = _Walk(space)
        self._seen: set[Policy] = set()
        self._told = 0
        self._average: float | None = None
        self._replay = _Replay(self._walk.steps, self._walk.width)
        self._agent = _Agent(self._walk.width, torch.Generator().manual_seed(derived(seed)))

    def ask(self, count: int) -> list[Policy]:
        wave = [policy for policy in self._initial if policy not in self._seen][:count]
        self._seen.update(wave)
        while len(wave) < count:
            place = derived(self._seed, self._told, len(self._seen))
            policy = self._proposal(np.random.default_rng(place))
            policy = policy or fresh(self._space, random.Random(place), self._seen)
            if policy is None:
                break
            self._seen.add(policy)
            wave.append(policy)
        return wave

    def tell(self, results: Sequence[TrialResult]) -> None:
        with _one_thread():
            for result in results:
                self._told += 1
                self._seen.add(result.policy)
                reward = _reward(result)
                if reward is not None and self._walk.steps and self._space.contains(result.policy):
                    self._learn(self._walk.actions(self._space.encode(result.policy)), reward)

    def _learn(self, actions: Array, reward: float) -> None:
        self._average = reward if self._average is None else BASELINE * self._average + (1 - BASELINE) * reward
        self._replay.add(self._walk.states(actions), actions, reward)
        generator = torch.Generator().manual_seed(derived(self._seed, self._told))
        for _ in range(UPDATES):
            self._agent.update(*self._replay.batch(generator, self._average))

    def _proposal(self, generator: np.random.Generator) -> Policy | None:
        """The first new policy of a few noisy walks; None before the actor has learned, or where all are known."""
        if self._told < WARM_UP or not self._walk.steps:
            return None
        sigma = max(NOISE * DECAY ** (self._told - WARM_UP), 0.05) * 1.5 ** np.arange(ROLLOUTS, dtype=np.float32)
        actor = [array.detach().numpy() for array in self._agent.actor]
        draws = generator.random((self._walk.steps, ROLLOUTS))
        for indices in self._walk.rollouts(lambda step, states: _noisy(_acted(actor, states), sigma, draws[step])):
            policy = self._space.decode(indices)
            if policy not in self._seen:
                return policy
        return None


class _Walk:
    """The decisions that leave a choice, as steps, and the states in which they are made."""

    def __init__(self, space: PolicySpace) -> None:
        self._decisions = space.decisions
        self._open = [place for place, decision in enumerate(space.decisions) if len(decision.options) > 1]
        self.steps = len(self._open)
        self._last = np.array([len(space.decisions[place].options) - 1 for place in self._open], np.float32)
        macs = space.graph.layer_macs(Policy())
        touched = [_touched(space, space.decisions[place]) for place in self._open]
        work = np.array([sum(macs[layer.name] for layer in layers) for layers in touched], np.float32)
        self._share = work / max(work.sum(), 1)
        rows = [_described(space.decisions[place], layers) for place, layers in zip(self._open, touched, strict=True)]
        fixed = np.array(rows, np.float32).reshape(self.steps, -1)
        place = np.linspace(0, 1, self.steps, dtype=np.float32)[:, None]
        left = 1 - np.cumsum(self._share)[:, None]
        self._fixed = np.concatenate([fixed, place, np.sqrt(self._share)[:, None], left], axis=1)
        self.width = self._fixed.shape[1] + 2

    def actions(self, indices: Sequence[int]) -> Array:
        """Of a policy's indices: 0 for the least compressed option of each step, 1 for the most."""
        return np.array([indices[place] for place in self._open], np.float32) / self._last

    def states(self, actions: Array) -> Array:
        """One row a step."""
        reduced = np.concatenate([[0], np.cumsum(self._share * actions)[:-1]])
        before = np.concatenate([[0], actions[:-1]])
        return np.column_stack([self._fixed, reduced, before]).astype(np.float32)

    def rollouts(self, act: Callable[[int, Array], Array]) -> list[list[int]]:
        """Indices of the options that ``act`` takes, for all rollouts at once, given a step and their states."""
        chosen = np.zeros((ROLLOUTS, len(self._decisions)), np.int64)
        reduced, before = np.zeros(ROLLOUTS, np.float32), np.zeros(ROLLOUTS, np.float32)
        for step, place in enumerate(self._open):
            states = np.column_stack([np.tile(self._fixed[step], (ROLLOUTS, 1)), reduced, before])
            chosen[:, place] = np.rint(act(step, states) * self._last[step])
            before = (chosen[:, place] / self._last[step]).astype(np.float32)
            reduced = reduced + self._share[step] * before
        return [[int(index) for index in row] for row in chosen]


class _Replay:
    """The transitions of the most recent trials."""

    def __init__(self, steps: int, width: int) -> None:
        self._states = torch.zeros(EPISODES, steps, width)
        self._actions = torch.zeros(EPISODES, steps)
        self._rewards = torch.zeros(EPISODES)
        self._count = 0

    def add(self, states: Array, actions: Array, reward: float) -> None:
        row = self._count % EPISODES
        self._states[row], self._actions[row] = torch.from_numpy(states), torch.from_numpy(actions)
        self._rewards[row] = reward
        self._count += 1

    def batch(self, generator: torch.Generator, baseline: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """States, actions, rewards less the baseline, next states, and whether there is one."""
        steps = self._actions.shape[1]
        row = torch.randint(min(self._count, EPISODES), (BATCH,), generator=generator)
        step = torch.randint(steps, (BATCH,), generator=generator)
        following = self._states[row, (step + 1).clamp(max=steps - 1)]
        rewards = self._rewards[row] - baseline
        return self._states[row, step], self._actions[row, step], rewards, following, (step + 1 < steps).float()


class _Agent:
    """Actor and critic with slowly following copies (Lillicrap et al. 2016, algorithm 1)."""

    def __init__(self, width: int, generator: torch.Generator) -> None:
        self.actor = _network(width, generator, bias=-1.0)  # compress little until something is known
        self._critic = _network(width + 1, generator, bias=0.0)
        self._followers = [array.detach().clone() for array in (*self.actor, *self._critic)]
        self._actor_steps = torch.optim.Adam(self.actor, ACTOR_RATE)
        self._critic_steps = torch.optim.Adam(self._critic, CRITIC_RATE)

    def update(self, states: Tensor, actions: Tensor, rewards: Tensor, following: Tensor, more: Tensor) -> None:
        half = len(self.actor)
        with torch.no_grad():
            later = _value(self._followers[half:], following, _action(self._followers[:half], following))
            target = rewards + DISCOUNT * more * later
        loss = mse_loss(_value(self._critic, states, actions), target)
        self._critic_steps.zero_grad()
        torch.autograd.backward(loss)
        self._critic_steps.step()
        loss = -_value(self._critic, states, _action(self.actor, states)).mean()
        self._actor_steps.zero_grad()
        torch.autograd.backward(loss)
        self._actor_steps.step()
        with torch.no_grad():
            torch._foreach_lerp_(self._followers, [*self.actor, *self._critic], TARGET_RATE)


def _network(width: int, generator: torch.Generator, bias: float) -> Network:
    """Weights and biases of three layers; the last one begins near ``bias`` everywhere."""
    arrays: Network = []
    for out, read, bound in ((WIDTH, width, width**-0.5), (WIDTH, WIDTH, WIDTH**-0.5), (1, WIDTH, 3e-3)):
        arrays += [(2 * torch.rand(shape, generator=generator) - 1) * bound for shape in ((out, read), (out,))]
    arrays[-1] += bias
    return [array.requires_grad_() for array in arrays]


def _output(network: Network, values: Tensor) -> Tensor:
    for layer in (0, 2):
        values = relu(linear(values, *network[layer : layer + 2]))
    return linear(values, *network[4:]).squeeze(-1)


def _action(actor: Network, states: Tensor) -> Tensor:
    return torch.sigmoid(_output(actor, states))


def _value(critic: Network, states: Tensor, actions: Tensor) -> Tensor:
    return _output(critic, torch.cat([states, actions[:, None]], dim=1))


def _acted(actor: Sequence[Array], states: Array) -> Array:
    """`_action` in NumPy, which takes a tenth of the time for so few states."""
    for layer in (0, 2):
        states = np.maximum(states @ actor[layer].T + actor[layer + 1], 0)
    output: Array = 1 / (1 + np.exp(-(states @ actor[4].T + actor[5])[:, 0]))
    return output


def _noisy(actions: Array, sigma: Array, draws: NDArray[np.float64]) -> Array:
    """Draws from normal distributions around the actions, truncated to [0, 1] (AMC, section 3.3)."""
    low, high = ndtr(-actions / sigma), ndtr((1 - actions) / sigma)
    noisy: Array = np.clip(actions + sigma * ndtri(low + draws * (high - low)), 0, 1)
    return noisy


def _reward(result: TrialResult) -> float | None:
    """At least -1 for a feasible result, less for others; None where nothing was learned."""
    if result.status == "failed" or not all(map(isfinite, result.violations)):
        return None
    if result.feasible and result.objective is not None:
        return -log10(min(max(result.objective, 1e-4), 10.0))
    return -1.0 - sum(max(violation, 0.0) for violation in result.violations)


def _touched(space: PolicySpace, decision: Decision) -> list[Layer]:
    """The layers that a decision changes."""
    graph = space.graph
    if decision.kind == "branch":
        names = list(graph.branch_by_name[decision.name].layers)
    elif decision.kind == "channels":
        members = graph.group_by_name[decision.name].members
        names = list(dict.fromkeys(member.parameter.rpartition(".")[0] for member in members))
    else:
        names = [decision.name]
    return [graph.layer_by_name[name] for name in names if name in graph.layer_by_name]


def _described(decision: Decision, layers: Sequence[Layer]) -> list[float]:
    """What a state tells of a step whatever was done before (AMC, equation 1), sizes as logarithms."""
    kinds = [float(decision.kind == kind) for kind in ("channels", "branch", "precision")]
    if not layers:
        return [*kinds, 0.0, 0.0, 0.0, 0.0, 0.0]
    out, read, *kernel = layers[0].weight_shape
    sizes = (out, read, prod(kernel), layers[0].positions, len(decision.options))
    return [*kinds, *(log10(size) / 3 for size in sizes)]


@contextmanager
def _one_thread() -> Iterator[None]:
    """So that sums come in one order; and matrices this small gain nothing from more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
