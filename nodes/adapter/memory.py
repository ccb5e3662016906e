"""Memory of a run, asked of ComfyUI before it is taken, and weights that ComfyUI may move."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher

_in_use = threading.RLock()


def weights_in_use() -> AbstractContextManager[Any]:
    """For another thread than the run's, while it computes with the weights of a `HeldPatcher`."""
    return _in_use


class HeldPatcher(ModelPatcher):
    """Of weights that another thread computes with: they move when it has done what it is at.

    ComfyUI moves weights in the thread of the run, whenever something else needs their place.
    """

    def load(self, *arguments: Any, **more: Any) -> Any:
        """As `ModelPatcher`."""
        with _in_use:
            return super().load(*arguments, **more)

    def unpatch_model(self, *arguments: Any, **more: Any) -> Any:
        """As `ModelPatcher`."""
        with _in_use:
            return super().unpatch_model(*arguments, **more)


def is_on(here: torch.device, device: torch.device) -> bool:
    """Whether what is `here` is where `device` says; without a number any of its kind will do."""
    if here.type != device.type:
        return False
    return device.index is None or here.index is None or here.index == device.index


def is_dynamic(patcher: ModelPatcher) -> bool:
    """Whether ComfyUI brings a model's weights as they are needed, and takes them away again."""
    asked = getattr(patcher, "is_dynamic", None)
    return asked is not None and bool(asked())


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
