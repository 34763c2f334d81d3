"""A folder of one's own, the stand-in for `autocomp.api`, and a profile."""

import sys
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from types import ModuleType

import pytest

import autocomp
from autocomp.hardware import EngineTime, HardwareProfile, Kernel, KernelTime
from tests.cli.fake import FakeApi


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeApi]:
    fake = FakeApi()
    module = ModuleType("autocomp.api")
    for name in vars(FakeApi):
        if not name.startswith("_") and callable(getattr(fake, name)):
            setattr(module, name, getattr(fake, name))
    monkeypatch.setitem(sys.modules, "autocomp.api", module)
    monkeypatch.setattr(autocomp, "api", module, raising=False)
    yield fake


@pytest.fixture
def board(folder: Path) -> HardwareProfile:
    """A measured profile in the working directory, of a device that no machine here is."""
    kernels = [
        KernelTime(Kernel("conv", 16, out, (3, 3), (1, 1), 1, (8, 8), 4, precision, context), 0.01 * out, 0.0, count)
        for out in (16, 32, 48, 64, 96, 128)
        for precision, context, count in (("fp32", "f conv2d", 1), ("int8", "q conv2d.q", 2), ("int8", "q conv2d", 1))
    ]
    engines = (
        EngineTime("zoo:resnet8", 4, 10, 1.0, 1.1, "random:3x16x16x10"),
        EngineTime("object:Net", 1, 9, 1.0, 1.0),
    )
    day = date(2026, 1, 31)
    profile = HardwareProfile("board", "tvm 1", 2, day, True, "cpu: Z80", kernels=tuple(kernels), engines=engines)
    profile.save(folder / "hardware_profiles")
    return profile
