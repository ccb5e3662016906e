"""Transformer blocks through torch.compile: what surrounds self-attention, fused.

Self-attention keeps state (the key/value cache) and is the caller's; the two pieces around it are
compiled once and serve every layer, since weights are inputs of the compiled code. A chunk of
another length compiles again.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .forward import (
    PositionTable,
    RunBlocks,
    SelfAttend,
    TextContext,
    after_attention,
    before_attention,
)


def compiled_block_runner() -> RunBlocks:
    """For `wan_forward`'s `run_blocks`; compiles when it is first used."""
    before = torch.compile(before_attention, dynamic=False)
    after = torch.compile(after_attention, dynamic=False)

    def run(
        blocks: Iterable[nn.Module],
        hidden: Tensor,
        modulation: Tensor,
        num_heads: int,
        positions: PositionTable,
        text: TextContext,
        attend: SelfAttend,
    ) -> Tensor:
        for layer, block in enumerate(blocks):
            q, k, v = before(block, hidden, modulation, num_heads, positions.cos, positions.sin)
            attended = attend(layer, q, k, v)
            hidden = after(
                block, hidden, attended, modulation, text.keys[layer], text.values[layer]
            )
        return hidden

    return run
