"""The embedded text encoder: the shipped table, clauses and roles, unknown and surplus words."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lightforcing.lightforcing_core.embedded import EMBEDDED_TEXT
from lightforcing.lightforcing_core.errors import UserError
from lightforcing.lightforcing_core.text.embedded import EmbeddedTextEncoder


@pytest.fixture(scope="module")
def encoder() -> EmbeddedTextEncoder:
    return EmbeddedTextEncoder.load(EMBEDDED_TEXT)


def _roles(encoder: EmbeddedTextEncoder, prompt: str) -> dict[str, set[str]]:
    """Words by role, by their canonical spelling."""
    spelling: dict[int, str] = {}
    for word, index in encoder.words.items():
        spelling.setdefault(index, word)
    result: dict[str, set[str]] = {}
    for word, role in encoder.tokenize(prompt):
        result.setdefault(encoder.roles[role], set()).add(spelling[word])
    return result


def test_each_word_gets_the_role_of_its_clause(encoder) -> None:
    prompt = (
        "A large red circle moving slowly left and a small blue star moving quickly up over a "
        "striped sand background with a pillar, camera panning right"
    )
    assert _roles(encoder, prompt) == {
        "object 1": {"large", "red", "circle", "slowly", "left"},
        "object 2": {"small", "blue", "star", "quickly", "up"},
        "scene": {"striped", "sand"},
        "pillar": {"pillar"},
        "camera": {"camera", "panning", "right"},
    }


def test_case_punctuation_synonyms_and_order_of_clauses_do_not_matter(encoder) -> None:
    plain = encoder.encode("a small green square moving quickly down over a dotted clay background")
    fancy = encoder.encode("Over a DOTTED, brown background: a tiny, green BOX (fast) downwards!")
    assert torch.equal(plain.sum(1), fancy.sum(1))


def test_a_clause_without_colour_or_shape_goes_on_about_the_same_object(encoder) -> None:
    split = _roles(encoder, "a red circle, large, moving left and a blue star")
    assert split == {"object 1": {"red", "circle", "large", "left"}, "object 2": {"blue", "star"}}


def test_the_result_is_the_rows_repeated_to_the_full_length(encoder) -> None:
    embedded = encoder.encode("a red circle")
    assert embedded.shape == (1, 512, 4096) and embedded.dtype == torch.float32
    rows = encoder.encode_rows("a red circle")
    assert torch.equal(embedded[0].unflatten(0, (-1, encoder.rows))[7], rows)
    assert (rows.abs().sum(1) > 0).sum() == 2
    assert encoder.encode("").abs().sum() == 0


def test_unknown_words_are_named_in_one_warning(encoder, caplog) -> None:
    with caplog.at_level(logging.WARNING, logger="lightforcing"):
        odd = encoder.encode("a wobbly red circle with a fluffy wobbly hat")
    (record,) = caplog.records
    assert record.getMessage().endswith("wobbly, fluffy, hat")
    assert torch.equal(odd, encoder.encode("a red circle"))


def test_words_in_other_scripts_and_numbers_are_named_too(encoder, caplog) -> None:
    with caplog.at_level(logging.WARNING, logger="lightforcing"):
        encoder.encode("красный circle 3 círculo")
    (record,) = caplog.records
    assert record.getMessage().endswith("красный, 3, círculo")


def test_surplus_words_are_cut_with_a_warning(encoder, caplog) -> None:
    with caplog.at_level(logging.WARNING, logger="lightforcing"):
        embedded = encoder.encode("large red circle left " * 20)
    assert "reads the first 32" in caplog.text
    assert embedded.shape == (1, 512, 4096)


def test_a_fifth_object_shares_the_last_role(encoder) -> None:
    many = " and ".join(f"a {c} circle" for c in ("red", "blue", "green", "cyan", "white"))
    assert set(_roles(encoder, many)) == {"object 1", "object 2", "object 3", "object 4", "other"}


def test_the_vocabulary_lists_words_not_marks(encoder) -> None:
    assert {"red", "gray", "panning", "over", "a"} <= set(encoder.vocabulary)
    assert not {",", "."} & set(encoder.vocabulary)
    assert list(encoder.vocabulary) == sorted(encoder.vocabulary)


def test_wrong_files_are_refused_with_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no text vocabulary"):
        EmbeddedTextEncoder.load(tmp_path / "missing.safetensors")
    other = tmp_path / "other.safetensors"
    save_file({"words": torch.zeros(2, 2)}, other)
    with pytest.raises(UserError, match="not the text vocabulary"):
        EmbeddedTextEncoder.load(other)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(EMBEDDED_TEXT.read_bytes()[:200])
    with pytest.raises(UserError, match="damaged"):
        EmbeddedTextEncoder.load(broken)
