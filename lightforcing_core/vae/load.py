"""From a file to a `VideoVAE`: which family it is, whether it is whole, and its conventions."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from ..checkpoints.archive import one_line
from ..checkpoints.files import read_state_dict
from ..checkpoints.formats import describe
from ..checkpoints.metadata import OUR_KEY, read_facts
from ..errors import UserError
from .latent_stats import LATENT_CHANNELS
from .streaming import EncodePadding, LatentConvention, VideoVAE
from .taehv import TAEHV, TAEHVConfig
from .wan_vae import WanVAE

_LOG = logging.getLogger("lightforcing")
_WRAPPERS = ("first_stage_model.", "state_dict.", "model.", "vae.", "taehv.")
_WAN_MARKER = "decoder.middle.0.residual.0.gamma"
_TAEHV_MARKER = "decoder.22.bias"
_KNOWN = (
    "Wan 2.1 VAE (Wan2.1_VAE.pth, wan_2.1_vae.safetensors), LightVAE (lightvaew2_1) or TAEHV "
    "(taew2_1, lighttaew2_1)"
)


def _without_wrappers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Strip names that trainers and other programs put around a whole state dict."""
    for wrapper in _WRAPPERS:
        if tensors and all(name.startswith(wrapper) for name in tensors):
            tensors = {name.removeprefix(wrapper): tensor for name, tensor in tensors.items()}
    return tensors


def _looks_like(tensors: Mapping[str, Tensor]) -> str:
    """What a file that is no supported VAE looks like, in a few words."""
    if any(name.startswith("decoder.upsamples.0.upsamples.") for name in tensors):
        return "a Wan 2.2 VAE, whose latents Wan 2.1 models do not have"
    return describe(tensors)


def _file_conventions(path: Path, metadata: Mapping[str, str]) -> dict[str, str]:
    """The conventions that a file of this project states in its metadata, checked."""
    facts = read_facts(metadata, path)
    choices = {"latents": get_args(LatentConvention), "encode_padding": get_args(EncodePadding)}
    for name, allowed in choices.items():
        if name in facts and facts[name] not in allowed:
            raise UserError(
                f"{path}: metadata '{OUR_KEY}' says {name} = {one_line(repr(facts[name]), 80)}, "
                f"expected {' or '.join(allowed)}; correct the file's metadata"
            )
    return {name: str(facts[name]) for name in choices if name in facts}


def load_vae(
    path: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    latents: LatentConvention | None = None,
) -> VideoVAE:
    """Load a Wan 2.1 VAE, a LightVAE or a file of the TAEHV family, told apart by tensor names.

    Args:
        path: a .safetensors or torch file.
        device: where the weights go.
        dtype: what they become; None keeps the file's.
        latents: for a TAEHV file, which latents it takes: 'normalised' (taew2_1) or 'denormalised'
            (lighttaew2_1). None asks the file's metadata and, where there is none, assumes
            'normalised', which the log then says; the tensors of the two are alike.

    Raises:
        UserError: no readable checkpoint, another kind of model, tensors missing, unexpected or
            not finite, or `latents` given for a Wan VAE.
    """
    path = Path(path)
    tensors, metadata = read_state_dict(path)
    tensors = _without_wrappers(tensors)
    conventions = _file_conventions(path, metadata)
    network: WanVAE | TAEHV
    try:
        if _WAN_MARKER in tensors:
            network = WanVAE.from_state_dict(tensors)
        elif _TAEHV_MARKER in tensors:
            network = _load_taehv(tensors)
        else:
            raise UserError(f"this is {_looks_like(tensors)}, not a VAE for Wan 2.1; give {_KNOWN}")
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    network = network.to(device=device, dtype=dtype).eval().requires_grad_(False)
    if isinstance(network, WanVAE):
        if latents is not None:
            raise UserError(
                f"{path}: a Wan VAE needs no latents setting, it is for TAEHV files; leave it out"
            )
        return VideoVAE(network)
    if latents is not None:
        conventions["latents"] = latents
    elif "latents" not in conventions:
        _LOG.info(
            "%s: assuming a TAEHV file for normalised latents (taew2_1); for lighttaew2_1 ask for "
            "denormalised ones, or colours and contrast are wrong",
            path.name,
        )
    return VideoVAE(network, **conventions)


def _load_taehv(tensors: dict[str, Tensor]) -> TAEHV:
    config = TAEHVConfig.from_state_dict(tensors)
    if config.image_channels != 3:
        raise UserError(
            f"this TAEHV file makes {config.image_channels} channels, expected the 3 of RGB; give "
            "taew2_1 or lighttaew2_1"
        )
    channels = config.latent_channels
    if channels != LATENT_CHANNELS:
        raise UserError(
            f"this TAEHV file has {channels} latent channels, Wan 2.1 has {LATENT_CHANNELS}; "
            "give taew2_1 or lighttaew2_1"
        )
    return TAEHV.from_state_dict(tensors)
