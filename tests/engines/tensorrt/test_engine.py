"""The engine's own logic (batches, binding, timing, closing) with host memory in place of a GPU's, and ONNX Runtime in
place of TensorRT's runtime. What a GPU does with it is tested by the conformance suite, where there is one."""

import ctypes
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from autocomp.engines import copies_of
from autocomp.engines.cuda import GpuInfo
from autocomp.engines.onnxruntime import OnnxRuntimeEngine, exact_engine
from autocomp.engines.tensorrt.engine import TensorRtEngine
from autocomp.engines.tensorrt.flavour import Flavour
from autocomp.errors import EngineError
from autocomp.policy import Policy
from autocomp.protocols import Engine
from autocomp.results import Copies
from tests.engines.conftest import Case

BATCH, STREAM, RUN_MS = 4, 7, 1.5


@dataclass
class HostCuda:
    """The `Cuda` protocol in host memory. Its clock advances by `RUN_MS` for every launch."""

    captures: bool = True
    memory: dict[int, Any] = field(default_factory=dict)
    launches: int = 0
    released: bool = False
    package: str = "host"
    info: GpuInfo = field(default=GpuInfo("host", (8, 9), "13.0", 2**30, "none"))

    def allocate(self, size_bytes: int) -> int:
        buffer = ctypes.create_string_buffer(size_bytes)
        self.memory[ctypes.addressof(buffer)] = buffer
        return ctypes.addressof(buffer)

    def free(self, address: int) -> None:
        del self.memory[address]

    def upload(self, address: int, values: NDArray[Any], stream: int) -> None:
        assert values.flags.c_contiguous and stream == STREAM
        ctypes.memmove(address, values.ctypes.data, values.nbytes)

    def download(self, values: NDArray[Any], address: int, stream: int) -> None:
        assert values.flags.c_contiguous and stream == STREAM
        ctypes.memmove(values.ctypes.data, address, values.nbytes)

    def stream(self) -> int:
        return STREAM

    def release(self, stream: int) -> None:
        assert stream == STREAM and not self.memory
        self.released = True

    def event(self) -> list[int]:
        return [0]

    def record(self, event: list[int], stream: int) -> None:
        event[0] = self.launches

    def elapsed_ms(self, begin: list[int], end: list[int]) -> float:
        return RUN_MS * (end[0] - begin[0])

    def synchronize(self, stream: int) -> None:
        assert stream == STREAM

    def capture(self, stream: int, work: Callable[[], None]) -> Callable[[], None] | None:
        return work if self.captures else None


class Mode(Enum):
    OUTPUT = 0
    INPUT = 1


class Plan:
    """A deserialized engine, and its execution context; the output comes first, as it may."""

    num_io_tensors = 2
    profiler: Any = None

    def __init__(self, executor: OnnxRuntimeEngine, shape: tuple[int, ...], cuda: HostCuda) -> None:
        self._executor, self._cuda = executor, cuda
        self._shapes = {"logits": (BATCH, 10), "input": (BATCH, *shape)}
        self._addresses: dict[str, int] = {}
        self.fails = False
        self.free = False  # whether the number of images is not set yet

    def create_execution_context(self) -> "Plan":
        return self

    def get_tensor_name(self, index: int) -> str:
        return list(self._shapes)[index]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (-1, *self._shapes[name][1:]) if self.free else self._shapes[name]

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> None:
        assert self.free and shape == self._shapes[name]
        self.free = False

    def get_tensor_mode(self, name: str) -> Mode:
        return Mode.INPUT if name == "input" else Mode.OUTPUT

    def create_engine_inspector(self) -> SimpleNamespace:
        return SimpleNamespace(get_engine_information=lambda form: f'{{"Layers": ["conv1"], "Form": "{form}"}}')

    def set_tensor_address(self, name: str, address: int) -> None:
        self._addresses[name] = address

    def execute_async_v3(self, stream: int) -> bool:
        images = np.zeros(self._shapes["input"], np.float32)
        self._cuda.download(images, self._addresses["input"], stream)
        self._cuda.upload(self._addresses["logits"], self._executor.run(images), stream)
        self._cuda.launches += 1
        if self.profiler is not None:
            for name, ms in {"conv1": 1.0, "layer1": self._cuda.launches % 2}.items():
                self.profiler.report_layer_time(name, float(ms))
        return not self.fails


