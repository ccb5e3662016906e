"""Whatever a file holds, reading it gives plain tensors or one clear line, soon and in bounds."""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import struct
import tarfile
import tempfile
import time
import warnings
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from torch import Tensor, nn

from lightforcing.lightforcing_core.checkpoints import archive as archive_module
from lightforcing.lightforcing_core.checkpoints.files import read_metadata, read_state_dict
from lightforcing.lightforcing_core.errors import UserError

# ---- pickles by hand: torch.save refuses to write what an attacker would ----

PROTO = b"\x80\x02"
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"
HUGE = b"\x8a\x08" + struct.pack("<q", 10**12)


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def put(index: int) -> bytes:
    return b"r" + struct.pack("<I", index)


def get(index: int) -> bytes:
    return b"j" + struct.pack("<I", index)


def tensor(size: bytes, stride: bytes, numel: bytes = b"K\x04", key: str = "0") -> bytes:
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu")
    storage += numel + b"tQ"
    return REBUILD + b"(" + storage + b"K\x00" + size + stride + b"\x89NtR"


FOUR = tensor(b"K\x04\x85", b"K\x01\x85")


def archive(content: bytes, method: int = zipfile.ZIP_STORED, **notes: bytes) -> bytes:
    """A torch file around a pickle; its storage '0' has four floats."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as file:
        file.writestr("a/data.pkl", PROTO + content + b".")
        for name, note in notes.items():
            file.writestr(f"a/{name}", note)
        file.writestr("a/data/0", bytes(16))
        file.writestr("a/version", b"3\n")
    return stream.getvalue()


def header(facts: object, body: bytes = b"", length: int | None = None) -> bytes:
    raw = facts if isinstance(facts, bytes) else json.dumps(facts).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + body


def entry(start: int, end: int, shape: list[int] | None = None, dtype: str = "F32") -> dict:
    shape = [(end - start) // 4] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def refused(path: Path) -> str:
    """The message with which a path is refused, within five seconds."""
    start = time.perf_counter()
    with pytest.raises(UserError) as caught:
        read_state_dict(path)
    assert time.perf_counter() - start < 5
    message = str(caught.value)
    assert message.isprintable(), message
    return message


def refused_bytes(folder: Path, content: bytes, name: str = "model.pt") -> str:
    path = folder / name
    path.write_bytes(content)
    message = refused(path)
    assert str(path) in message
    assert list(folder.iterdir()) == [path], "something was left behind"
    return message


def mapping_of(tensor: Tensor) -> tuple[str, int]:
    """The file that a tensor's numbers lie in, and how many bytes of it were copied."""
    address = tensor.data_ptr()
    found = ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split(maxsplit=5)
        if not first.endswith(":"):
            start, end = (int(part, 16) for part in first.split("-"))
            found = rest[-1] if start <= address < end else ""
        elif found and first == "Anonymous:":
            return found, int(rest[0]) * 1024
    raise AssertionError("an address that is not mapped")


# ---- what is read ----


@pytest.mark.parametrize("kind", ["safetensors", "torch", "old torch"])
def test_plain_files_read_to_the_same_tensors(kind: str, tmp_path: Path) -> None:
    weights = {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).bfloat16(),
        "c": torch.arange(6).view(2, 3),
        "d": torch.zeros(0, 4),
        "e": torch.randn(4).to(torch.float8_e4m3fn),
        "f": torch.tensor(2.5),
    }
    path = tmp_path / ("m.safetensors" if kind == "safetensors" else "m.pt")
    if kind == "safetensors":
        save_file(weights, path)
    else:
        if kind == "old torch":
            del weights["e"]  # torch itself reads float8 back from zip files only
        torch.save(weights, path, _use_new_zipfile_serialization=kind != "old torch")
    read, _ = read_state_dict(path)
    assert list(read) == list(weights) or kind == "safetensors"
    assert set(read) == set(weights)
    for name, value in weights.items():
        assert read[name].dtype == value.dtype
        assert read[name].shape == value.shape
        assert torch.equal(read[name].float(), value.float())


