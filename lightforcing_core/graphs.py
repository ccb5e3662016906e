"""Whether CUDA graphs can be recorded here."""

from __future__ import annotations

import torch


def graphs_obstacle(device: torch.device) -> str:
    """Why a GPU's launches cannot be recorded; empty if they can, or if it is no GPU.

    What is allocated while a graph is recorded exists under cudaMallocAsync only once the graph
    runs, and Triton refuses to launch with such addresses.
    """
    if device.type == "cuda" and torch.cuda.get_allocator_backend() == "cudaMallocAsync":
        return (
            "CUDA graphs of Triton kernels cannot be recorded with the allocator cudaMallocAsync; "
            "in ComfyUI, --disable-cuda-malloc chooses the other one"
        )
    return ""
