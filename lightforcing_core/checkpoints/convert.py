"""Any supported layout to one clean safetensors file under Wan's own names."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..outputs import check_output, replacing
from .checkpoint import Progress, open_checkpoint
from .lora import Lora
from .metadata import file_metadata

log = logging.getLogger("lightforcing")


@dataclass(frozen=True)
class Conversion:
    """What was written."""

    out: Path
    format: str
    tensors: int
    out_bytes: int
    family: str | None
    dropped: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "out": str(self.out),
            "format": self.format,
            "tensors": self.tensors,
            "bytes": self.out_bytes,
            "family": self.family,
            "dropped": list(self.dropped),
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
    check_output(out, [path])
    checkpoint = open_checkpoint(path, family=family)
    checkpoint.check_whole()
    # In the order of the model: files of one model then differ only where their weights do.
    tensors = checkpoint.read(dtype=dtype, loras=loras, on_progress=on_progress)
    known = checkpoint.identification.family
    facts: dict[str, object] = {
        "num_heads": checkpoint.config.num_heads,
        **({"family": known.name} if known else {}),
        **({"text_len": checkpoint.config.text_len} if checkpoint.config.text_len != 512 else {}),
        **(checkpoint.preset.to_facts() if not checkpoint.identification.candidates else {}),
    }
    with replacing(out) as temporary:
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, temporary, metadata=file_metadata(facts))
    return Conversion(
        out=out,
        format=checkpoint.recognised.format,
        tensors=len(tensors),
        out_bytes=out.stat().st_size,
        family=known.name if known else None,
        dropped=checkpoint.unexpected,
    )
