"""Streaming video autoencoders with explicit state."""

from .load import load_vae
from .streaming import StreamingDecoder, StreamingEncoder, VideoVAE
from .taehv import TAEHV, TAEHVConfig
from .wan_vae import WanVAE, WanVAEConfig

__all__ = [
    "TAEHV",
    "StreamingDecoder",
    "StreamingEncoder",
    "TAEHVConfig",
    "VideoVAE",
    "WanVAE",
    "WanVAEConfig",
    "load_vae",
]
