"""What every measurement shares: the clock, the facts of the machine, tables on disk."""

from __future__ import annotations

import csv
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

_WARM_UPS = 3
_GRAPH_CALLS = 10  # calls in one graph: a replay is long enough for the clock


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: median and the tenth and ninetieth percentile of all runs."""

    median_ms: float
    low_ms: float
    high_ms: float

    def to_dict(self) -> dict[str, float]:
        return {
            "ms": round(self.median_ms, 5),
            "ms_p10": round(self.low_ms, 5),
            "ms_p90": round(self.high_ms, 5),
        }


def time_call(call: Callable[[], object], device: torch.device, runs: int = 30) -> Timing:
    """How long a call takes on a device.

    On CUDA, ten calls are captured in a graph and its replays are timed with events: GPU time, as
    the call costs inside a captured chunk, without the host's launch overhead. On the CPU by wall
    clock.

    Args:
        call: takes nothing, uses the same tensors every time.
        device: where its work happens.
        runs: how many measurements.
    """
    for _ in range(_WARM_UPS):
        call()
    if device.type != "cuda":
        return _summary([_wall_ms(call) for _ in range(runs)])
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_GRAPH_CALLS):
            call()
    graph.replay()
    samples = []
    for _ in range(runs):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) / _GRAPH_CALLS)
    return _summary(samples)


def _wall_ms(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return (time.perf_counter() - started) * 1e3


def _summary(samples: Sequence[float]) -> Timing:
    ordered = sorted(samples)
    tenth = max(len(ordered) // 10, 0)
    return Timing(statistics.median(ordered), ordered[tenth], ordered[-1 - tenth])


def machine_facts(device: torch.device) -> dict[str, str]:
    """Device and versions, for every table."""
    facts = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
    }
    for package in ("triton", "triton-windows"):
        try:
            facts["triton"] = metadata.version(package)
        except metadata.PackageNotFoundError:
            facts.setdefault("triton", "not installed")
    if device.type == "cuda":
        facts["cuda"] = str(torch.version.cuda)
    return facts


def device_name(device: torch.device) -> str:
    """'cpu', or the name of the card."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _commit() -> str:
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return "not known"
    return done.stdout.strip()


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]], facts: Mapping[str, str]) -> None:
    """All rows with the facts in every one; columns in order of first appearance."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*names, *facts])
        writer.writeheader()
        writer.writerows({**row, **facts} for row in rows)
