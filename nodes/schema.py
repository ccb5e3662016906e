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


def check_choices(node: type[io.ComfyNode], **values: object) -> bool | str:
    """For `validate_inputs`: whether combo inputs have values of their lists, or what is wrong.

    Older versions of ComfyUI do not look. Values that are not known yet are None.
    """
    for widget in node.define_schema().inputs:
        value = values.get(widget.id)
        if value is not None and value not in widget.options:
            return f"{widget.id} has no '{value}'; choose one of {', '.join(widget.options)}"
    return True