@pytest.mark.parametrize(
    "name",
    ["m", "m.sft", "m.SAFETENSORS", "a1b2c3", "model.v2.1", "Wan2.1-T2V-1.3B", "Wan2.1-14B.bf16"],
)
def test_names_that_say_nothing_else_are_taken(name: str, tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / name)
    assert list(read_state_dict(tmp_path / name)[0]) == ["a"]


@pytest.mark.parametrize("name", ["m.pth", "m.ckpt", "m.bin", "m", "m.PT", "Wan2.1-T2V-1.3B"])
def test_torch_files_have_many_names(name: str, tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / name)
    assert list(read_state_dict(tmp_path / name)[0]) == ["a"]


@pytest.mark.parametrize("name", ["m.safetensors", "m.sft", "m.png", "m.txt", "m.py"])
def test_a_pickle_under_another_name_is_refused(name: str, tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / name)
    with pytest.raises(UserError, match=r"torch file under the wrong extension.*expected \.pt"):
        read_state_dict(tmp_path / name)


@pytest.mark.parametrize("name", ["m.pt", "m.bin", "m.GGUF", "m.mp4", "m.zip"])
def test_safetensors_under_another_name_are_refused(name: str, tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / name)
    with pytest.raises(UserError, match=r"wrong extension.*expected \.safetensors"):
        read_state_dict(tmp_path / name)


def test_what_training_writes_besides_weights_is_no_obstacle(tmp_path: Path) -> None:
    layer = nn.Linear(3, 2)
    shared = torch.randn(4, 4)
    content = {
        "generator": layer.state_dict(),
        "parameter": layer.weight,
        "view": shared[1:3].t(),
        "tied": [shared],
        "again": shared,
        "step": 600,
        "loss": 0.5,
        "big": 2**40,
        "flags": (True, None, b"bytes", {1, 2}),
        "dtype": torch.bfloat16,
        "size": shared.shape,
        "device": torch.device("cuda", 0),
        "history": OrderedDict(a=1),
        "nested": {7: {"w": torch.ones(2, dtype=torch.int16)}},
    }
    for old in (False, True):
        torch.save(content, tmp_path / "m.pt", _use_new_zipfile_serialization=not old)
        read, metadata = read_state_dict(tmp_path / "m.pt")
        names = ["generator.weight", "generator.bias", "parameter", "view", "again", "nested.7.w"]
        assert list(read) == names
        assert metadata == {}
        assert torch.equal(read["view"], shared[1:3].t())
        assert all(type(t) is Tensor and not t.requires_grad for t in read.values())


def test_a_safetensors_file_is_known_whatever_its_header_length(tmp_path: Path) -> None:
    """The length comes first; 0x80 and 'P' are also how other formats begin."""
    for padding in range(200):
        facts = json.dumps({"__metadata__": {"k": "v" * padding}, "a": entry(0, 4)}).encode()
        (tmp_path / "m").write_bytes(header(facts, bytes(4)))
        read, metadata = read_state_dict(tmp_path / "m")
        assert list(read) == ["a"]
        assert metadata == {"k": "v" * padding} == read_metadata(tmp_path / "m")


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("name", ["m.safetensors", "m.pt"])
def test_reading_takes_no_private_memory(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    weights = {str(i): torch.full((256, 1024), float(i)) for i in range(4)}
    (save_file if name == "m.safetensors" else torch.save)(weights, path)
    read, _ = read_state_dict(path)
    for key, value in weights.items():
        assert torch.equal(read[key], value)  # touches every page
        assert mapping_of(read[key]) == (str(path), 0)


# ---- folders, indexes, shards ----


def write_shards(folder: Path, count: int = 3, stem: str = "model") -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{stem}-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    for number, file in enumerate(files):
        facts = {"format": "pt", "part": str(number)}
        save_file({f"w{number}": torch.full((2,), float(number))}, file, metadata=facts)
    return files


def write_index(folder: Path, table: object) -> Path:
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 24}, "weight_map": table}))
    return path


