"""Reading tensors from files that may be hostile.

Two readers only: safetensors, and torch's weights-only unpickler (which builds tensors and plain
containers and runs no code) behind the checks of `archive`. A file is told by its content; a name
that says something else is refused.
"""

from __future__ import annotations

import pickle
import stat
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import UserError
from .archive import MAX_TENSORS, PICKLE_MAGIC, ZIP_MAGIC, check_torch_file, one_line
from .bounded_json import MAX_JSON_BYTES, parse_object
from .shards import Shards, find_shards

# What the two readers are seen to raise on files that were cut or overwritten in places.
_DAMAGE = (
    SafetensorError,
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    LookupError,
    ValueError,
    OSError,
    TypeError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    MemoryError,
    struct.error,
)
_MAX_NAME = 1000
_MAX_DEPTH = 64
_MAX_ITEMS = 1_000_000
# Tied and repeated weights share storage; more than this often they do only in an attack.
_MAX_SHARING = 8
_SAFETENSORS_EXTENSIONS = (".safetensors", ".sft")
_TORCH_EXTENSIONS = (".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle")
# What other programs go by, and open or run accordingly.
_OTHER_EXTENSIONS = (
    *(".gguf", ".onnx", ".png", ".jpg", ".jpeg", ".webp", ".gif", ".mp4", ".webm", ".txt"),
    *(".json", ".md", ".csv", ".html", ".yaml", ".yml", ".py", ".zip", ".tar", ".gz", ".7z"),
)
_EXPECTED = "expected a .safetensors or torch .pt file"


