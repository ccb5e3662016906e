"""From a file to a MODEL."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import comfy.model_management
import comfy.model_sampling
import comfy.sd
import torch
from comfy.model_patcher import ModelPatcher
from comfy.utils import ProgressBar
from torch import Tensor

from ...lightforcing_core.checkpoints.checkpoint import Checkpoint, open_checkpoint
from ...lightforcing_core.checkpoints.load import notes
from ...lightforcing_core.checkpoints.lora import check_loras, load_lora
from ...lightforcing_core.checkpoints.metadata import file_metadata
from ...lightforcing_core.errors import UserError
from .options import ModelFacts, with_facts

_HEAD_DIM = 128  # ComfyUI takes width / 128 for the number of heads
_TEXT_LEN = 512


@dataclass(frozen=True)
class ModelRequest:
    """What to load.

    Attributes:
        path: any layout of docs/CHECKPOINTS.md.
        family: name of the family when the user says it.
        loras: files and strengths, merged into the weights.
        weight_dtype: None: bfloat16, which these models are trained in, where the device computes
            in it and ComfyUI was not started with another choice.
    """

    path: Path
    family: str | None = None
    loras: Sequence[tuple[Path, float]] = ()
    weight_dtype: torch.dtype | None = None


@dataclass(frozen=True)
class LoadedPatcher:
    """A MODEL and what its user should be told, a line each."""

    patcher: ModelPatcher
    notes: tuple[str, ...]


class _FlowSampling(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
    """Flow matching with a shift of its own, as ModelSamplingSD3 sets it."""


def load_model(request: ModelRequest, *, disable_dynamic: bool = False) -> LoadedPatcher:
    """Load a denoiser into ComfyUI's own model class, with its shift and its preset.

    Args: disable_dynamic: newer versions of ComfyUI ask for a MODEL without dynamic memory.

    Raises:
        UserError: the file is no such denoiser, is damaged, or a LoRA does not fit.
    """
    checkpoint = open_checkpoint(request.path, family=request.family)
    checkpoint.check_whole()
    _check_host_can_build(checkpoint)
    loras = [(load_lora(path), strength) for path, strength in request.loras]
    check_loras([lora for lora, _ in loras], checkpoint.shapes)
    bar = ProgressBar(100)
    # ComfyUI copies the weights into its own class and rounds them to its own type.
    state = checkpoint.read(
        loras=loras,
        on_progress=lambda done, total: bar.update_absolute(100 * done // max(total, 1)),
    )
    patcher = _build(state, request.weight_dtype or _weight_dtype(checkpoint), disable_dynamic)
    # Multi-GPU and dynamic-memory copies are made by loading again.
    if hasattr(patcher, "cached_patcher_init"):
        patcher.cached_patcher_init = (_load_again, (request,))
    preset = checkpoint.preset
    _set_shift(patcher, preset.shift)
    with_facts(patcher, ModelFacts(request.path.name, preset))
    return LoadedPatcher(patcher, notes(checkpoint, [lora for lora, _ in loras]))


def _load_again(request: ModelRequest, disable_dynamic: bool = False) -> ModelPatcher:
    return load_model(request, disable_dynamic=disable_dynamic).patcher


def _check_host_can_build(checkpoint: Checkpoint) -> None:
    config = checkpoint.config
    if config.head_dim != _HEAD_DIM or config.text_len != _TEXT_LEN:
        raise UserError(
            f"{checkpoint.path}: {config.num_heads} heads of {config.head_dim} and "
            f"{config.text_len} rows of text; ComfyUI builds Wan models with heads of {_HEAD_DIM} "
            f"and {_TEXT_LEN} rows only. Use this file with the lightforcing command instead"
        )


def _weight_dtype(checkpoint: Checkpoint) -> torch.dtype:
    # ComfyUI takes the first type that the device is good at, and puts float16 first by itself.
    order = [torch.bfloat16, torch.float16, torch.float32]
    if next(iter(checkpoint.stored_types), "") == "float16":
        order[:2] = [torch.float16, torch.bfloat16]
    management = comfy.model_management
    return management.unet_dtype(
        device=management.get_torch_device(),
        model_params=checkpoint.parameters,
        supported_dtypes=order,
    )


def _build(state: dict[str, Tensor], dtype: torch.dtype, disable_dynamic: bool) -> ModelPatcher:
    # Only versions that know the argument ask for it, or get it.
    newer = {"disable_dynamic": True} if disable_dynamic or _stays_whole(state, dtype) else {}
    # The flag makes ComfyUI 0.21 and newer build its causal class; older ones ignore it.
    patcher = comfy.sd.load_diffusion_model_state_dict(
        state, model_options={"dtype": dtype}, metadata=file_metadata({}), **newer
    )
    if patcher is None:
        raise UserError(
            "this version of ComfyUI does not recognise Wan 2.1 weights; update ComfyUI"
        )
    return patcher


def _stays_whole(state: dict[str, Tensor], dtype: torch.dtype) -> bool:
    """Whether a newer ComfyUI is asked not to bring these weights piece by piece as they are
    needed: the fast engine wants them to stay. They are moved as one then, as older versions do.

    For models that take at most half of the GPU.
    """
    management = comfy.model_management
    device = management.get_torch_device()
    arguments = inspect.signature(comfy.sd.load_diffusion_model_state_dict).parameters
    if device.type != "cuda" or "disable_dynamic" not in arguments:
        return False
    needed = dtype.itemsize * sum(tensor.numel() for tensor in state.values())
    return 2 * needed <= management.get_total_memory(device)


def _set_shift(patcher: ModelPatcher, shift: float) -> None:
    sampling = _FlowSampling(patcher.model.model_config)
    sampling.set_parameters(shift=shift, multiplier=1000)
    patcher.add_object_patch("model_sampling", sampling)
