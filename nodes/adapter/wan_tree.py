"""ComfyUI's `diffusion_model` as the Wan-shaped tree that the core runs."""

from __future__ import annotations

import torch
from comfy.model_base import BaseModel
from torch import nn

from ...lightforcing_core.errors import UserError

# Everything else is of other Wan models: image encoders, VACE, cameras, audio.
_ROOMS = {
    "patch_embedding",
    "text_embedding",
    "time_embedding",
    "time_projection",
    "blocks",
    "head",
    "rope_embedder",
}
_LATENT_CHANNELS = 16
_DO = (
    "load a Wan 2.1 text-to-video model made for autoregressive sampling (Self Forcing, Causal "
    "Forcing, LongLive, ...) with Load Model (Light Forcing) or Load Diffusion Model"
)


def wan_tree(model: BaseModel) -> nn.Module:
    """The module tree of a MODEL's weights, when it is one that the core can run.

    Raises:
        UserError: it is of another model; says what to load.
    """
    tree = getattr(model, "diffusion_model", None)
    name = type(tree).__name__
    rooms = {child for child, _ in tree.named_children()} if isinstance(tree, nn.Module) else set()
    if not {"patch_embedding", "blocks", "head"} <= rooms or not hasattr(tree, "num_heads"):
        raise UserError(f"this MODEL is {name}, not a Wan 2.1 video model; {_DO}")
    if not rooms <= _ROOMS:
        extra = ", ".join(sorted(rooms - _ROOMS))
        raise UserError(f"this MODEL is another kind of Wan model ({name} with {extra}); {_DO}")
    channels = tree.patch_embedding.weight.shape[1]
    if channels != _LATENT_CHANNELS or tree.patch_size[0] != 1:
        raise UserError(
            f"this Wan model takes {channels} latent channels in patches of {tree.patch_size}, "
            f"expected {_LATENT_CHANNELS} in patches of one frame; {_DO}"
        )
    return tree


def compute_dtype(model: BaseModel) -> torch.dtype:
    """What a MODEL computes in: its weights may be stored narrower."""
    newer = getattr(model, "get_dtype_inference", None)
    if newer is not None:
        return newer()
    return model.manual_cast_dtype or model.get_dtype()