@pytest.mark.parametrize("inside", ["", "transformer"])
@pytest.mark.parametrize("way", ["folder", "folder with index", "index", "shard"])
def test_all_ways_to_name_a_sharded_model_read_it_whole(
    way: str, inside: str, tmp_path: Path
) -> None:
    files = write_shards(tmp_path / inside)
    (tmp_path / inside / "._model-00001-of-00003.safetensors").write_bytes(b"macOS")
    path = tmp_path
    if "index" in way:
        index = write_index(files[0].parent, {f"w{i}": f.name for i, f in enumerate(files)})
        path = index if way == "index" else path
    elif way == "shard":
        path = files[1]
    read, metadata = read_state_dict(path)
    assert {name: float(t[0]) for name, t in read.items()} == {"w0": 0.0, "w1": 1.0, "w2": 2.0}
    assert metadata == {"format": "pt"}, "metadata that differs belongs to no model"


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    files = write_shards(tmp_path)
    files[1].unlink()
    for path in (tmp_path, files[0]):
        assert f"{files[1]} is missing" in refused(path)
    index = write_index(tmp_path, {f"w{i}": f.name for i, f in enumerate(files)})
    assert f"{files[1]} is missing" in refused(index)


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    save_file({"same": torch.zeros(1)}, tmp_path / "a.safetensors")
    save_file({"same": torch.ones(1)}, tmp_path / "b.safetensors")
    assert "repeats the tensor 'same'" in refused(tmp_path)


def test_an_index_and_its_shards_must_agree(tmp_path: Path) -> None:
    files = write_shards(tmp_path)
    table = {f"w{i}": f.name for i, f in enumerate(files)}
    assert "lacks the tensor 'extra'" in refused(
        write_index(tmp_path, table | {"extra": files[0].name})
    )
    swapped = table | {"w0": files[1].name, "w1": files[0].name}
    assert "places in another file" in refused(write_index(tmp_path, swapped))


