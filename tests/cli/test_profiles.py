"""`autocomp profile`."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from autocomp.config import SearchConfig
from autocomp.hardware import HardwareProfile, KernelEstimate, KernelTime, Prediction
from autocomp.policy import Policy
from autocomp.study.build_profile import Built, Job
from autocomp.study.profiles import Checked, PolicyLatency, Standing
from autocomp.study.staleness import Drift
from tests.cli.fake import ROOT, FakeApi, run

ASKED = "profile lookup --hardware board --op conv --in 16 --kernel 3 --size 8 --batch 4"


def test_profiles_are_listed_with_their_standing(
    board: HardwareProfile, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    simulated = HardwareProfile("simulated-1t", "simulated (an estimate)", 1, board.date, True)
    simulated.save(folder / "hardware_profiles")
    replace(simulated, device="simulated-2t", threads=2, details="cpu: 6502").save(folder / "hardware_profiles")
    (folder / "hardware_profiles" / "torn").mkdir()
    (folder / "hardware_profiles" / "torn" / "profile.toml").write_text("format = 1\n")
    assert run("profile", "list") == 0
    listed = {line.split()[0]: line.split()[1] for line in capfd.readouterr().out.splitlines()}
    expected = {
        "board": "measured,", "simulated": "described", "simulated-1t": "measured", "simulated-2t": "stale",
        "torn": "unreadable",
    }  # fmt: skip
    assert listed.items() >= expected.items()  # this machine's own profile may have been built meanwhile
    assert run("profile", "list", "--json") == 0
    found = {row["name"]: row["standing"] for row in json.loads(capfd.readouterr().out)}
    assert found["board"] == "foreign" and found["simulated-2t"] == "stale"
    assert run("profile", "show", "simulated-2t") == 0
    out = capfd.readouterr().out
    command = "autocomp profile build --fresh --engine simulated --threads 2 --hardware simulated"
    assert f"stale on this machine: device was cpu: 6502, is unknown; build it again with '{command}'" in out
    assert run("profile", "show", "simulated-2t", "--json") == 0
    assert json.loads(capfd.readouterr().out)["rebuild"] == command


@pytest.mark.parametrize(("measured_ms", "status"), [(11.1, 3), (8.9, 3), (10.5, 0)])
def test_a_check_says_what_is_stale_and_leaves_with_3(
    board: HardwareProfile, api: FakeApi, capfd: pytest.CaptureFixture[str], measured_ms: float, status: int
) -> None:
    drift = Drift("zoo:resnet8", 4, 10.0, measured_ms)
    api.outcome = Checked(Standing("measured"), (drift,), "autocomp profile build --fresh" if drift.stale else "")
    assert run("profile", "check", "board") == status
    out = capfd.readouterr().out
    assert f"takes {measured_ms:.3g} ms, the profile says 10 ms" in out
    assert ("build it again with 'autocomp profile build --fresh'" in out) == bool(status)
    assert run("profile", "check", "board", "--json") == status
    printed = json.loads(capfd.readouterr().out)
    assert printed["standing"] == ("stale" if status else "measured") and printed["drifts"][0]["stale"] == bool(status)
    documented = (ROOT / "docs" / "json.md").read_text().split("## `profile check`")[1]
    assert all(f"`{name}`" in documented for name in (*printed, *printed["drifts"][0]))


def test_a_profile_is_shown(board: HardwareProfile, capfd: pytest.CaptureFixture[str]) -> None:
    assert run("profile", "show", "board") == 0
    out = capfd.readouterr().out
    for text in (
        "engine: tvm 1",
        "cpu: Z80",
        "date: 2026-01-31",
        "note: of another device",
        "1 engine of zoo:resnet8",
    ):
        assert text in out
    assert re.search(r"conv +int8 +4 +12$", out, re.MULTILINE)
    assert run("profile", "show", "board", "--json") == 0
    assert {"op": "conv", "precision": "fp32", "batch": 4, "kernels": 6} in json.loads(capfd.readouterr().out)[
        "kernels"
    ]


@pytest.mark.parametrize(
    ("more", "source", "context"),
    [
        ("--out 32 --precision int8", "measured", "q conv2d.q (measured most often"),
        ("--out 32 --precision int8 --context conv2d", "measured", "q conv2d.q"),
        ("--out 32 --precision int8 --context", "measured", "q conv2d"),
        ("--out 40", "interpolated", "f conv2d"),
        ("--out 999", "extrapolated", "f conv2d"),
    ],
)
def test_a_kernel_is_looked_up(
    board: HardwareProfile, capfd: pytest.CaptureFixture[str], more: str, source: str, context: str
) -> None:
    words = [*ASKED.split(), *more.split()] + ["q conv2d"] * more.endswith("--context")
    assert run(*words) == 0
    out, err = capfd.readouterr()
    assert f", {source}\n" in out and f"context: {context}" in out
    assert err == "note: the profile board is of another device than this one\n"
    assert run(*words, "--json") == 0
    found = json.loads(capfd.readouterr().out)
    assert found["source"] == source and found["low_ms"] < found["ms"] < found["high_ms"]
    if source == "measured":
        assert found["ms"] == 0.32


def test_profiles_are_compared(board: HardwareProfile, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run("profile", "diff", "board", "board") == 0
    assert "0 of 18 kernels differ" in capfd.readouterr().out
    slower = tuple(KernelTime(e.kernel, 2 * e.median_ms, 0.0, e.samples) for e in board.kernels[1:])
    replace(board, device="late", engine="tvm 2", kernels=slower).save(folder / "hardware_profiles")
    assert run("profile", "diff", "board", "late") == 0
    out = capfd.readouterr().out
    assert "engine was tvm 1, is tvm 2" in out and "17 of 17 kernels differ" in out and "only in the first: 1" in out
    assert run("profile", "diff", "board", "late", "--json") == 0
    assert [row["ratio"] for row in json.loads(capfd.readouterr().out)["ratios"]] == pytest.approx([2.0, 2.0])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("build --batch 0", "whole numbers from 1"),
        ("build --batch 1,x", "whole numbers from 1"),
        ("build --like gone", "unknown hardware profile 'gone'"),
        ("build --like simulated", "names no model that can be built here"),
        ("build --like board --model zoo:resnet8", "leave out --model"),
        ("build --threads 0", "threads must be at least 1"),
        ("lookup --hardware board", "give --op, --in and --out"),
        ("lookup --hardware board --op conv --in 16 --out 16", "give --kernel and --size"),
        ("lookup --hardware board --op linear --in 16 --out 16", "it has conv in fp32, conv in int8"),
        ("lookup --hardware board --op conv --in 16 --out 16 --precision bf16", "it has conv in fp32, conv in int8"),
        ("lookup --hardware simulated --op conv --in 16 --out 16", "no measured kernels"),
        (
            "lookup --engine simulated --threads 77 --op conv --in 1 --out 1",
            "this device (simulated-77t) has no profile",
        ),
        (f"{ASKED[8:]} --out 16 --context add", "most often 'f conv2d'"),
        (f"{ASKED[8:]} --out 16 --groups 3", "3 groups do not divide"),
        (f"{ASKED[8:]} --out 16 --stride 2y2", "write 3 or 3x3"),
        (f"{ASKED[8:]} --out 0", "1 or more"),
        ("lookup --hardware board --policy gone.json", "no policy file gone.json"),
        ("lookup --policy gone.json --op conv", "leave out --op"),
        ("lookup --policy gone.json --size wide", "the side of the images"),
        ("check gone", "unknown hardware profile 'gone'"),
        ("diff board gone", "unknown hardware profile 'gone'"),
        ("show torn", "threads, date, measured missing"),
        ("show newer", "its format is not 1"),
    ],
)
def test_bad_input_about_profiles_is_one_line(
    board: HardwareProfile, api: FakeApi, folder: Path, capfd: pytest.CaptureFixture[str], arguments: str, said: str
) -> None:
    for name, text in (("torn", 'format = 1\ndevice = "torn"\nengine = "x"\n'), ("newer", "format = 2\n")):
        (folder / "hardware_profiles" / name).mkdir()
        (folder / "hardware_profiles" / name / "profile.toml").write_text(text)
    assert run("profile", *arguments.split()) == 2
    out, err = capfd.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith("note: ")]
    assert said in err and len(lines) == 1 and out == "" and api.calls == []


def test_build_passes_its_jobs_and_prints_what_it_made(
    board: HardwareProfile, api: FakeApi, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    api.outcome = Built(board, Path("x/board"), 7, 0, 5, 9.0)
    flags = "--model m:f --data random:3x8x8 --engine simulated --space int8 --batch 1,8 --seed 4 --seconds 9"
    assert run("profile", "build", *flags.split(), "--out", "there") == 0
    config = SearchConfig(model="m:f", data="random:3x8x8", engine="simulated", space="int8", seed=4)
    assert api.calls == [("build_profile", (Job(config, (1, 8)),), 9.0, Path("there"))]
    out, err = capfd.readouterr()
    assert out.splitlines()[-1] == "7 engines measured, 5 kernels added; profile: x/board" and "7 engines" in err
    assert run("profile", "build", "--like", "board", "--json") == 0
    (job,) = api.calls[-1][1]
    assert (job.config.model, job.config.data, job.batches) == ("zoo:resnet8", "random:3x16x16x10", (4,))
    printed = json.loads(capfd.readouterr().out)
    assert printed == api.outcome.to_json()
    documented = (ROOT / "docs" / "json.md").read_text().split("## `profile build`")[1]
    assert all(f"`{name}`" in documented for name in printed)
    api.outcome = KeyboardInterrupt()
    assert run("profile", "build") == 130
    assert "the same command goes on" in capfd.readouterr().err
    assert run("profile", "build", "--fresh") == 130
    assert "the same command without --fresh goes on" in capfd.readouterr().err and api.calls[-1][-1] == "fresh"


def test_a_policy_is_looked_up(
    board: HardwareProfile, api: FakeApi, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    kernel = board.kernels[0].kernel
    table = {"stem": (kernel, KernelEstimate(1.0, 0.1, "measured"))}
    api.outcome = PolicyLatency(Prediction(1.5, 0.1, 1.0), 4, table, 0.5)
    (folder / "policy.json").write_text(json.dumps(Policy().to_json()))
    words = "profile lookup --hardware board --policy policy.json --model zoo:resnet8 --data random:3x8x8x10 --size 8"
    assert run(*words.split()) == 0
    config = SearchConfig(model="zoo:resnet8", data="random:3x8x8x10", size=8)
    assert [call[:3] for call in api.calls] == [("predict_policy", Policy(), config)]
    assert api.calls[0][3].device == "board"
    out = capfd.readouterr().out
    assert "predicted: 1.500 ms (95 %: 1.304 to 1.696) at batch 4; 100 %" in out and "stem" in out
    assert run(*words.split(), "--json") == 0
    assert json.loads(capfd.readouterr().out) == {"device": "board", **api.outcome.to_json()}
