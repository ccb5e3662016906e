"""What a checkpoint is, and whether this machine can run it, before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from ..kv_cache import CacheSpec
from ..layout import FrameSize, latent_frames
from ..memory import GIB, available_bytes, usable_device
from .checkpoint import WIDENED, Checkpoint, Progress, is_finite, open_checkpoint, some
from .families import Identification
from .load import notes
from .quantised import is_eight_bit
from .shards import find_shards

_DEFAULT_SIZE = FrameSize(832, 480)
_DEFAULT_FRAMES = 81


@dataclass(frozen=True)
class MemoryNeed:
    """What a run takes on a device, and what is free there.

    Attributes:
        size, frames: pixels and pixel frames of the video asked for.
        device: 'cpu', 'cuda:0'.
        weight_bytes, cache_bytes, work_bytes: weights, key/value cache, activations of a forward
            (an estimate; without VAE and text encoder).
        free_bytes: what the device has.
    """

    size: FrameSize
    frames: int
    device: str
    weight_bytes: int
    cache_bytes: int
    work_bytes: int
    free_bytes: int

    @property
    def needed_bytes(self) -> int:
        return self.weight_bytes + self.cache_bytes + self.work_bytes

    @property
    def fits(self) -> bool:
        return self.needed_bytes <= self.free_bytes

    def to_dict(self) -> dict[str, Any]:
        return {
            "width": self.size.width,
            "height": self.size.height,
            "frames": self.frames,
            "device": self.device,
            "weights_gib": round(self.weight_bytes / GIB, 3),
            "cache_gib": round(self.cache_bytes / GIB, 3),
            "work_gib": round(self.work_bytes / GIB, 3),
            "free_gib": round(self.free_bytes / GIB, 3),
            "fits": self.fits,
        }


@dataclass(frozen=True)
class Inspection:
    """Everything `lightforcing inspect` says of a file."""

    checkpoint: Checkpoint
    memory: MemoryNeed
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        checkpoint = self.checkpoint
        config, identification = checkpoint.config, checkpoint.identification
        family = identification.family
        return {
            "file": str(checkpoint.path),
            "format": checkpoint.recognised.format,
            "prefix": checkpoint.recognised.root,
            "averaged_weights": checkpoint.recognised.is_average,
            "passed_over": list(checkpoint.recognised.passed_over),
            "family": family.name if family else None,
            "family_from": identification.reason,
            "candidates": [candidate.name for candidate in identification.candidates],
            "config": {
                "dim": config.dim,
                "ffn_dim": config.ffn_dim,
                "num_heads": config.num_heads,
                "num_layers": config.num_layers,
                "in_dim": config.in_dim,
                "out_dim": config.out_dim,
                "text_dim": config.text_dim,
                "text_len": config.text_len,
                "frames_per_chunk": checkpoint.preset.frames_per_chunk,
            },
            "parameters": checkpoint.parameters,
            "dtypes": checkpoint.stored_types,
            "file_bytes": file_bytes(checkpoint.path),
            "marked_causal": checkpoint.marked_causal,
            "merged_loras": list(checkpoint.merged_loras),
            "missing": list(checkpoint.missing),
            "misshapen": list(checkpoint.misshapen),
            "unexpected": list(checkpoint.unexpected),
            "settings": checkpoint.preset.to_facts(),
            "not_reproduced": list(family.not_reproduced) if family else [],
            "notes": list(self.notes),
            "memory": self.memory.to_dict(),
        }


def inspect_checkpoint(
    path: str | Path,
    *,
    family: str | None = None,
    size: FrameSize | None = None,
    frames: int | None = None,
    device: str | None = None,
) -> Inspection:
    """Recognise a file and work out what a run of it takes; its weights are not read.

    Args:
        path: a checkpoint in any known layout.
        family: its family when the user says it.
        size, frames: of the video to plan for; default: the preset's, else 832x480 and 81.
        device: default: CUDA where there is one.

    Raises:
        UserError: it is no denoiser for Wan 2.1 text to video.
    """
    checkpoint = open_checkpoint(path, family=family)
    preset = checkpoint.preset
    if size is None:
        size = _DEFAULT_SIZE
        if preset.width is not None and preset.height is not None:
            size = FrameSize(preset.width, preset.height)
    if frames is None:
        frames = preset.frames or _DEFAULT_FRAMES
    memory = _memory_need(checkpoint, size, frames, usable_device(device))
    return Inspection(checkpoint, memory, notes(checkpoint))


def check_values(checkpoint: Checkpoint, on_progress: Progress = lambda done, total: None) -> None:
    """Read every weight once, in place, and raise on NaN or infinity.

    Raises:
        UserError: names the first tensor that holds one.
    """
    weights = checkpoint.recognised.weights
    stored = {name: weights.tensors[name] for name in checkpoint.shapes}
    total = sum(tensor.nbytes for tensor in stored.values())
    done = 0
    for name, tensor in stored.items():
        # Integers are always finite; their scales need not be.
        wide = weights.widened(name, tensor, WIDENED) if is_eight_bit(tensor) else tensor
        if not is_finite(wide):
            raise UserError(
                f"{checkpoint.path}: '{name}' holds NaN or infinite weights; the file is damaged: "
                "download it again"
            )
        done += tensor.nbytes
        on_progress(done, total)


def summary(inspection: Inspection) -> list[tuple[str, str]]:
    """The report for people, as (name, value) rows."""
    checkpoint, memory = inspection.checkpoint, inspection.memory
    config, preset = checkpoint.config, checkpoint.preset
    recognised, identification = checkpoint.recognised, checkpoint.identification
    which = "averaged (EMA) weights" if recognised.is_average else "weights"
    window = "whole history" if preset.window_frames == -1 else f"{preset.window_frames} frames"
    steps = " / ".join(f"{round(step, 2):g}" for step in preset.steps)
    rows = [
        ("file", f"{checkpoint.path} ({file_bytes(checkpoint.path) / GIB:.2f} GiB)"),
        ("format", f"{recognised.format}, {which} under '{recognised.root}'"),
        ("family", f"{_family_text(identification)} ({identification.reason})"),
        (
            "model",
            f"width {config.dim}, {config.num_layers} layers, {config.num_heads} heads of "
            f"{config.head_dim}, feed-forward {config.ffn_dim}, text {config.text_dim}",
        ),
        (
            "parameters",
            f"{checkpoint.parameters / 1e9:.3f} B in {len(checkpoint.shapes)} tensors, "
            + ", ".join(checkpoint.stored_types),
        ),
        ("unexpected", some(checkpoint.unexpected) or "nothing"),
        (
            "ComfyUI",
            "sees an autoregressive model"
            if checkpoint.marked_causal
            else "sees plain Wan (convert writes the metadata it looks for)",
        ),
        (
            "settings",
            f"{preset.frames_per_chunk} frames a chunk, steps {steps} (shift {preset.shift:g}), "
            f"window {window}, {preset.sink_frames} sink frames, clean pass at "
            f"{preset.context_timestep:g}",
        ),
    ]
    if checkpoint.merged_loras:
        rows.append(("LoRA", f"in the weights already: {', '.join(checkpoint.merged_loras)}"))
    if preset.first_chunk_steps is not None:
        first = " / ".join(f"{round(step, 2):g}" for step in preset.first_chunk_steps)
        rows.append(("", f"first chunk: steps {first}"))
    rows += [("note", note) for note in inspection.notes]
    verdict = "fits" if memory.fits else "does NOT fit"
    rows.append(
        (
            "memory",
            f"{memory.frames} frames of {memory.size.width}x{memory.size.height} take "
            f"{memory.needed_bytes / GIB:.2f} GiB (weights {memory.weight_bytes / GIB:.2f}, cache "
            f"{memory.cache_bytes / GIB:.2f}, work {memory.work_bytes / GIB:.2f}; without VAE and "
            f"text encoder): {verdict} in {memory.free_bytes / GIB:.2f} GiB free on "
            f"{memory.device}",
        )
    )
    return rows


def _family_text(identification: Identification) -> str:
    if identification.family is not None:
        return identification.family.title
    if identification.candidates:
        return f"one of {', '.join(family.name for family in identification.candidates)}"
    return "none of the published ones; its own settings"


def file_bytes(path: Path) -> int:
    """Size of all files that a checkpoint is read from."""
    return sum(file.stat().st_size for file in find_shards(path).files)


def _memory_need(
    checkpoint: Checkpoint, size: FrameSize, frames: int, device: torch.device
) -> MemoryNeed:
    config, preset = checkpoint.config, checkpoint.preset
    # Generation runs in these types unless the user says otherwise.
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    total = latent_frames(frames)
    capacity = total if preset.window_frames == -1 else min(preset.window_frames, total)
    cache = CacheSpec(
        batch=1,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        head_dim=config.head_dim,
        frame_tokens=size.frame_tokens,
        capacity_frames=capacity,
        dtype=dtype,
    )
    rows = size.frame_tokens * min(preset.frames_per_chunk, total)
    # Of one block: input, its normed copy, q, k, v, attention's output, and the wide feed-forward
    # twice (before and after its activation).
    work = rows * (6 * config.dim + 2 * config.ffn_dim) * dtype.itemsize
    return MemoryNeed(
        size=size,
        frames=frames,
        device=str(device),
        weight_bytes=checkpoint.parameters * dtype.itemsize,
        cache_bytes=cache.total_bytes,
        work_bytes=work,
        free_bytes=available_bytes(device),
    )
