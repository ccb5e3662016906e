"""What ComfyUI's own classes cost: frames a second of the Chunk Sampler, and of its engine alone.

    python benchmarks/comfyui_path.py --comfyui DIRECTORY [--speeds fast fp8] [--runs 6]
        [--async-allocator] [--tiny] [--csv FILE]

in an environment that has ComfyUI's requirements and this package.

A MODEL as ComfyUI makes it, with random weights at the 1.3B shape, lying whole on the GPU; 81
frames at 832x480, growth 0.88/0.98, latents brought to the host, nothing decoded. The other way is
`rollout` over the same weights with an engine that, like the node's, makes recordings for each
video; eight-bit weights it has rounded once, where the node rounds them for each video too. Both
videos are compared first. `--async-allocator` takes cudaMallocAsync, as ComfyUI does by itself
where it can; `--tiny` is a small model, for the CPU as well, where nothing is fused.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import statistics
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightforcing.lightforcing_core.bench.case import RolloutCase, wait
from lightforcing.lightforcing_core.bench.common import device_name, machine_facts, write_csv
from lightforcing.lightforcing_core.cli.common import say
from lightforcing.lightforcing_core.fast.engine import ForwardEngine
from lightforcing.lightforcing_core.fast.linears import EIGHT_BIT_SPEEDS, with_eight_bit_linears
from lightforcing.lightforcing_core.layout import FrameSize
from lightforcing.lightforcing_core.rollout import rollout
from lightforcing.lightforcing_core.sparse_settings import SparseSettings, make_schedule
from lightforcing.lightforcing_core.verify import relative_error
from lightforcing.lightforcing_core.wan.config import WanConfig
from lightforcing.lightforcing_core.wan.forward import prepare_text
from lightforcing.lightforcing_core.wan.modules import WanModel

WARM_UPS = 2
MOST_DIFFERENCE = 0.05  # between both videos; other fusions, and recordings of other addresses
_ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF"
TINY = RolloutCase(
    FrameSize(128, 128),
    frames=33,
    config=WanConfig(dim=256, ffn_dim=512, num_heads=2, num_layers=2),
    dtype=torch.float32,
)

Video = tuple[Tensor, float]
"""Normalised latents on the host, and the seconds that its chunks took."""


class Comfy:
    """ComfyUI, and our adapter to it without the nodes, which need its server."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        sys.path.insert(0, str(folder))
        sys.argv = sys.argv[:1]  # ComfyUI reads them as its own
        if device.type == "cpu":
            importlib.import_module("comfy.cli_args").args.cpu = True
        room = types.ModuleType("lightforcing.nodes")
        room.__path__ = [str(Path(__file__).resolve().parents[1] / "nodes")]
        sys.modules["lightforcing.nodes"] = room
        adapter = "lightforcing.nodes.adapter"
        self.models = importlib.import_module("comfy.supported_models")
        self.patcher = importlib.import_module("comfy.model_patcher").ModelPatcher
        self.sampler = importlib.import_module(f"{adapter}.sampler")
        self.options = importlib.import_module(f"{adapter}.options")
        self.plain_run = importlib.import_module(f"{adapter}.watching").PlainRun
        self.version = importlib.import_module("comfyui_version").__version__


