"""How much memory a device still has."""

from __future__ import annotations

import psutil
import torch

GIB = 1 << 30


def available_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on the device, what torch holds unused included."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device)
        return free + reserved - torch.cuda.memory_allocated(device)
    return psutil.virtual_memory().available
