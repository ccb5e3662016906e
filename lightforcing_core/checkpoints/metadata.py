"""What this project, and ComfyUI, write into a safetensors file beside its tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from ..errors import UserError
from .archive import one_line

OUR_KEY = "lightforcing"  # our own facts, JSON
HOST_KEY = "config"
# Of a size or a count without a narrower bound of its own.
MAX_NUMBER = 2**20
# What makes ComfyUI (0.21 and newer) build its causal class. Exactly this: it hands the inner
# object to the constructor.
HOST_CONFIG = {"transformer": {"causal_ar": True}}


def read_facts(metadata: Mapping[str, str], path: Path) -> dict[str, object]:
    """Our own facts about a file, empty when it has none.

    Raises:
        UserError: they are not a JSON object.
    """
    text = metadata.get(OUR_KEY)
    if text is None:
        return {}
    try:
        facts = json.loads(text)
    except (ValueError, RecursionError) as error:  # numbers of 4300 digits raise a ValueError
        raise UserError(
            f"{path}: metadata '{OUR_KEY}' is not JSON ({error}); the file is damaged"
        ) from error
    if not isinstance(facts, dict):
        raise UserError(
            f"{path}: metadata '{OUR_KEY}' must be a JSON object, got {one_line(text, 80)}"
        )
    return facts


def is_marked_causal(metadata: Mapping[str, str]) -> bool:
    """Whether ComfyUI would see the file as an autoregressive model."""
    try:
        config = json.loads(metadata.get(HOST_KEY, "{}"))
    except (ValueError, RecursionError):
        return False
    inner = config.get("transformer") if isinstance(config, dict) else None
    return isinstance(inner, dict) and inner.get("causal_ar") is True


def file_metadata(facts: Mapping[str, object]) -> dict[str, str]:
    """Metadata of a denoiser's file: ComfyUI's flag, and our own facts."""
    return {HOST_KEY: json.dumps(HOST_CONFIG), OUR_KEY: json.dumps(dict(facts))}


def whole_number(facts: Mapping[str, object], name: str, least: int, most: int = MAX_NUMBER) -> int:
    """A fact that must be a whole number from `least` to `most`.

    Raises:
        UserError: it is something else.
    """
    value = facts[name]
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise UserError(
            f"metadata '{name}' must be a whole number from {least} to {most}, got "
            f"{one_line(repr(value), 80)}; correct the file's metadata"
        )
    return value
