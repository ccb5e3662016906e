"""Sparse Attention's part of a MODEL: its settings, and the patch for ComfyUI's own AR sampler."""

from __future__ import annotations

from comfy.model_patcher import ModelPatcher

from .native import patch_forward
from .options import SparseChoice, with_sparse
from .wan_tree import wan_tree


def patch_model(model: ModelPatcher, choice: SparseChoice) -> ModelPatcher:
    """A clone of a MODEL that samples as a Sparse Attention node says; the MODEL stays as it is.

    Raises:
        UserError: it is no Wan 2.1 text-to-video model.
    """
    tree = wan_tree(model.model)
    patched = model.clone()
    with_sparse(patched, choice)
    patch_forward(patched, tree)
    return patched
