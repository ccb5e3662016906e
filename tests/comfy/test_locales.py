"""Node texts in the page's languages: whole, current, and readable by the page."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from lightforcing.development.locales import node_texts

ROOT = Path(__file__).resolve().parents[2]
LANGUAGES = sorted(path.name for path in (ROOT / "locales").iterdir())


def read(language: str) -> dict[str, Any]:
    return json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))


def leaves(texts: Any, path: str = "") -> dict[str, str]:
    """Every text by its path."""
    if isinstance(texts, str):
        return {path: texts}
    found: dict[str, str] = {}
    for key, value in texts.items():
        found |= leaves(value, f"{path}.{key}" if path else key)
    return found


@pytest.fixture(scope="module")
def texts(server: Any) -> dict[str, Any]:
    """What the server says about the nodes."""
    return node_texts(server.ask("/object_info")[1])


def test_english_is_what_the_nodes_say(texts: dict[str, Any]) -> None:
    stale = leaves(read("en")).items() ^ leaves(texts).items()
    assert not stale, f"run python -m lightforcing.development locales: {sorted(stale)}"


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_text_is_there_and_none_is_stale(language: str, texts: dict[str, Any]) -> None:
    there, wanted = leaves(read(language)), leaves(texts)
    assert not wanted.keys() - there.keys(), "missing"
    assert not there.keys() - wanted.keys(), "stale"
    assert all(text.strip() for text in there.values())


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_page_can_read_every_text(language: str) -> None:
    """It compiles them as messages, in which these characters mean something."""
    for path, text in leaves(read(language)).items():
        assert not set(text) & set("{}@|"), f"{path}: {text}"


def test_chinese_keeps_the_figures(texts: dict[str, Any]) -> None:
    """A number that the English text says is in the Chinese one too."""
    chinese = leaves(read("zh"))
    for path, text in leaves(texts).items():
        figures = re.findall(r"\d+(?:\.\d+)?", text)
        missing = [figure for figure in figures if figure not in chinese[path]]
        assert not missing, f"{path}: {missing} not in {chinese[path]}"


def test_the_server_hands_them_to_the_page(server: Any) -> None:
    _, served = server.ask("/i18n")
    for language in LANGUAGES:
        assert served[language]["nodeDefs"] == read(language)
