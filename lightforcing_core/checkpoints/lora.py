"""LoRAs on a denoiser: check that they fit, merge them, hand them to ComfyUI.

`lora_file` reads the files.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError
from .archive import one_line
from .lora_file import Difference, Lora, Pair, load_lora

__all__ = [
    "Difference",
    "Lora",
    "Pair",
    "check_loras",
    "load_lora",
    "merge",
    "parse_strength",
    "to_host_names",
]

log = logging.getLogger("lightforcing")

# Parameters whose first axis is the model's width.
_AS_WIDE = re.compile(
    r"blocks\.\d+\.(?:(?:self_attn|cross_attn)\.[qkvo]|ffn\.2)\.weight"
    r"|(?:patch_embedding|(?:text|time)_embedding\.[02])\.weight"
)
# Useful strengths are near 1; far larger ones overflow, and the base file would be blamed.
MAX_STRENGTH = 1000.0
_PUBLISHED_WIDTHS = {1536: "a 1.3B", 3072: "a 5B", 5120: "a 14B"}


def check_loras(loras: Sequence[Lora], shapes: Mapping[str, torch.Size]) -> tuple[str, ...]:
    """Hold every update against the parameter it is for.

    Args:
        loras: as loaded.
        shapes: of the denoiser's parameters, by Wan's names.

    Returns:
        What will not be used: keys of the files that name no parameter of Wan, and parameters
        that this denoiser lacks. Whoever loads says so (`load.notes`): this is asked several times.

    Raises:
        UserError: an update has another shape than its parameter, or a LoRA has nothing for
            this denoiser.
    """
    unmatched: list[str] = []
    for lora in loras:
        absent = [name for name in lora.updates if name not in shapes]
        if len(absent) == len(lora.updates):
            raise UserError(
                f"{lora.name}: none of its {len(absent)} parameters is in this checkpoint "
                f"({_some(absent)}); use a LoRA made for this model"
            )
        _check_shapes(lora, shapes)
        unmatched += [*lora.unmatched, *absent]
    return tuple(unmatched)


def merge(name: str, weight: Tensor, loras: Sequence[tuple[Lora, float]]) -> Tensor:
    """One parameter with LoRAs added: weight + sum of strength * scale * (up @ down).

    Args:
        name: Wan's parameter name.
        weight: any float dtype and device, of a shape that `check_loras` has passed.
        loras: with the strength of each.

    Returns:
        A new float32 tensor on the weight's device, computed in float32; the weight itself (its
        own dtype, no copy) when nothing touches it, which a strength of 0 does not.

    Raises:
        UserError: a strength that is not finite or beyond `MAX_STRENGTH`.
    """
    parts: list[tuple[Pair | Difference, float]] = []
    for lora, strength in loras:
        if not abs(strength) <= MAX_STRENGTH:
            raise UserError(
                f"{lora.name}: the strength must be a finite number from {-MAX_STRENGTH:g} to "
                f"{MAX_STRENGTH:g}, got {strength:g}; use one near 1"
            )
        if strength != 0:
            parts += [(part, strength) for part in lora.updates.get(name, ())]
    if not parts:
        return weight
    merged = weight.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    for part, strength in parts:
        part.add_to(merged, strength)
    return merged


def to_host_names(lora: Lora) -> dict[str, Tensor]:
    """The same LoRA as ComfyUI's own loader takes it (comfy.lora.load_lora).

    Returns:
        'diffusion_model.<module>.lora_up.weight', '.lora_down.weight' and '.alpha' (float32, one
        number); '.diff' and '.diff_b' for differences. Tensors are those of the file where
        possible; a pair and a difference for one weight, which ComfyUI would not add up, become
        one '.diff'.
    """
    host: dict[str, Tensor] = {}
    for name, parts in lora.updates.items():
        module = f"diffusion_model.{name.removesuffix('.weight').removesuffix('.bias')}"
        if len(parts) == 1 and isinstance(pair := parts[0], Pair):
            host[f"{module}.lora_up.weight"] = pair.up
            host[f"{module}.lora_down.weight"] = pair.down
            host[f"{module}.alpha"] = torch.tensor(pair.scale * pair.down.shape[0])
            continue
        whole = next(part for part in parts if isinstance(part, Difference))
        value = whole.value
        if len(parts) > 1 or whole.scale != 1:
            value = torch.zeros(whole.shape)
            for part in parts:
                part.add_to(value, 1.0)
        host[f"{module}.diff_b" if name.endswith(".bias") else f"{module}.diff"] = value
    return host


def parse_strength(text: str) -> tuple[Path, float]:
    r"""'FILE' or 'FILE:STRENGTH' of the command line; the strength is 1 when it is not given.

    A colon in the path itself is no strength ('C:\x.safetensors'), and neither is one in the name
    of a file that exists.

    Raises:
        UserError: what follows the colon is no finite number or beyond `MAX_STRENGTH`, or the
            path is none that a file can have.
    """
    head, colon, tail = text.rpartition(":")
    drive = len(head) == 1 and head.isalpha()
    if not colon or drive or re.search(r"[\\/]", tail) or _exists(text, head):
        return Path(text), 1.0
    try:
        strength = float(tail)
    except ValueError:
        strength = math.nan
    if not head or not abs(strength) <= MAX_STRENGTH:
        raise UserError(
            "a LoRA is given as FILE or FILE:STRENGTH with a finite number from "
            f"{-MAX_STRENGTH:g} to {MAX_STRENGTH:g}, got '{one_line(text)}'"
        )
    return Path(head), strength


def _exists(text: str, head: str) -> bool:
    """Whether all of 'FILE:STRENGTH' is the name of a file."""
    try:
        return Path(text).exists()
    except OSError:
        # The longest names that a file can have are too long with a strength behind them.
        pass
    try:
        Path(head).exists()
    except OSError as error:
        raise UserError(
            f"a LoRA cannot be looked up at '{one_line(head)}' ({error.strerror}); check the path"
        ) from error
    return False


def _check_shapes(lora: Lora, shapes: Mapping[str, torch.Size]) -> None:
    wrong = [
        (name, part)
        for name, parts in lora.updates.items()
        for part in parts
        if name in shapes and not part.fits(shapes[name])
    ]
    if not wrong:
        return
    # A tensor that tells the width explains all the others.
    name, part = next((item for item in wrong if _AS_WIDE.fullmatch(item[0])), wrong[0])
    message = f"{lora.name}: '{name}' is {list(part.shape)}, expected {list(shapes[name])}"
    came, expected = part.shape[:1], shapes[name][:1]
    if _AS_WIDE.fullmatch(name) and len(part.shape) > 1 and came != tuple(expected):
        kind = _PUBLISHED_WIDTHS.get(came[0], "another")
        raise UserError(
            f"{message}; made for another width: this LoRA is for {kind} model ({came[0]}), the "
            f"checkpoint is {expected[0]} wide"
        )
    raise UserError(f"{message}; use a LoRA made for this model")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
