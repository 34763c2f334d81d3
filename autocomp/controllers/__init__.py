"""Controllers: they choose which policies a study tries next. Optuna, cmaes and torch are
imported when a controller that needs them is asked for.

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
from autocomp.controllers.problem import Factor, Problem
from autocomp.controllers.random import RandomController
from autocomp.controllers.solver import solve, solve_nearly
from autocomp.errors import ConfigError
from autocomp.policy import Policy
from autocomp.protocols import Controller
from autocomp.space import PolicySpace

__all__ = [
    "BLIND",
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
    "solve_nearly",
    "warm_start",
]


def _tpe(space: PolicySpace, seed: int, initial: Sequence[Policy]) -> Controller:
    from autocomp.controllers.samplers import TPE, SamplerController

    return SamplerController(space, seed, initial, TPE)


def _nsga2(space: PolicySpace, seed: int, initial: Sequence[Policy]) -> Controller:
    from autocomp.controllers.samplers import NSGA2, SamplerController

    return SamplerController(space, seed, initial, NSGA2)


def _gp(space: PolicySpace, seed: int, initial: Sequence[Policy]) -> Controller:
    from autocomp.controllers.samplers import GP, SamplerController

    return SamplerController(space, seed, initial, GP)


def _cmaes(space: PolicySpace, seed: int, initial: Sequence[Policy]) -> Controller:
    from autocomp.controllers.cmaes import CmaesController

    return CmaesController(space, seed, initial)


def _ddpg(space: PolicySpace, seed: int, initial: Sequence[Policy]) -> Controller:
    from autocomp.controllers.ddpg import DdpgController

    return DdpgController(space, seed, initial)


BLIND: Mapping[str, Callable[[PolicySpace, int, Sequence[Policy]], Controller]] = MappingProxyType(
    {
        "evolution": EvolutionController,
        "random": RandomController,
        "tpe": _tpe,
        "nsga2": _nsga2,
        "gp": _gp,
        "cmaes": _cmaes,
        "ddpg": _ddpg,
    }
)
"""Controllers that know nothing but what they are told of their own proposals."""
CONTROLLERS = ("guided", *BLIND)
"""Names of all controllers."""


def make_controller(
    name: str, space: PolicySpace, seed: int, initial: Sequence[Policy] = (), knowledge: Knowledge | None = None
) -> Controller:
    """A controller by name.

    Args:
        name: one of `CONTROLLERS`.
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
    if name != "guided":
        return BLIND[name](space, seed, initial)
    if knowledge is None:
        raise ConfigError("the guided controller needs losses and costs to begin with: use evolution")
    return GuidedController(space, seed, initial, knowledge)
