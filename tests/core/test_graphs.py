"""Who takes turns with a recording, and what a recorded launch is given."""

from __future__ import annotations

import importlib
import threading
import weakref
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightforcing.lightforcing_core import graphs
from lightforcing.lightforcing_core.graphs import beside_recordings, graphs_obstacle

triton = pytest.importorskip("triton")
launch = importlib.import_module("lightforcing.kernels.launch")
CUDA = torch.device("cuda")


@pytest.mark.parametrize(
    ("device", "backend", "waits"),
    [
        (CUDA, "cudaMallocAsync", True),
        (CUDA, "native", False),
        (torch.device("cpu"), "cudaMallocAsync", False),
    ],
)
def test_threads_take_turns_where_the_allocator_cannot_tell_them_apart(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, backend: str, waits: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: backend)
    has_entered = threading.Event()

    def other() -> None:
        with beside_recordings(device):
            has_entered.set()

    thread = threading.Thread(target=other)
    with beside_recordings(device):
        thread.start()
        assert has_entered.wait(0.2) != waits
    thread.join(5)
    assert has_entered.is_set()


@pytest.mark.parametrize(
    ("backend", "version", "can"),
    [
        ("native", "3.3.1", True),
        ("cudaMallocAsync", "3.3.1", False),
        ("cudaMallocAsync", "3.6.0", True),
        ("cudaMallocAsync", "4.0.0+git", True),
    ],
)
def test_an_old_triton_cannot_record_with_the_other_allocator(
    monkeypatch: pytest.MonkeyPatch, backend: str, version: str, can: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: backend)
    monkeypatch.setattr(triton, "__version__", version)
    assert (graphs_obstacle(CUDA) == "") == can
    assert can or "--disable-cuda-malloc" in graphs_obstacle(CUDA)
    assert graphs_obstacle(torch.device("cpu")) == ""


class Graph:
    """Ends as told: whole, or ended by CUDA before."""

    def __init__(self, calls: list[str], *, is_lost: bool = False) -> None:
        self.calls, self.is_lost = calls, is_lost

    def capture_begin(self, *pool: Any, capture_error_mode: str) -> None:
        assert capture_error_mode == "thread_local"
        self.calls.append(f"begin {pool}")

    def capture_end(self) -> None:
        self.calls.append("end")
        if self.is_lost:
            raise RuntimeError("the recording was lost")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a recording does; the CPU stands in for a device with cudaMallocAsync."""
    made: list[str] = []
    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(graphs, "_capture_stream", lambda device: stream)
    monkeypatch.setattr(graphs, "is_asynchronous", lambda device: True)
    for name in ("device", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda given: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: made.append("empty"))
    restore = lambda device, pool: made.append("restore")  # noqa: E731
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", restore, raising=False)
    return made


@pytest.mark.parametrize(
    ("pool", "after_run", "empties"),
    [(None, False, True), ((0, 7), False, False), ((0, 7), True, True)],
)
def test_the_cache_is_emptied_where_there_is_something_in_it(
    calls: list[str], pool: tuple[int, int] | None, after_run: bool, empties: bool
) -> None:
    with graphs.recording(Graph(calls), torch.device("cpu"), pool, after_run=after_run):
        assert graphs._turn.locked()
        calls.append("run")
    given = (pool,) if pool else ()
    assert calls == ["empty"] * empties + [f"begin {given}", "run", "end"]
    assert not graphs._turn.locked()


@pytest.mark.parametrize("is_lost", [False, True])
def test_a_recording_that_fails_leaves_nothing(calls: list[str], is_lost: bool) -> None:
    """Neither the lock, nor what it made, nor an allocator that works for it."""
    left: list[weakref.ref[torch.Tensor]] = []

    def run() -> None:
        x = torch.zeros(3)
        left.append(weakref.ref(x))
        raise RuntimeError("something waits for the device")

    graph = Graph(calls, is_lost=is_lost)
    with (
        pytest.raises(RuntimeError, match="something waits") as raised,
        graphs.recording(graph, torch.device("cpu"), after_run=False),
    ):
        run()
    assert calls[2:] == (["end", "restore"] if is_lost else ["end"])
    assert not graphs._turn.locked()
    assert raised.value.__traceback__ is not None and left[0]() is None


def test_a_recording_that_cannot_begin_ends_no_other(
    calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With that allocator a process can record one thing at a time."""

    def refuse(self: Graph, *_: Any, **__: Any) -> None:
        raise RuntimeError("only one at a time")

    monkeypatch.setattr(Graph, "capture_begin", refuse)
    with (
        pytest.raises(RuntimeError, match="one at a time"),
        graphs.recording(Graph(calls), torch.device("cpu"), after_run=False),
    ):
        raise AssertionError("nothing runs within")
    assert calls == ["empty"] and not graphs._turn.locked()


def test_a_recording_that_cuda_ended_is_an_error(calls: list[str]) -> None:
    graph = Graph(calls, is_lost=True)
    with (
        pytest.raises(RuntimeError, match="was lost"),
        graphs.recording(graph, torch.device("cpu"), after_run=False),
    ):
        pass
    assert calls[-1] == "restore" and not graphs._turn.locked()


class Kernel:
    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda **arguments: setattr(self, "given", arguments)


@pytest.mark.parametrize("is_recorded", [False, True])
@pytest.mark.parametrize("backend", ["native", "cudaMallocAsync"])
@pytest.mark.parametrize("version", ["3.5.1", triton.__version__])
def test_recorded_launches_are_given_addresses(
    monkeypatch: pytest.MonkeyPatch, version: str, backend: str, is_recorded: bool
) -> None:
    """What a graph allocates, Triton may not ask the driver about before the graph runs."""
    monkeypatch.setattr(launch, "is_interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: is_recorded)
    monkeypatch.setattr(triton, "__version__", version)
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: backend)
    are_given = is_recorded and version != "3.5.1" and backend == "cudaMallocAsync"
    x, kernel = torch.zeros(6, dtype=torch.bfloat16)[2:], Kernel()
    launch.Launch(kernel, (1,), {"x": x, "none": None, "length": 4}, {"num_warps": 4}).run()
    assert kernel.given["length"] == 4 and kernel.given["none"] is None
    given = kernel.given["x"]
    assert isinstance(given, int) == are_given
    assert given.data_ptr() == x.data_ptr() and given.dtype == torch.bfloat16
    if are_given:
        assert given == x.data_ptr()
        specialise = importlib.import_module("triton._C.libtriton").native_specialize_impl
        compiler = importlib.import_module("triton.backends.nvidia.compiler").CUDABackend
        # Compiled for the same types and alignment, or each kernel would be compiled twice.
        assert specialise(compiler, given, False, True, True) == specialise(
            compiler, x, False, True, True
        )