def read_state_dict(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a checkpoint, on the CPU and memory-mapped.

    Nothing is read before it is used and no private memory is taken, but for torch files of the
    layout before torch 1.6, which are read whole.

    Args:
        path: a .safetensors file or a torch .pt / .pth file; one shard of several
            (name-00001-of-00003.safetensors, the others beside it); an index of shards
            (*.safetensors.index.json); or a folder that holds these, itself or in its subfolder
            `transformer`.

    Returns:
        (tensors by name, metadata). A torch file may nest them: keys are then joined with '.'
        ('generator_ema.model.blocks.0...'), and values that are not tensors are dropped. Of
        several shards, metadata on which two disagree is dropped.

    Raises:
        UserError: missing, neither file nor folder, unreadable, truncated, with code in it, or
            not a checkpoint at all.
    """
    path = Path(path)
    _require_place(path)
    shards = find_shards(path)
    if len(shards.files) == 1 and not shards.index:
        return _read_file(shards.files[0])
    return _read_shards(shards)


def read_metadata(path: str | Path) -> dict[str, str]:
    """Metadata of one safetensors file without its tensors; empty for anything else."""
    path = Path(path)
    try:
        _require_place(path)
        if path.is_dir() or not _is_safetensors(_read_head(path)):
            return {}
        return _read_header(path)[1]
    except (UserError, OSError):
        return {}


def _require_place(path: Path) -> None:
    shown = one_line(path, 1000)
    try:
        mode = path.stat().st_mode
    except FileNotFoundError as error:
        raise UserError(f"no such file: {shown}; check the path") from error
    except OSError as error:
        raise UserError(f"cannot read {shown}: {error.strerror}; check the path") from error
    except ValueError as error:
        raise UserError(f"{shown} is not a path ({one_line(error)}); check it") from error
    # Opening a pipe would wait for its other end, for ever.
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise UserError(f"{shown} is a device or a pipe, not a file; {_EXPECTED}")


def _read_shards(shards: Shards) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    disputed: set[str] = set()
    for file in shards.files:
        part, facts = _read_file(file)
        for name in part:
            if name in tensors:
                raise UserError(
                    f"{one_line(file, 1000)} repeats the tensor '{one_line(name)}' of a file "
                    "beside it; give one file, or keep one version of the model in the folder"
                )
            if shards.index.get(name, file) != file:
                raise UserError(
                    f"{one_line(file, 1000)} has the tensor '{one_line(name)}', which "
                    f"{one_line(shards.source, 1000)} places in another file; download them again"
                )
        tensors.update(part)
        disputed |= {key for key in facts if metadata.get(key, facts[key]) != facts[key]}
        metadata.update(facts)
        if len(tensors) > MAX_TENSORS:
            raise UserError(
                f"{one_line(file, 1000)}: its model has more than {MAX_TENSORS} tensors"
            )
    for name, file in shards.index.items():
        if name not in tensors:
            raise UserError(
                f"{one_line(file, 1000)} lacks the tensor '{one_line(name)}' that "
                f"{one_line(shards.source, 1000)} places in it; download them again"
            )
    return tensors, {key: value for key, value in metadata.items() if key not in disputed}


def _read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    _require_place(path)
    try:
        head = _read_head(path)
        if _is_safetensors(head):
            _check_extension(path, "safetensors", _SAFETENSORS_EXTENSIONS)
            return _read_safetensors(path)
        if head.startswith((ZIP_MAGIC, PICKLE_MAGIC)):
            check_torch_file(path)
            _check_extension(path, "torch", _TORCH_EXTENSIONS)
            return _read_torch(path), {}
    except OSError as error:
        raise UserError(
            f"cannot read {one_line(path, 1000)}: {error.strerror}; check the disk and its rights"
        ) from error
    raise UserError(f"{one_line(path, 1000)} {_describe(head)}")


def _check_extension(path: Path, kind: str, known: tuple[str, ...]) -> None:
    """Raise when a name says that a file is something else than it is.

    Who trusts a file for being called .safetensors must not be given a pickle under that name, and
    other programs go by the name. Names without an extension (caches have them) say nothing, and
    neither does what looks like one but is no type of file ('Wan2.1-T2V-1.3B').
    """
    extension = path.suffix.lower()
    claims = {*_SAFETENSORS_EXTENSIONS, *_TORCH_EXTENSIONS, *_OTHER_EXTENSIONS} - {*known}
    if extension in claims:
        raise UserError(
            f"{one_line(path, 1000)} is a {kind} file under the wrong extension '{extension}'; "
            f"expected {known[0]}: rename it if you trust where it comes from"
        )


def _read_head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(512)


def _is_safetensors(head: bytes) -> bool:
    # The length of a header may begin with the bytes of another format, but never ends with them.
    return head[8:9] == b"{" and head[4:8] in (b"", b"\0\0\0\0")


def _describe(head: bytes) -> str:
    """What a file that is no checkpoint is, and what to do, as the rest of a sentence."""
    if head.startswith(b"version https://git-lfs"):
        return (
            "is a git-lfs pointer, not the file itself; download the real file (git lfs pull, or "
            "the download button of its page)"
        )
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
        return (
            "is a web page (it begins with '<'), saved in place of the file: often a login or "
            "error page; download the file again, logged in if its page asks for that"
        )
    if head.startswith(b"GGUF"):
        return "is a GGUF file, which is not supported; use the .safetensors file of the same model"
    if not head:
        return f"is not a checkpoint (empty, 0 bytes); {_EXPECTED}: download it again"
    if head[8:9] == b"{":
        size = int.from_bytes(head[:8], "little")
        return (
            f"is a damaged safetensors file (a header of {size} bytes, the format allows "
            "100,000,000); download it again"
        )
    if head[:2] == b"\x1f\x8b" or head[:2] == b"PK" or head[257:262] == b"ustar":
        return f"is an archive, not a checkpoint; {_EXPECTED}: unpack it"
    if head.lstrip()[:1] == b"{":
        return f"is a JSON text, not a checkpoint; {_EXPECTED}"
    what = "a text" if _is_text(head) else "neither format"
    return f"is not a checkpoint ({what}); {_EXPECTED}: download it again"


def _is_text(head: bytes) -> bool:
    return all(byte >= 32 or byte in b"\t\r\n\f" for byte in head)


def _damaged(path: Path, kind: str, reason: object) -> UserError:
    if isinstance(reason, Exception):
        if isinstance(reason, MemoryError) or "Cannot allocate memory" in str(reason):
            return UserError(
                f"cannot map {one_line(path, 1000)} into memory ({path.stat().st_size} bytes); "
                "close other programs, or use a machine with more memory"
            )
        reason = (str(reason) or type(reason).__name__).splitlines()[0]
    return UserError(
        f"{one_line(path, 1000)} is a damaged {kind} file ({one_line(reason)}); download it again"
    )


def _read_header(path: Path) -> tuple[list[str], dict[str, str]]:
    """Tensor names and metadata of a safetensors file; the rest of it is for the library."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 + length:
            raise UserError(
                f"{one_line(path, 1000)} is truncated (its header alone has {length} bytes, the "
                f"file {size}); download it again"
            )
        if length > MAX_JSON_BYTES:
            raise _damaged(path, "safetensors", f"a header of {length} bytes")
        raw = file.read(length)
    try:
        header = parse_object(raw)
    except ValueError as error:
        raise _damaged(path, "safetensors", error) from error
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _damaged(path, "safetensors", "metadata other than texts")
    return list(header), metadata


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    names, metadata = _read_header(path)
    _check_count(path, len(names))
    for name in names:
        _check_name(path, name)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in names}, metadata
    except _DAMAGE as error:
        raise _damaged(path, "safetensors", error) from error


def _read_torch(path: Path) -> dict[str, Tensor]:
    with path.open("rb") as file:
        mapped = file.read(4) == ZIP_MAGIC  # the old layout cannot be mapped
        file.seek(0)
        try:
            content = torch.load(
                path if mapped else file, map_location="cpu", weights_only=True, mmap=mapped
            )
        except _DAMAGE as error:
            raise _damaged(path, "torch", error) from error
    tensors = _flatten(path, content)
    if not tensors:
        raise UserError(
            f"{one_line(path, 1000)} is a torch file without tensors, not a checkpoint; give a "
            ".safetensors or .pt file with a state dict"
        )
    room = _MAX_SHARING * path.stat().st_size
    if sum(tensor.numel() * tensor.itemsize for tensor in tensors.values()) > room:
        raise _damaged(path, "torch", "its tensors share their numbers too often")
    return tensors


def _flatten(path: Path, content: Any) -> dict[str, Tensor]:
    """Tensors of nested mappings by their joined keys; the nesting may be endless."""
    tensors: dict[str, Tensor] = {}
    pending: list[tuple[str, int, Any]] = [("", 0, content)]
    seen = 0
    while pending:
        name, depth, value = pending.pop()
        if isinstance(value, Tensor):
            _check_name(path, name)
            _check_tensor(path, name, value)
            if name in tensors:
                raise _damaged(path, "torch", f"two tensors of the name '{name}'")
            tensors[name] = value.detach()
            _check_count(path, len(tensors))
        elif isinstance(value, dict):
            seen += len(value)
            if depth == _MAX_DEPTH or seen > _MAX_ITEMS:
                raise _damaged(path, "torch", "nested too deeply")
            inside = []
            # dict's own method: a hostile mapping has attributes, perhaps one named 'items'.
            for key, item in dict.items(value):
                if isinstance(item, (Tensor, dict)):
                    part = str(key)
                    # Each part by itself: joining long ones again and again takes time.
                    _check_name(path, part)
                    inside.append((f"{name}.{part}" if name else part, depth + 1, item))
            pending.extend(reversed(inside))
    return tensors


def _check_count(path: Path, count: int) -> None:
    if count > MAX_TENSORS:
        raise UserError(
            f"{one_line(path, 1000)} has more than {MAX_TENSORS} tensors, which no model has; it "
            "was not loaded: give another file"
        )


def _check_name(path: Path, name: str) -> None:
    if len(name) > _MAX_NAME or not name.isprintable():
        raise UserError(
            f"{one_line(path, 1000)} has a tensor with an impossible name ('{one_line(name, 60)}', "
            f"{len(name)} characters), it was not loaded: give another file"
        )


def _check_tensor(path: Path, name: str, tensor: Tensor) -> None:
    """Only plain numbers that the file holds: no repeats without end, no other kinds of tensor."""
    plain = (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.layout is torch.strided
        and tensor.device.type == "cpu"
        and not tensor.is_quantized
        and not tensor.is_nested
    )
    if not plain or tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
        raise UserError(
            f"{one_line(path, 1000)}: '{one_line(name, 100)}' is not a plain tensor (or larger "
            "than the numbers behind it), it was not loaded: ask for a .safetensors file"
        )
