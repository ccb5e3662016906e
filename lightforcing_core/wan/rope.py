"""Three-axis rotary positions of Wan: latent frame, row, column.

The head dimension splits into frame / row / column parts of d - 4 (d // 6), 2 (d // 6) and
2 (d // 6) values (44 / 42 / 42 of 128); each part rotates its neighbouring pairs by
position / 10000^(2 i / part). Angles are computed in float64 for the indices asked for.

The published code looks angles up in a table of 1024 positions and fails at latent frame 1024
(about 4 minutes of video). Here there is no table: frame indices go on counting. Attention sees
only the difference of two indices, so within a window nothing changes with time (tested at frame
5000); the distance to sink frames goes on growing, as it does in the published rolling window.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

THETA = 10000.0


def axis_split(head_dim: int) -> tuple[int, int, int]:
    """Values of one head that rotate with the frame, row and column index."""
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


def _angles(positions: Tensor, part: int) -> Tensor:
    exponents = torch.arange(0, part, 2, dtype=torch.float64, device=positions.device) / part
    return torch.outer(positions, THETA**-exponents)  # [positions, part / 2]


def rope_angles(
    frame_indices: Sequence[int],
    rows: int,
    columns: int,
    head_dim: int,
    device: torch.device | str,
) -> tuple[Tensor, Tensor]:
    """Cosine and sine for every token of some latent frames, in raster order.

    Args:
        frame_indices: absolute index of each latent frame, any order, repeats allowed.
        rows, columns: patches per frame.

    Returns:
        (cos, sin), each float32 [len(frame_indices) * rows * columns, head_dim / 2].

    Reference: Wan 2.1 `rope_params` / `causal_rope_apply`.
    """
    frame_part, row_part, column_part = axis_split(head_dim)

    def axis(values: Sequence[int], part: int) -> Tensor:
        # Float64 on the host: some devices lack it, and these tables are tiny.
        return _angles(torch.tensor(list(values), dtype=torch.float64), part)

    axes = [
        axis(frame_indices, frame_part),
        axis(range(rows), row_part),
        axis(range(columns), column_part),
    ]
    device = torch.device(device)
    small = torch.cat(
        [f(angles).float().flatten() for f in (torch.cos, torch.sin) for angles in axes]
    )
    if device.type == "cuda":
        small = small.pin_memory()  # so that the host need not wait for what the device does
    tables = small.to(device, non_blocking=True).split([angles.numel() for angles in axes] * 2)
    shape = len(frame_indices), rows, columns

    def spread(frame: Tensor, row: Tensor, column: Tensor) -> Tensor:
        parts = (
            frame.view(shape[0], 1, 1, -1).expand(*shape, -1),
            row.view(1, rows, 1, -1).expand(*shape, -1),
            column.view(1, 1, columns, -1).expand(*shape, -1),
        )
        return torch.cat(parts, dim=-1).flatten(0, 2)

    return spread(*tables[:3]), spread(*tables[3:])


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighbouring pairs of the last axis, in float32.

    Args:
        x: [B, S, H, D].
        cos, sin: float32 [S, D / 2].

    Returns:
        [B, S, H, D] in the dtype of x.
    """
    pairs = x.float().unflatten(-1, (-1, 2))
    even, odd = pairs.unbind(-1)
    c, s = cos[:, None], sin[:, None]
    return torch.stack((even * c - odd * s, even * s + odd * c), dim=-1).flatten(-2).to(x.dtype)
