"""Profile builds on the simulated engine, whose times are exact; once on the real one."""

from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from autocomp.config import SearchConfig
from autocomp.engines import make_backend
from autocomp.engines.simulated import SimulatedBackend
from autocomp.errors import ConfigError, DataError, ModelError, SpaceError
from autocomp.hardware import EngineTime, HardwareProfile, Predictor, kernels_of
from autocomp.outcome import Event, Note
from autocomp.policy import Policy
from autocomp.study import guidance, profiling
from autocomp.study.build_profile import Built, Job, Progress, build_profile, jobs_like, jobs_of
from autocomp.study.guidance import known_profile, obtain_profile
from autocomp.study.profiles import check_profile, find_profile, predict_policy, standing
from autocomp.study.profiling import _timed
from autocomp.study.steady import WAITS_S
from autocomp.study.workbench import EditEmitter, Workbench, backend_spec, prepare
from tests.draws import Uniform

CONFIG = SearchConfig(
    model="zoo:resnet8", data="random:3x16x16x10", engine="simulated", calibration_images=8, search_images=8,
    selection_images=8,
)  # fmt: skip


def tiny() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(16, 4),
    )  # fmt: skip


def ignore(event: Event) -> None:
    del event


class Ticks:
    """A clock that goes on by a second whenever it is read."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def build(
    root: Path,
    jobs: tuple[Job, ...] | None = None,
    seconds: float = 100.0,
    progress: Callable[[Progress], None] = lambda _: None,
    observer: Callable[[Event], None] = ignore,
) -> Built:
    return build_profile(jobs or jobs_of(CONFIG, (2,)), seconds, root, observer, progress, Ticks())


def engine_ms(bench: Workbench, policy: Policy) -> float:
    assert isinstance(bench.emitter, EditEmitter)
    with bench.backend.build(bench.emitter.skeleton(policy)) as engine:
        return float(engine.time(1)[0])


def test_predictions_after_a_build_are_the_engines(tmp_path: Path) -> None:
    built = build(tmp_path, seconds=110)
    assert built.engines > 20 and built.busy == 0 and built.added == len(built.profile.kernels)
    predictor = Predictor(built.profile)
    bench = prepare(replace(CONFIG, batch=2), ignore)
    whole, errors = 0, []
    for policy in (*bench.space.uniform(), *(bench.space.suggest(Uniform(seed)) for seed in range(50))):
        found = predictor.engine(kernels_of(bench.traced.graph, policy, 2).values())
        truth = engine_ms(bench, policy)
        if found.measured == 1.0:
            whole += 1
            assert found.ms == pytest.approx(truth, rel=1e-6)
        else:
            errors.append(abs(found.ms / truth - 1))
    assert whole > 3 and len(errors) > 20
    assert np.median(errors) < 0.05 and max(errors) < 0.25  # this device computes in steps of 16 channels


def test_time_is_divided_and_kept_between_batches(tmp_path: Path) -> None:
    seen: list[Progress] = []
    built = build(tmp_path, jobs_of(CONFIG, (1, 4)), seconds=60, progress=seen.append)
    counts = [sum(entry.batch == batch for entry in built.profile.engines) for batch in (1, 4)]
    assert min(counts) > 0.6 * max(counts)
    assert [stand.engines for stand in seen] == list(range(1, built.engines + 1))
    assert seen[-1].kernels == len(built.profile.kernels) and seen[-1].elapsed_s <= built.seconds
    assert HardwareProfile.load(built.folder).engines == built.profile.engines


def test_an_interrupted_build_goes_on_without_losing_a_kernel(tmp_path: Path) -> None:
    seen: list[Progress] = []

    def stop(stand: Progress) -> None:
        seen.append(stand)
        if stand.engines == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, progress=stop)
    kept = HardwareProfile.load(tmp_path / "simulated-1t")
    assert len(kept.engines) == 5 and len(kept.kernels) == seen[-1].kernels
    built = build(tmp_path, seconds=20)
    times = {entry.kernel: entry for entry in built.profile.kernels}
    assert built.profile.engines[:5] == kept.engines and len(built.profile.engines) == 5 + built.engines
    for entry in kept.kernels:
        assert times[entry.kernel].samples >= entry.samples
        assert times[entry.kernel].median_ms == pytest.approx(entry.median_ms)
    assert built.added == len(built.profile.kernels) - len(kept.kernels) > 0


def test_another_devices_profile_is_replaced_with_a_line(tmp_path: Path) -> None:
    old = build(tmp_path, seconds=3).profile
    replace(old, details="cpu: 6502").save(tmp_path)
    assert standing(replace(old, details="cpu: 6502")).kind == "stale"
    events: list[Event] = []
    built = build(tmp_path, seconds=3, observer=events.append)
    assert built.notes == ("the profile simulated-1t was stale (device was cpu: 6502, is unknown): it is replaced",)
    assert Note(built.notes[0]) in events
    assert len(built.profile.engines) == built.engines and standing(built.profile).kind == "measured"


def test_like_builds_the_same_models_and_batches(tmp_path: Path) -> None:
    first = build(tmp_path / "a", jobs_of(CONFIG, (3, 1)), seconds=8).profile
    assert {entry.data for entry in first.engines} == {"random:3x16x16x10"}
    jobs = jobs_like(SearchConfig(engine="simulated"), first)
    assert [(job.config.model, job.config.data, job.batches) for job in jobs] == [
        ("zoo:resnet8", "random:3x16x16x10", (1, 3))
    ]
    second = build(tmp_path / "b", jobs, seconds=8).profile
    assert {entry.kernel for entry in first.kernels} & {entry.kernel for entry in second.kernels}
    unnamed = tuple(replace(entry, data="") for entry in first.engines)
    live = tuple(replace(entry, model="object:Net") for entry in first.engines)
    with pytest.raises(ConfigError, match="names no model"):
        jobs_like(SearchConfig(), replace(first, engines=unnamed + live))


@pytest.mark.parametrize(
    ("change", "seconds", "error", "said"),
    [
        ({}, 0.0, ConfigError, "--seconds 0"),
        ({}, float("nan"), ConfigError, "--seconds nan"),
        ({"engine": "abacus"}, 1.0, ConfigError, "unknown engine 'abacus'"),
        ({"hardware": "abacus"}, 1.0, ConfigError, "unknown simulated device"),
        ({"model": "zoo:alexnet"}, 1.0, ModelError, "the zoo has no"),
        ({"data": "random:3"}, 1.0, DataError, "is no shape"),
        ({"space": "nowhere"}, 1.0, SpaceError, "unknown search space"),
        ({"space": "./whole.toml"}, 1.0, SpaceError, "leaves nothing to choose"),
    ],
)
def test_bad_input_is_told_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], seconds: float, error: Any, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("whole.toml").write_text('format = 1\nkept = [1.0]\nprecisions = ["fp32"]\ndrop_branches = false\n')
    with pytest.raises(error, match=said):
        build(tmp_path / "out", jobs_of(replace(CONFIG, **change), ()), seconds)
    assert not (tmp_path / "out").exists()


def test_a_torn_profile_is_not_overwritten(tmp_path: Path) -> None:
    folder = build(tmp_path, seconds=3).folder
    path = folder / "kernels.csv"
    torn = path.read_text()[:-20]
    path.write_text(torn)
    with pytest.raises(ConfigError, match=r"kernels\.csv.*torn.*delete .* and build again"):
        build(tmp_path, seconds=3)
    assert path.read_text() == torn


def test_engines_measured_on_a_busy_device_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slowed(*given: Any) -> Any:
        _, wall_ms, operators = _timed(*given)
        return 1.3, wall_ms, operators

    monkeypatch.setattr(profiling, "_timed", slowed)
    built = build(tmp_path, seconds=10)
    assert built.busy == built.engines > 1
    (note,) = built.notes
    assert note == f"{built.busy} of {built.busy} engines were measured while the device was busy: " + (
        "build again when it is quiet"
    )


def test_a_policy_is_predicted_without_an_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"this device \(simulated-1t\) has no profile"):
        find_profile(None, CONFIG)
    (tmp_path / "hardware_profiles").mkdir()
    build_profile(jobs_of(CONFIG, (2,)), 40, None, ignore, lambda _: None, Ticks())
    profile = find_profile(None, CONFIG)
    found = predict_policy(Policy(), replace(CONFIG, batch=2), profile, ignore)
    bench = prepare(replace(CONFIG, batch=2), ignore)
    assert found.prediction.measured == 1.0
    assert found.prediction.ms == pytest.approx(engine_ms(bench, Policy()), rel=1e-6)
    assert sum(entry.ms for _, entry in found.kernels.values()) + found.overhead_ms == pytest.approx(
        found.prediction.ms
    )
    far = predict_policy(Policy(), replace(CONFIG, batch=64), profile, ignore)
    assert far.prediction.measured == 0.0 and far.prediction.deviation_ms > found.prediction.deviation_ms


def outdated() -> HardwareProfile:
    return HardwareProfile("simulated-1t", "simulated (an estimate)", 1, date(2026, 1, 31), True, engines=(OLD,))


OLD = EngineTime("zoo:resnet8", 2, 9, 1.0, 1.0)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> HardwareProfile:
    """Built anew, whatever its folder held."""
    root = tmp_path_factory.mktemp("fresh")
    outdated().save(root)
    return build_profile(jobs_of(CONFIG, (2,)), 5, root, ignore, lambda _: None, Ticks(), fresh=True).profile


def scaled(profile: HardwareProfile, factor: float) -> HardwareProfile:
    """What a device says that is so much slower."""
    kernels = tuple(replace(entry, median_ms=factor * entry.median_ms) for entry in profile.kernels)
    engines = tuple(replace(e, ms=factor * e.ms, kernels_ms=factor * e.kernels_ms) for e in profile.engines)
    return replace(profile, kernels=kernels, engines=engines)


def test_a_fresh_build_forgets_what_was_measured(fresh: HardwareProfile) -> None:
    assert OLD not in fresh.engines and len(fresh.engines) > 1


def test_a_profile_is_stale_when_the_reference_is_off_by_more_than_a_tenth(fresh: HardwareProfile) -> None:
    """Times of the simulated engine are exact: only what the profile says of them is changed."""
    pauses: list[float] = []
    found = check_profile(scaled(fresh, 1 / 1.2), SearchConfig(), ignore, pauses.append)
    (drift,) = found.drifts
    assert drift.batch == 2 and drift.off == pytest.approx(0.2) and drift.stale
    assert found.rebuild == (
        "autocomp profile build --fresh --like simulated-1t --engine simulated --threads 1 --hardware simulated"
    )
    assert pauses == list(WAITS_S)  # other work, which may end, would have slowed it as well
    other = check_profile(replace(fresh, engine="simulated (of old)"), SearchConfig(), ignore, pauses.append)
    assert other.standing.kind == "stale" and other.drifts == () and "--fresh" in other.rebuild
    for changed, said in (
        (replace(fresh, device="box-1t"), "another device"),
        (replace(fresh, measured=False, kernels=()), "only described"),
    ):
        with pytest.raises(ConfigError, match=said):
            check_profile(changed, SearchConfig(), ignore, pauses.append)


def test_a_guided_search_tells_of_a_profile_that_does_not_fit(
    fresh: HardwareProfile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = fresh.save(tmp_path / "hardware_profiles")
    bench, events = prepare(replace(CONFIG, batch=2), ignore), list[Event]()
    assert known_profile(bench, events.append) is not None and events == []
    path = folder / "profile.toml"
    text = path.read_text()
    for old, new, said in (("format = 1", "format = 9", "cannot be read"), ("estimate)", "guess)", "is stale")):
        path.write_text(text.replace(old, new))
        assert known_profile(bench, events.append) is None
        (note,) = events
        assert isinstance(note, Note) and said in note.text
        events.clear()
    scaled(fresh, 2.0).save(tmp_path / "hardware_profiles")
    monkeypatch.setattr(guidance, "SURVEY_ENGINES", 1)
    with bench.backend.build(bench.reference) as reference:
        assert obtain_profile(bench, reference, tmp_path / "run", events.append) is not None
    assert any(isinstance(event, Note) and "stale, or the device is busy" in event.text for event in events)


@pytest.mark.parametrize(("factor", "kept"), [(2.0, False), (1.0, True)], ids=["busy", "quiet"])
def test_only_a_quiet_devices_times_are_kept_for_later(
    factor: float, kept: bool, fresh: HardwareProfile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(SimulatedBackend, "measures", True)  # its times are what a device's would be
    monkeypatch.setattr(guidance, "SURVEY_ENGINES", 1)
    bench = prepare(replace(CONFIG, batch=2), ignore)
    told = scaled(fresh, factor)
    whole = set(kernels_of(bench.traced.graph, bench.reference_policy, 2).values())
    few = tuple(entry for entry in told.kernels if entry.kernel in whole)  # the others are left to measure
    folder = replace(told, kernels=few).save(tmp_path / "hardware_profiles")
    before = HardwareProfile.load(folder)
    with bench.backend.build(bench.reference) as reference:
        assert obtain_profile(bench, reference, tmp_path / "run", ignore) is not None
    surveyed = HardwareProfile.load(tmp_path / "run" / "profile" / folder.name)
    assert len(surveyed.engines) == len(before.engines) + 1
    assert HardwareProfile.load(folder) == (surveyed if kept else before)


def test_with_the_real_engine(tmp_path: Path) -> None:
    config = replace(CONFIG, model=f"{__name__}:tiny", data="random:3x12x12x4", engine="onnxruntime")
    seen: list[Progress] = []
    built = build_profile(jobs_of(config, (2,)), 2.0, tmp_path, ignore, seen.append)
    device = make_backend(backend_spec(config)).device
    assert built.profile.differences(device) == () and built.engines == len(seen) >= 1
    assert all(entry.median_ms >= 0 for entry in built.profile.kernels)
    for entry in built.profile.engines:
        assert 0 < entry.kernels_ms < 1.5 * entry.ms
    assert standing(built.profile).kind == "measured"


@pytest.mark.parametrize(
    ("changed", "reason"), [({"space": "ranks"}, "space ranks has ranks"), ({"target_resource": "phone"}, "with phone")]
)
def test_a_search_that_cannot_be_guided_says_why(changed: dict[str, str], reason: str, tmp_path: Path) -> None:
    bench, events = prepare(replace(CONFIG, executor="ray", **changed), ignore), list[Event]()
    with bench.backend.build(bench.reference) as reference:
        assert obtain_profile(bench, reference, tmp_path, events.append) is None
    (note,) = events
    assert isinstance(note, Note) and reason in note.text
