"""What every node's schema has in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from comfy_api.latest import io

CATEGORY = "LightForcing"


def node_schema(*, search_aliases: Sequence[str], **fields: Any) -> io.Schema:
    """A schema in our category; search aliases where this ComfyUI knows them (0.4 and newer)."""
    if any(field.name == "search_aliases" for field in dataclasses.fields(io.Schema)):
        fields["search_aliases"] = [*search_aliases]
    return io.Schema(category=CATEGORY, **fields)
