"""Traced networks that several tests of compression share."""

from dataclasses import dataclass

import pytest
from torch import Tensor, nn

from autocomp.capabilities import Numerics
from autocomp.compress import Statistics, Traced, collect, trace
from autocomp.compress.importance import Evidence
from autocomp.compress.surgery import tensors_of
from autocomp.engines.processor import weight_max
from autocomp.policy import Recipe
from tests.compress.nets import Chain, Mixed, images, trained

UNSIGNED = Numerics(signed_activations=False, symmetric_activations=False, weight_max=weight_max())
"""As an engine on this processor computes."""


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


def evidence_of(traced: Traced, data: Tensor, seed: int = 0) -> Evidence:
    found = collect(traced, data, Recipe(importance="group_l2"))
    return Evidence(traced, tensors_of(traced.module), found.moments, data, 1e-3, seed)


@pytest.fixture(scope="session")
def chained(chain: Case) -> Evidence:
    return evidence_of(chain.traced, chain.images)


@pytest.fixture(scope="session")
def mixture(mixed: Case) -> Evidence:
    return evidence_of(mixed.traced, mixed.images[:16])
