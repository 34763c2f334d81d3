"""Models are compared with their published parameter counts, torchvision's own, and plain torch."""

import copy
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from autocomp.data import DataOptions, load_data
from autocomp.errors import DataError, ModelError
from autocomp.factory import call_factory, is_factory
from autocomp.models import ZOO, build_zoo, check_logits, load_model, wrap_model


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    text = str(error.value)
    assert text and "\n" not in text
    return text


# Table 6 of He et al. gives 0.27, 0.46, 0.66, 0.85 and 1.7 million parameters for ResNet-20, 32, 44, 56 and 110.
@pytest.mark.parametrize(
    ("name", "millions"),
    [("resnet20", 0.27), ("resnet32", 0.46), ("resnet44", 0.66), ("resnet56", 0.85), ("resnet110", 1.7)],
)
def test_zoo_has_the_published_sizes(name: str, millions: float) -> None:
    parameters = sum(value.numel() for value in build_zoo(name, 10).parameters())
    assert parameters / 1e6 == pytest.approx(millions, rel=0.03)


def test_zoo_block_matches_the_paper_step_by_step() -> None:
    block = build_zoo("resnet8", 10).layer2[0].eval()
    with torch.no_grad():
        for norm in (block.bn1, block.bn2):
            norm.running_mean.uniform_(-1, 1)
            norm.running_var.uniform_(0.5, 2)
        x = torch.randn(2, 16, 8, 8)

        def norm_by_hand(y: torch.Tensor, norm: nn.BatchNorm2d) -> torch.Tensor:
            scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
            return (y - norm.running_mean[:, None, None]) * scale[:, None, None] + norm.bias[:, None, None]

        y = norm_by_hand(F.conv2d(x, block.conv1.weight, stride=2, padding=1), block.bn1).clamp(min=0)
        y = norm_by_hand(F.conv2d(y, block.conv2.weight, padding=1), block.bn2)
        shortcut = torch.zeros(2, 32, 4, 4)
        shortcut[:, 8:24] = x[:, :, 0::2, 0::2]
        assert torch.allclose(block(x), (y + shortcut).clamp(min=0), atol=1e-5)


@pytest.mark.parametrize("name", ZOO)
def test_zoo_returns_logits(name: str) -> None:
    check_logits(load_model(f"zoo:{name}", None, 7, embedded=False), (3, 32, 32))


def accuracy(module: nn.Module, batches: object) -> float:
    right = total = 0
    with torch.inference_mode():
        for images, labels in batches:  # type: ignore[attr-defined]
            right += int((module(torch.from_numpy(images)).argmax(1).numpy() == labels).sum())
            total += len(labels)
    return right / total


def test_embedded_weights_know_the_digits(root: Path) -> None:
    data = load_data("digits", DataOptions())
    model = load_model("zoo:resnet20", None, 10, embedded=True)
    assert (model.weights, model.classes) == ("embedded", 10)
    assert len(data.test) >= 500
    assert accuracy(model.module, data.test.batches(250)) >= 0.985
    assert (root / "autocomp" / "assets" / "resnet20_digits.safetensors").stat().st_size <= 1.2e6


def test_embedded_weights_belong_to_one_model() -> None:
    for spec, classes in (("zoo:resnet56", 10), ("zoo:resnet20", 100)):
        with pytest.raises(ModelError) as error:
            load_model(spec, None, classes, embedded=True)
        assert "--weights" in one_line(error)


def test_shared_weights_score_as_published(shared: Path, cifar10_npz: Path) -> None:
    data = load_data(f"npz:{cifar10_npz}", DataOptions())
    model = load_model("zoo:resnet20", shared / "weights" / "cifar10_resnet20.safetensors", 10, embedded=False)
    assert accuracy(model.module, data.test.batches(250)) == pytest.approx(0.9173, abs=2e-4)


def test_shared_resnet56_loads(shared: Path, cifar10_npz: Path) -> None:
    data = load_data(f"npz:{cifar10_npz}", DataOptions())
    model = load_model("zoo:resnet56", shared / "weights" / "cifar10_resnet56.safetensors", 10, embedded=False)
    images, labels = next(data.test.batches(500))
    assert accuracy(model.module, [(images, labels)]) > 0.91


def test_random_weights_are_equal_on_every_call_and_leave_the_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = load_model("zoo:resnet8", None, 10, embedded=False)
    assert torch.rand(1) == expected
    second = load_model("zoo:resnet8", None, 10, embedded=False)
    assert first.weights is None
    assert first.weights_digest == second.weights_digest
    assert not first.module.training


