"""The noise levels of a MODEL's denoising steps, where no scheduler node gives them."""

from __future__ import annotations

import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...lightforcing_core.checkpoints.presets import Preset
from ...lightforcing_core.timesteps import TRAIN_TIMESTEPS
from .options import facts_of


def noise_levels(model: ModelPatcher, steps: int) -> tuple[Tensor, tuple[float, ...] | None]:
    """Noise levels falling to 0, for all chunks and for the first one where it has its own.

    Args: steps: 0: those the model was trained for, under the shift it has now; Self Forcing's
        when its loader does not say. Otherwise so many of ComfyUI's 'simple' scheduler.
    """
    sampling = model.get_model_object("model_sampling")
    if steps:
        return comfy.samplers.calculate_sigmas(sampling, "simple", steps), None
    facts = facts_of(model.model_options)
    preset = Preset() if facts is None else facts.preset.with_shift(float(sampling.shift))
    first = preset.first_chunk_steps
    return torch.tensor(_falling(preset.steps)), None if first is None else _falling(first)


def _falling(timesteps: tuple[float, ...]) -> tuple[float, ...]:
    return (*(timestep / TRAIN_TIMESTEPS for timestep in timesteps), 0.0)
