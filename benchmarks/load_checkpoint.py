"""How long loading a 1.3B checkpoint takes, and how much memory of its own.

    python benchmarks/load_checkpoint.py [--device cuda] [--layers 30] [--runs 5] [--csv FILE]

Files of the published size are made with random weights (which changes nothing about loading), read
once so that they lie in the page cache, and loaded several times; beside it every tensor is copied,
which is what a loader cannot beat when it copies at all. Loaded and plain weights are compared
first. Memory is private (anonymous) host memory, sampled every 2 ms; mapped pages are not counted.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from lightforcing.lightforcing_core.bench.common import device_name, machine_facts, write_csv
from lightforcing.lightforcing_core.checkpoints.files import read_state_dict
from lightforcing.lightforcing_core.checkpoints.load import load_model
from lightforcing.lightforcing_core.wan.config import WanConfig
from lightforcing.lightforcing_core.wan.modules import WanModel

MIB = 1 << 20
RESULTS = Path(__file__).parent / "results" / "load_checkpoint.csv"


def anonymous_bytes() -> int:
    """Private host memory of this process (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this kernel does not report RssAnon")


@contextmanager
def peak_memory() -> Iterator[Callable[[], int]]:
    """Largest growth of private memory inside the block."""
    before = peak = anonymous_bytes()
    stop = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stop.wait(0.002):
            peak = max(peak, anonymous_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield lambda: max(peak, anonymous_bytes()) - before
    finally:
        stop.set()
        thread.join()


def random_weights(config: WanConfig) -> dict[str, Tensor]:
    """bf16 weights of the published shapes."""
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in WanModel(config).named_parameters()}
    generator = torch.Generator().manual_seed(0)
    pool = (torch.randn(1 << 24, generator=generator) * 0.02).bfloat16()
    tensors = {}
    for name, shape in shapes.items():
        times = -(-shape.numel() // pool.numel())
        tensors[name] = pool.repeat(times)[: shape.numel()].reshape(shape).clone()
    return tensors


def write_files(folder: Path, weights: dict[str, Tensor]) -> dict[str, Path]:
    """The same weights as three kinds of file."""
    files = {"safetensors bf16": folder / "model.safetensors", "torch bf16": folder / "model.pt"}
    save_file(weights, files["safetensors bf16"])
    prefixed = {f"model.{name}": tensor for name, tensor in weights.items()}
    torch.save({"generator_ema": prefixed}, files["torch bf16"])
    eight_bit = dict(prefixed)
    for name, tensor in weights.items():
        if name.startswith("blocks.") and tensor.ndim == 2 and name.endswith(".weight"):
            scale = tensor.float().abs().amax(1, keepdim=True) / 448
            eight_bit[f"model.{name}"] = (tensor.float() / scale).to(torch.float8_e4m3fn)
            eight_bit[f"model.{name}_scale"] = scale
    files["LightX2V fp8"] = folder / "fp8.safetensors"
    save_file(eight_bit, files["LightX2V fp8"])
    return files


def synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def copy_all(path: Path, device: str) -> None:
    """Every tensor of a file into memory of its own."""
    tensors, _ = read_state_dict(path)
    copies = [t.to(device) if device != "cpu" else t.clone() for t in tensors.values()]
    synchronise(device)
    del copies


def load(path: Path, device: str, dtype: torch.dtype | None) -> object:
    """A finished load."""
    model = load_model(path, device=device, dtype=dtype)
    synchronise(device)
    return model


def seconds_of(work: Callable[[], object], runs: int) -> list[float]:
    """Wall time of each run."""
    seconds = []
    for _ in range(runs):
        started = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - started)
        del result
    return seconds


def peak_of_load(path: Path, device: str, dtype: torch.dtype | None) -> int:
    """Private memory that one load adds; for a process of its own, where no heap is left over."""
    if device.startswith("cuda"):
        torch.zeros(1, device=device)  # the driver's own memory is not the loader's
    with peak_memory() as grown:
        result = load(path, device, dtype)
        peak = grown()
    del result
    return peak


def main() -> None:
    """Make the files, check, measure, write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--layers",
        type=int,
        default=30,
        help="30 is the published 1.3B; "
        "with another number the width is 1664, as 1536 always means 30",
    )
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--csv", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    device = arguments.device
    published = arguments.layers == WanConfig.num_layers
    other = WanConfig(dim=1664, num_heads=13, num_layers=arguments.layers)
    weights = random_weights(WanConfig() if published else other)
    with tempfile.TemporaryDirectory() as name:
        files = write_files(Path(name), weights)
        loaded = load_model(files["torch bf16"], device=device).tree
        for key, parameter in loaded.named_parameters():
            assert torch.equal(parameter.cpu(), weights[key]), f"{key} differs"
        del loaded, weights
        rows = []
        for kind, path in files.items():
            copies = seconds_of(lambda path=path: copy_all(path, device), arguments.runs)
            for dtype in (None, torch.float16, torch.float32):
                seconds = seconds_of(
                    lambda path=path, dtype=dtype: load(path, device, dtype), arguments.runs
                )
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                    peak = pool.submit(peak_of_load, path, device, dtype).result()
                median, copy = statistics.median(seconds), statistics.median(copies)
                rows.append(
                    {
                        "file": kind,
                        "file_mib": round(path.stat().st_size / MIB),
                        "to": str(dtype).removeprefix("torch.") if dtype else "as stored",
                        "device": device,
                        "load_seconds": round(median, 3),
                        "load_min": round(min(seconds), 3),
                        "load_max": round(max(seconds), 3),
                        "copy_seconds": round(copy, 3),
                        "copy_min": round(min(copies), 3),
                        "copy_max": round(max(copies), 3),
                        "ratio": round(median / copy, 2),
                        "private_mib": round(peak / MIB),
                    }
                )
                print(rows[-1], flush=True)  # noqa: T201 (a program's output)
    place = torch.device(device)
    write_csv(arguments.csv, rows, {"machine": device_name(place), **machine_facts(place)})
    draw(arguments.csv.with_suffix(".png"), rows, device)


def draw(path: Path, rows: list[dict], device: str) -> None:
    """Bars of loading beside copying; left out, with a word, where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture: matplotlib is not installed", flush=True)  # noqa: T201
        return
    figure = Figure(figsize=(8, 0.5 * len(rows) + 1.4), layout="constrained")
    axes = figure.add_subplot()
    for place, row in enumerate(rows):
        low, high = row["load_seconds"] - row["load_min"], row["load_max"] - row["load_seconds"]
        axes.barh(place - 0.2, row["load_seconds"], 0.38, color="#2a6f97", xerr=[[low], [high]],
                  error_kw={"ecolor": "#444", "capsize": 2})  # fmt: skip
        axes.barh(place + 0.2, row["copy_seconds"], 0.38, color="#c9c9c9")
    axes.set_yticks(range(len(rows)), [f"{row['file']} to {row['to']}" for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("seconds from a warm page cache, median (whiskers: fastest and slowest run)")
    axes.set_title(f"Loading 1.3B weights to {device} (blue), copying the file's tensors (grey)",
                   fontsize=10)  # fmt: skip
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
