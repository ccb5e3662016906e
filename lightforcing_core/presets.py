"""Presets of `lightforcing generate`: options of its own, bundled for a purpose.

An option given explicitly overrides the preset's. Some belong together: a sparsity of the user's
own brings its own limit (`--base-sparsity`), a window its own sink, another policy its own frames.

Eight-bit products are fp8 where the GPU multiplies it, else int8. Where a machine has neither,
`speed` is refused, since it would not be what its name says; `low-memory` leaves them out and keeps
the rest.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from . import schedule as schedules
from . import selection as policies
from .errors import UserError
from .fast.linears import EIGHT_BIT_SPEEDS, eight_bit_obstacle, eight_bit_speed
from .fast.operations import fused_obstacles

log = logging.getLogger("lightforcing")


@dataclass(frozen=True)
class RunPreset:
    """A bundle of options.

    Attributes:
        options: by name, as `argparse` has them.
        needs_eight_bit: whether it is refused where eight-bit products cannot be made.
    """

    options: Mapping[str, Any]
    needs_eight_bit: bool


def _sparse(name: str) -> dict[str, Any]:
    """Sparse attention as released under this name."""
    growth, policy = schedules.PRESETS[name], policies.PRESETS[name]
    return {
        "sparsity": growth.target,
        "base_sparsity": growth.base,
        "keep_frames": policy.keep_frames,
        "keep_sink": policy.keep_sink,
        "keep_near": policy.keep_near,
    }


PRESETS = {
    "speed": RunPreset(_sparse("short"), needs_eight_bit=True),
    "low-memory": RunPreset(
        {
            **_sparse("long"),
            "window": 12,
            "sink": 3,
            "decode_frames": 1,
            "text_device": "cpu",
        },
        needs_eight_bit=False,
    ),
}
# Options that the preset does not fill where the user gave one of these.
_SPARSITY = ("dense", "sparsity", "schedule_values")
_POLICY = ("dense", "policy")
_OWN = {
    "sparsity": _SPARSITY,
    "base_sparsity": _SPARSITY,
    "keep_frames": _POLICY,
    "keep_sink": _POLICY,
    "keep_near": _POLICY,
    "sink": ("window",),
}


def fill(
    name: str, given: Mapping[str, Any], device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """The options of a preset that a user left open, `speed` among them.

    Args:
        name: of one of PRESETS.
        given: options by name; None, False and empty ones are open.
        device, dtype: what the model will run on and in.

    Raises:
        UserError: the machine cannot do what the preset is for; says every reason.
    """
    preset = PRESETS[name]

    def is_given(option: str) -> bool:
        value = given.get(option)
        return value is not None and value is not False and value != ()

    filled = {
        option: value
        for option, value in preset.options.items()
        if not is_given(option) and not any(map(is_given, _OWN.get(option, ())))
    }
    if is_given("speed"):
        return filled
    speed = eight_bit_speed(device)
    obstacles = eight_bit_obstacles(speed, device, dtype)
    if not obstacles:
        return filled | {"speed": speed}
    reasons = "; ".join(obstacles)
    if preset.needs_eight_bit:
        raise UserError(
            f"the preset '{name}' cannot be used: eight-bit products: {reasons}; "
            "with '--speed plain' or 'fast' the rest of it can"
        )
    log.warning("preset '%s' without eight-bit products: %s", name, reasons)
    return filled


def eight_bit_obstacles(
    speed: str, device: torch.device, dtype: torch.dtype, widths: tuple[int, ...] = ()
) -> list[str]:
    """Why a speed out of `EIGHT_BIT_SPEEDS` cannot be had; empty: it can."""
    unfit = eight_bit_obstacle(device, dtype, EIGHT_BIT_SPEEDS[speed], widths)
    return [*fused_obstacles(device, dtype), *([f"eight-bit layers: {unfit}"] if unfit else [])]
