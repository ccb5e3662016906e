"""A pickle of tensors acted out on inert stand-ins, to see what torch would do with it.

torch's weights-only unpickler runs no code, but it trusts numbers: a pickle can ask it for memory
that the file does not fill, or for work without end (a short chain of tuples takes 2^40 steps to
hash). The scan knows the instructions that torch knows, allows the calls that checkpoints need,
and checks every argument of them.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

MAX_TENSORS = 100_000
MAX_PICKLE_BYTES = 64 * 2**20
# Each can cost 3 us and 100 bytes, here and again in torch. torch writes 35 a tensor, and a Wan
# 14B with its average and its critic has 3,300 tensors.
_MAX_INSTRUCTIONS = 700_000
# A character can take 4 bytes in memory.
_MAX_TEXT = 16 * 2**20
_MAX_DIMENSIONS = 64
# torch reads numbers of up to 255 bytes; as keys, many large ones can be made to collide.
_MAX_NUMBER = 2**60

_STORAGES = {
    "torch.storage.UntypedStorage": 1,
    "torch.ByteStorage": 1,
    "torch.CharStorage": 1,
    "torch.BoolStorage": 1,
    "torch.ShortStorage": 2,
    "torch.HalfStorage": 2,
    "torch.BFloat16Storage": 2,
    "torch.IntStorage": 4,
    "torch.FloatStorage": 4,
    "torch.LongStorage": 8,
    "torch.DoubleStorage": 8,
    "torch.ComplexFloatStorage": 8,
    "torch.ComplexDoubleStorage": 16,
}
_DTYPES = {
    str(dtype): dtype.itemsize for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)
}
# Of what torch allows, left out: what allocates from a number (bytearray), sets attributes of any
# name (rebuilding with state), and tensors that are no plain weights (sparse, quantised, nested,
# meta, wrapped).
_CALLS = {
    "collections.OrderedDict",
    "collections.Counter",
    "builtins.complex",
    "builtins.set",
    "torch.Size",
    "torch.device",
    "_codecs.encode",
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
    "torch._utils._rebuild_parameter",
}
_ALLOWED = {*_CALLS, *_STORAGES, *_DTYPES}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_SHORT_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_CHANGES = (
    *("MARK", "TUPLE", "EMPTY_LIST", "EMPTY_DICT", "APPEND", "APPENDS", "SETITEM", "SETITEMS"),
    *("REDUCE", "BUILD", "BINPERSID"),
)


class DamagedFile(Exception):
    """The file contradicts itself; the message is the reason, in a few words."""


class UnusualFile(Exception):
    """The file has what no checkpoint needs and some attacks do; the message says what."""


class HoldsCode(Exception):
    """The pickle names something that no tensor needs; the message is that name."""


class _Global(str):
    """The name of a function, storage type or dtype."""


class _Dict:
    """A dict, of which only kind and size matter."""

    __slots__ = ("ordered", "size")

    def __init__(self, ordered: bool = False, size: int = 0) -> None:
        self.ordered = ordered
        self.size = size


@dataclass(frozen=True)
class Storage:
    """Numbers that tensors look into: how many bytes, how many of them an element has."""

    size: int
    itemsize: int


_TENSOR = object()
_OTHER = object()


def other_protocol(protocol: int) -> str:
    """What is wrong with a pickle of another protocol than torch's own, 2."""
    return (
        f"saved with pickle_protocol={protocol}, which torch's weights-only loading does not read; "
        "it reads 2, the default of torch.save"
    )


def name_code(stream: io.BytesIO) -> None:
    """Raise HoldsCode if a pickle of whichever protocol names a global that no tensor needs."""
    words: list[str] = []
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            if count > _MAX_INSTRUCTIONS:
                return
            if opcode.name in ("GLOBAL", "INST"):
                _check_global(_global_name(argument))
            elif opcode.name == "STACK_GLOBAL":
                _check_global(".".join(words[-2:]))
            elif isinstance(argument, str):
                words = [*words[-1:], argument]
    except ValueError:
        # Cut or mangled: nothing that could be named came before.
        return


