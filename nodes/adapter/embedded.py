"""The embedded model's text encoder and autoencoder as CLIP and VAE; stand-ins for missing ones."""

from __future__ import annotations

from typing import Any, NoReturn

import comfy.sd
import torch
from comfy.supported_models_base import ClipTarget
from torch import Tensor, nn

from ...lightforcing_core.embedded import EMBEDDED_TEXT, EMBEDDED_VAE
from ...lightforcing_core.errors import UserError
from ...lightforcing_core.text.embedded import EmbeddedTextEncoder
from ...lightforcing_core.vae.load import load_vae
from .video_vae import PackVAE


class _WordTable(nn.Module):
    """The embedded text encoder with the methods that ComfyUI's CLIP calls."""

    def __init__(self, dtype: torch.dtype, device: torch.device, model_options: object) -> None:
        del dtype, device, model_options  # a table of words on the host: nothing to place
        super().__init__()
        self.dtypes: set[torch.dtype] = set()
        self.encoder = EmbeddedTextEncoder.load(EMBEDDED_TEXT)

    def encode_token_weights(self, tokens: dict[str, str]) -> tuple[Tensor, None]:
        """Embedding float32 [1, 512, 4096] of the prompt; there is no pooled one."""
        return self.encoder.encode(tokens["text"]), None

    def set_clip_options(self, options: dict[str, Any]) -> None:
        """Layers of a text network: a table has none."""

    def reset_clip_options(self) -> None:
        """See `set_clip_options`."""


class _WordTokenizer:
    """Hands the prompt on as it is: words are looked up when it is encoded."""

    def __init__(self, embedding_directory: object = None, tokenizer_data: object = None) -> None:
        pass

    def tokenize_with_weights(
        self, text: str, return_word_ids: bool = False, **options: object
    ) -> dict[str, str]:
        return {"text": text}

    def state_dict(self) -> dict[str, Tensor]:
        return {}


def embedded_clip() -> comfy.sd.CLIP:
    """The embedded model's text encoder as a CLIP.

    Raises:
        UserError: its file is missing or damaged.
    """
    return comfy.sd.CLIP(ClipTarget(_WordTokenizer, _WordTable))


def embedded_vae() -> PackVAE:
    """The embedded model's autoencoder as a VAE.

    Raises:
        UserError: its file is missing or damaged.
    """
    return PackVAE(load_vae(EMBEDDED_VAE))


class MissingPartError(UserError, AttributeError):
    """An attribute error too, so that whoever only asks what an object can do gets an answer."""


class OwnPart:
    """Stands where a checkpoint of the user's own brings no CLIP or VAE; any use is an error."""

    def __init__(self, message: str) -> None:
        self._message = message

    @classmethod
    def clip(cls, model_name: str) -> OwnPart:
        """For the CLIP output."""
        return cls(
            f"'{model_name}' holds no text encoder, only the denoiser; add a Load CLIP node with "
            "type wan and umt5_xxl_fp8_e4m3fn_scaled.safetensors (or umt5_xxl_fp16)"
        )

    @classmethod
    def vae(cls, model_name: str) -> OwnPart:
        """For the VAE output."""
        return cls(
            f"'{model_name}' holds no VAE, only the denoiser; add a Load VAE node with "
            "wan_2.1_vae.safetensors"
        )

    def __getattr__(self, name: str) -> NoReturn:
        # Copying and printing ask for names of their own, and must not fail.
        if name.startswith("__"):
            raise AttributeError(name)
        raise MissingPartError(self._message)
