"""What a torch file would do when it is loaded, found out before it is loaded.

A torch file is a pickle plus raw numbers, in a zip archive or (before torch 1.6) one after the
other. torch's weights-only unpickler runs no code, but it trusts the numbers in the pickle: they
can ask for memory that the file does not fill, or for work without end. So the archive's table is
checked first, then the pickle is acted out on inert stand-ins: every call in it, every tensor's
place in its storage and every storage's place in the file.
"""

from __future__ import annotations

import io
import mmap
import struct
import tarfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from ..errors import UserError
from .pickle_scan import (
    MAX_PICKLE_BYTES,
    MAX_TENSORS,
    DamagedFile,
    HoldsCode,
    PickleScan,
    UnusualFile,
    name_code,
    other_protocol,
)

ZIP_MAGIC = b"PK\x03\x04"
PICKLE_MAGIC = b"\x80"
# The first two pickles of every file of the layout before torch 1.6: a magic number, version 1001.
_OLD_NUMBER = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_OLD_MAGIC = b"\x80\x02" + _OLD_NUMBER + b"\x80\x02M\xe9\x03."

_MAX_DIRECTORY_BYTES = 32 * 2**20
# torch's own notes in an archive (version, byte order, ...) are a few bytes, and read whole.
_MAX_NOTE_BYTES = 4096

_END = struct.Struct("<4s4H2LH")
_END64_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")


def one_line(text: object, limit: int = 300) -> str:
    """Text from a file or a library, fit for a one-line message: escaped where it is not printable
    (line ends, terminal control, reversed writing) and cut in the middle."""
    text = str(text)
    if len(text) > limit:
        text = f"{text[: limit // 2]}...{text[-limit // 2 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def check_torch_file(path: Path) -> None:
    """Let a torch file pass only if loading it builds plain tensors that lie within the file.

    Costs no more memory than the file's own table of contents, whatever the file claims.

    Args:
        path: a regular file that starts with ZIP_MAGIC or PICKLE_MAGIC.

    Raises:
        UserError: it is damaged, compressed, another kind of archive or pickle, or holds objects
            that could run code.
    """
    shown = one_line(path, 1000)
    try:
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            if data[: len(ZIP_MAGIC)] == ZIP_MAGIC:
                _check_zip(data)
            else:
                _check_old_layout(data)
    except HoldsCode as error:
        raise UserError(
            f"{shown} holds a Python object ('{one_line(error)}') that weights-only loading does "
            "not build and that could run code, it was not loaded: ask its author for a "
            ".safetensors file"
        ) from error
    except _OtherFile as error:
        raise UserError(f"{shown} is {error}") from error
    except UnusualFile as error:
        raise UserError(
            f"{shown} is an unusual torch file ({one_line(error)}), it was not loaded: ask its "
            "author for a .safetensors file"
        ) from error
    except _CONTRADICTIONS as error:
        reason = one_line(error) or type(error).__name__
        if isinstance(error, LookupError):
            reason = "its pickle refers to nothing"
        raise UserError(f"{shown} is a damaged torch file ({reason}); download it again") from error


# What the code below meets where a file's numbers do not fit together.
_CONTRADICTIONS = (
    DamagedFile,
    LookupError,
    ValueError,
    TypeError,
    struct.error,
    OSError,
    MemoryError,
)


class _OtherFile(Exception):
    """Not a checkpoint at all; the message goes on from the file's name."""