@pytest.mark.parametrize(
    "name",
    [
        "../secret.safetensors",
        "/etc/hostname",
        "sub/file.safetensors",
        "..\\secret.safetensors",
        "C:file.safetensors",
        "..",
        "",
        "a\nb",
        "model.safetensors.index.json",
        "x" * 300,
        7,
        None,
    ],
    ids=repr,
)
def test_an_index_leads_only_to_files_beside_it(name: object, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.zeros(1)}, tmp_path / "secret.safetensors")
    assert "files in its own folder" in refused(write_index(folder, {"a": name}))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "damaged index"),
        (b"{", "damaged index"),
        (b"\xff\xfe", "damaged index"),
        (b"[]", "damaged index"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"weight_map": {"a": "x", "a": "y"}}', "'a' occurs twice"),
        (b'{"weight_map": []}', "no weight_map"),
        (b'{"weight_map": {}}', "no weight_map"),
        (b" " * (17 * 2**20), "too much"),
    ],
    ids=["empty", "cut", "binary", "list", "deep", "twice", "no table", "no entries", "large"],
)
def test_a_damaged_index_is_refused(content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_bytes(content)
    assert said in refused(path)


def test_folders_that_fit_nothing_say_what_was_expected(tmp_path: Path) -> None:
    (tmp_path / "readme.txt").write_text("no model here")
    message = refused(tmp_path)
    assert "index.json" in message
    assert "transformer" in message
    for name in ("a.safetensors.index.json", "b.safetensors.index.json"):
        (tmp_path / name).write_text("{}")
    assert "holds 2 models" in refused(tmp_path)


# ---- other files under a checkpoint's name ----


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty"),
        (b"this is not a checkpoint at all", "a text"),
        (os.urandom(7) + b"\x01" * 500, "neither format"),
        (b"\n<!DOCTYPE html><html>Sign in to continue</html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git-lfs pointer"),
        (b"GGUF\x03\0\0\0" + bytes(64), "GGUF"),
        (b"<script>{}</script>" + bytes(64), "web page"),
        (b"\x1f\x8b\x08" + bytes(64), "archive"),
        (b'{"architectures": ["WanModel"]}', "JSON"),
        (b"PK\x03\x04", "its end is missing"),
        (b"PK\x05\x06" + bytes(18), "archive"),
        (b"\x80", "pickle"),
        (pickle.dumps([1, 2, 3], protocol=2), "pickle but not a checkpoint"),
        (pickle.dumps([1, 2, 3]), "pickle but not a checkpoint"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("name", ["model.safetensors", "model.pt"])
def test_another_kind_of_file_is_called_by_its_name(
    content: bytes, said: str, name: str, tmp_path: Path
) -> None:
    assert said in refused_bytes(tmp_path, content, name)


def test_a_zip_that_torch_did_not_write_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "letter.docx"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("[Content_Types].xml", "<x/>")
        file.writestr("word/document.xml", "<x/>" * 100)
    assert "zip archive but not a checkpoint" in refused(path)


def test_torchscript_programs_are_refused(tmp_path: Path) -> None:
    assert "TorchScript" in refused_bytes(tmp_path, archive(b"}", **{"constants.pkl": PROTO}))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_pipes_and_devices_are_refused_without_opening_them(tmp_path: Path) -> None:
    pipe = tmp_path / "model.safetensors"
    os.mkfifo(pipe)
    assert "device or a pipe" in refused(pipe)
    assert read_metadata(pipe) == {}
    assert "without a checkpoint" in refused(tmp_path)
    assert "device or a pipe" in refused(Path("/dev/zero"))


def test_paths_that_cannot_be_read_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "no such file" in refused(tmp_path / "missing.pt")
    assert "no such file" in refused(tmp_path / "bad\nname\x1b[31m.pt")
    assert "cannot read" in refused(tmp_path / ("x" * 5000))
    assert "is not a path" in refused(Path("a\0b"))
    path = tmp_path / "model.pt"
    path.write_bytes(FOUR)

    def denied(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)  # rights do not stop root, who runs tests in CI
    assert "Permission denied" in refused(path)


# ---- code ----


class RunsCode:
    def __reduce__(self) -> tuple:
        return (os.system, ("touch should_not_exist",))


@pytest.mark.parametrize("protocol", range(2, 6))
def test_a_bare_pickle_with_code_is_refused_by_the_name_of_it(
    protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    message = refused_bytes(tmp_path, pickle.dumps({"generator": RunsCode()}, protocol))
    assert f"a Python object ('{os.name}.system') that weights-only loading does not" in message
    assert "could run code" in message
    assert ".safetensors" in message


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_torch_file_with_code_is_refused_by_the_name_of_it(
    old: bool, protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    content = {"w": torch.zeros(2), "x": RunsCode()}
    path = tmp_path / "m.pt"
    torch.save(content, path, _use_new_zipfile_serialization=not old, pickle_protocol=protocol)
    if old and protocol == 4:
        assert "pickle_protocol=4" in refused(path)
    else:
        assert f"holds a Python object ('{os.name}.system') that" in refused(path)
    assert not Path("should_not_exist").exists()


@pytest.mark.parametrize(
    "name",
    [
        "builtins eval",
        "__builtin__ bytearray",
        "torch.nn.modules.linear Linear",
        "torch._utils _rebuild_wrapper_subclass",
        "torch._utils _rebuild_meta_tensor_no_storage",
        "torch.storage TypedStorage\x1b[31m",
        "torch hub",
    ],
)
def test_globals_that_no_tensor_needs_are_refused(name: str, tmp_path: Path) -> None:
    content = b"c" + name.replace(" ", "\n").encode() + b"\n" + HUGE + b"\x85R"
    assert "that could run code" in refused_bytes(tmp_path, archive(content))


@pytest.mark.parametrize(
    ("extra", "name"),
    [
        (numpy.float32(0.5), "numpy"),
        (defaultdict(int), "collections.defaultdict"),
        (PurePosixPath("a"), "pathlib.PurePosixPath"),
    ],
    ids=["numpy", "defaultdict", "path"],
)
def test_harmless_objects_are_refused_for_what_they_are(
    extra: object, name: str, tmp_path: Path
) -> None:
    """torch's own weights-only loading builds none of them."""
    path = tmp_path / "m.pt"
    torch.save({"w": torch.zeros(2), "extra": extra}, path)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    message = refused(path)
    assert f"a Python object ('{name}" in message
    assert "weights-only loading does not build" in message
    assert "holds code" not in message


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_another_pickle_protocol_is_called_by_its_number(
    old: bool, protocol: int, tmp_path: Path
) -> None:
    path = tmp_path / "m.pt"
    content = {"w": torch.zeros(2)}
    torch.save(content, path, _use_new_zipfile_serialization=not old, pickle_protocol=protocol)
    if protocol > 3:
        with warnings.catch_warnings(), pytest.raises(pickle.UnpicklingError):
            warnings.simplefilter("ignore")
            torch.load(path, weights_only=True)
    message = refused(path)
    assert f"saved with pickle_protocol={protocol}" in message
    assert "default of torch.save" in message


def test_a_complex_number_is_built_from_two_numbers_only(tmp_path: Path) -> None:
    for old in (False, True):
        content = {"w": torch.ones(2), "pole": 1 + 2j}
        torch.save(content, tmp_path / "m.pt", _use_new_zipfile_serialization=not old)
        assert list(read_state_dict(tmp_path / "m.pt")[0]) == ["w"]
    (tmp_path / "m.pt").unlink()
    content = b"cbuiltins\ncomplex\n" + text("1" * 100) + b"\x85R"
    assert "strange arguments" in refused_bytes(tmp_path, archive(content))


# ---- torch files that ask for too much ----

COPIES = b"](" + b"".join(b"](" + text(str(i)) + b"K\x01e" for i in range(1000)) + b"e" + put(0)
BOMBS: dict[str, tuple[bytes, str]] = {
    "one number repeated": (tensor(HUGE + b"\x85", b"K\x00\x85"), "larger than its storage"),
    "tensor beyond its storage": (tensor(b"K\x05\x85", b"K\x01\x85"), "outside its storage"),
    "strides beyond its storage": (tensor(b"K\x02\x85", b"K\x09\x85"), "outside its storage"),
    "negative stride": (tensor(b"K\x02\x85", b"J\xff\xff\xff\xff\x85"), "not a whole number"),
    "size is text": (tensor(text("4") + b"\x85", b"K\x01\x85"), "not a whole number"),
    "storage beyond its record": (tensor(HUGE + b"\x85", b"K\x01\x85", HUGE), "than its record"),
    "storage without a record": (tensor(b"K\x04\x85", b"K\x01\x85", key="9"), "than its record"),
    "dimensions without end": (
        tensor(b"(" + b"K\x01" * 1000 + b"t", b"(" + b"K\x01" * 1000 + b"t"),
        "dimensions",
    ),
    "key that hashes for ever": (
        b"}" + b")" + b"".join(put(i) + get(i) + b"\x86" for i in range(60)) + b"K\x01s",
        "dict key",
    ),
    "dicts within dicts 2^60 times": (
        b"}" + put(0) + text("t") + FOUR + b"s"
        b"" + b"".join(b"}" + put(i) + b"(" + text("a") + get(i - 1) + text("b") + get(i - 1) + b"u"
                       for i in range(1, 60)),
        "more than 100000 tensors",
    ),
    "a dict in itself": (b"}" + put(0) + text("") + get(0) + b"s", "nested too deeply"),
    "dicts 100,000 deep": (
        b"}" + (text("a") + b"}") * 100_000 + b"s" * 100_000, "nested too deeply"
    ),
    "tuples 200,000 deep": (b")" + b"\x85" * 200_000, "without tensors"),
    "lists 200,000 deep": (b"]" * 200_000 + b"a" * 199_999, "without tensors"),
    "instructions without end": (b"N" * 2_000_000, "instructions"),
    "copies of copies": (
        COPIES + (b"ccollections\nOrderedDict\n" + get(0) + b"\x85R") * 5000, "copies of copies"
    ),
    "text without end": (text("k" * 17 * 2**20), "characters of text"),
    "a memo of any size": (b"Nr\xff\xff\xff\xff", "reference out of bounds"),
    "a number of 2,000 bits": (b"\x8a\xff" + b"\x7f" * 255, "60 bits"),
    "a name of 2,000 characters": (b"}" + text("k" * 2000) + FOUR + b"s", "impossible name"),
    "a name with line ends": (b"}" + text("a\n\x1b[31mb") + FOUR + b"s", r"a\n\x1b[31mb"),
    "two tensors of one name": (
        b"}(" + text("a.b") + FOUR + text("a") + b"}" + text("b") + FOUR + b"su", "of the name"
    ),
    "two storages of one name": (
        b"(" + FOUR + tensor(b"K\x02\x85", b"K\x01\x85", b"K\x02") + b"t", "storages of one name"
    ),
    "one tensor made 100,001 times": (
        b"(" + FOUR.replace(b"((X", put(1) + b"((X", 1)[:-1] + put(2) + b"R"
        + (get(1) + get(2) + b"R") * 100_000 + b"t",
        "more than 100000 tensors",
    ),
    "attributes of a tensor": (FOUR + b"}b", "a dict is missing"),
    "a dtype that is called": (b"ctorch\nfloat32\n)R", "a call of"),
    "nothing": (b"", "damaged"),
}  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_torch_file_that_asks_for_too_much_is_refused(bomb: str, tmp_path: Path) -> None:
    content, said = BOMBS[bomb]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert said in refused_bytes(tmp_path, archive(content))
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert (after - before) / 1024 < 200, "MiB of memory"


def test_weights_may_be_tied_but_not_a_thousandfold(tmp_path: Path) -> None:
    shared = torch.zeros(100_000)
    path = tmp_path / "m.pt"
    torch.save({str(i): shared for i in range(5)}, path)
    assert len(read_state_dict(path)[0]) == 5
    torch.save({str(i): shared for i in range(1000)}, path)
    assert "share their numbers" in refused(path)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda: archive(FOUR, zipfile.ZIP_DEFLATED), "compressed"),
        (lambda: archive(bytes(10**8), zipfile.ZIP_DEFLATED), "compressed"),
        (lambda: archive(FOUR, byteorder=b"big"), "big-endian"),
        (lambda: archive(FOUR, other=bytes(5000)), "5000 bytes"),
        (lambda: archive(FOUR)[:-30], "end is missing"),
        (lambda: archive(FOUR) + b"\0", "end is missing"),
        (lambda: archive(FOUR).replace(b"a/data/0", b"a/data/1", 1), "table of contents"),
        (lambda: archive(FOUR).replace(b"a/version", b"b/version"), "outside the folder"),
        (lambda: archive(FOUR, **{"DATA/0": bytes(16)}), "table of contents is wrong"),
        (lambda: overlapping(), "overlap"),
        (lambda: archive(FOUR).replace(b"\x10\0\0\0\x10\0\0\0", b"\0\0\0\x7f\0\0\0\x7f"), "past"),
    ],
    ids=["deflate", "bomb", "endian", "note", "cut", "longer", "moved", "folder", "case", "overlap",
         "outside"],
)  # fmt: skip
def test_an_archive_that_lies_is_refused(
    damage: Callable[[], bytes], said: str, tmp_path: Path
) -> None:
    assert said in refused_bytes(tmp_path, damage())


def overlapping() -> bytes:
    """The table of contents gives the pickle's 16 following bytes to the storage as well."""
    whole = archive(FOUR)
    size = struct.pack("<I", len(PROTO + FOUR + b"."))
    at = whole.rindex(b"PK\x01\x02", 0, whole.index(b"a/data.pkl", 60))
    longer = struct.pack("<I", struct.unpack("<I", size)[0] + 40)
    return whole[:at] + whole[at:].replace(size + size, longer + longer, 1)


def test_the_old_layout_must_hold_the_numbers_that_it_promises(tmp_path: Path) -> None:
    stream = io.BytesIO()
    torch.save({"w": torch.arange(5.0)}, stream, _use_new_zipfile_serialization=False)
    whole = stream.getvalue()
    for damaged, said in (
        (whole[:-1], "ends early"),
        (whole[:-20], "ends early"),
        (whole.replace(b"K\x05N", b"K\x06N"), "its sizes are wrong"),
        (whole[:-28] + struct.pack("<q", 4) + whole[-20:], "its sizes are wrong"),
        (whole.replace(b"K\x05N", b"J\xff\xff\xff\x7fN"), "its sizes are wrong"),
        (whole[: whole.rindex(b"]")] + b"]." + whole[whole.rindex(b".", 0, -28) + 1 :], "list of"),
    ):
        assert said in refused_bytes(tmp_path, damaged)


def test_a_tar_archive_in_a_pickle_is_refused(tmp_path: Path) -> None:
    """torch would take it for the layout of 2016 and unpack it into a temporary folder."""
    stream = io.BytesIO()
    torch.save({"w": torch.zeros(1)}, stream, _use_new_zipfile_serialization=False)
    magic = stream.getvalue()[: stream.getvalue().index(b"}")]
    whole = bytearray(magic + text(" " * 600) + b".")
    whole[148:156] = b"%06o\0 " % sum(whole[:512])
    tarfile.TarInfo.frombuf(bytes(whole[:512]), "utf-8", "surrogateescape")
    assert "tar archive" in refused_bytes(tmp_path, bytes(whole))


def test_archives_of_endless_entries_are_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive_module, "MAX_TENSORS", 5)
    notes = {str(i): b"" for i in range(110)}
    assert "113 entries" in refused_bytes(tmp_path, archive(FOUR, **notes))


