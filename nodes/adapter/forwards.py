"""Forwards of a MODEL: hearing of each, what ran them, a prompt for runs nobody looks at."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

from .wan_tree import wan_tree

_KEY = "lightforcing_forwards"


@dataclass
class ForwardTally:
    """What ran the forwards of a run; the engine counts while it goes on.

    Attributes:
        speed: one of the core engine's SPEEDS; 'plain': without an engine, and nothing is counted.
        replayed: forwards replayed from CUDA graphs.
        fused: those launched kernel by kernel.
        plain: those that took the model's own layers.
        reason: why, where something else was meant to.
    """

    speed: str
    replayed: int = 0
    fused: int = 0
    plain: int = 0
    reason: str = ""

    def __add__(self, other: ForwardTally) -> ForwardTally:
        return ForwardTally(
            self.speed,
            self.replayed + other.replayed,
            self.fused + other.fused,
            self.plain + other.plain,
            self.reason or other.reason,
        )

    def __str__(self) -> str:
        total = self.replayed + self.fused + self.plain
        if self.speed == "plain":
            said = self.speed
        elif not total:
            said = "plain, compiled with the MODEL"
        elif self.plain == total:
            said = f"plain, not {self.speed}"
        else:
            share = "all" if self.replayed == total else f"{self.replayed or 'none'} of {total}"
            said = f"{self.speed}, {share} replayed from CUDA graphs"
            if self.plain:
                said += f", {self.plain} by the model's own layers"
        return f"{said} ({self.reason})" if self.reason else said


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