def _check_zip(data: mmap.mmap) -> None:
    entries = _read_directory(data)
    pickles = [name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise _OtherFile(
            "a zip archive but not a checkpoint (no data.pkl in it); unpack it, or give the "
            ".safetensors or .pt file"
        )
    folder = pickles[0].removesuffix("data.pkl")
    if any(name.endswith("/constants.pkl") for name in entries):
        raise _OtherFile(
            "a TorchScript program, not a checkpoint; give a .safetensors file of the weights"
        )
    places: list[tuple[int, int]] = []
    records: dict[str, int] = {}
    for name, entry in entries.items():
        # torch takes the folder from the first name, and looks names up without regard to case.
        if not name.startswith(folder):
            raise UnusualFile(f"'{name}' lies outside the folder '{folder}'")
        start = _check_entry(data, name, entry)
        places.append((entry.offset, start + entry.size))
        if name.startswith(f"{folder}data/"):
            records[name.removeprefix(f"{folder}data/")] = entry.size
        elif name == pickles[0]:
            if entry.size > MAX_PICKLE_BYTES:
                raise UnusualFile(f"data.pkl has {entry.size} bytes")
            stream = data[start : start + entry.size]
        elif entry.size > _MAX_NOTE_BYTES:
            raise UnusualFile(f"'{name}' has {entry.size} bytes")
        elif name.lower().endswith("/byteorder") and data[start : start + entry.size] != b"little":
            raise UnusualFile("its numbers are stored big-endian")
    places.sort()
    if any(end > start for (_, end), (start, _) in pairwise(places)):
        raise DamagedFile("entries overlap")
    PickleScan(io.BytesIO(stream), records).run()


@dataclass(frozen=True, slots=True)
class _Entry:
    flags: int
    method: int
    packed_size: int
    size: int
    offset: int


def _read_directory(data: mmap.mmap) -> dict[str, _Entry]:
    """Entries of a zip archive by name, as its central directory states them, in that order."""
    end_at = len(data) - _END.size
    if end_at < 0 or data[end_at : end_at + 4] != b"PK\x05\x06" or data[-2:] != b"\0\0":
        raise DamagedFile("its end is missing")
    _, _, _, _, count, size, offset, _ = _END.unpack_from(data, end_at)
    locator_at = end_at - _END64_LOCATOR.size
    if locator_at >= 0 and data[locator_at : locator_at + 4] == b"PK\x06\x07":
        _, _, end_at, _ = _END64_LOCATOR.unpack_from(data, locator_at)
        if end_at + _END64.size > locator_at:
            raise DamagedFile("its table of contents is out of place")
        magic, *_, count, size, offset = _END64.unpack_from(data, end_at)
        if magic != b"PK\x06\x06":
            raise DamagedFile("its table of contents is out of place")
    if offset + size != end_at:
        raise DamagedFile("its table of contents is out of place")
    if count > MAX_TENSORS + 100 or size > _MAX_DIRECTORY_BYTES:
        raise UnusualFile(f"{count} entries in the archive")
    table = data[offset : offset + size]
    entries: dict[str, _Entry] = {}
    at = 0
    for _ in range(count):
        magic, _, _, flags, method, _, _, _, packed, full, name_length, extra_length, *rest = (
            _CENTRAL.unpack_from(table, at)
        )
        comment_length, _, _, _, start = rest
        at += _CENTRAL.size
        name = table[at : at + name_length].decode(errors="surrogateescape")
        extra = table[at + name_length : at + name_length + extra_length]
        at += name_length + extra_length + comment_length
        if magic != b"PK\x01\x02" or at > size:
            raise DamagedFile("its table of contents is cut")
        full, packed, start = _wide_sizes(extra, full, packed, start)
        entries[name] = _Entry(flags, method, packed, full, start)
    if len({name.lower() for name in entries}) != count or at != size:
        raise DamagedFile("its table of contents is wrong")
    return entries


def _wide_sizes(extra: bytes, *sizes: int) -> list[int]:
    """The sizes of an entry, those that do not fit 32 bits taken from its extra field."""
    wide = b""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            wide = extra[at + 4 : at + 4 + length]
        at += 4 + length
    numbers = iter(struct.unpack(f"<{len(wide) // 8}Q", wide[: len(wide) // 8 * 8]))
    return [next(numbers, size) if size == 0xFFFFFFFF else size for size in sizes]


def _check_entry(data: mmap.mmap, name: str, entry: _Entry) -> int:
    """Where the bytes of an entry start; they are all inside the file."""
    if entry.method != 0 or entry.packed_size != entry.size:
        raise UnusualFile(f"'{name}' is compressed, which torch never does")
    if entry.flags & 1:
        raise UnusualFile(f"'{name}' is encrypted")
    magic, _, _, method, *_, name_length, extra_length = _LOCAL.unpack_from(data, entry.offset)
    name_at = entry.offset + _LOCAL.size
    start = name_at + name_length + extra_length
    if start + entry.size > len(data):
        raise DamagedFile("an entry reaches past the end of the file")
    stored_name = data[name_at : name_at + name_length].decode(errors="surrogateescape")
    if magic != ZIP_MAGIC or method != 0 or stored_name != name:
        raise DamagedFile("an entry is not where the table of contents says")
    return start


def _check_old_layout(data: mmap.mmap) -> None:
    """The layout before torch 1.6: five pickles, then each storage as a length and its bytes."""
    stream = io.BytesIO(data[:MAX_PICKLE_BYTES])
    if data[: len(_OLD_MAGIC)] != _OLD_MAGIC:
        name_code(stream)
        if _OLD_NUMBER in data[:64]:
            raise UnusualFile(other_protocol(data[1]))
        raise _OtherFile("a Python pickle but not a checkpoint; give a .safetensors or .pt file")
    try:
        tarfile.TarInfo.frombuf(data[: tarfile.BLOCKSIZE], "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        pass
    else:
        # torch would unpack it into a temporary folder.
        raise UnusualFile("it is a tar archive as well")
    stream.seek(len(_OLD_MAGIC))
    PickleScan(stream).run()
    content = PickleScan(stream)
    content.run()
    keys = PickleScan(stream).run()
    # A storage that no bytes follow would keep what was in memory.
    if type(keys) is not list or sorted(keys) != sorted(content.roots):
        raise DamagedFile("its list of storages is wrong")
    at = stream.tell()
    for key in keys:
        storage = content.storages[key]
        (stored,) = struct.unpack_from("<q", data, at)
        at += 8 + storage.size
        if stored * storage.itemsize != storage.size or at > len(data):
            raise DamagedFile("it ends early or its sizes are wrong")
