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
_LATENT_CHANNELS = 16  # of the Wan 2.1 VAE, the only latents this engine makes
_PLAIN_TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_SCALES = (".weight_scale", ".scale_weight", ".scale_input", ".input_scale", "scaled_fp8")


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
        """The preset in a file's metadata.

        Raises:
            UserError: a value of the wrong type or out of range.
        """
        known: dict[str, object] = {}
        for name, least in _LEAST.items():
            if name in facts:
                known[name] = _whole_number(facts, name, least)
        if "steps" in facts:
            steps = facts["steps"]
            if not isinstance(steps, list) or not all(isinstance(v, int | float) for v in steps):
                raise UserError(f"metadata 'steps' must be a list of numbers, got {steps!r}")
            known["steps"] = check_steps(steps)
        return cls(**known)  # type: ignore[arg-type]


_LEAST = {
    "frames_per_chunk": 1,
    "window_frames": -1,
    "sink_frames": 0,
    "width": 16,
    "height": 16,
    "frames": 1,
}


def _whole_number(facts: Mapping[str, object], name: str, least: int) -> int:
    value = facts[name]
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UserError(f"metadata '{name}' must be a whole number from {least} up, got {value!r}")
    return value


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
        preset = Preset.from_facts(facts)
        layout, tensors = normalise(tensors)
        if num_heads is None and "num_heads" in facts:
            num_heads = _whole_number(facts, "num_heads", 1)
        text_len = _whole_number(facts, "text_len", 1) if "text_len" in facts else 512
        config = WanConfig.from_tensors(tensors, num_heads=num_heads, text_len=text_len)
        _refuse_other_wans(config, tensors)
        tree, unexpected = _build(config, tensors, device, dtype)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
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


def _refuse_other_wans(config: WanConfig, tensors: Mapping[str, Tensor]) -> None:
    image = any(name.startswith("img_emb.") or ".k_img." in name for name in tensors)
    if image or config.in_dim > config.out_dim:
        raise UserError(
            f"this is a Wan image-to-video checkpoint ({config.in_dim} channels in, "
            f"{config.out_dim} out); use a text-to-video one: it continues from a first frame by "
            "itself"
        )
    if config.in_dim != _LATENT_CHANNELS or config.out_dim != _LATENT_CHANNELS:
        raise UserError(
            f"this Wan model has {config.in_dim} latent channels, expected {_LATENT_CHANNELS} "
            "(Wan 2.1); Wan 2.2 5B needs another autoencoder and is not supported"
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
    scales = [name for name in tensors if name.endswith(_SCALES)]
    odd = [name for name in expected if tensors[name].dtype not in _PLAIN_TYPES]
    if scales or odd:
        first = (odd or scales)[0]
        raise UserError(
            f"this is a quantised checkpoint ('{first}' is "
            f"{str(tensors[first].dtype).removeprefix('torch.')}), which is not supported yet; "
            "use the bf16, fp16 or float32 file"
        )
    state = {}
    for name in expected:
        tensor = tensors[name].to(device=device, dtype=dtype)
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
