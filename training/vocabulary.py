"""The words that prompts of the embedded model are made of, and the compact table that holds them.

Every word has a code, one row of a Hadamard matrix, so that all codes are orthogonal and no word
is a mixture of others. The role of the clause a word stands in (first object, second object,
background, pillar, camera) has a code of its own beside it: which adjective belongs to which noun
is then readable from each row alone.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "magenta", "white")
SHAPES = ("circle", "square", "triangle", "star")
SIZES = ("small", "large")
DIRECTIONS = ("left", "right", "up", "down")
SPEEDS = ("slowly", "quickly")
TEXTURES = ("plain", "striped", "checkered", "dotted")
TONES = ("grey", "sand", "olive", "slate", "clay")
CAMERAS = ("static", "left", "right")
CAMERA_WORDS = ("camera", "static", "panning")
PILLAR_WORDS = ("pillar",)

_SYNONYMS = {
    "gray": "grey", "beige": "sand", "sandy": "sand", "brown": "clay", "purple": "magenta",
    "pink": "magenta", "violet": "magenta", "turquoise": "cyan",
    "ball": "circle", "disc": "circle", "disk": "circle", "sphere": "circle", "round": "circle",
    "box": "square", "block": "square", "little": "small", "tiny": "small", "big": "large",
    "leftward": "left", "leftwards": "left", "rightward": "right", "rightwards": "right",
    "upward": "up", "upwards": "up", "downward": "down", "downwards": "down",
    "slow": "slowly", "quick": "quickly", "fast": "quickly", "rapidly": "quickly",
    "stripes": "striped", "checked": "checkered", "chequered": "checkered", "dots": "dotted",
    "still": "static", "fixed": "static", "pans": "panning", "pan": "panning",
    "column": "pillar", "post": "pillar",
    "circles": "circle", "squares": "square", "triangles": "triangle", "stars": "star",
}  # fmt: skip
_FILLERS = [
    "a", "an", "the", "is", "are", "it", "its", "to", "of", "at", "in", "there", "that", "stone",
    "moving", "moves", "move", "going", "goes", "flying", "flies", "sliding", "slides",
    "drifting", "drifts", "travelling", "travels", "background", "wall", "scene", "shape", "object",
]  # fmt: skip
_SEPARATORS = [
    ",", ".", ";", ":", "!", "(", ")", "and", "over", "on", "against", "with", "while", "as",
    "past", "behind", "before", "then", "plus",
]  # fmt: skip
# A clause has the first of these roles one of whose words it has, else it goes on about the
# object before it.
_ROLE_WORDS = {
    "camera": CAMERA_WORDS,
    "pillar": PILLAR_WORDS,
    "scene": (*TEXTURES, *TONES),
    "object": (*COLOURS, *SHAPES),
}
ROLES = ("object 1", "object 2", "object 3", "object 4", "scene", "pillar", "camera", "other")
_ROW_SCALE = 8.0  # rows of norm about 64, which 4096 inputs of standard initialisation expect


def _hadamard(size: int) -> Tensor:
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
    return matrix


def table() -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of the text file; `text.embedded` documents the format."""
    words = [*COLOURS, *SHAPES, *SIZES, *DIRECTIONS, *SPEEDS, *TEXTURES, *TONES]
    words += [*CAMERA_WORDS, *PILLAR_WORDS]
    index = {word: i for i, word in enumerate(words)}
    index.update({word: index[target] for word, target in _SYNONYMS.items()})
    facts = {
        "kind": "embedded_text",
        "text_dim": 4096,
        "text_len": 512,
        "rows": 32,
        "words": index,
        "fillers": _FILLERS,
        "separators": _SEPARATORS,
        "roles": ROLES,
        "role_words": {
            role: sorted(w for w, i in index.items() if words[i] in members)
            for role, members in _ROLE_WORDS.items()
        },
    }
    tensors = {
        "words": (_hadamard(64)[: len(words)] * _ROW_SCALE).half(),
        "roles": (_hadamard(len(ROLES)) * 2 * _ROW_SCALE).half(),
    }
    return tensors, {"lightforcing": json.dumps(facts)}


def write_table(path: Path) -> None:
    """Write the text file of the embedded model."""
    tensors, metadata = table()
    save_file(tensors, path, metadata=metadata)
