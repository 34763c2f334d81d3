"""Bad input to a search: one line, no traceback, no folder."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import autocomp
from autocomp.api import Interrupted
from autocomp.cli import main
from autocomp.engines.simulated import SimulatedBackend
from autocomp.errors import EngineError, InputError
from autocomp.study.run import Run


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "zoo:resnet99"], "resnet99"),
        (["--data", "npz:missing.npz"], "missing.npz"),
        (["--space", "nowhere"], "nowhere"),
        (["--engine", "warp"], "warp"),
        (["--metric", "nowhere:f"], "nowhere"),
        (["--budget", "fast"], "fast"),
        (["--budget", "2x"], "0.5x"),
        (["--controller", "oracle"], "oracle"),
        (["--ranges", "loud"], "loud"),
        (["--executor", "cloud"], "cloud"),
        (["--finetune-epochs", "-1"], "finetune-epochs"),
        (["--executor", "ray", "--address", "127.0.0.1:9"], "no Ray cluster answers at 127.0.0.1:9"),
        (["--workers", "4"], "--executor ray"),
        (["--model", "zoo:resnet8"], "weights"),
        (["--data", "random:3x7"], "random:"),
        (["--hardware", "simulated-phone"], "simulated"),
        (["--weights", "pickled.pt"], "pickled.pt"),
        (["--weights", "other.safetensors"], "conv1.weight"),
        (["--config", "bad.toml"], "modle"),
        (["--space", "bad_space.toml"], "chanels"),
        (["--model", "mine:tuple_output"], "logits"),
        (["--model", "mine:guessing"], "chance"),
    ],
)
def test_bad_input_is_one_clear_line_and_leaves_no_folder(
    tmp_path: Path,
    arguments: list[str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    save_file({"wrong.weight": np.zeros(3, np.float32)}, tmp_path / "other.safetensors")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "pickled.pt")
    (tmp_path / "bad.toml").write_text('modle = "zoo:resnet20"\n')
    (tmp_path / "bad_space.toml").write_text("[chanels]\nkept = [1.0]\n")
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "class Pair(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.conv = torch.nn.Conv2d(3, 10, 3)\n"
        "    def forward(self, x):\n"
        "        y = self.conv(x).mean((2, 3))\n"
        "        return y, y\n"
        "def tuple_output():\n"
        "    return Pair()\n"
        "def guessing():\n"
        "    torch.manual_seed(0)\n"
        "    return torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),\n"
        "                               torch.nn.Flatten(), torch.nn.Linear(16, 10))\n"
    )
    budget = [] if "--budget" in arguments else ["--budget", "15ms"]
    with pytest.raises(SystemExit) as left:
        main(["search", *budget, *arguments, "--out", "run"])
    error = capsys.readouterr().err
    assert left.value.code == 2, error
    assert "Traceback" not in error and words in error
    message = [line for line in error.splitlines() if line.startswith("autocomp:")]
    assert len(message) == 1
    assert not (tmp_path / "run").exists()


class Small(nn.Module):
    """Two classes, told apart by the sign of the mean pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 2)
        with torch.no_grad():
            self.conv.weight.fill_(1.0)
            self.head.weight.copy_(torch.tensor([[-1.0], [1.0]]).expand(2, 8))
            for bias in (self.conv.bias, self.head.bias):
                bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.conv(x).mean((2, 3)))
        return logits


def dataset(loud: float = 1.0, count: int = 300) -> TensorDataset:
    """Images of `Small`; one in ten has pixels so many times as large."""
    labels = torch.arange(count) % 2
    images = torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(count))
    images *= (2 * labels - 1)[:, None, None, None]
    images[::10] *= loud
    return TensorDataset(images, labels)


def refused(out: Path, data: tuple[TensorDataset, ...], words: str, **settings: Any) -> None:
    """Refused by name in one line, as the user's fault, and without a folder."""
    given = {"budget": "0.9x", "engine": "simulated", "calibration_images": 100, **settings}
    with pytest.raises(InputError, match=words) as caught:
        autocomp.search(Small(), data, out=out, search_images=64, selection_images=64, **given)
    assert "\n" not in str(caught.value) and not out.exists()


def test_activations_that_overflow_are_bad_input(tmp_path: Path) -> None:
    refused(tmp_path / "run", (dataset(1e38), dataset()), "the output of conv is NaN or infinite")
    refused(tmp_path / "run", (dataset(), dataset(1e38), dataset()), "cannot be scored.*NaN or infinite")


def test_a_metric_that_fails_on_the_uncompressed_model_is_bad_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"metric_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(
        "def f(outputs, reference, labels):\n    return 1 / (len(labels) - len(outputs))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    words = f"{name}:f cannot score the uncompressed model: the metric raised ZeroDivisionError"
    refused(tmp_path / "run", (dataset(), dataset()), words, metric=f"{name}:f")


def test_globs_without_a_match_and_models_larger_than_memory_are_bad_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = (dataset(), dataset())
    refused(tmp_path / "run", data, "exclude: no layer of this model matches 'convs': .*conv, ", exclude="convs")
    monkeypatch.setattr("autocomp.memory.available_bytes", lambda: 50_000)
    refused(tmp_path / "run", data, r"live:Small needs about .* MB of memory .*second moments.*, but 0\.05 MB are free")


def test_an_engine_that_refuses_the_uncompressed_model_is_bad_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(*_: object) -> None:
        raise EngineError("there is no such operator")

    monkeypatch.setattr(SimulatedBackend, "build", build)
    refused(tmp_path / "run", (dataset(), dataset()), "fails on the uncompressed model: there is no such operator")


@pytest.mark.parametrize(("budget", "words"), [(None, "no budget"), (15, "must be a text"), ((15,), "must be a text")])
def test_a_budget_that_is_no_text_is_bad_input(tmp_path: Path, budget: object, words: str) -> None:
    refused(tmp_path / "run", (dataset(), dataset()), words, budget=budget)


def test_an_interrupt_of_live_objects_does_not_promise_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(bench: object, prologue: object, run: Run, *_: object) -> None:
        raise Interrupted(run.folder)

    monkeypatch.setattr("autocomp.api.searching.conduct", stopped)
    with pytest.raises(Interrupted) as caught:
        autocomp.search(
            Small(), (dataset(), dataset()), "0.9x", engine="simulated", out=tmp_path / "run", calibration_images=100,
            search_images=64, selection_images=64,
        )  # fmt: skip
    assert "autocomp resume" not in str(caught.value) and str(tmp_path / "run") in str(caught.value)
