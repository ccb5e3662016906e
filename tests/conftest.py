"""Fixtures shared by all tests."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def _import_kernels_interpreted() -> None:
    """Triton's functions are made when they are imported, interpreted or compiled for good.

    So this comes before any test module: torch imports Triton for reasons of its own (a module on
    the meta device is enough).
    """
    if importlib.util.find_spec("triton") is None:
        return
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        import lightforcing.kernels.compile
        import lightforcing.kernels.ops  # noqa: F401
    finally:
        del os.environ["TRITON_INTERPRET"]
        if before is not None:
            os.environ["TRITON_INTERPRET"] = before


if not torch.cuda.is_available():
    _import_kernels_interpreted()


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Folder with the outputs of the published implementations.

    LIGHTFORCING_GOLDEN names it; the default lies beside the checkout.
    """
    folder = Path(os.environ.get("LIGHTFORCING_GOLDEN", ROOT.parent / "shared" / "golden"))
    if not folder.is_dir():
        pytest.skip(f"no golden files: {folder} does not exist (set LIGHTFORCING_GOLDEN)")
    return folder


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tiny networks only lose time to threads that wait for each other on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fresh_random_state(request: pytest.FixtureRequest) -> None:
    """Every test draws its own inputs, the same in every run of that test."""
    torch.manual_seed(sum(request.node.nodeid.encode()))
