"""Commands on a finished run: retarget, verify, finetune, export; and sparsify."""

import json
from pathlib import Path

import pytest

from autocomp.config import SearchConfig
from autocomp.study.shipped import ShippedVerification
from tests.cli.fake import CONTEST, ROOT, FakeApi, card, finetuned, run, sparsified, verification


def test_retarget_passes_what_differs(api: FakeApi, capfd: pytest.CaptureFixture[str]) -> None:
    assert run("retarget", "runs/x", "--engine", "openvino", "--threads", "2", "--budget", "9ms", "--out", "y") == 0
    given = {"engine": "openvino", "hardware": None, "reference": None, "threads": 2, "budget": ("9ms",)}
    assert api.calls == [("retarget", Path("runs/x"), given, Path("y"))]
    assert "best found" in capfd.readouterr().out


@pytest.mark.parametrize(("reason", "status"), [(None, 0), ("p50 0.6x is over 0.5x", 3)])
def test_verify_prints_its_verdict_and_leaves_with_it(
    api: FakeApi, capfd: pytest.CaptureFixture[str], reason: str | None, status: int
) -> None:
    api.outcome = verification(reason)
    assert run("verify", "runs/x") == status
    assert api.calls == [("verify", Path("runs/x"))]
    out = capfd.readouterr().out
    assert (reason or "Verified: within 15ms, on cpu with e 1, bounds at 95 %") in out and "ratio: 0.500" in out
    assert run("verify", "runs/x", "--json") == status
    printed = json.loads(capfd.readouterr().out)
    assert printed["verified"] is (status == 0) and printed["reason"] == reason
    documented = (ROOT / "docs" / "json.md").read_text().split("## `verify`")[1]
    assert all(f"`{name}`" in documented for name in printed)


@pytest.mark.parametrize("reason", [None, "p50 0.6x is over 0.5x"])
def test_finetune_passes_what_is_given(api: FakeApi, capfd: pytest.CaptureFixture[str], reason: str | None) -> None:
    api.outcome = finetuned(reason)
    assert run("finetune", "runs/x", "--epochs", "3", "--lr", "0.02", "--distillation", "0", "--finalists", "4") == 0
    assert api.calls == [("finetune", Path("runs/x"), {"epochs": 3, "lr": 0.02, "distillation": 0.0}, 4)]
    out = capfd.readouterr().out
    assert "80.00 % before, 82.00 % after" in out and "1.5, 0.5" in out and str(CONTEST) in out
    assert (f"the run stays as it was: {reason}" if reason else "+2.00 points (+1.00 to +3.00)") in out
    assert run("finetune", "runs/x", "--json", "--address", "auto") == 0
    assert api.calls[-1] == ("finetune", Path("runs/x"), {}, "auto")
    printed = json.loads(capfd.readouterr().out)
    assert printed["replaced"] is (reason is None) and printed["losses"] == [1.5, 0.5]
    documented = (ROOT / "docs" / "json.md").read_text().split("## `finetune`")[1].split("\n## ")[0]
    assert all(f"`{name}`" in documented for name in printed)


def test_sparsify_passes_what_is_given(api: FakeApi, capfd: pytest.CaptureFixture[str]) -> None:
    api.outcome = sparsified()
    flags = "--model m:f --data d:f --seed 3 --slimming 0.001 --epochs 2 --out w.safetensors"
    assert run("sparsify", *flags.split()) == 0
    expected = SearchConfig(model="m:f", data="d:f", seed=3)
    assert api.calls == [("sparsify", expected, {"slimming": 0.001, "epochs": 2}, Path("w.safetensors"))]
    out = capfd.readouterr().out
    assert "80.00 % before, 79.00 % after" in out and "small batch-norm factors: 0 before, 7 after, of 32" in out
    assert run("sparsify", "--soft-pruning", "0.3", "--json") == 0
    printed = json.loads(capfd.readouterr().out)
    assert printed["zero_filters"] == {"all": 16, "before": 1, "after": 5} and printed["losses"] == [1.5, 0.5]
    documented = (ROOT / "docs" / "json.md").read_text().split("## `sparsify`")[1].split("\n## ")[0]
    assert all(f"`{name}`" in documented for name in printed)


def test_export_passes_its_kinds(api: FakeApi, capfd: pytest.CaptureFixture[str]) -> None:
    api.outcome = card()
    assert run("export", "runs/x", "--to", "onnx, policy", "--out", "there") == 0
    assert api.calls == [("export", Path("runs/x"), ["onnx", "policy"], Path("there"))]
    assert capfd.readouterr().out == "there: model.onnx, card.json\n"
    assert run("export", "runs/x", "--to", "onnx,engine") == 0
    assert capfd.readouterr().out == "exported: model.onnx, card.json\nnote: no engine files\n"
    assert run("export", "runs/x", "--json") == 0
    printed = json.loads(capfd.readouterr().out)
    assert printed == {**card().to_json(), "folder": "exported"}
    documented = (ROOT / "docs" / "json.md").read_text().split("## `export`")[1].split("\n## ")[0]
    assert all(f"`{name}`" in documented for name in (*printed, *printed["data"]))


@pytest.mark.parametrize(("broken", "status"), [((), 0), (("model.onnx was changed after it was shipped",), 1)])
def test_verify_of_an_exported_folder_leaves_with_1_where_a_claim_is_untrue(
    api: FakeApi, folder: Path, capfd: pytest.CaptureFixture[str], broken: tuple[str, ...], status: int
) -> None:
    (folder / "shipped").mkdir()
    (folder / "shipped" / "card.json").touch()
    seen = (verification().device, verification().verdict, 0.9) if not broken else ()
    api.outcome = ShippedVerification(Path("shipped"), card(), broken, *seen)
    assert run("verify", "shipped", "--data", "npz:x.npz") == status
    assert api.calls == [("verify_shipped", Path("shipped"), "npz:x.npz")]
    out = capfd.readouterr().out
    assert f"no longer true: {broken[0]}" in out if broken else "all that the card claims holds" in out
    assert run("verify", "shipped", "--json") == status
    printed = json.loads(capfd.readouterr().out)
    assert printed["holds"] is (status == 0) and printed["broken"] == list(broken)
    documented = (ROOT / "docs" / "json.md").read_text().split("Of an exported folder")[1].split("\n## ")[0]
    assert all(f"`{name}`" in documented for name in printed)
    assert run("verify", "runs/x", "--data", "digits") == 2
    assert "a run is verified without data" in capfd.readouterr().err
