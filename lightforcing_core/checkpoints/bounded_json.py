"""JSON from a file that may be hostile: a safetensors header, or the index of a sharded model."""

from __future__ import annotations

import json
from typing import Any

# The safetensors format allows headers of 100 MB, which take several times that once parsed.
# 100,000 tensors fit into 16 MiB; Wan 14B needs 0.2.
MAX_JSON_BYTES = 16 * 2**20
# An object or list in a parsed file takes 60 to 230 bytes.
_MAX_PARTS = 1_000_000


def parse_object(raw: bytes) -> dict[str, Any]:
    """The JSON object that `raw` is.

    Raises:
        ValueError: too large, not UTF-8, not JSON, not an object, nested too deeply, or with a
            key that occurs twice, of which readers would take one or the other.
    """
    parts = sum(raw.count(sign) for sign in (b"{", b"[", b","))
    if len(raw) > MAX_JSON_BYTES or parts > _MAX_PARTS:
        raise ValueError(f"{len(raw)} bytes of JSON with {parts} parts are too much")
    try:
        value = json.loads(raw.decode(), object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError("its JSON is nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError("its JSON is not an object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    items = dict(pairs)
    if len(items) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"'{name}' occurs twice")
            seen.add(name)
    return items
