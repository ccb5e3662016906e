"""What the kernels need on GPUs that need not be here."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from typing import Any

from .errors import UserError


def compile_report(archs: Sequence[int]) -> dict[str, Any]:
    """Compile every shipped kernel for some architectures.

    Args:
        archs: compute capabilities, 86 for 8.6.

    Returns:
        `kernels` (rows of `name`, `arch`, `shared_bytes`, `registers`, `spill_bytes`, `ok`,
        `error`) and `triton`, its version.

    Raises:
        UserError: Triton is missing or interpreted, or nothing is shipped for an architecture.
    """
    if importlib.util.find_spec("triton") is None:
        raise UserError(
            "Triton is not installed, so there is nothing to compile with; pip install triton "
            "(triton-windows on Windows)"
        )
    # Late: the compiler's module imports Triton.
    from ..kernels.compile import compile_all

    try:
        kernels = compile_all(archs)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"cannot compile kernels: {error}") from error
    return {"triton": _version(), "kernels": [asdict(kernel) for kernel in kernels]}


def _version() -> str:
    for package in ("triton", "triton-windows"):
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return "not known"
