"""Any supported layout to one clean safetensors file under Wan's own names."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..errors import UserError
from ..outputs import check_output, replacing
from .checkpoint import Checkpoint, Progress, open_checkpoint
from .load import notes
from .lora import Lora, check_loras
from .metadata import file_metadata
from .shards import find_shards

log = logging.getLogger("lightforcing")


@dataclass(frozen=True)
class Conversion:
    """What was written.

    Attributes:
        dropped: tensors of the source that are no part of the model.
        unmatched: keys of LoRA files that found no parameter.
        notes: what the user should know of the source (`load.notes`).
    """

    out: Path
    format: str
    tensors: int
    out_bytes: int
    family: str | None
    dropped: tuple[str, ...]
    unmatched: tuple[str, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "out": str(self.out),
            "format": self.format,
            "tensors": self.tensors,
            "bytes": self.out_bytes,
            "family": self.family,
            "dropped": list(self.dropped),
            "unmatched_lora_keys": list(self.unmatched),
            "notes": list(self.notes),
        }


def convert_checkpoint(
    path: str | Path,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    family: str | None = None,
    loras: Sequence[tuple[Lora, float]] = (),
    on_progress: Progress = lambda done, total: None,
) -> Conversion:
    """Write a denoiser under ComfyUI's (Wan's own) names with the metadata that marks it causal.

    Args:
        path: a checkpoint in any known layout.
        out: the .safetensors file to write; it appears under its name only when complete.
        dtype: default: as stored; eight-bit weights become bfloat16.
        family: its family when the user says it; written into the file, so that its settings are
            known from then on.
        loras: merged into the weights.
        on_progress: told how many of the file's bytes are read.

    Raises:
        UserError: the file cannot be used, or the output cannot be written.
    """
    path = Path(path)
    if out.suffix.lower() not in (".safetensors", ".sft"):
        raise UserError(f"{out} must end in .safetensors, which is what is written")
    check_output(out, [path, *find_shards(path).files] if path.exists() else [path])
    checkpoint = open_checkpoint(path, family=family)
    checkpoint.check_whole()
    unmatched = check_loras([lora for lora, _ in loras], checkpoint.shapes) if loras else ()
    # In the order of the model: files of one model then differ only where their weights do.
    tensors = checkpoint.read(dtype=dtype, loras=loras, on_progress=on_progress)
    with replacing(out) as temporary:
        save_file(_apart(tensors), temporary, metadata=file_metadata(_facts(checkpoint, loras)))
    family_found = checkpoint.identification.family
    return Conversion(
        out=out,
        format=checkpoint.recognised.format,
        tensors=len(tensors),
        out_bytes=out.stat().st_size,
        family=family_found.name if family_found else None,
        dropped=checkpoint.unexpected,
        unmatched=unmatched,
        notes=notes(checkpoint, [lora for lora, _ in loras]),
    )


def _facts(checkpoint: Checkpoint, loras: Sequence[tuple[Lora, float]]) -> dict[str, object]:
    """What is known of the weights, for the file that is written."""
    config, family = checkpoint.config, checkpoint.identification.family
    merged = [*checkpoint.merged_loras, *(f"{lora.name}:{strength:g}" for lora, strength in loras)]
    return {
        "num_heads": config.num_heads,
        "num_layers": config.num_layers,
        **({"text_len": config.text_len} if config.text_len != 512 else {}),
        **({"family": family.name} if family else {}),
        **({"merged_loras": merged} if merged else {}),
        **checkpoint.preset.to_facts(),
    }


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, contiguous, and none sharing numbers with another: the format has no ties."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        plain = tensor.contiguous()
        place = plain.data_ptr()
        result[name] = plain.clone() if place in seen and plain.numel() else plain
        seen.add(place)
    return result
