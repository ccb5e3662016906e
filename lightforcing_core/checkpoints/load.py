"""From a checkpoint file to a module tree that can run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..fast.linears import EIGHT_BIT_LAYERS, EightBitLinear, with_eight_bit_linears
from ..wan.config import WanConfig
from ..wan.modules import WanModel
from .checkpoint import WIDENED, Checkpoint, Progress, open_checkpoint, some
from .lora import Lora, check_loras
from .presets import Preset

log = logging.getLogger("lightforcing")


@dataclass(frozen=True)
class LoadedModel:
    """A denoiser ready to run, and what its file said.

    `notes` is what its user should be told: what was chosen for them, what will differ from the
    published sampler, what was left out. Whoever loads shows them.
    """

    tree: WanModel
    config: WanConfig
    format: str
    preset: Preset
    unexpected: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def load_model(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    num_heads: int | None = None,
    family: str | None = None,
    loras: Sequence[tuple[Lora, float]] = (),
    on_progress: Progress = lambda done, total: None,
) -> LoadedModel:
    """Load a denoiser from any known layout (docs/CHECKPOINTS.md).

    Args:
        path: a .safetensors or torch file, a shard of one, or a diffusers folder.
        device: where to. On the CPU, tensors that keep their type stay memory-mapped.
        dtype: of the weights; default: as stored, eight-bit ones in bfloat16.
        num_heads: overrides the file's metadata and the rule width / 128.
        family: name of the family the weights are of, when the user says it.
        loras: LoRAs and their strengths, added to the weights in float32.
        on_progress: told how many of the file's bytes are done.

    Raises:
        UserError: the file is not such a checkpoint, tensors are missing or have wrong shapes,
            weights are not finite, or a LoRA does not fit.
    """
    checkpoint = open_checkpoint(path, num_heads=num_heads, family=family)
    return load_checkpoint(
        checkpoint, device=device, dtype=dtype, loras=loras, on_progress=on_progress
    )


def load_checkpoint(
    checkpoint: Checkpoint,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    loras: Sequence[tuple[Lora, float]] = (),
    eight_bit: torch.dtype | None = None,
    on_progress: Progress = lambda done, total: None,
) -> LoadedModel:
    """`load_model` for a checkpoint that is open already.

    Args:
        eight_bit: numbers that the blocks' linear layers are to be of (`fast.linears`). Layers that
            the file holds in such numbers, and to which no LoRA is added, keep theirs; the others
            are rounded. None: eight-bit weights are widened.
    """
    checkpoint.check_whole()
    _report(checkpoint)
    kept = checkpoint.stored_as(eight_bit, EIGHT_BIT_LAYERS, loras) if eight_bit else []
    state = checkpoint.read(
        device=device,
        dtype=dtype,
        loras=loras,
        as_stored={f"{name}.weight" for name in kept},
        on_progress=on_progress,
    )
    with torch.device("meta"):
        tree = WanModel(checkpoint.config)
    for name in kept:
        weight, bias = (state.pop(f"{name}.{part}") for part in ("weight", "bias"))
        scale = checkpoint.scale(f"{name}.weight")
        tree.set_submodule(name, EightBitLinear.of(weight, scale, bias, dtype or WIDENED))
    tree.load_state_dict(state, assign=True)
    if eight_bit is not None:
        with_eight_bit_linears(tree, eight_bit, replace=True)
        of_blocks = checkpoint.config.num_layers * len(EIGHT_BIT_LAYERS)
        log.info("eight-bit layers: %d of %d as the file has them", len(kept), of_blocks)
    return LoadedModel(
        tree.requires_grad_(False).eval(),
        checkpoint.config,
        checkpoint.recognised.format,
        checkpoint.preset,
        checkpoint.unexpected,
        notes(checkpoint, [lora for lora, _ in loras]),
    )


def _report(checkpoint: Checkpoint) -> None:
    """Log what the file is."""
    name = checkpoint.path.name
    recognised, config = checkpoint.recognised, checkpoint.config
    log.info(
        "%s: %s, width %d, %d layers, %d heads, %.2f B parameters, %d frames a chunk",
        name,
        recognised.format,
        config.dim,
        config.num_layers,
        config.num_heads,
        checkpoint.parameters / 1e9,
        checkpoint.preset.frames_per_chunk,
    )


def notes(checkpoint: Checkpoint, loras: Sequence[Lora] = ()) -> tuple[str, ...]:
    """What the user of a checkpoint, and of LoRAs given with it, should know, a line each."""
    name = checkpoint.path.name
    identification = checkpoint.identification
    family = identification.family
    recognised = checkpoint.recognised
    lines = []
    if recognised.passed_over:
        which = "the averaged weights" if recognised.is_average else "the weights"
        others = ", ".join(f"'{root}'" for root in recognised.passed_over)
        lines.append(f"{name}: took {which} under '{recognised.root}', passed over {others}")
    if checkpoint.unexpected:
        number, examples = len(checkpoint.unexpected), some(checkpoint.unexpected)
        lines.append(f"{name}: ignored {number} unknown tensors ({examples})")
    if identification.candidates:
        names = ", ".join(candidate.name for candidate in identification.candidates)
        lines.append(
            f"{name}: which family these weights are of is not known "
            f"({identification.reason}); using {checkpoint.preset.frames_per_chunk} frames a chunk "
            f"and {len(checkpoint.preset.steps)} steps. If that is wrong, choose: --family {names}"
        )
    if family is not None and family.not_reproduced:
        left_out = "; ".join(family.not_reproduced)
        lines.append(f"{name}: not reproduced of {family.title}: {left_out}")
    unmatched = check_loras(loras, checkpoint.shapes)
    if unmatched:
        lines.append(f"{name}: ignored {len(unmatched)} entries of LoRA files ({some(unmatched)})")
    if checkpoint.merged_loras and loras:
        already = ", ".join(checkpoint.merged_loras)
        lines.append(f"{name}: holds {already} already; the LoRA given is added to that")
    if family is not None and family.needs_lora and not loras and not checkpoint.merged_loras:
        lines.append(f"{name}: {family.title} is a base and a LoRA; give the LoRA too (--lora)")
    return tuple(lines)