class PickleScan:
    """One pickle: numbers, texts, tuples and lists are themselves, the rest are placeholders.

    Args:
        stream: positioned at the pickle; left behind it.
        records: bytes by storage key in a zip archive. None in the layout before torch 1.6, where
            the pickle alone says how large a storage is: see `storages` and `roots` afterwards.
    """

    def __init__(self, stream: io.BytesIO, records: Mapping[str, int] | None = None) -> None:
        self.storages: dict[str, Storage] = {}
        # Storages with bytes of their own in the file; the others are parts of them.
        self.roots: set[str] = set()
        self._stream = stream
        self._records = records
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self._tensors = 0
        self._copied = 0
        self._text = 0

    def run(self) -> Any:
        """The stand-in of the pickled object.

        Raises:
            DamagedFile, UnusualFile, HoldsCode: as their names say.
            LookupError, ValueError, TypeError: the pickle is damaged.
        """
        start = self._stream.tell()
        length = self._stream.seek(0, io.SEEK_END)
        self._stream.seek(start)
        changes = {name: getattr(self, f"_{name.lower()}") for name in _CHANGES}
        for count, (opcode, argument, _) in enumerate(pickletools.genops(self._stream)):
            if count > _MAX_INSTRUCTIONS:
                raise UnusualFile(f"more than {_MAX_INSTRUCTIONS} instructions in its pickle")
            name = opcode.name
            if name in changes:
                changes[name]()
            elif name in _SHORT_TUPLES:
                self._short_tuple(_SHORT_TUPLES[name])
            elif name in _CONSTANTS:
                self._stack.append(_CONSTANTS[name])
            elif name in ("BINPUT", "LONG_BINPUT"):
                if argument > length:
                    raise DamagedFile("a reference out of bounds")
                self._memo[argument] = self._stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                self._stack.append(self._memo[argument])
            elif name in ("BININT", "BININT1", "BININT2", "BINFLOAT", "LONG1"):
                if name == "LONG1" and abs(argument) > _MAX_NUMBER:
                    raise UnusualFile("a number of more than 60 bits")
                self._stack.append(argument)
            elif name in ("BINUNICODE", "SHORT_BINSTRING"):
                self._count_text(argument)
                self._stack.append(argument)
            elif name == "GLOBAL":
                self._count_text(argument)
                full_name = _global_name(argument)
                _check_global(full_name)
                self._stack.append(_Global(full_name))
            elif name == "STOP":
                break
            elif name != "PROTO" or argument != 2:
                self._stream.seek(start)
                name_code(self._stream)
                if name == "PROTO":
                    raise UnusualFile(other_protocol(argument))
                raise UnusualFile(f"{name} in its pickle, which torch does not write")
        return self._stack.pop()

    def _mark(self) -> None:
        self._marks.append(self._stack)
        self._stack = []

    def _pop_mark(self) -> list[Any]:
        items = self._stack
        self._stack = self._marks.pop()
        return items

    def _tuple(self) -> None:
        items = self._pop_mark()
        self._stack.append(tuple(items))

    def _short_tuple(self, count: int) -> None:
        if len(self._stack) < count:
            raise DamagedFile("a tuple of nothing")
        self._stack[-count:] = [tuple(self._stack[-count:])]

    def _empty_list(self) -> None:
        self._stack.append([])

    def _empty_dict(self) -> None:
        self._stack.append(_Dict())

    def _append(self) -> None:
        item = self._stack.pop()
        _expect(self._stack[-1], list).append(item)

    def _appends(self) -> None:
        items = self._pop_mark()
        _expect(self._stack[-1], list).extend(items)

    def _setitem(self) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._set_items([key, value])

    def _setitems(self) -> None:
        self._set_items(self._pop_mark())

    def _set_items(self, items: list[Any]) -> None:
        if len(items) % 2:
            raise DamagedFile("a key without a value")
        for key in items[::2]:
            _check_key(key)
        _expect(self._stack[-1], _Dict).size += len(items) // 2

    def _build(self) -> None:
        """A state dict gets attributes: torch's `_metadata`."""
        state = _expect(self._stack.pop(), _Dict)
        if not _expect(self._stack[-1], _Dict).ordered:
            raise UnusualFile("attributes for something that is not a state dict")
        self._count_copy(state.size)

    def _binpersid(self) -> None:
        kind, type_name, key, location, numel, *view = _expect(self._stack.pop(), tuple)
        if kind != "storage" or type(type_name) is not _Global or type_name not in _STORAGES:
            raise DamagedFile("a storage of unknown type")
        if type(key) is not str or type(location) is not str:
            raise DamagedFile("a storage without a name")
        itemsize = _STORAGES[type_name]
        storage = Storage(_count(numel) * itemsize, itemsize)
        if self._records is not None:
            if view or storage.size > self._records.get(key, -1):
                raise DamagedFile("a storage larger than its record")
        else:
            self.roots.add(key)
        self._remember(key, storage)
        if view and view[0] is not None:
            view_key, offset, view_numel = _expect(view[0], tuple)
            if (_count(offset) + _count(view_numel)) * itemsize > storage.size:
                raise DamagedFile("a part of a storage outside of it")
            storage = Storage(view_numel * itemsize, itemsize)
            self._remember(_expect(view_key, str), storage)
        self._stack.append(storage)

    def _remember(self, key: str, storage: Storage) -> None:
        # torch keeps the first of a name, whatever is said of it later.
        if self.storages.setdefault(key, storage) != storage:
            raise DamagedFile("two storages of one name")

    def _reduce(self) -> None:
        arguments = _expect(self._stack.pop(), tuple)
        function = self._stack[-1]
        if type(function) is not _Global or function not in _CALLS:
            raise UnusualFile(f"a call of '{function if type(function) is _Global else '?'}'")
        self._stack[-1] = self._call(function.rpartition(".")[2], arguments)

    def _call(self, name: str, arguments: tuple) -> Any:
        """What a call gives. Containers are copied by it, so copies have a budget."""
        match name, arguments:
            case "OrderedDict" | "Counter", ():
                return _Dict(ordered=name == "OrderedDict")
            case "OrderedDict", (list(pairs),):
                self._count_copy(len(pairs))
                for pair in pairs:
                    if type(pair) not in (list, tuple) or len(pair) != 2:
                        raise DamagedFile("a key without a value")
                    _check_key(pair[0])
                return _Dict(ordered=True, size=len(pairs))
            case "Counter", (_Dict(size=size),):
                self._count_copy(size)
                return _Dict(size=size)
            case "set", (list(items),):
                self._count_copy(len(items))
                for item in items:
                    _check_key(item)
                return _OTHER
            case "Size", (tuple(sizes),):
                self._count_copy(len(sizes))
                return tuple(_count(size) for size in sizes)
            case "complex", (float() | int(), float() | int()):
                return _OTHER
            case "device", (str(),) | (str(), int()):
                return _OTHER
            case "encode", (str(text), "latin1"):
                self._count_text(text)
                return _OTHER
            case "_rebuild_parameter", (tensor, bool(), hooks) if tensor is _TENSOR:
                _check_hooks(hooks)
                return _TENSOR
            case "_rebuild_tensor", (storage, offset, size, stride):
                return self._tensor(storage, None, offset, size, stride)
            case "_rebuild_tensor_v2", (storage, offset, size, stride, bool(), hooks):
                _check_hooks(hooks)
                return self._tensor(storage, None, offset, size, stride)
            case "_rebuild_tensor_v3", (storage, offset, size, stride, bool(), hooks, dtype):
                _check_hooks(hooks)
                if type(dtype) is not _Global or dtype not in _DTYPES:
                    raise DamagedFile("a tensor of unknown type")
                return self._tensor(storage, _DTYPES[dtype], offset, size, stride)
        raise UnusualFile(f"a call of {name} with strange arguments")

    def _tensor(
        self, storage: Any, itemsize: int | None, offset: Any, size: Any, stride: Any
    ) -> object:
        self._tensors += 1
        if self._tensors > MAX_TENSORS:
            raise UnusualFile(f"more than {MAX_TENSORS} tensors")
        room = _expect(storage, Storage).size
        itemsize = itemsize or storage.itemsize
        if len(_expect(size, tuple)) != len(_expect(stride, tuple)) or len(size) > _MAX_DIMENSIONS:
            raise DamagedFile("a tensor with wrong dimensions")
        numel = 1
        end = _count(offset)
        for length, step in zip(size, stride, strict=True):
            numel *= _count(length)
            end += (length - 1) * _count(step)
        if offset * itemsize > room or (numel and (end + 1) * itemsize > room):
            raise DamagedFile("a tensor outside its storage")
        # Rows of one number repeated: small here, of any size once something is computed with it.
        if numel * itemsize > room:
            raise UnusualFile("a tensor larger than its storage")
        return _TENSOR

    def _count_copy(self, count: int) -> None:
        self._copied += count
        if self._copied > _MAX_INSTRUCTIONS:
            raise UnusualFile("copies of copies in its pickle")

    def _count_text(self, text: str) -> None:
        self._text += len(text)
        if self._text > _MAX_TEXT:
            raise UnusualFile(f"more than {_MAX_TEXT} characters of text in its pickle")


def _global_name(argument: str) -> str:
    name = argument.replace(" ", ".", 1)
    # torch.save writes the name that the module had in Python 2.
    return f"builtins.{name[12:]}" if name.startswith("__builtin__.") else name


def _check_global(name: str) -> None:
    if name not in _ALLOWED:
        raise HoldsCode(name)


def _check_key(key: Any) -> None:
    """Only what is hashed at once; a nested tuple can take for ever."""
    if type(key) not in (str, int):
        raise UnusualFile("a dict key that is neither text nor a number")


def _check_hooks(hooks: Any) -> None:
    if hooks is not None and type(hooks) is not _Dict:
        raise DamagedFile("hooks on a tensor")


def _expect(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise DamagedFile(f"a {kind.__name__.strip('_').lower()} is missing in its pickle")
    return value


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise DamagedFile("a size that is not a whole number")
    return value
