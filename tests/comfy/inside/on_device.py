"""Decoding beside sampling on a device, with stand-ins where ComfyUI would be.

A program that `test_on_device.py` starts: DEVICE; it writes one line of JSON.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
import types
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[3]
DEVICE = torch.device(sys.argv[1], 0 if sys.argv[1] == "cuda" else None)
IS_CUDA = DEVICE.type == "cuda"


class ModelPatcher:
    """Moves a model whole, as ComfyUI's does with models whose layers are not its own."""

    def __init__(self, model: torch.nn.Module, load_device: Any, offload_device: Any) -> None:
        self.model, self.load_device = model, load_device
        self.offload_device = offload_device

    def load(self, device_to: Any = None) -> None:
        self.model.to(device_to)

    def unpatch_model(self, device_to: Any = None) -> None:
        self.model.to(device_to)


def stand_in(name: str, **contents: Any) -> None:
    module = types.ModuleType(name)
    vars(module).update(contents)
    sys.modules[name] = module
    parent, _, last = name.rpartition(".")
    if parent:
        setattr(importlib.import_module(parent), last, module)


cpu = torch.device("cpu")
stand_in("comfy", __path__=[])
stand_in("comfy.model_patcher", ModelPatcher=ModelPatcher)
stand_in("comfy.utils", ProgressBar=None)
stand_in(
    "comfy.model_management",
    intermediate_device=lambda: cpu,
    vae_offload_device=lambda: cpu,
    throw_exception_if_processing_interrupted=lambda: None,
)
# Without the nodes themselves, which need all of ComfyUI.
stand_in("lightforcing.nodes", __path__=[str(ROOT / "nodes")])


def core(name: str) -> Any:
    return importlib.import_module(f"lightforcing.lightforcing_core.{name}")


decoding = importlib.import_module("lightforcing.nodes.adapter.decoding")
memory = importlib.import_module("lightforcing.nodes.adapter.memory")
video_vae = importlib.import_module("lightforcing.nodes.adapter.video_vae")
case_of, sparse_of, engines = core("bench.case"), core("sparse_settings"), core("fast.engine")

CASE = case_of.SMALL
if IS_CUDA:
    sizes = {"dim": 256, "ffn_dim": 512, "num_heads": 2, "num_layers": 3, "text_dim": 32}
    CASE = case_of.RolloutCase(
        core("layout").FrameSize(416, 240), 69, core("wan.config").WanConfig(**sizes)
    )
MODEL = types.SimpleNamespace(load_device=DEVICE)


class Maker:
    """Makes a video with a recording engine, and has every chunk decoded."""

    def __init__(self, name: str) -> None:
        sparse = sparse_of.SparseSettings(sparse_of.make_schedule(0.8))
        self.settings = CASE.settings(sparse)
        self.tree = case_of.random_denoiser(CASE, DEVICE)
        self.text = case_of.random_prompt(CASE, self.tree, DEVICE)
        network = core("bench.vae").decoder_network(name).eval()
        self.vae = video_vae.StreamingVAE(
            core("vae.streaming").VideoVAE(network), load_device=DEVICE, dtype=CASE.dtype
        )
        self.vae.patcher.load(DEVICE)
        self.seen: set[Any] = set()
        self.recorded = 0
        self.early = 0  # chunks that were shown while the device was still busy with what follows

    def __call__(self, *, beside: bool, moved: bool = False, busy: bool = False) -> list[Any]:
        shown: list[Any] = []
        still_busy = []

        def show(index: int, frames: torch.Tensor, pixels: Any, seconds: float) -> None:
            assert seconds > 0 and index == len(shown)
            if still_busy and not still_busy[0].query():
                self.early += 1
            shown.append((torch.from_numpy(pixels), video_vae.as_image(frames)[0]))

        engine = engines.ForwardEngine(self.tree, seen=self.seen) if IS_CUDA else None
        obstacle = decoding.beside_obstacle
        if not beside:
            decoding.beside_obstacle = lambda model, vae: "as asked"
        try:
            with (
                torch.inference_mode(),
                decoding.decoding(MODEL, self.vae, show) as decoder,
                contextlib.closing(self._chunks(engine)) as chunks,
            ):
                assert decoder.is_beside == (beside and IS_CUDA)
                for index, chunk in enumerate(chunks):
                    self.recorded = 0 if engine is None else engine.num_recordings
                    if busy and IS_CUDA:
                        torch.cuda._sleep(2_000_000_000)  # about a second
                        event = torch.cuda.Event()
                        event.record()
                        still_busy[:] = [event]
                    decoder.hand_in(index, chunk.latents, chunk.ready)
                    if moved:
                        with memory.weights_in_use():
                            self.vae.patcher.unpatch_model(cpu)
                            scratch = [torch.full((1 << 22,), 9.0, device=DEVICE) for _ in range(8)]
                            self.vae.patcher.load(DEVICE)
                        del scratch
                    if busy:
                        decoder.finish()
        finally:
            decoding.beside_obstacle = obstacle
        return shown

    def _chunks(self, engine: Any) -> Any:
        return core("rollout").rollout(
            self.tree,
            self.settings,
            self.text,
            CASE.noise(DEVICE),
            dtype=CASE.dtype,
            engine=engine,
        )


def equal(a: list[Any], b: list[Any]) -> bool:
    return all(
        torch.equal(x, y)
        for one, two in zip(a, b, strict=True)
        for x, y in zip(one, two, strict=True)
    )


def held() -> int:
    """Bytes on the device, as asked for: blocks may be larger, by what lay free where they are."""
    if not IS_CUDA:
        return 0
    asked = torch.cuda.memory_stats().get("requested_bytes.all.current", 0)
    return asked or torch.cuda.memory_allocated()


def claims(name: str) -> dict[str, Any]:
    maker = Maker(name)
    maker(beside=True)  # compiles
    expected = maker(beside=False)
    before = held()
    found: dict[str, Any] = {"frames": sum(len(pixels) for pixels, _ in expected)}
    found["equal"] = all(equal(maker(beside=True), expected) for _ in range(3))
    found["recorded"] = maker.recorded
    found["equal_when_moved"] = equal(maker(beside=True, moved=True), expected)
    maker.early = 0
    found["equal_when_busy"] = equal(maker(beside=True, busy=True), expected)
    found["early"] = maker.early
    found["left_bytes"] = held() - before
    return found


names = ("taehv", "lightvae") if IS_CUDA else ("taehv small",)
allocator = torch.cuda.get_allocator_backend() if IS_CUDA else "none"
found = {"allocator": allocator, "cases": {name: claims(name) for name in names}}
sys.stdout.write(json.dumps(found) + "\n")
