"""Controllers: they choose which policies a study tries next. Optuna is imported when one of its samplers is asked for.

Whatever the controller, the same results told in the same order (in whatever portions) lead to the same wave, so a
study is resumed by telling its history again. No policy is proposed twice, nor one that was told already; a wave
shorter than asked for means that there is no other.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from autocomp.controllers.allocation import Allocation, allocate, frontier
from autocomp.controllers.evolution import EvolutionController
from autocomp.controllers.guided import GuidedController, Knowledge
from autocomp.controllers.initial import warm_start
from autocomp.controllers.random import RandomController
from autocomp.controllers.solver import Factor, Problem, solve
from autocomp.errors import ConfigError
from autocomp.policy import Policy
from autocomp.protocols import Controller
from autocomp.space import PolicySpace

__all__ = [
    "CONTROLLERS",
    "Allocation",
    "Factor",
    "GuidedController",
    "Knowledge",
    "Problem",
    "allocate",
    "frontier",
    "make_controller",
    "solve",
    "warm_start",
]

Factory = Callable[[PolicySpace, int, Sequence[Policy], Knowledge | None], Controller]


def _guided(space: PolicySpace, seed: int, initial: Sequence[Policy], knowledge: Knowledge | None) -> Controller:
    if knowledge is None:
        raise ConfigError("the guided controller needs losses and costs to begin with: use evolution")
    return GuidedController(space, seed, initial, knowledge)


def _evolution(space: PolicySpace, seed: int, initial: Sequence[Policy], knowledge: Knowledge | None) -> Controller:
    return EvolutionController(space, seed, initial)


def _random(space: PolicySpace, seed: int, initial: Sequence[Policy], knowledge: Knowledge | None) -> Controller:
    return RandomController(space, seed, initial)


def _tpe(space: PolicySpace, seed: int, initial: Sequence[Policy], knowledge: Knowledge | None) -> Controller:
    from autocomp.controllers.samplers import TPE, SamplerController

    return SamplerController(space, seed, initial, TPE)


def _nsga2(space: PolicySpace, seed: int, initial: Sequence[Policy], knowledge: Knowledge | None) -> Controller:
    from autocomp.controllers.samplers import NSGA2, SamplerController

    return SamplerController(space, seed, initial, NSGA2)


CONTROLLERS: Mapping[str, Factory] = MappingProxyType(
    {"guided": _guided, "evolution": _evolution, "random": _random, "tpe": _tpe, "nsga2": _nsga2}
)


def make_controller(
    name: str, space: PolicySpace, seed: int, initial: Sequence[Policy] = (), knowledge: Knowledge | None = None
) -> Controller:
    """A controller by name.

    Args:
        name: a key of `CONTROLLERS`.
        space: what it may propose.
        seed: of all its draws.
        initial: policies proposed before its own, in this order.
        knowledge: of losses and costs; the guided controller needs it, the others learn by trying.

    Raises:
        ConfigError: an unknown name, or no knowledge for the guided one.
        SpaceError: an initial policy lies outside the space.
    """
    if name not in CONTROLLERS:
        raise ConfigError(f"unknown controller {name!r}: use one of {', '.join(CONTROLLERS)}")
    return CONTROLLERS[name](space, seed, initial, knowledge)
