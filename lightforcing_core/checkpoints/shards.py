"""Which files a checkpoint consists of: itself, the shards beside it, or what a folder holds."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import UserError
from .archive import one_line
from .bounded_json import MAX_JSON_BYTES, parse_object

_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors", re.DOTALL)
_INDEX = ".index.json"
_TORCH_ENDS = (".pt", ".pth", ".ckpt", ".bin")
_MAX_FILES = 1000
_EXPECTED = (
    "*.safetensors.index.json with its shards, or *.safetensors, there or in its subfolder "
    "transformer"
)


@dataclass(frozen=True)
class Shards:
    """Files that make up one checkpoint.

    Args:
        files: in the order to read them.
        index: file by tensor name, where an index says so.
        source: the index, for messages.
    """

    files: tuple[Path, ...]
    index: Mapping[str, Path] = field(default_factory=dict)
    source: Path | None = None


def find_shards(path: Path) -> Shards:
    """The files behind a path that exists.

    Args:
        path: a folder, an index (*.index.json), one shard (name-00001-of-00003.safetensors), or
            any other file, which then is the only one.

    Raises:
        UserError: the folder holds no checkpoint or more than one, the index is damaged or leads
            out of its folder, or a shard is missing.
    """
    if path.is_dir():
        return _in_folder(path)
    if path.name.endswith(_INDEX):
        return _from_index(path)
    return Shards(_siblings(path))


def _in_folder(folder: Path) -> Shards:
    for place in (folder, folder / "transformer"):
        indexes = _visible(place, f"*.safetensors{_INDEX}")
        if len(indexes) > 1:
            names = ", ".join(one_line(path.name) for path in indexes[:4])
            raise UserError(
                f"{one_line(folder, 1000)} holds {len(indexes)} models ({names}); give one of "
                "these files"
            )
        if indexes:
            return _from_index(indexes[0])
        files = _visible(place, "*.safetensors")
        if len(files) > _MAX_FILES:
            raise UserError(
                f"{one_line(folder, 1000)} holds {len(files)} .safetensors files, which is no "
                "checkpoint; give one file"
            )
        if files:
            complete: set[Path] = set()
            for path in files:
                if path not in complete:
                    complete.update(_siblings(path))
            return Shards(tuple(sorted(complete)))
        torch_files = [file for end in _TORCH_ENDS for file in _visible(place, f"*{end}")]
        if len(torch_files) > 1:
            names = ", ".join(one_line(path.name) for path in torch_files[:4])
            raise UserError(
                f"{one_line(folder, 1000)} holds {len(torch_files)} torch files ({names}); give "
                "the one to load"
            )
        if torch_files:
            return Shards(tuple(torch_files))
    raise UserError(
        f"{one_line(folder, 1000)} is a folder without a checkpoint; expected {_EXPECTED}, or give "
        "a .safetensors or .pt file"
    )


def _visible(folder: Path, pattern: str) -> list[Path]:
    """Files by pattern, without the hidden ones that macOS leaves beside each file."""
    return sorted(
        path for path in folder.glob(pattern) if not path.name.startswith(".") and path.is_file()
    )


def _siblings(path: Path) -> tuple[Path, ...]:
    match = _SHARD.fullmatch(path.name)
    if match is None:
        return (path,)
    stem, number, total = match[1], int(match[2]), int(match[3])
    if number > total or not 1 <= total <= _MAX_FILES:
        raise UserError(
            f"{one_line(path, 1000)} names itself shard {number} of {total}, which cannot be; "
            "give its original name back to it"
        )

    def shard(number: int) -> Path:
        return path.with_name(f"{stem}-{number:05}-of-{total:05}.safetensors")

    # Published files count from 1; some tools count from 0.
    first = 0 if number == 0 or shard(0).is_file() else 1
    files = tuple(shard(number) for number in range(first, first + total))
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise UserError(
            f"{one_line(missing[0], 1000)} is missing ({len(missing)} of {total} shards are); "
            "download it into the same folder"
        )
    return files


def _from_index(path: Path) -> Shards:
    shown = one_line(path, 1000)
    try:
        with path.open("rb") as file:
            table = parse_object(file.read(MAX_JSON_BYTES + 1)).get("weight_map")
    except OSError as error:
        raise UserError(f"cannot read {shown}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(
            f"{shown} is a damaged index ({one_line(error)}); download it again"
        ) from error
    if not isinstance(table, dict) or not table:
        raise UserError(
            f"{shown} is not an index of shards (no weight_map); give a .safetensors file"
        )
    index: dict[str, Path] = {}
    for tensor, name in table.items():
        if not isinstance(name, str) or not _is_plain_name(name):
            raise UserError(
                f"{shown} leads to '{one_line(name)}'; expected names of files in its own folder: "
                "download it again"
            )
        index[tensor] = path.with_name(name)
    files = tuple(sorted(set(index.values())))
    if len(files) > _MAX_FILES:
        raise UserError(f"{shown} names {len(files)} files, expected at most {_MAX_FILES}")
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise UserError(
            f"{one_line(missing[0], 1000)} is missing ({len(missing)} of the {len(files)} files of "
            f"{one_line(path.name)} are); download it into the same folder"
        )
    return Shards(files, index, path)


def _is_plain_name(name: str) -> bool:
    # The colon is a drive or a stream on Windows.
    return (
        name.isprintable()
        and not any(sign in name for sign in "/\\:")
        and name not in ("", ".", "..")
        and not name.endswith(_INDEX)
        and len(name.encode()) <= 255
    )
