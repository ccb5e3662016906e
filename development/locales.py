"""English node texts as the page's locale files want them, from what the server says."""

from __future__ import annotations

from typing import Any


def node_texts(object_info: dict[str, Any]) -> dict[str, Any]:
    """The content of locales/en/nodeDefs.json; `object_info` is `GET /object_info`'s answer."""
    return {
        name: _texts(info)
        for name, info in sorted(object_info.items())
        if name.startswith("LightForcing")
    }


def _texts(info: dict[str, Any]) -> dict[str, Any]:
    inputs = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
    tooltips = info.get("output_tooltips") or [None] * len(info["output_name"])
    return {
        "display_name": info["display_name"],
        "description": info["description"],
        "inputs": {
            name: _named(name, options[0].get("tooltip") if options else None)
            for name, (_, *options) in inputs.items()
        },
        "outputs": {
            str(index): _named(name, tooltip)
            for index, (name, tooltip) in enumerate(zip(info["output_name"], tooltips, strict=True))
        },
    }


def _named(name: str, tooltip: str | None) -> dict[str, str]:
    return {"name": name} | ({"tooltip": tooltip} if tooltip else {})
