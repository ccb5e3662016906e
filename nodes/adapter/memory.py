"""Memory of a run, asked of ComfyUI before it is taken."""

from __future__ import annotations

from collections.abc import Sequence

import comfy.model_management
from comfy.model_patcher import ModelPatcher


def reserve(
    patcher: ModelPatcher,
    cache_bytes: int,
    video: Sequence[int],
    frames_per_chunk: int,
    also_load: Sequence[ModelPatcher] = (),
    also_bytes: int = 0,
) -> None:
    """Have ComfyUI make room for a key/value cache and the forwards of a chunk.

    It unloads other models and, where that is not enough, a part of this one. The cache itself
    checks that there is room when it is made.

    Args:
        patcher: the MODEL, loaded by the guider already.
        cache_bytes: of the cache.
        video: shape of the video's latents, [B, C, F, h, w].
        frames_per_chunk: latent frames of one forward.
        also_load: what must stay beside it: a VAE that decodes the video meanwhile.
        also_bytes: that those take beside their weights.
    """
    batch, channels, frames, height, width = video
    chunk = [batch, channels, min(frames, frames_per_chunk), height, width]
    needed = cache_bytes + patcher.memory_required(chunk) + also_bytes
    if comfy.model_management.get_free_memory(patcher.load_device) < needed:
        comfy.model_management.load_models_gpu([patcher, *also_load], memory_required=needed)
