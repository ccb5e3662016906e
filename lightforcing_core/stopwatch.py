"""Time spent in parts of a chunk, without making the device wait."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import torch


class Stopwatch:
    """Sums time by name: wall time on the CPU, device time between events on CUDA.

    Events are only recorded while the work goes on; they are read by `take`, which the caller
    calls when it has waited for the device anyway.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def span(self, name: str) -> Iterator[None]:
        if self._device.type != "cuda":
            started = time.perf_counter()
            yield
            self._add(name, time.perf_counter() - started)
            return
        stream = torch.cuda.current_stream(self._device)
        started_event, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        started_event.record(stream)
        yield
        ended.record(stream)
        self._events.append((name, started_event, ended))

    def close(self) -> Callable[[], dict[str, float]]:
        """Forget the spans so far; what is returned reads them, and waits for those not over."""
        seconds, events = self._seconds, self._events
        self._seconds, self._events = {}, []

        def read() -> dict[str, float]:
            for name, started, ended in events:
                ended.synchronize()
                seconds[name] = seconds.get(name, 0.0) + started.elapsed_time(ended) / 1000
            events.clear()
            return seconds

        return read

    def take(self) -> dict[str, float]:
        """Seconds by name since the last time; waits for spans that are not over."""
        return self.close()()

    def _add(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds
