"""The text encoder of the embedded model: words to embedding rows, from a compact table.

It has the interface of a real one (prompt in, [1, 512, 4096] out), so the same denoiser forward,
file layout and hosts serve both. The table is a safetensors file with

- `words` [V, C1] and `roles` [R, C2]: codes of words and of clause roles;
- metadata `lightforcing`, JSON: `words` (word to row of `words`; synonyms share one), `fillers`
  (known words without meaning), `separators` (words that end a clause), `roles` (names of the rows
  of `roles`), `role_words` (words that make a clause one of that role), `rows`, `text_len`,
  `text_dim`.

A prompt is cut into clauses at separators. A clause with a camera, pillar or background word has
that role; one with a colour or shape is about the next object; any other goes on about the object
before it. Each word becomes one row: its code, its clause's role code, zeros up to `text_dim`. So
"which colour belongs to which shape" is written in each row.

The rows are padded with zeros to `rows` (32) and repeated to `text_len` (512). Wan attends to all
512 rows without a mask, so padding with 490 zero rows would drown a short prompt; repeating leaves
attention exactly what it is over the 32 rows, which is what training uses.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import UserError

log = logging.getLogger("lightforcing")

_TOKEN = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class EmbeddedTextEncoder:
    """Prompt to embedding rows; build it with `load`.

    Attributes:
        word_codes: float32 [V, C1].
        role_codes: float32 [R, C2].
        words: word to its row of `word_codes`.
        fillers: known words that make no row.
        separators: words and marks that end a clause.
        roles: names of the rows of `role_codes`; those that start with "object" are numbered.
        role_words: role to the words that give a clause that role, strongest role first.
        rows: rows before repetition.
        text_len, text_dim: size of the result.
    """

    word_codes: Tensor
    role_codes: Tensor
    words: Mapping[str, int]
    fillers: frozenset[str]
    separators: frozenset[str]
    roles: Sequence[str]
    role_words: Mapping[str, frozenset[str]]
    rows: int
    text_len: int
    text_dim: int

    @classmethod
    def load(cls, path: str | Path) -> EmbeddedTextEncoder:
        """Read the table.

        Raises:
            UserError: the file is missing or is not such a table.
        """
        path = Path(path)
        if not path.is_file():
            raise UserError(f"no text vocabulary at {path}; give the file that came with the model")
        try:
            with safe_open(path, framework="pt") as file:
                facts = json.loads((file.metadata() or {}).get("lightforcing", "{}"))
                if facts.get("kind") != "embedded_text":
                    raise UserError(
                        f"{path} is not the text vocabulary of the embedded model; "
                        "expected lightforcing_mini_text.safetensors"
                    )
                word_codes, role_codes = (file.get_tensor(name) for name in ("words", "roles"))
            return cls(
                word_codes=word_codes.float(),
                role_codes=role_codes.float(),
                words=facts["words"],
                fillers=frozenset(facts["fillers"]),
                separators=frozenset(facts["separators"]),
                roles=tuple(facts["roles"]),
                role_words={k: frozenset(v) for k, v in facts["role_words"].items()},
                rows=facts["rows"],
                text_len=facts["text_len"],
                text_dim=facts["text_dim"],
            )
        except (SafetensorError, json.JSONDecodeError, KeyError, OSError) as error:
            raise UserError(f"{path}: damaged text vocabulary ({error}); fetch it again") from error

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Every word that is understood, synonyms and fillers included, sorted."""
        spoken = {word for word in self.separators if word.isalpha()}
        return tuple(sorted({*self.words, *self.fillers, *spoken}))

    def tokenize(self, prompt: str) -> list[tuple[int, int]]:
        """(word index, role index) of each row; case and other punctuation do not matter.

        Unknown words are left out with one warning that names them; so are words past `rows`.
        """
        clauses: list[list[str]] = [[]]
        unknown: list[str] = []
        for token in _TOKEN.findall(prompt.lower()):
            if token in self.separators:
                clauses.append([])
            elif token in self.words:
                clauses[-1].append(token)
            elif token.isalnum() and token not in self.fillers and token not in unknown:
                unknown.append(token)
        if unknown:
            log.warning(
                "ignored words that the embedded model does not know: %s", ", ".join(unknown)
            )
        pairs: list[tuple[int, int]] = []
        objects = 0
        for clause in filter(None, clauses):
            role = self._named_role(clause)
            if role in ("object", None):
                objects += role == "object"
                # Adjectives before the first noun belong to it.
                role = f"object {max(objects, 1)}"
            place = self.roles.index(role) if role in self.roles else len(self.roles) - 1
            pairs += [(self.words[word], place) for word in clause]
        if len(pairs) > self.rows:
            log.warning(
                "the prompt has %d meaningful words, the embedded model reads the first %d",
                len(pairs),
                self.rows,
            )
        return pairs[: self.rows]

    def _named_role(self, clause: Sequence[str]) -> str | None:
        named = (role for role, members in self.role_words.items() if members & set(clause))
        return next(named, None)

    def encode_rows(self, prompt: str) -> Tensor:
        """Rows before repetition, float32 [rows, text_dim]; unused rows are zeros."""
        result = torch.zeros(self.rows, self.text_dim)
        word_width, role_width = self.word_codes.shape[1], self.role_codes.shape[1]
        for row, (word, role) in enumerate(self.tokenize(prompt)):
            result[row, :word_width] = self.word_codes[word]
            result[row, word_width : word_width + role_width] = self.role_codes[role]
        return result

    def encode(self, prompt: str) -> Tensor:
        """Embedding of a prompt, float32 [1, text_len, text_dim]; an empty prompt is legal."""
        repeats = self.text_len // self.rows
        return self.encode_rows(prompt).repeat(repeats, 1).unsqueeze(0)
