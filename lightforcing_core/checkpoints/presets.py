"""The settings that weights were trained for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..errors import UserError
from ..timesteps import SELF_FORCING_STEPS, check_steps, shift_again
from .metadata import whole_number

_LEAST = {
    "frames_per_chunk": 1,
    "window_frames": -1,
    "sink_frames": 0,
    "width": 16,
    "height": 16,
    "frames": 1,
}
_LISTS = ("steps", "first_chunk_steps")
_NUMBERS = ("shift", "context_timestep")


@dataclass(frozen=True)
class Preset:
    """Settings a checkpoint was trained for; a user's own settings come first.

    Attributes:
        frames_per_chunk, window_frames, sink_frames: latent frames (-1: whole history).
        steps: timesteps, already shifted; first_chunk_steps: of the first chunk, None: the same.
        shift: the shift that `steps` were made with; for showing.
        context_timestep: noise level of the clean pass, 0..1000.
        width, height: pixels; frames: pixel frames. None when nothing says.
    """

    frames_per_chunk: int = 3
    steps: tuple[float, ...] = SELF_FORCING_STEPS
    first_chunk_steps: tuple[float, ...] | None = None
    shift: float = 5.0
    window_frames: int = -1
    sink_frames: int = 0
    context_timestep: float = 0.0
    width: int | None = None
    height: int | None = None
    frames: int | None = None

    def updated(self, facts: Mapping[str, object]) -> Preset:
        """This preset with the values that a file's metadata gives.

        Raises:
            UserError: a value of the wrong type or out of range.
        """
        known: dict[str, Any] = {
            name: whole_number(facts, name, least)
            for name, least in _LEAST.items()
            if name in facts
        }
        for name in _LISTS:
            steps = facts.get(name)
            if steps is None:
                continue
            if not isinstance(steps, list) or not all(map(_is_number, steps)):
                raise UserError(f"metadata '{name}' must be a list of numbers, got {steps!r}")
            known[name] = check_steps(steps)
        for name in _NUMBERS:
            if name in facts:
                value = facts[name]
                if not _is_number(value) or not 0 <= float(value) < 1000:  # type: ignore[arg-type]
                    raise UserError(
                        f"metadata '{name}' must be a number from 0 to below 1000, got {value!r}"
                    )
                known[name] = float(value)  # type: ignore[arg-type]
        return replace(self, **known)

    def with_shift(self, shift: float) -> Preset:
        """The same lists of steps under another shift.

        Raises:
            UserError: the shift is not above 0.
        """
        first = self.first_chunk_steps
        return replace(
            self,
            steps=shift_again(self.steps, self.shift, shift),
            first_chunk_steps=None if first is None else shift_again(first, self.shift, shift),
            shift=shift,
        )

    def to_facts(self) -> dict[str, object]:
        """For a file's metadata and for JSON, nothing rounded; what nothing says is left out."""
        facts = {k: v for k, v in asdict(self).items() if v is not None}
        return {k: list(v) if k in _LISTS else v for k, v in facts.items()}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
