"""Prompt rows of scenes, as tensors: what `EmbeddedTextEncoder.encode_rows` gives for `prompts`.

Rows have no order for the denoiser (cross-attention without positions), so they are built from the
attributes directly, many scenes at once. Attributes that have their default value are left out at
times, so that a prompt which does not name them gets the default.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..lightforcing_core.text.embedded import EmbeddedTextEncoder
from .scenes import MAX_OBJECTS, Scenes
from .vocabulary import (
    CAMERAS,
    COLOURS,
    DIRECTIONS,
    ROLES,
    SHAPES,
    SIZES,
    SPEEDS,
    TEXTURES,
    TONES,
)

OMITTED_SHARE = 0.3
_OBJECT_ATTRIBUTES = (
    ("size", SIZES, "large"),
    ("colour", COLOURS, None),
    ("shape", SHAPES, None),
    ("speed", SPEEDS, "slowly"),
    ("direction", DIRECTIONS, "right"),
)
_SCENE_ATTRIBUTES = (("texture", TEXTURES, "plain"), ("tone", TONES, "grey"))
_NO_ROW = -1


class PromptRows:
    """Builds prompt rows on one device.

    Args:
        encoder: the vocabulary.
        device: where.
    """

    def __init__(self, encoder: EmbeddedTextEncoder, device: torch.device) -> None:
        self._encoder = encoder
        self._device = device
        # One row of zeros at the end serves index -1.
        self._words = _with_zero_row(encoder.word_codes).to(device)
        self._roles = _with_zero_row(encoder.role_codes).to(device)

    def indices(self, scenes: Scenes, generator: torch.Generator | None = None) -> Tensor:
        """Word and role of each row, int64 [B, rows, 2], -1 for no row.

        Args:
            scenes: on this device.
            generator: to leave out default attributes at random; None: nothing is left out.
        """
        rows: list[tuple[Tensor, int]] = []
        batch = len(scenes)

        def add(words: Tensor, role: str, present: Tensor, is_default: Tensor | None) -> None:
            if generator is not None and is_default is not None:
                chance = torch.rand(batch, generator=generator, device=self._device)
                present = present & ~(is_default & (chance < OMITTED_SHARE))
            rows.append((torch.where(present, words, _NO_ROW), ROLES.index(role)))

        always = torch.ones(batch, dtype=torch.bool, device=self._device)
        for slot in range(MAX_OBJECTS):
            present = scenes.count > slot
            for name, values, default in _OBJECT_ATTRIBUTES:
                index = getattr(scenes, name)[:, slot]
                omit = None if default is None else index == values.index(default)
                add(self._word(values)[index], f"object {slot + 1}", present, omit)
        for name, values, default in _SCENE_ATTRIBUTES:
            index = getattr(scenes, name)
            add(self._word(values)[index], "scene", always, index == values.index(default))
        add(self._word(("pillar",))[always.long() - 1], "pillar", scenes.pillar, None)
        static = scenes.camera == CAMERAS.index("static")
        before = len(rows)
        add(self._word(("camera",))[always.long() - 1], "camera", always, static)
        named = rows[before][0] >= 0
        add(self._word(("panning",))[always.long() - 1], "camera", named & ~static, None)
        add(self._word(CAMERAS)[scenes.camera], "camera", named, None)

        result = torch.full((batch, self._encoder.rows, 2), _NO_ROW, device=self._device)
        for i, (words, role) in enumerate(rows):
            result[:, i, 0] = words
            result[:, i, 1] = torch.where(words >= 0, role, _NO_ROW)
        return result

    def _word(self, words: tuple[str, ...]) -> Tensor:
        return torch.tensor([self._encoder.words[w] for w in words], device=self._device)

    def embed(self, indices: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows [B, rows, text_dim] of `indices`."""
        words, roles = self._words[indices[..., 0]], self._roles[indices[..., 1]]
        codes = torch.cat([words, roles], dim=-1).to(dtype)
        return torch.nn.functional.pad(codes, (0, self._encoder.text_dim - codes.shape[-1]))


def _with_zero_row(codes: Tensor) -> Tensor:
    return torch.cat([codes, torch.zeros_like(codes[:1])])