class Bench:
    """One MODEL, and the same weights in our tree."""

    def __init__(self, comfy: Comfy, case: RolloutCase, device: torch.device) -> None:
        self.comfy, self.case, self.device = comfy, case, device
        backend = {"backend": "reference"} if device.type == "cpu" else {}
        self.sparse = SparseSettings(make_schedule(0.88, base_sparsity=0.98), **backend)
        self.settings = case.settings(self.sparse)
        sizes = {name: getattr(case.config, name) for name in ("dim", "ffn_dim", "num_layers")}
        config = comfy.models.WAN21_T2V(
            {
                **sizes,
                "num_heads": case.config.num_heads,
                "image_model": "wan2.1",
                "model_type": "t2v",
                "patch_size": (1, 2, 2),
                "freq_dim": 256,
                "window_size": (-1, -1),
                "qk_norm": True,
                "cross_attn_norm": True,
                "eps": 1e-6,
                "in_dim": 16,
                "out_dim": 16,
            }
        )
        config.set_inference_dtype(case.dtype, None)
        model = config.get_model({}, "", device=device).to(device)
        torch.manual_seed(0)
        for name, parameter in model.diffusion_model.named_parameters():
            if name.endswith("bias"):
                parameter.data.zero_()
            elif "norm" in name:
                parameter.data.fill_(1)
            else:
                parameter.data.normal_(std=0.02)
        self.model = comfy.patcher(model, load_device=device, offload_device=torch.device("cpu"))
        with torch.device("meta"):
            tree = WanModel(case.config)
        tree.load_state_dict(model.diffusion_model.state_dict(), assign=True)
        self.tree = tree.requires_grad_(False)
        self.embeds = torch.randn(1, 512, 4096)

    def in_comfy(self, speed: str) -> Callable[[], Video]:
        """Videos of the Chunk Sampler."""
        comfy, case, used = self.comfy, self.case, self.model.clone()
        comfy.options.with_sparse(used, comfy.options.SparseChoice("7", self.sparse))
        sigmas = torch.tensor([*(step / 1000 for step in self.settings.steps), 0.0])
        chosen = comfy.sampler.ChunkSettings(frames_per_chunk=3, window_frames=-1, speed=speed)
        frames = self.settings.num_frames
        empty = torch.zeros(1, 16, frames, case.size.latent_height, case.size.latent_width)

        def make() -> Video:
            seconds: list[float] = []

            @contextlib.contextmanager
            def watch(info: Any) -> Iterator[Any]:
                run = comfy.plain_run(info)
                run.chunk_done = lambda chunk: seconds.append(chunk.statistics.seconds)
                yield run

            with torch.inference_mode():  # as ComfyUI runs nodes
                made = comfy.sampler.sample_chunks(
                    used,
                    [[self.embeds, {}]],
                    sigmas,
                    chosen,
                    seed=0,
                    latent_image=empty,
                    watch=watch,
                )
            return self.model.model.process_latent_in(made), sum(seconds)

        return make

    def alone(self, speed: str) -> Callable[[], Video]:
        """Videos of the core with the same engine."""
        text = prepare_text(self.tree, self.embeds.to(self.device, self.case.dtype))
        engine = None
        if speed != "plain":
            numbers = EIGHT_BIT_SPEEDS.get(speed)
            engine = ForwardEngine(
                self.tree if numbers is None else with_eight_bit_linears(self.tree, numbers)
            )

        def make() -> Video:
            noise = self.case.noise(self.device)
            chunks = list(
                rollout(self.tree, self.settings, text, noise, dtype=self.case.dtype, engine=engine)
            )
            latents = torch.cat([chunk.latents for chunk in chunks], dim=2)
            return latents.cpu(), sum(chunk.statistics.seconds for chunk in chunks)

        return make

    def row(self, speed: str, way: str, make: Callable[[], Video], runs: int) -> dict[str, Any]:
        seconds, chunks = [], []
        for run in range(WARM_UPS + runs):
            started = wait(self.device)
            _, chunk_seconds = make()
            if run >= WARM_UPS:
                seconds.append(wait(self.device) - started)
                chunks.append(chunk_seconds)
        middle = statistics.median(seconds)
        return {
            "speed": speed,
            "way": way,
            "frames": self.case.frames,
            "runs": runs,
            "seconds": round(middle, 4),
            "seconds_min": round(min(seconds), 4),
            "seconds_max": round(max(seconds), 4),
            "seconds_in_chunks": round(statistics.median(chunks), 4),
            "frames_per_second": round(self.case.frames / middle, 2),
        }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--comfyui", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--speeds", nargs="+", default=["fast", "fp8"])
    parser.add_argument("--runs", type=int, default=6)
    parser.add_argument("--async-allocator", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    if arguments.async_allocator and not os.environ.get(_ALLOCATOR):
        # It is chosen when torch starts.
        os.environ[_ALLOCATOR] = "backend:cudaMallocAsync"
        os.execv(sys.executable, [sys.executable, *sys.argv])
    is_gpu = arguments.device.startswith("cuda")
    if arguments.async_allocator and torch.cuda.get_allocator_backend() != "cudaMallocAsync":
        raise SystemExit(f"{_ALLOCATOR} names another allocator; unset it")
    device = torch.device(arguments.device, 0) if is_gpu else torch.device(arguments.device)
    case = TINY if arguments.tiny else RolloutCase(FrameSize(832, 480))
    bench = Bench(Comfy(arguments.comfyui, device), case, device)
    rows = []
    for speed in arguments.speeds:
        ways = {"Chunk Sampler": bench.in_comfy(speed), "engine alone": bench.alone(speed)}
        difference = relative_error(*(make()[0].float() for make in ways.values()))
        if not difference < MOST_DIFFERENCE:
            raise SystemExit(f"{speed}: the two videos differ by {difference:.3f}; nothing timed")
        made = [bench.row(speed, way, make, arguments.runs) for way, make in ways.items()]
        loss = 100 * (1 - made[0]["frames_per_second"] / made[1]["frames_per_second"])
        made[0] |= {"loss_percent": round(loss, 2), "difference": round(difference, 5)}
        for row in made:
            say("  ".join(f"{name} {value}" for name, value in row.items()))
        rows += made
    facts = {
        "allocator": torch.cuda.get_allocator_backend() if is_gpu else "none",
        "comfyui": bench.comfy.version,
        "device": device_name(device),
        **machine_facts(device),
    }
    say(", ".join(f"{name} {value}" for name, value in facts.items()))
    if arguments.csv:
        write_csv(arguments.csv, rows, facts)


if __name__ == "__main__":
    main()
