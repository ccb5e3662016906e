"""Reading tensors from files that may be hostile.

Two readers only: safetensors, and torch's weights-only unpickler (which builds tensors and plain
containers and runs no code). Everything else is refused by content, not by file name.
"""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import UserError

# What the unpickler is seen to raise on files that were cut or overwritten in places.
_DAMAGE = (
    RuntimeError,
    EOFError,
    LookupError,
    ValueError,
    OSError,
    TypeError,
    AttributeError,
    AssertionError,
    struct.error,
)
# A safetensors file starts with the length of its JSON header; 100 MB is the format's own limit.
_MAX_HEADER_BYTES = 100_000_000


def read_state_dict(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a checkpoint file, on the CPU and memory-mapped where possible.

    Args:
        path: a .safetensors file or a torch .pt / .pth file, told apart by content.

    Returns:
        (tensors by name, metadata). A torch file may nest them: keys are then joined with '.'
        ('generator_ema.model.blocks.0...'), and values that are not tensors are dropped.

    Raises:
        UserError: missing, not a file, unreadable, truncated, with code in it, or not a
            checkpoint at all.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"no such file: {path}; check the path")
    if not path.is_file():
        raise UserError(f"{path} is a folder; give a .safetensors or .pt file")
    try:
        with path.open("rb") as file:
            head = file.read(16)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    if zipfile.is_zipfile(path) or head[:1] == b"\x80":
        return _read_torch(path), {}
    return _read_safetensors(path, head)


def read_metadata(path: str | Path) -> dict[str, str]:
    """Metadata of a safetensors file without its tensors; empty for anything else."""
    path = Path(path)
    if not path.is_file():
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError):
        return {}


def _read_safetensors(path: Path, head: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    size = path.stat().st_size
    header_bytes = int.from_bytes(head[:8], "little")
    looks_right = len(head) >= 9 and head[8:9] == b"{"
    if not looks_right or header_bytes > min(size - 8, _MAX_HEADER_BYTES):
        what = "empty" if size == 0 else "truncated" if looks_right else "neither format"
        raise UserError(
            f"{path} is not a checkpoint ({what}, {size} bytes); "
            "expected a .safetensors or torch .pt file: download it again"
        )
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise UserError(
            f"{path} is a damaged safetensors file ({error}); download it again"
        ) from error


def _read_torch(path: Path) -> dict[str, Tensor]:
    try:
        # mmap works only for the zip layout; the old one is read whole.
        content = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} holds Python objects other than tensors, which could run code; it was not "
            "loaded: ask its author for a .safetensors file"
        ) from error
    except _DAMAGE as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{path} is a damaged torch file ({first_line}); download it again"
        ) from error
    tensors: dict[str, Tensor] = {}
    _collect(content, "", tensors)
    if not tensors:
        raise UserError(f"{path} is a torch file without tensors; it is not a checkpoint")
    return tensors


def _collect(value: Any, name: str, tensors: dict[str, Tensor]) -> None:
    if isinstance(value, Tensor):
        tensors[name] = value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _collect(item, f"{name}.{key}" if name else str(key), tensors)
