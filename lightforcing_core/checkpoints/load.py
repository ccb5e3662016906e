"""From a checkpoint file to a module tree that can run."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError
from ..timesteps import SELF_FORCING_STEPS, check_steps
from ..wan.config import WanConfig
from ..wan.modules import WanModel
from .files import read_state_dict
from .formats import normalise

log = logging.getLogger("lightforcing")

METADATA_KEY = "lightforcing"  # our own facts, JSON, beside ComfyUI's `config`


@dataclass(frozen=True)
class Preset:
    """Settings a checkpoint was trained for; a user's own settings come first.

    Attributes:
        frames_per_chunk, window_frames, sink_frames: latent frames (-1: whole history).
        steps: timesteps.
        width, height: pixels; frames: pixel frames. None when the file does not say.
    """

    frames_per_chunk: int = 3
    steps: tuple[float, ...] = SELF_FORCING_STEPS
    window_frames: int = -1
    sink_frames: int = 0
    width: int | None = None
    height: int | None = None
    frames: int | None = None

    @classmethod
    def from_facts(cls, facts: Mapping[str, object]) -> Preset:
        known = {k: facts[k] for k in cls.__dataclass_fields__ if k in facts}
        if "steps" in known:
            known["steps"] = check_steps(known["steps"])  # type: ignore[arg-type]
        return cls(**known)  # type: ignore[arg-type]


@dataclass(frozen=True)
class LoadedModel:
    """A denoiser ready to run, and what its file said."""

    tree: WanModel
    config: WanConfig
    format: str
    preset: Preset
    unexpected: tuple[str, ...] = field(default=())


def read_facts(metadata: Mapping[str, str], path: Path) -> dict[str, object]:
    """Our own metadata of a file, empty when it has none."""
    text = metadata.get(METADATA_KEY)
    if text is None:
        return {}
    try:
        facts = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}: metadata '{METADATA_KEY}' is not JSON ({error}); the file is damaged"
        ) from error
    if not isinstance(facts, dict):
        raise UserError(f"{path}: metadata '{METADATA_KEY}' must be a JSON object, got {text}")
    return facts


def load_model(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    num_heads: int | None = None,
) -> LoadedModel:
    """Load a denoiser from any known layout (`formats.FORMATS`).

    Args:
        path: Self Forcing .pt, ComfyUI-named safetensors or our own.
        device: where to.
        dtype: of the weights; default: as stored.
        num_heads: overrides the file's metadata and the rule width / 128.

    Raises:
        UserError: the file is not such a checkpoint, tensors are missing or have wrong shapes,
            or weights are not finite.
    """
    path = Path(path)
    tensors, metadata = read_state_dict(path)
    facts = read_facts(metadata, path)
    try:
        layout, tensors = normalise(tensors)
        heads = num_heads or facts.get("num_heads")
        text_len = facts.get("text_len", 512)
        config = WanConfig.from_tensors(tensors, num_heads=heads, text_len=text_len)
        _refuse_image_to_video(tensors)
        tree, unexpected = _build(config, tensors, device, dtype)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    preset = Preset.from_facts(facts)
    log.info(
        "%s: %s, width %d, %d layers, %d heads, %.2f B parameters, %d frames a chunk",
        path.name,
        layout,
        config.dim,
        config.num_layers,
        config.num_heads,
        sum(p.numel() for p in tree.parameters()) / 1e9,
        preset.frames_per_chunk,
    )
    return LoadedModel(tree, config, layout, preset, unexpected)


def _refuse_image_to_video(tensors: Mapping[str, Tensor]) -> None:
    if any(name.startswith("img_emb.") or ".k_img." in name for name in tensors):
        raise UserError(
            "this is a Wan image-to-video checkpoint (it has image cross-attention); use a "
            "text-to-video one: it continues from a first frame by itself"
        )


def _build(
    config: WanConfig,
    tensors: Mapping[str, Tensor],
    device: torch.device | str,
    dtype: torch.dtype | None,
) -> tuple[WanModel, tuple[str, ...]]:
    """A tree with these tensors, and the names it had no use for."""
    with torch.device("meta"):
        tree = WanModel(config)
    expected = dict(tree.named_parameters())
    missing = [name for name in expected if name not in tensors]
    wrong = [
        f"{name} is {list(tensors[name].shape)}, expected {list(parameter.shape)}"
        for name, parameter in expected.items()
        if name in tensors and tensors[name].shape != parameter.shape
    ]
    if missing or wrong:
        parts = []
        if missing:
            parts.append(f"{len(missing)} tensors are missing ({_some(missing)})")
        if wrong:
            parts.append(f"{len(wrong)} have another shape ({_some(wrong)})")
        raise UserError(f"{' and '.join(parts)}; the file does not fit a Wan 2.1 denoiser")
    state = {}
    for name in expected:
        tensor = tensors[name].to(device=device, dtype=dtype)
        if not tensor.is_floating_point():
            raise UserError(f"'{name}' has data type {tensor.dtype}, expected floating point")
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(f"'{name}' holds NaN or infinite weights; the file is damaged")
        state[name] = tensor
    tree.load_state_dict(state, assign=True)
    unexpected = tuple(sorted(set(tensors) - set(expected)))
    if unexpected:
        log.warning("ignored %d unknown tensors (%s)", len(unexpected), _some(unexpected))
    return tree.requires_grad_(False).eval(), unexpected


def _some(names: list[str] | tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