def test_digest_sees_a_single_bit() -> None:
    module = build_zoo("resnet8", 10)
    before = wrap_model(module, 10).weights_digest
    with torch.no_grad():
        module.linear.bias[3] = torch.nextafter(module.linear.bias[3], torch.tensor(9.0))
    assert wrap_model(module, 10).weights_digest != before


def test_torchvision_by_name() -> None:
    model = load_model("torchvision:resnet18", None, 12, embedded=False)
    assert sum(value.numel() for value in model.module.parameters()) == 11_689_512 - 513 * (1000 - 12)
    check_logits(model, (3, 64, 64))


@pytest.mark.parametrize(
    "spec", ["resnet20", "zoo:", "zoo:resnet21", "torchvision:resnet19", "hub:resnet20", "a b:c", ""]
)
def test_unknown_models_are_told_what_exists(spec: str) -> None:
    with pytest.raises(ModelError) as error:
        load_model(spec, None, 10, embedded=False)
    assert "resnet18" in one_line(error) or "resnet20" in one_line(error)


# --- weights ---------------------------------------------------------------------------------------


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return build_zoo("resnet8", 10).state_dict()


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state},
        lambda state: {f"module.{name}": value for name, value in state.items()},
        lambda state: {"state_dict": {f"module._orig_mod.{name}": value for name, value in state.items()}},
        lambda state: {name: value for name, value in state.items() if "num_batches" not in name},
    ],
)
def test_state_dicts_of_training_scripts_load(wrap, state: dict[str, torch.Tensor], tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    torch.save(wrap(state), tmp_path / "w.pt")
    model = load_model("zoo:resnet8", tmp_path / "w.pt", 10, embedded=False)
    assert model.weights == str(tmp_path / "w.pt")
    for name, value in state.items():
        assert torch.equal(model.module.state_dict()[name], value), name


def test_safetensors_and_torch_files_give_one_digest(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    torch.save(state, tmp_path / "w.pt")
    save_file(state, tmp_path / "w.safetensors")
    digests = {
        load_model("zoo:resnet8", tmp_path / name, 10, embedded=False).weights_digest
        for name in ("w.pt", "w.safetensors")
    }
    assert len(digests) == 1


def test_weights_that_do_not_fit_are_named(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    state["layer9.extra"] = torch.zeros(1)
    state["linear.weight"] = torch.zeros(100, 64)
    del state["layer1.0.conv1.weight"]
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(ModelError) as error:
        load_model("zoo:resnet8", tmp_path / "w.safetensors", 10, embedded=False)
    text = one_line(error)
    assert "missing layer1.0.conv1.weight" in text
    assert "unknown layer9.extra" in text
    assert "linear.weight (100, 64) instead of (10, 64)" in text


def test_at_most_five_names_are_listed(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    save_file({"linear.weight": state["linear.weight"]}, tmp_path / "w.safetensors")
    with pytest.raises(ModelError) as error:
        load_model("zoo:resnet8", tmp_path / "w.safetensors", 10, embedded=False)
    needed = sum("num_batches" not in name for name in state) - 1
    assert f"and {needed - 5} more" in one_line(error)


def test_nan_weights_are_refused(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    state["bn1.weight"][2] = float("nan")
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(ModelError, match=r"NaN.*bn1\.weight"):
        load_model("zoo:resnet8", tmp_path / "w.safetensors", 10, embedded=False)


def test_files_that_are_no_weights(tmp_path: Path) -> None:
    torch.save(build_zoo("resnet8", 10), tmp_path / "module.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps({"x": Path("/")}))
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"a": 1}, tmp_path / "numbers.pt")
    (tmp_path / "bad.safetensors").write_bytes(b"no header at all")
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "script.pt"))
    for name in (
        "module.pt",
        "plain.pt",
        "text.pt",
        "empty.pt",
        "list.pt",
        "numbers.pt",
        "bad.safetensors",
        "script.pt",
    ):
        with pytest.raises(ModelError) as error:
            load_model("zoo:resnet8", tmp_path / name, 10, embedded=False)
        assert name in one_line(error) and "save" in one_line(error), name
    with pytest.raises(ModelError, match="pickled module"):
        load_model("zoo:resnet8", tmp_path / "module.pt", 10, embedded=False)
    with pytest.raises(ModelError, match="no weights file"):
        load_model("zoo:resnet8", tmp_path / "absent.pt", 10, embedded=False)


def test_a_pickle_runs_no_code(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return exec, (f"open({str(tmp_path / 'fired')!r}, 'w')",)

    (tmp_path / "bomb.pt").write_bytes(pickle.dumps(Bomb()))
    torch.save({"x": Bomb()}, tmp_path / "bomb2.pt")
    for name in ("bomb.pt", "bomb2.pt"):
        with pytest.raises(ModelError):
            load_model("zoo:resnet8", tmp_path / name, 10, embedded=False)
    assert not (tmp_path / "fired").exists()


# --- the user's own --------------------------------------------------------------------------------


@pytest.fixture
def user_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "user_nets.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def make():\n    return nn.Sequential(nn.Flatten(), nn.Linear(12, 4))\n"
        "def fails():\n    raise RuntimeError('first line\\nsecond')\n"
        "def gives_text():\n    return 'net'\n"
        "class Holder:\n    make = staticmethod(make)\nvalue = 3\n"
    )
    (tmp_path / "user_broken.py").write_text("import no_such_library_anywhere\n")
    (tmp_path / "user_wrong.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", ".")])
    return tmp_path


