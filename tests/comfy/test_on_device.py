"""Decoding beside sampling with real streams: see `inside/on_device.py`, a program of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROGRAM = Path(__file__).parent / "inside" / "on_device.py"


def found_on(device: str, allocator: str = "native") -> dict:
    done = subprocess.run(
        [sys.executable, PROGRAM, device],
        env={**os.environ, "PYTORCH_CUDA_ALLOC_CONF": f"backend:{allocator}"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_chunks_are_decoded_in_line_on_the_cpu() -> None:
    (found,) = found_on("cpu")["cases"].values()
    assert found["frames"] == 33 and found["equal"] and found["equal_when_moved"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("allocator", ["native", "cudaMallocAsync"])
def test_chunks_are_decoded_beside_sampling(allocator: str) -> None:
    """With torch's allocator and with the one that ComfyUI takes where it can.

    The same frames as in line, while forwards are replayed where they can be and weights are moved
    to and fro; shown before what is behind the chunk on the sampling stream is done; nothing is
    left.
    """
    found = found_on("cuda", allocator)
    assert found["allocator"] == allocator
    for name, case in found["cases"].items():
        assert case["frames"] == 69 and case["equal"] and case["equal_when_moved"], name
        assert case["recorded"] == 3, name
        assert case["equal_when_busy"], name
        # Of six chunks. The other allocator may give a stream what another one has not yet freed,
        # and have it wait.
        assert case["early"] >= 4 or allocator != "native", name
        assert abs(case["left_bytes"]) < 1 << 20, name
