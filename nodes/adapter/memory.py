"""Memory of a run, asked of ComfyUI before it is taken."""

from __future__ import annotations

from collections.abc import Sequence

import comfy.model_management
from comfy.model_patcher import ModelPatcher


def chunk_bytes(patcher: ModelPatcher, video: Sequence[int], frames_per_chunk: int) -> int:
    """What a forward of one chunk takes beside weights and cache, as ComfyUI counts.

    Args:
        video: shape of the video's latents, [B, C, F, h, w].
        frames_per_chunk: latent frames of one forward.
    """
    batch, channels, frames, height, width = video
    return int(
        patcher.memory_required([batch, channels, min(frames, frames_per_chunk), height, width])
    )


def reserve(patcher: ModelPatcher, needed: int, also_load: Sequence[ModelPatcher] = ()) -> None:
    """Have ComfyUI make room for what a run takes beside its models.

    It unloads other models and, where that is not enough, a part of this one. The cache itself
    checks that there is room when it is made.

    Args:
        patcher: the MODEL, loaded by the guider already.
        needed: bytes: key/value cache, forwards of a chunk, and what those below take beside their
            weights.
        also_load: what must stay beside it: a VAE that decodes the video meanwhile.
    """
    if comfy.model_management.get_free_memory(patcher.load_device) < needed:
        comfy.model_management.load_models_gpu([patcher, *also_load], memory_required=needed)
