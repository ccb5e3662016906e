"""One door to the prompt encoders."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..checkpoints.files import read_metadata
from ..embedded import EMBEDDED_TEXT
from .embedded import EmbeddedTextEncoder


class TextEncoder(Protocol):
    """Turns a prompt into embeddings [1, L, text_dim], L at most the model's text_len."""

    def encode(self, prompt: str) -> Tensor: ...


def load_text_encoder(
    path: str | Path | None, device: torch.device | str, dtype: torch.dtype
) -> TextEncoder:
    """The embedded encoder for None or a file of its kind, else UMT5 from a file or folder."""
    if path is None:
        return EmbeddedTextEncoder.load(EMBEDDED_TEXT)
    if "embedded_text" in read_metadata(path).get("lightforcing", ""):
        return EmbeddedTextEncoder.load(path)
    # Late: UMT5 pulls in transformers, an optional extra.
    from .umt5 import UMT5Encoder

    return UMT5Encoder.load(path, device=device, dtype=dtype)
