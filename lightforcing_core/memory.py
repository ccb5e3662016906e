"""Devices by name, and how much memory they still have."""

from __future__ import annotations

import psutil
import torch

from .errors import UserError

GIB = 1 << 30


def available_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on the device, what torch holds unused included."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device)
        return free + reserved - torch.cuda.memory_allocated(device)
    return psutil.virtual_memory().available


def usable_device(name: str | None) -> torch.device:
    """The device of a name; None: CUDA where there is one, else the CPU.

    Raises:
        UserError: it is no such device, or cannot be used here.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise UserError(f"device '{name}' is not supported; use cpu or cuda")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device '{name}' cannot be used: {reason}; try --device cpu") from error
    return device
