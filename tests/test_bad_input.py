"""Bad input to a search: one line, no traceback, no folder."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.processes import command


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
        (["--executor", "cloud"], "cloud"),
        (["--finetune-epochs", "3"], "finetune-epochs"),
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
def test_bad_input_is_one_clear_line_and_leaves_no_folder(tmp_path: Path, arguments: list[str], words: str) -> None:
    from safetensors.numpy import save_file

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
    done = command("search", *budget, *arguments, "--out", "run", cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr and words in done.stderr
    message = [line for line in done.stderr.splitlines() if line.startswith("autocomp:")]
    assert len(message) == 1
    assert not (tmp_path / "run").exists()