@pytest.fixture(params=[True, False], ids=["graph", "launches"])
def parts(request: pytest.FixtureRequest, resnet8: Case, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    cuda = HostCuda(request.param)
    with exact_engine(resnet8.emit(Policy()), BATCH) as executor:
        plan = Plan(executor, resnet8.net.input_shape, cuda)
        runtime = SimpleNamespace(deserialize_cuda_engine=lambda data: plan if data == b"plan" else None)

        class Logger:
            INTERNAL_ERROR, ERROR = "internal", "error"

        class Profiler: ...

        module = SimpleNamespace(
            ILogger=Logger, IProfiler=Profiler, LayerInformationFormat=SimpleNamespace(JSON="json"), TensorIOMode=Mode,
            Runtime=lambda logger: runtime, __spec__=None,
        )  # fmt: skip
        monkeypatch.setitem(sys.modules, "stand_in_runtime", module)  # type: ignore[arg-type]
        yield Flavour("tensorrt", "stand_in_runtime", "10.9"), plan, cuda


@pytest.mark.parametrize("count", [0, 1, BATCH, 2 * BATCH - 1])
def test_any_number_of_images_in_batches(parts: Any, resnet8: Case, count: int) -> None:
    flavour, _, cuda = parts
    with TensorRtEngine(flavour, b"plan", cuda, BATCH) as engine:
        assert isinstance(engine, Engine)
        result = engine.run(resnet8.images[:count])
        with pytest.raises(EngineError, match=r"shape \(3, 8, 8\), not \(3, 8, 9\)"):
            engine.run(np.zeros((2, 3, 8, 9), np.float32))
    assert result.shape == (count, 10) and result.dtype == np.float32
    np.testing.assert_allclose(result, resnet8.expected(Policy())[:count], rtol=1e-3, atol=1e-4)


def test_a_free_number_of_images_is_set_before_memory_is_taken(parts: Any, resnet8: Case) -> None:
    flavour, plan, cuda = parts
    plan.free = True
    with TensorRtEngine(flavour, b"plan", cuda, BATCH) as engine:
        result = engine.run(resnet8.images)
    np.testing.assert_allclose(result, resnet8.expected(Policy()), rtol=1e-3, atol=1e-4)


def test_times_are_of_single_launches_and_memory_is_given_back(parts: Any, resnet8: Case) -> None:
    flavour, _, cuda = parts
    with TensorRtEngine(flavour, b"plan", cuda, BATCH) as engine:
        before = cuda.launches
        np.testing.assert_allclose(engine.time(5), RUN_MS)
        assert cuda.launches == before + 5 and len(cuda.memory) == 2
    assert not cuda.memory and cuda.released
    with pytest.raises(EngineError, match="closed"):
        engine.run(resnet8.images)


def test_layers_are_timed_launch_by_launch_and_the_inspector_is_asked_for_json(parts: Any) -> None:
    flavour, _, cuda = parts
    with TensorRtEngine(flavour, b"plan", cuda, BATCH) as engine:
        layers, run_ms = engine.profile(3)
        assert layers.keys() == {"conv1", "layer1"} and layers["conv1"] == 1.0 and run_ms == RUN_MS
        assert json.loads(engine.inspect()) == {"Layers": ["conv1"], "Form": "json"}


def test_copies_are_told_apart(parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    flavour, _, cuda = parts

    def taking(launches: int, move: Callable[..., None]) -> Callable[..., None]:
        def moved(*given: Any) -> None:
            move(*given)
            cuda.launches += launches

        return moved

    with TensorRtEngine(flavour, b"plan", cuda, BATCH) as engine:
        monkeypatch.setattr(cuda, "upload", taking(3, cuda.upload))
        monkeypatch.setattr(cuda, "download", taking(2, cuda.download))
        found = copies_of(engine)
    assert found == Copies(to_device_ms=3 * RUN_MS, from_device_ms=2 * RUN_MS)


def test_a_run_that_fails_is_an_error(parts: Any, resnet8: Case) -> None:
    flavour, plan, cuda = parts
    with TensorRtEngine(flavour, b"plan", cuda, BATCH) as engine:
        plan.fails = True
        with pytest.raises(EngineError, match="TensorRT failed while running"):
            engine.run(resnet8.images)


def test_the_names_in_use_are_those_of_the_package() -> None:
    """What stands in for the runtime here, and the rest of what an engine asks it for."""
    real = pytest.importorskip("tensorrt_rtx_bindings", reason="not installed: pip install 'autocomp[tensorrt-rtx]'")
    asked = {name for name in vars(Plan) if not name.startswith("_")}
    known = {*dir(real.ICudaEngine), *dir(real.IExecutionContext)}
    assert asked <= known and {"create_engine_inspector", "profiler"} <= known
    assert hasattr(real.Runtime, "deserialize_cuda_engine") and hasattr(real.TensorIOMode, "INPUT")
    assert hasattr(real.EngineInspector, "get_engine_information") and hasattr(real.LayerInformationFormat, "JSON")
    assert hasattr(real.IProfiler, "report_layer_time") and hasattr(real.ProfilingVerbosity, "DETAILED")


def test_a_plan_that_is_refused_is_an_error(parts: Any) -> None:
    flavour, _, cuda = parts
    with pytest.raises(EngineError, match="tensorrt cannot load the engine"):
        TensorRtEngine(flavour, b"other", cuda, BATCH)
