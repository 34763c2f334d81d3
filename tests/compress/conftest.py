"""Traced networks that several tests of compression share."""

from dataclasses import dataclass

import pytest
from torch import Tensor, nn

from autocomp.capabilities import Numerics
from autocomp.compress import Statistics, Traced, collect, trace
from autocomp.policy import Recipe
from tests.compress.nets import Chain, Mixed, images, trained

UNSIGNED = Numerics(signed_activations=False, symmetric_activations=False, weight_max=127)


@dataclass(frozen=True)
class Case:
    """A network, its trace, and calibration images with their statistics."""

    model: nn.Module
    traced: Traced
    images: Tensor
    statistics: Statistics


def case(model: nn.Module, size: int, count: int = 64) -> Case:
    calibration = images(count, size)
    traced = trace(model, calibration[:2])
    return Case(model, traced, calibration, collect(traced, calibration, Recipe()))


@pytest.fixture(scope="session")
def mixed() -> Case:
    return case(trained(Mixed()), 16)


@pytest.fixture(scope="session")
def chain() -> Case:
    return case(trained(Chain()), 8)
