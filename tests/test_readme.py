"""The README's autocomp commands and its example of serving, run in order in one folder, with few trials."""

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from autocomp.cli import main
from tests import tiny
from tests.data.checks import MEAN, STD

FEW = ["--trials", "14", "--baseline-trials", "0", "--finalists", "1", "--calibration-images", "128"]
FEW += ["--search-images", "100", "--selection-images", "100", "--finetune-epochs", "0"]
FEW += ["--engine", "simulated"]
"""A busy machine may reach no 0.5x, and later lines need the run in runs/half. The real engine has tests of its own."""
TINY = ["--model", "tests.tiny:model", "--data", "npz:tiny.npz"]
"""In place of the default job's and of CIFAR's, of which every line would take half a minute."""


def commands(root: Path) -> list[list[str]]:
    """Every ``autocomp`` line of the README's console blocks, in order."""
    blocks = re.findall(r"```console\n(.*?)```", (root / "README.md").read_text(), re.DOTALL)
    lines = [line.removeprefix("$ ") for block in blocks for line in block.splitlines()]
    return [shlex.split(line) for line in lines if line.startswith("autocomp ")]


def tiny_npz(path: Path) -> None:
    """Noise of many colours, 32 x 32, with the classes that the tiny model gives it under the source's defaults."""
    rng = np.random.default_rng(0)
    found = {}
    for part in ("train", "test"):
        colours = rng.integers(40, 216, (600, 1, 1, 3))
        pixels = (colours + rng.integers(-40, 40, (600, 32, 32, 3))).astype(np.uint8)
        images = torch.from_numpy(((pixels / 255 - MEAN) / STD).astype(np.float32)).permute(0, 3, 1, 2)
        with torch.no_grad():
            found |= {f"x_{part}": pixels, f"y_{part}": tiny.model()(images).argmax(1).numpy()}
    np.savez(path, **found)


def serving(root: Path) -> str:
    """The README's example of ONNX Runtime on an exported folder."""
    blocks = re.findall(r"```python\n(.*?)```", (root / "README.md").read_text(), re.DOTALL)
    (example,) = (block for block in blocks if "InferenceSession" in block)
    return example


def test_serving_needs_no_autocomp(root: Path) -> None:
    code = ast.parse(serving(root))
    modules = {alias.name for node in code.body if isinstance(node, ast.Import) for alias in node.names}
    assert modules == {"json", "numpy", "onnxruntime"}
    assert not any(isinstance(node, ast.ImportFrom) for node in ast.walk(code))


def test_the_readme_shows_every_kind_of_command(root: Path) -> None:
    shown = {words[1] for words in commands(root)}
    assert {"search", "report", "apply", "measure", "spaces", "profile", "doctor"} <= shown


def test_the_readmes_commands_run(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_npz(tmp_path / "tiny.npz")
    save_file(tiny.model().state_dict(), tmp_path / "resnet20.safetensors")
    for words in commands(root):
        arguments = words[1:]
        if arguments[0] in ("search", "apply", "sparsify") or "--policy" in arguments:
            arguments += TINY  # the last of two equal flags counts
        if arguments[0] == "sensitivity":
            arguments[1] = TINY[1]
            arguments += TINY[2:]
        if arguments[0] == "search":
            arguments += FEW
        if arguments[0] == "apply":
            arguments += FEW[-2:]
        if arguments[0] == "finetune":
            arguments += ["--finalists", "1"]
        if arguments[:2] == ["profile", "build"]:
            arguments += [*TINY, "--seconds", "5"]
        with pytest.raises(SystemExit) as left:
            main(arguments)
        shown = capfd.readouterr()
        # What the simulated engine says cannot be verified; that is an answer, with a status of its own.
        # Of a hundred images one that falls to the other side is more than half a point.
        allowed = {"search": {3}, "retarget": {3}, "verify": {2}, "debug-accuracy": {0, 1}}.get(arguments[0], {0})
        if arguments[:2] == ["profile", "check"]:
            allowed = {0, 3}
        assert left.value.code in allowed, f"{shlex.join(words)}\n{shown.out}\n{shown.err}"
        assert "Traceback" not in shown.err
    served = subprocess.run(
        [sys.executable, "-c", serving(root)], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert re.fullmatch(r"\[\d\]\n", served.stdout)
