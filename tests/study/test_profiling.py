"""A survey on the simulated engine, whose times are exact."""

from collections.abc import Iterator
from datetime import date

import pytest

from autocomp.capabilities import Capabilities
from autocomp.engines import BackendSpec, make_backend
from autocomp.hardware import HardwareProfile, Predictor, kernels_of
from autocomp.policy import FP32, INT8, Policy
from autocomp.space import SearchSpace
from autocomp.study.profiling import Subject, Survey, quiet_ms, survey
from tests.engines.conftest import Case, case
from tests.engines.nets import resnet


@pytest.fixture(scope="module")
def model() -> Case:
    return case(resnet(depth=8, width=16, size=8))


@pytest.fixture
def subject(model: Case) -> Iterator[Subject]:
    backend = make_backend(BackendSpec("simulated", batch=4))
    space = SearchSpace("test", kept=(1.0, 0.5), precisions=(FP32, INT8), drop_branches=True)
    restricted = space.restrict(model.net.graph, Capabilities((FP32, INT8), channel_multiple=8))
    with backend.build(model.emit(Policy())) as reference:
        usual = quiet_ms(reference, blocks=2)
        yield Subject("test", restricted, backend, model.emit, model.template.values, reference, usual)


def empty(subject: Subject) -> HardwareProfile:
    return HardwareProfile.of(subject.backend.device, date(2026, 1, 1), "")


def predicted(profile: HardwareProfile, subject: Subject, policy: Policy) -> tuple[float, float]:
    """Predicted ms, and the share of it that was measured."""
    found = Predictor(profile).engine(kernels_of(subject.graph, policy, 4).values())
    return found.ms, found.measured


def real(subject: Subject, policy: Policy) -> float:
    with subject.backend.build(subject.skeleton(policy)) as engine:
        return float(engine.time(1)[0])


def test_uniform_policies_come_first_and_are_then_known_exactly(subject: Subject) -> None:
    steps: list[Survey] = []
    profile = survey(subject, empty(subject), float("inf"), 4, steps.append)
    assert [step.engines for step in steps] == [1, 2, 3, 4]
    for policy in subject.space.uniform():
        ms, measured = predicted(profile, subject, policy)
        assert measured == 1.0
        assert ms == pytest.approx(real(subject, policy), rel=1e-6)


def test_more_engines_leave_less_to_guess(subject: Subject) -> None:
    few, many = (survey(subject, empty(subject), float("inf"), count, lambda _: None) for count in (4, 24))
    assert len(many.kernels) > len(few.kernels)
    first, *_, last = (layer.name for layer in subject.graph.layers)
    for uniform in subject.space.uniform():
        mixed = subject.graph.normalise(Policy(uniform.kept, frozenset(), {first: INT8, last: INT8}))
        assert subject.space.contains(mixed)
        assert predicted(many, subject, mixed)[0] == pytest.approx(real(subject, mixed), rel=0.15)


def test_no_engine_is_begun_once_the_time_is_over(subject: Subject) -> None:
    ticks = iter([0.0, 5.0, 11.0])
    steps: list[Survey] = []
    survey(subject, empty(subject), 10.0, 100, steps.append, clock=lambda: next(ticks))
    assert len(steps) == 2


def test_a_profile_is_extended_not_measured_again(subject: Subject) -> None:
    first = survey(subject, empty(subject), float("inf"), 4, lambda _: None)
    steps: list[Survey] = []
    longer = survey(subject, first, float("inf"), 2, steps.append)
    assert {entry.kernel for entry in first.kernels} <= {entry.kernel for entry in longer.kernels}
    assert len(longer.engines) == 4 + len(steps)
