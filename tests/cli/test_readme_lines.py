"""Every command of the README parses, and reaches the API."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from autocomp.engines import BackendSpec, make_backend
from autocomp.hardware import HardwareProfile, Prediction
from autocomp.policy import Policy
from autocomp.results import Score
from autocomp.study.build_profile import Built
from autocomp.study.debug import AccuracyGap
from autocomp.study.profiles import Checked, PolicyLatency, Standing
from tests.cli.fake import ROOT, FakeApi, card, estimate, finetuned, run, sensitivity, sparsified, verification


def readme_commands() -> list[str]:
    blocks = re.findall(r"```console\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = [line.removeprefix("$ ") for block in blocks for line in block.splitlines() if line.startswith("$ ")]
    return [line for line in lines if line.startswith("autocomp ")]


def test_readme_has_commands() -> None:
    assert {shlex.split(line)[1] for line in readme_commands()} >= {
        "search",
        "report",
        "apply",
        "measure",
        "sensitivity",
        "spaces",
    }


@pytest.mark.parametrize("line", readme_commands())
def test_commands_of_the_readme_parse(api: FakeApi, board: HardwareProfile, folder: Path, line: str) -> None:
    (folder / "runs" / "half").mkdir(parents=True)
    if " measure " in line:
        api.outcome = estimate(0.5)
    if " verify " in line:
        api.outcome = verification()
    if " finetune " in line:
        api.outcome = finetuned()
    if " debug-accuracy " in line:
        api.outcome = AccuracyGap({"engine": "e 1"}, Score(0.0, 0.9, 10, 1.0), Score(0.1, 0.9, 10, 0.9), 0.0)
    if " sparsify " in line:
        api.outcome = sparsified()
    if " export " in line:
        api.outcome = card()
    if " sensitivity" in line:
        api.outcome = sensitivity()
    if " profile " in line:
        own = replace(board, device=make_backend(BackendSpec()).device.name)
        own.save(folder / "hardware_profiles")
        (folder / "runs" / "half" / "policy.json").write_text(json.dumps(Policy().to_json()))
        api.outcome = Built(board, Path("x"), 7, 0, 5, 9.0)
        if "profile check" in line:
            api.outcome = Checked(Standing("measured"), (), "")
        if "--policy" in line:
            api.outcome = PolicyLatency(Prediction(1.5, 0.1, 1.0), 4, {}, 0.5)
    assert run(*shlex.split(line)[1:]) == 0
