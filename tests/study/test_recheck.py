"""A run's shipped model measured again: verdicts, what they change, and what is refused."""

import json
from typing import Any

import pytest

from autocomp.api import Interrupted, load_result, resume, searching, verify
from autocomp.errors import ConfigError, InputError, RunError
from autocomp.study import recheck
from autocomp.study import verify as verification
from autocomp.study.run import Run, read_manifest
from tests.study.conftest import HERE, Make


def test_a_predicted_run_becomes_a_verified_one_on_the_real_engine(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    protocol = verification.verification_protocol(("p50",), builds=2)
    monkeypatch.setattr(recheck, "verification_protocol", lambda _: protocol)
    folder = make(predicted=True, budget="1000ms")  # not a claim on how busy this machine is
    found = verify(folder)
    assert found.verdict.admitted, found.verdict.reason
    assert found.changed and found.confidence == 0.95
    latency = found.verdict.latency
    assert 0 < latency.ratio.low < latency.ratio.high and 0 < latency.latency_ms.low < latency.latency_ms.high <= 1000
    result = load_result(folder)
    assert result.verified and not result.predicted and result.best is not None
    assert result.best.latency == found.verdict.latency and result.best.verified
    assert result.reference.latency is not None
    assert result.reference.latency.latency_ms == found.verdict.latency.reference_ms
    assert result.contenders["random"].latency is None and not result.contenders["random"].verified
    assert not any(note.startswith("latencies are predicted") for note in result.notes) and "another" in result.notes
    assert any("gone.npz" in note for note in result.notes)  # accuracy could not be scored again
    manifest = read_manifest(folder)
    assert manifest.status == "verified" and manifest.device == HERE
    assert "Verified: within 1000ms" in (folder / "report.md").read_text()
    (entry,) = [e for e in Run.entries_of(folder) if e["kind"] == "verification"]
    assert entry["admitted"] is True and entry["device"] == HERE


def test_one_that_fails_says_why_and_the_run_is_measured_but_not_verified(make: Make, measured: Any) -> None:
    measured(0.95)
    folder = make(predicted=True)
    found = verify(folder)
    assert not found.verdict.admitted and "is over 0.9x" in (found.verdict.reason or "")
    result = load_result(folder)
    assert not result.predicted and not result.verified and read_manifest(folder).status == "unverified"


def test_asking_again_wants_more_confidence_and_a_measured_result_stays(make: Make, measured: Any) -> None:
    measured(0.5)
    folder = make(predicted=False)
    before = (folder / "result.json").read_text()
    assert [verify(folder).confidence for _ in range(3)] == pytest.approx([0.95, 0.975, 1 - 0.05 / 3])
    assert (folder / "result.json").read_text() == before and read_manifest(folder).status == "unverified"


def test_a_verdict_of_the_search_counts_as_asked(make: Make, measured: Any) -> None:
    measured(0.5)
    folder = make(predicted=False)
    best = load_result(folder).best
    assert best is not None
    with Run.open(folder) as run:
        run.record("verdict", policy=best.policy.digest, admitted=False)
        run.record("verdict", policy="another", admitted=False)
    assert [verify(folder).confidence for _ in range(2)] == pytest.approx([0.975, 1 - 0.05 / 3])


def test_on_another_device_the_run_stays_predicted(make: Make, measured: Any) -> None:
    measured(0.5)
    folder = make(predicted=True, device={**HERE, "name": "far-away-1t"})
    events: list[Any] = []
    found = verify(folder, events.append)
    assert found.verdict.admitted and not found.changed
    assert any("the run is for far-away-1t" in getattr(event, "text", "") for event in events)
    assert load_result(folder).predicted and read_manifest(folder).device["name"] == "far-away-1t"


def test_what_cannot_be_verified_is_refused(make: Make) -> None:
    folder = make(predicted=True, engine="simulated")
    with pytest.raises(ConfigError, match="only estimates"):
        verify(folder)
    text = (folder / "manifest.json").read_text().replace('"simulated"', '"onnxruntime"')
    (folder / "manifest.json").write_text(text)
    for name in ("model.onnx", "reference.onnx"):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[:-9])
        with pytest.raises(RunError, match=rf"{name} is not the file that the run shipped"):
            verify(folder)
        (folder / name).write_bytes(whole)
    (folder / "reference.onnx").unlink()
    with pytest.raises(RunError, match=r"not whole.*reference\.onnx"):
        verify(folder)
    data = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps({**data, "best": None}))
    with pytest.raises(RunError, match="shipped no model"):
        verify(folder)
    with pytest.raises(InputError, match="no run folder"):
        verify(folder.parent)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"budget": ["0.9x"]}'])
def test_a_damaged_result_is_told_and_made_again(make: Make, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    folder = make(predicted=False)
    (folder / "result.json").write_text(text)
    with pytest.raises(RunError, match=r"result\.json is damaged or of another version .*autocomp resume") as caught:
        load_result(folder)
    assert "\n" not in str(caught.value)

    def reached(*_: Any) -> None:
        raise InputError("the search goes on")

    monkeypatch.setattr(searching, "prepare", reached)
    monkeypatch.setattr(searching, "package_versions", lambda: {"autocomp": "0.1.0"})
    with pytest.raises(InputError, match="goes on"):
        resume(folder)


def test_a_report_that_is_interrupted_says_how_to_write_it(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(predicted=False)

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(searching, "conduct", lambda *_: None)
    monkeypatch.setattr(searching, "write_report", stopped)
    unused: Any = None
    with Run.open(folder) as run, pytest.raises(Interrupted, match=f"autocomp report {folder}"):
        searching._conduct(unused, unused, run, unused)
