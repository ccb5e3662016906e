"""Prompts that follow each other in a video, as a CONDITIONING.

The schedule rides on the first prompt's entry, so that a sampler which does not know it makes the
whole video with the first prompt.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...lightforcing_core.errors import UserError
from ...lightforcing_core.generate import FRAME_RATE
from ...lightforcing_core.layout import TEMPORAL_COMPRESSION

_KEY = "lightforcing_prompts"


@dataclass(frozen=True, eq=False)
class PromptSchedule:
    """Prompts and when they begin.

    Attributes:
        starts: seconds, rising from 0.
        embeds: float [1, L, text_dim] each.
    """

    starts: tuple[float, ...]
    embeds: tuple[Tensor, ...]


def parse_prompts(text: str) -> list[tuple[float, str]]:
    """Lines of 'SECONDS: PROMPT' as (seconds, prompt), the first one at 0.

    A line without a time goes on with the prompt before it; empty lines are skipped.

    Raises:
        UserError: no prompt at 0, or times that do not rise.
    """
    prompts: list[tuple[float, str]] = []
    for number, line in enumerate(text.splitlines(), start=1):
        head, colon, tail = line.partition(":")
        start = _seconds(head) if colon else None
        if start is not None:
            if prompts and start <= prompts[-1][0]:
                raise UserError(
                    f"line {number} of the prompt schedule starts at {start:g} s, not after the "
                    f"{prompts[-1][0]:g} s of the prompt before it; put the lines in order"
                )
            prompts.append((start, tail.strip()))
        elif line.strip() and prompts:
            prompts[-1] = (prompts[-1][0], f"{prompts[-1][1]} {line.strip()}".strip())
        elif line.strip():
            prompts.append((0.0, line.strip()))
    if not prompts or prompts[0][0] != 0:
        raise UserError(
            "a prompt schedule begins with a prompt at 0 seconds, such as '0: a red circle'; "
            + (f"the first one here is at {prompts[0][0]:g} s" if prompts else "it is empty")
        )
    return prompts


def _seconds(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 <= value < float("inf") else None


def schedule_conditioning(schedule: PromptSchedule, extra: dict[str, Any]) -> list[Any]:
    """A CONDITIONING of one entry, the first prompt's, with the schedule on it."""
    return [[schedule.embeds[0], {**extra, _KEY: schedule}]]


def schedule_of(conds: Sequence[dict[str, Any]]) -> PromptSchedule | None:
    """The schedule on a guider's conditions, if there is one."""
    return next((cond[_KEY] for cond in conds if _KEY in cond), None)


def prompt_at(schedule: PromptSchedule, frame: int) -> tuple[int, Tensor]:
    """Number and embeds of the prompt of a chunk that starts at a latent frame.

    It is the last one that has begun when the chunk's first picture is shown, 16 pictures a second.
    """
    picture = max(TEMPORAL_COMPRESSION * (frame - 1) + 1, 0)
    number = bisect.bisect_right(schedule.starts, picture / FRAME_RATE) - 1
    return number, schedule.embeds[number]
