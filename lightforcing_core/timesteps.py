"""Denoising step lists. A timestep runs from 1000 (noise) to 0 (clean); sigma = timestep / 1000."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from .errors import UserError

TRAIN_TIMESTEPS = 1000.0


def warp_steps(steps: Sequence[float], shift: float) -> tuple[float, ...]:
    """Shift unwarped timesteps towards noise: sigma' = shift sigma / (1 + (shift - 1) sigma).

    Reference: Self Forcing `FlowMatchScheduler` and its `warp_denoising_step`. Its command line
    and training use shift 5; the 8 of its demo script is a class default, not what the
    published weights were trained with.
    """
    if not 0 < shift < math.inf:
        raise UserError(f"shift must be above 0 (Self Forcing uses 5), got {shift}")
    sigmas = [step / TRAIN_TIMESTEPS for step in steps]
    return tuple(TRAIN_TIMESTEPS * shift * s / (1 + (shift - 1) * s) for s in sigmas)


def shift_again(steps: Sequence[float], old: float, new: float) -> tuple[float, ...]:
    """A list that was warped with one shift, warped with another instead."""
    if new == old:
        return tuple(steps)
    sigmas = [step / TRAIN_TIMESTEPS for step in steps]
    plain = [TRAIN_TIMESTEPS * s / (old - (old - 1) * s) for s in sigmas]
    return warp_steps(plain, new)


SELF_FORCING_STEPS = warp_steps((1000, 750, 500, 250), shift=5.0)  # 1000, 937.5, 833.33, 625


def check_steps(steps: Sequence[float]) -> tuple[float, ...]:
    """The step list if it is one: at least one value, falling, within (0, 1000].

    Raises:
        UserError: it is not.
    """
    values = tuple(float(step) for step in steps)
    falling = all(a > b for a, b in itertools.pairwise(values))
    if not values or not falling or not all(0 < v <= TRAIN_TIMESTEPS for v in values):
        raise UserError(
            "a step list must fall from at most 1000 and end above 0, such as "
            f"1000,937.5,833.33,625; got {list(values)}"
        )
    return values
