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

    frames = len(frame_indices)
    angles = torch.cat(
        [
            axis(frame_indices, frame_part)[:, None, None].expand(frames, rows, columns, -1),
            axis(range(rows), row_part)[None, :, None].expand(frames, rows, columns, -1),
            axis(range(columns), column_part)[None, None].expand(frames, rows, columns, -1),
        ],
        dim=-1,
    ).flatten(0, 2)
    return angles.cos().float().to(device), angles.sin().float().to(device)


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
