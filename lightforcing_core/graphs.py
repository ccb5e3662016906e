"""Recording launches as CUDA graphs, whichever allocator torch has.

With cudaMallocAsync, which ComfyUI takes where it can, what is allocated while a graph is recorded
belongs to that graph: nothing of it may be kept, so what a recording leaves is made before, and
Triton must take an address on trust (`kernels.launch`), which old versions do not. And torch takes
whatever any thread allocates or frees meanwhile for recorded, so threads that use a GPU beside one
that records take turns with it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import threading
from collections.abc import Iterator
from traceback import clear_frames

import torch

_turn = threading.Lock()  # of the process, as the allocator is


def graphs_obstacle(device: torch.device) -> str:
    """Why a GPU's launches cannot be recorded; empty if they can, or if it is no GPU."""
    if not is_asynchronous(device) or importlib.util.find_spec("triton") is None:
        return ""
    from ..kernels.launch import takes_addresses

    if takes_addresses():
        return ""
    return (
        "with the allocator cudaMallocAsync CUDA graphs need Triton 3.6 or newer; in ComfyUI, "
        "--disable-cuda-malloc chooses the other one"
    )


def beside_recordings(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """For a thread that uses a device while another one may record: wait for it, and have it wait.

    Nothing where torch's own allocator is used, which tells such threads apart.
    """
    return _turn if is_asynchronous(device) else contextlib.nullcontext()


def is_asynchronous(device: torch.device) -> bool:
    """Whether torch's allocator is cudaMallocAsync."""
    return device.type == "cuda" and torch.cuda.get_allocator_backend() == "cudaMallocAsync"


@contextlib.contextmanager
def recording(
    graph: torch.cuda.CUDAGraph,
    device: torch.device,
    pool: tuple[int, int] | None = None,
    *,
    after_run: bool,
) -> Iterator[None]:
    """Record what is launched within, without running it.

    `torch.cuda.graph` waits for the device and empties torch's cache before each recording, which
    costs a video as much as they do. Here that is done where there is something in the cache.

    Args:
        pool: of the graphs before, which share their memory; None: the first one.
        after_run: whether such launches were run since the last recording, and left their memory.

    Raises:
        RuntimeError: what was launched cannot be recorded, or there is no memory.
    """
    stream = _capture_stream(device)
    with torch.cuda.device(device), _turn:
        if pool is None or after_run:  # recordings that were forgotten left theirs too
            torch.cuda.empty_cache()
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            # Libraries keep a workspace for each stream, which must not be a graph's.
            torch.mm(*(torch.zeros(16, 16, device=device) for _ in range(2)))
            # Another thread may allocate meanwhile: a decoder, a host's own work.
            graph.capture_begin(*([pool] if pool else []), capture_error_mode="thread_local")
            try:
                yield
                graph.capture_end()
            except BaseException as error:
                # What was allocated within must not outlive it, as it would in a traceback.
                clear_frames(error.__traceback__)
                _abandon(graph, device)
                raise


def _abandon(graph: torch.cuda.CUDAGraph, device: torch.device) -> None:
    """End a recording that failed, so that torch's allocator no longer works for it."""
    try:
        graph.capture_end()
    except RuntimeError:  # CUDA has ended it; why is what the caller hears
        if not is_asynchronous(device):
            return
        # That leaves this allocator as if it went on, in which it would give nothing back for as
        # long as the process lives. It has no use for the pool's number, and refuses where nothing
        # goes on.
        with contextlib.suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), (0, 0))


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all recordings: each further one would have its own workspaces for good."""
    return torch.cuda.Stream(device)
