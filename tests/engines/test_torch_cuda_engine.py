"""The engine of torch-cuda with a processor in place of the GPU: streams and events that do nothing but count, and a
graph that repeats the operators it saw, into the same memory. What a GPU does with it is tested by the conformance
suite, where there is one."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from autocomp.engines import BackendSpec, by_graph_value, copies_of, make_backend
from autocomp.engines.cuda import GpuInfo
from autocomp.engines.torch_cuda import backend as room
from autocomp.errors import EngineError
from autocomp.policy import FP32, Policy, Precision
from autocomp.protocols import Backend, Engine
from tests.engines.conftest import Case
from tests.engines.tensorrt.test_engine import HostCuda

GPU = GpuInfo("NVIDIA H200", (9, 0), "13.0", 140 * 2**30, "0000:01:00.0")
BATCH = 4


class Graph:
    """Operators with the tensors they read and wrote."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, Any, Any, Any]] = []

    def replay(self) -> None:
        Clock.now += 1.5
        for operator, given, named, found in self.seen:
            again = operator(*given, **named)
            if isinstance(found, Tensor) and found.data_ptr() != again.data_ptr():
                found.copy_(again)


class Capture(TorchDispatchMode):
    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self._graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self._graph.seen.append((func, args, kwargs or {}, found))
        return found


class Clock:
    now = 0.0


class Event:
    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing
        self._at = float("nan")

    def record(self, stream: "Stream") -> None:
        Clock.now += 0.25
        self._at = Clock.now

    def elapsed_time(self, end: "Event") -> float:
        return end._at - self._at


class Stream:
    def synchronize(self) -> None: ...


@contextmanager
def capturing(graph: Graph, stream: Stream) -> Iterator[None]:
    with Capture(graph):
        yield


@pytest.fixture(params=["torch-cuda", "torch-cuda-compiled"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend:
    monkeypatch.setattr(room, "_DEVICE", "cpu")
    monkeypatch.setattr(room, "open_cuda", lambda: HostCuda(info=GPU))
    parts = {"is_available": lambda: True, "Stream": Stream, "Event": Event, "CUDAGraph": Graph, "graph": capturing}
    nothing = {"synchronize": lambda: None, "empty_cache": lambda: None, "stream": lambda stream: nullcontext()}
    for name, part in {**parts, **nothing}.items():
        monkeypatch.setattr(torch.cuda, name, part)
    monkeypatch.setattr(Tensor, "cpu", Tensor.clone)  # what comes from a device is a copy
    # What is compiled cannot be seen operator by operator; that it is asked for at all is what matters here.
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(torch, "compile", lambda module, **given: asked.append(given) or module)
    monkeypatch.setattr(Clock, "now", 0.0)
    made = make_backend(BackendSpec(request.param, BATCH))
    made.asked = asked  # type: ignore[attr-defined]
    return made


@pytest.mark.parametrize("kind", ["fp32", "fp16", "bf16"])
def test_any_number_of_images_through_one_graph(backend: Backend, resnet8: Case, kind: str) -> None:
    policy = Policy(precisions={layer.name: Precision.parse(kind) for layer in resnet8.net.graph.layers})
    backend.capabilities().validate(policy)
    expected = resnet8.expected(Policy())
    with backend.build(resnet8.emit(policy)) as engine:
        assert isinstance(engine, Engine)
        for count in (0, 1, BATCH, 2 * BATCH - 1):
            found = engine.run(resnet8.images[:count])
            assert found.shape == (count, 10) and found.dtype == np.float32
            assert np.linalg.norm(found - expected[:count]) <= 0.03 * np.linalg.norm(expected)
        with pytest.raises(EngineError, match="reads images of shape"):
            engine.run(np.zeros((2, 3, 8, 9), np.float32))
    assert len(backend.asked) == (backend.name == "torch-cuda-compiled")  # type: ignore[attr-defined]


def test_times_copies_and_operators_are_the_events(backend: Backend, resnet8: Case) -> None:
    onnx = resnet8.emit(Policy())
    with backend.build(onnx) as engine:
        np.testing.assert_allclose(engine.time(3), 1.75)  # a replay, and the event behind it
        found = copies_of(engine)
        assert found is not None and (found.to_device_ms, found.from_device_ms) == (0.25, 0.25)
        engine.run(resnet8.images)  # the images that are timed leave nothing behind
    for work in (lambda: engine.time(1), lambda: engine.run(resnet8.images), lambda: copies_of(engine)):
        with pytest.raises(EngineError, match="closed"):
            work()
    times = backend.profile(onnx, repeats=2)
    assert set(times.by_value.values()) == {0.25} and times.run_ms == pytest.approx(sum(times.by_value.values()))
    assert by_graph_value(onnx, times.by_value, resnet8.template.values)
    assert backend.device.name == "nvidia-h200" and dict(backend.device.details)["compute_capability"] == "9.0"


def test_errors_of_torch_are_told_with_a_remedy(
    backend: Backend, resnet8: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: Any, **named: Any) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(room.OnnxModule, "to", full)
    with pytest.raises(EngineError, match="out of GPU memory: give a smaller --batch"):
        backend.build(resnet8.emit(Policy()))
    assert FP32 in backend.capabilities().precisions