def test_factories_are_found_in_the_working_directory(user_code: Path) -> None:
    for spec in ("user_nets:make", "user_nets:Holder.make"):
        model = load_model(spec, None, 4, embedded=False)
        assert model.weights == "factory"
        check_logits(model, (3, 2, 2))


@pytest.mark.parametrize(
    ("spec", "part"),
    [
        ("user_absent:make", "cannot import user_absent"),
        ("user_broken:make", "no_such_library_anywhere"),
        ("user_wrong:make", "ZeroDivisionError"),
        ("user_nets:absent", "has no absent"),
        ("user_nets:value", "no function"),
        ("user_nets:fails", "RuntimeError(first line)"),
        ("user_nets:gives_text", "returns a str"),
    ],
)
def test_factories_that_fail_say_why(spec: str, part: str, user_code: Path) -> None:
    with pytest.raises(ModelError) as error:
        load_model(spec, None, 4, embedded=False)
    assert part in one_line(error)


def test_factory_specs() -> None:
    assert is_factory("a.b:c") and is_factory("a:b.c")
    assert not any(map(is_factory, ("a.b", "a-b:c", "a:", ":a", "a:b c", "npz:/x/y.npz")))
    with pytest.raises(DataError, match="or write digits"):
        call_factory("no_module_of_this_name:x", DataError, "write digits")


def test_live_modules_come_back_unchanged() -> None:
    torch.manual_seed(2)
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(16, 5)).train()
    before, modes = copy.deepcopy(module.state_dict()), [part.training for part in module.modules()]
    wrapped = wrap_model(module, 5)
    check_logits(wrapped, (3, 4, 4))
    check_logits(wrap_model(module), (3, 4, 4))
    assert not wrapped.module.training
    assert (wrapped.spec, wrapped.weights) == ("live:Sequential", "live")
    assert [part.training for part in module.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    with pytest.raises(ModelError, match=r"torch\.nn\.Module"):
        wrap_model("resnet", 5)  # type: ignore[arg-type]


class _Returns(nn.Module):
    def __init__(self, function) -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> object:
        return self.function(x)


@pytest.mark.parametrize(
    ("function", "part"),
    [
        (lambda x: (x.mean((2, 3)), 1), "returns a tuple"),
        (lambda x: {"logits": x.mean((2, 3))}, "returns a dict"),
        (lambda x: x, "(2, 3, 4, 4)"),
        (lambda x: x.mean((2, 3))[:, :2], "returns 2 logits, but the data has 3"),
        (lambda x: x.mean((2, 3)).argmax(1), "torch.int64"),
        (lambda x: x.mean((2, 3)) / 0, "NaN"),
        (lambda x: x @ torch.zeros(7, 7), "fails on images of 3x4x4"),
    ],
)
def test_models_that_return_no_logits(function, part: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ModelError) as error:
        check_logits(wrap_model(_Returns(function), 3), (3, 4, 4))
    assert part in one_line(error)


def test_a_model_that_divides_by_the_contrast_of_its_image_is_no_broken_one() -> None:
    model = _Returns(lambda x: (x / x.std((1, 2, 3), keepdim=True)).mean((2, 3)))
    check_logits(wrap_model(model, 3), (3, 4, 4))


def test_the_shipped_file_holds_the_zoo_names(root: Path) -> None:
    shipped = load_file(root / "autocomp" / "assets" / "resnet20_digits.safetensors")
    wanted = {name for name in build_zoo("resnet20", 10).state_dict() if "num_batches" not in name}
    assert set(shipped) == wanted
    assert all(value.dtype == torch.float32 and np.isfinite(value.numpy()).all() for value in shipped.values())
