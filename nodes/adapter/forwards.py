"""Hearing of every forward of a MODEL, and a prompt for runs whose pictures nobody looks at."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

from .wan_tree import wan_tree

_KEY = "lightforcing_forwards"


def with_listener(model: ModelPatcher, before: Callable[[], object]) -> ModelPatcher:
    """A clone whose network calls `before` each time it is about to run."""

    def listen(executor: Any, *inputs: Any, **options: Any) -> Any:
        before()
        return executor(*inputs, **options)

    clone = model.clone()
    clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, _KEY, listen)
    return clone


def empty_prompt(model: ModelPatcher) -> list[Any]:
    """CONDITIONING of zeros, as long as every prompt of this MODEL.

    Raises:
        UserError: it is no Wan model that this pack runs.
    """
    tree = wan_tree(model.model)
    width = tree.text_embedding[0].weight.shape[1]
    return [[torch.zeros(1, tree.text_len, width), {}]]


def host_version() -> str:
    """Of ComfyUI."""
    try:
        return str(importlib.import_module("comfyui_version").__version__)
    except (ImportError, AttributeError):
        return "not known"


def load_device(model: ModelPatcher) -> torch.device:
    """Where a MODEL runs."""
    return model.load_device
