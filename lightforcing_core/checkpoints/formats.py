"""Known layouts of a Wan denoiser, and how each becomes Wan's own names.

A format is a test on the names and a rename. `FORMATS` is the one place to add another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from ..errors import UserError

Tensors = Mapping[str, Tensor]

# Wrappers that trainers put around the state dict; the averaged weights come first.
_WRAPPERS = ("generator_ema", "generator", "model", "state_dict")
_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.")
_MARKER = "patch_embedding.weight"


@dataclass(frozen=True)
class Format:
    """One layout: its identifier, whether some names are in it, and the rename to Wan's names."""

    name: str
    matches: Callable[[Tensors], bool]
    rename: Callable[[Tensors], dict[str, Tensor]]


def _under(tensors: Tensors, prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _wrapper(tensors: Tensors) -> str | None:
    """The wrapper to read, 'generator_ema' before 'generator', or None."""
    for name in _WRAPPERS:
        inner = _under(tensors, f"{name}.")
        if _MARKER in inner or f"model.{_MARKER}" in inner:
            return name
    return None


def _without_prefix(tensors: Tensors) -> dict[str, Tensor]:
    for prefix in _PREFIXES:
        if f"{prefix}{_MARKER}" in tensors:
            return _under(tensors, prefix)
    return dict(tensors)


def _unwrapped(tensors: Tensors) -> dict[str, Tensor]:
    # A flat 'model.' prefix reads as the wrapper of that name: one strip serves both.
    return _without_prefix(_under(tensors, f"{_wrapper(tensors)}."))


FORMATS: tuple[Format, ...] = (
    Format("self_forcing", lambda tensors: _wrapper(tensors) is not None, _unwrapped),
    Format(
        "comfyui",
        lambda tensors: _MARKER in _without_prefix(tensors),
        _without_prefix,
    ),
)


def normalise(tensors: Tensors) -> tuple[str, dict[str, Tensor]]:
    """Find the layout and rename to Wan's names.

    Returns:
        (format identifier, tensors under Wan's names without any prefix).

    Raises:
        UserError: no known layout; says what the names look like.
    """
    for layout in FORMATS:
        if layout.matches(tensors):
            return layout.name, layout.rename(tensors)
    raise UserError(
        f"this file is {describe(tensors)}, not a Wan denoiser; expected a tensor "
        f"'{_MARKER}' (Self Forcing .pt or ComfyUI safetensors)"
    )


def describe(tensors: Tensors) -> str:
    """What the names of some tensors look like, in a few words."""
    names = list(tensors)

    def some(*needles: str) -> bool:
        return any(needle in name for name in names for needle in needles)

    if some("lora_A", "lora_down", "lora_up"):
        return "a LoRA"
    if some("decoder.middle.0.residual", "decoder.upsamples"):
        return "a Wan VAE"
    if some("decoder.22.", "decoder.1.weight"):
        return "a TAEHV autoencoder"
    if some("encoder.block.0.layer.0.SelfAttention", "spiece_model", "token_embedding.weight"):
        return "a T5 text encoder"
    if _wrapper(tensors) is not None or _MARKER in _without_prefix(tensors):
        return "a Wan denoiser"
    example = f", such as '{names[0]}'" if names else ""
    return f"a file of {len(names)} tensors of unknown kind{example}"
