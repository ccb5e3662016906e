"""docs/TROUBLESHOOTING.md quotes messages that the code really says."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "TROUBLESHOOTING.md").read_text(encoding="utf-8")
MESSAGES = re.findall(r"^> (.+)$", PAGE, re.MULTILINE)
COMFYUI_SAYS = {"Allocation on device"}


def said() -> str:
    """Every text in the shipped code, with the parts of an f-string apart."""
    texts = []
    for room in ("nodes", "lightforcing_core"):
        for file in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    texts.append(node.value)
    return "\n".join(texts)


SAID = said()


@pytest.mark.parametrize("message", [m for m in MESSAGES if m not in COMFYUI_SAYS])
def test_a_quoted_message_is_in_the_code(message: str) -> None:
    # Messages are put together where a value goes, and between sentences.
    parts = [part for part in re.split("…|; |, but ", message) if re.search(r"\w", part)]
    missing = [part for part in parts if part.strip() not in SAID]
    assert not missing, f"nothing says {missing}"