# ---- safetensors ----

FOUR_FLOATS = bytes(16)
BAD_HEADERS: dict[str, bytes] = {
    "overlap": header({"a": entry(0, 12), "b": entry(8, 16)}, FOUR_FLOATS),
    "gap": header({"a": entry(0, 4), "b": entry(8, 16)}, FOUR_FLOATS),
    "outside": header({"a": entry(0, 4000)}, FOUR_FLOATS),
    "bytes left over": header({"a": entry(0, 8)}, FOUR_FLOATS),
    "shape does not fit": header({"a": entry(0, 16, [5])}, FOUR_FLOATS),
    "shape overflows": header({"a": entry(0, 16, [2**40, 2**40])}, FOUR_FLOATS),
    "negative shape": header({"a": entry(0, 16, [-4])}, FOUR_FLOATS),
    "backwards": header({"a": entry(16, 0, [4])}, FOUR_FLOATS),
    "unknown dtype": header({"a": entry(0, 16, dtype="F99")}, FOUR_FLOATS),
    "header beyond the file": header({"a": entry(0, 16)}, FOUR_FLOATS, length=5000),
    "header of 10^15 bytes": header({"a": entry(0, 16)}, FOUR_FLOATS, length=10**15),
    "duplicate tensor": header(
        b'{"a":%s,"a":%s}' % ((json.dumps(entry(0, 16)).encode(),) * 2), FOUR_FLOATS
    ),
    "duplicate metadata": header(b'{"__metadata__":{"a":"1","a":"2"}}'),
    "deep": header(b'{"a":' + b"[" * 100_000),
    "deep and closed": header(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "deeper than objects": header(b"[" * 100_000),
    "not utf-8": header(b'{"\xff\xfe":1}'),
    "not json": header(b"{]]]]]]]]"),
    "metadata is a list": header({"__metadata__": [1]}),
    "metadata has numbers": header({"__metadata__": {"a": 1}}),
    "entry is a number": header({"a": 1}),
    "number without end": header(b'{"a":' + b"9" * 10**6 + b"}"),
    "parts without end": header(b'{"a":[' + b"[]," * 2_000_000 + b"1]}"),
    "cut": save({"a": torch.zeros(1000)})[:2000],
    "name with line ends": header({"a\n\x1b[31m": entry(0, 16)}, FOUR_FLOATS),
    "damaged name with line ends": header({"a\n\x1b[31m": entry(0, 99, [1])}, FOUR_FLOATS),
    "name of 2,000 characters": header({"k" * 2000: entry(0, 16)}, FOUR_FLOATS),
    "too many tensors": header(
        b"{%s}" % b",".join(
            b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % i for i in range(100_001)
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_a_damaged_safetensors_file_is_refused(case: str, tmp_path: Path) -> None:
    refused_bytes(tmp_path, BAD_HEADERS[case], "model.safetensors")


def test_a_file_cut_within_its_header_is_called_truncated(tmp_path: Path) -> None:
    whole = save({"a": torch.zeros(1000)})
    assert "is truncated" in refused_bytes(tmp_path, whole[:40], "model.safetensors")


def test_read_metadata_never_fails(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    for content in [*BAD_HEADERS.values(), b"", archive(FOUR), b"<html>"]:
        path.write_bytes(content)
        assert isinstance(read_metadata(path), dict)
    assert read_metadata(tmp_path) == read_metadata(tmp_path / "missing") == {}


# ---- anything else ----


def _small_files() -> list[bytes]:
    torch.manual_seed(1)
    weights = {"a.w": torch.randn(3, 4), "b": torch.arange(5), "c": torch.randn(6).half()}
    content = {"generator": OrderedDict(weights), "p": nn.Parameter(torch.ones(2)), "step": 3}
    files = [save(weights, metadata={"k": "v"})]
    for new in (True, False):
        stream = io.BytesIO()
        torch.save(content, stream, _use_new_zipfile_serialization=new)
        files.append(stream.getvalue())
    return files


def _rezip(content: bytes, steps: list) -> bytes:
    """Mangle only the pickle; a checksum that fits lets torch have it."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(stream, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            new.writestr(name, mangle(data, steps) if name.endswith("data.pkl") else data)
    return stream.getvalue()


SMALL_FILES = _small_files()
MANGLINGS = st.lists(
    st.tuples(
        st.sampled_from(["set", "cut", "repeat", "insert", "zero", "number"]),
        st.floats(0, 1, exclude_max=True),
        st.integers(1, 64),
        st.binary(min_size=1, max_size=8),
    ),
    min_size=1,
    max_size=6,
)


def mangle(content: bytes, steps: list[tuple[str, float, int, bytes]]) -> bytes:
    for kind, where, length, data in steps:
        at = int(where * len(content))
        end = min(at + length, len(content))
        head, span, tail = content[:at], content[at:end], content[end:]
        match kind:
            case "set":
                content = head + data + content[at + len(data) :]
            case "cut":
                content = head if length > 48 else head + tail
            case "repeat":
                content = head + span * 2 + tail
            case "insert":
                content = head + data + span + tail
            case "zero":
                content = head + bytes(len(span)) + tail
            case "number":
                content = head + b"\xff" * min(length, 8) + content[at + min(length, 8) :]
    return content


@settings(max_examples=int(os.environ.get("LIGHTFORCING_FUZZ", "150")), deadline=None)
@given(which=st.integers(0, 3), steps=MANGLINGS)
def test_a_mangled_file_gives_valid_tensors_or_one_line(
    which: int, steps: list[tuple[str, float, int, bytes]]
) -> None:
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder) / "model.bin"
        path.write_bytes(
            _rezip(SMALL_FILES[1], steps) if which == 3 else mangle(SMALL_FILES[which], steps)
        )
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.perf_counter()
        try:
            tensors, metadata = read_state_dict(path)
        except UserError as error:
            assert str(error).isprintable()
            assert str(path) in str(error)
        else:
            total = 0
            for name, value in tensors.items():
                assert isinstance(name, str)
                assert type(value) is Tensor
                assert value.device.type == "cpu"
                total += value.numel() * value.itemsize
                value.to(torch.float32 if value.is_floating_point() else value.dtype).sum()
            assert total <= 8 * path.stat().st_size
            assert all(isinstance(item, str) for pair in metadata.items() for item in pair)
            del tensors
        assert time.perf_counter() - start < 2
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024
        assert os.listdir(folder) == ["model.bin"]  # noqa: PTH208 (a name, not a path)


def test_a_folder_with_one_torch_file_is_that_file(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    torch.save({"a": torch.ones(2)}, folder / "base.pt")
    assert list(read_state_dict(folder)[0]) == ["a"]
    # A base and its LoRA: which one is meant is the user's to say.
    torch.save({"b": torch.ones(2)}, folder / "lora.pt")
    message = refused(folder)
    assert "base.pt, lora.pt" in message
    assert "give the one to load" in message
