"""Every shipped kernel compiles for every architecture, on a machine that has none of them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lightforcing.kernels.compile import compile_all
from lightforcing.kernels.configs import (
    ARCHS,
    BLOCK_SIZES,
    HEAD_DIMS,
    attention_config,
    selection_warps,
    table_arch,
)

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import dataclasses, json, sys
from lightforcing.kernels.compile import compile_all
import triton
if __name__ == "__main__":
    rows = compile_all(json.loads(sys.argv[1]))
    with open(sys.argv[2], "w") as file:
        json.dump([triton.__version__, [dataclasses.asdict(row) for row in rows]], file)
"""


def compile_elsewhere(
    folder: Path, archs: tuple[int, ...], triton: Path | None = None
) -> tuple[str, list[dict[str, Any]]]:
    """Version and rows of a process without the interpreter, with a Triton of its own or ours."""
    # A file, because the workers of the pool import the main module.
    (folder / "main.py").write_text(PROGRAM)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if triton:
        environment["PYTHONPATH"] = str(triton)
    done = subprocess.run(
        [sys.executable, folder / "main.py", json.dumps(archs), folder / "rows.json"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    version, rows = json.loads((folder / "rows.json").read_text())
    return version, rows


@pytest.fixture(scope="session")
def triton36() -> Path:
    """Triton 3.6.0, to which the configurations answer; LIGHTFORCING_TRITON36 names the folder."""
    folder = Path(os.environ.get("LIGHTFORCING_TRITON36", ROOT / ".venv" / "triton36"))
    command = [ROOT / ".ci" / "install-triton36", folder, sys.executable]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"Triton 3.6.0 cannot be installed: {done.stderr[-300:]}")
    return folder


def test_nothing_spills_and_all_fits(tmp_path: Path, triton36: Path) -> None:
    version, rows = compile_elsewhere(tmp_path, ARCHS, triton36)
    assert version == "3.6.0"
    assert {row["arch"] for row in rows} == set(ARCHS)
    assert [row for row in rows if not row["ok"]] == []
    assert max(row["spill_bytes"] for row in rows) == 0
    assert max(row["shared_bytes"] for row in rows if row["arch"] in (86, 89, 120)) <= 99 * 1024
    assert min(row["registers"] for row in rows) > 0
    by_rows = ("norm ", "row ", "rounding ", "scaling ", "projection ")
    # One: the bias of a head is as many numbers as there are threads.
    assert [row for row in rows if row["name"].startswith(by_rows) and row["narrow"] > 1] == []
    kinds = {row["name"].split(" ")[0] for row in rows if row["arch"] == 120}
    attention = {"attention", "merge", "pooling", "projection", "quantisation", "scores"}
    rows_and_layers = {"norm", "row", "rounding", "scaling"}
    others = {"convolution", "normalisation", "repeated", "selection"}
    assert kinds == attention | rows_and_layers | others
    assert any("tma" in row["name"] for row in rows if row["arch"] == 90)


def test_the_environments_triton_compiles_everything(tmp_path: Path) -> None:
    """For Hopper, which has kernels of its own, and the newest; all six are for 3.6 above."""
    _, rows = compile_elsewhere(tmp_path, (90, 120))
    assert {row["arch"] for row in rows} == {90, 120}
    assert [row for row in rows if not row["ok"]] == []


HOPPER = """
import json, sys
from lightforcing.kernels.compile import compile_launch, launches
found = launches(90)
texts = {}
for name in found:
    # Eight-bit products do wait for each other there, and are said to (docs/KERNELS.md).
    if name.startswith("attention d128 q128 k64") and "int8" not in name:
        compiled, log = compile_launch(found[name](), 90)
        texts[name] = compiled.asm["ptx"]
        # ptxas says so when it has to make asynchronous products wait for each other.
        assert "serialized" not in log, log
with open(sys.argv[1], "w") as file:
    json.dump(texts, file)
"""


def test_hopper_gets_its_own_instructions(tmp_path: Path, triton36: Path) -> None:
    """Loads run ahead of the loop through the copy engine, products through wgmma."""
    (tmp_path / "main.py").write_text(HOPPER)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    subprocess.run(
        [sys.executable, tmp_path / "main.py", tmp_path / "texts.json"],
        env=environment | {"PYTHONPATH": str(triton36)},
        check=True,
    )
    texts = json.loads((tmp_path / "texts.json").read_text())
    descriptors = [text for name, text in texts.items() if "tma" in name or "gluon" in name]
    assert len(descriptors) == 4
    for text in descriptors:
        assert "wgmma.mma_async" in text and "cp.async.bulk.tensor" in text
        assert "mma.sync" not in text
    for text in (text for name, text in texts.items() if "pointers" in name):
        # 16 bytes a copy: without the strides' divisibility it is 2, and nothing is pipelined.
        assert re.search(r"cp\.async\.cg\.shared\.global .* 0x10", text)


def test_unknown_architectures_and_the_interpreter_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ValueError, match=r"not for \[75\]"):
        compile_all((75, 90))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="the interpreter replaces the compiler"):
        compile_all((90,))


def test_every_device_gets_the_nearest_entries() -> None:
    assert [table_arch(c) for c in (80, 86, 87, 89, 90, 100, 103, 120, 121)] == [
        80, 86, 86, 89, 90, 100, 100, 120, 120,
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"8\.0 or newer, got 7\.5"):
        table_arch(75)


@pytest.mark.parametrize("arch", ARCHS)
def test_tiles_divide_blocks(arch: int) -> None:
    for head_dim in HEAD_DIMS:
        for q_block, kv_block in BLOCK_SIZES:
            for allow_tma in (True, False):
                config = attention_config(arch, head_dim, q_block, kv_block, allow_tma=allow_tma)
                assert q_block % config.tile_m == 0 and kv_block % config.tile_n == 0
                assert allow_tma or not config.use_tma


def test_more_scores_get_more_warps() -> None:
    assert [selection_warps(2**i) for i in (5, 10, 11, 13, 14)] == [1, 1, 4, 16, 32]
