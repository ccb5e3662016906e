"""Attention of teacher forcing: clean and noisy frames of a video in one sequence.

Clean chunk i attends to clean chunks up to i; noisy chunk i attends to clean chunks before i and to
itself. On a GPU this is FlexAttention inside a compiled block: at 256x128 a latent frame has 128
tokens, so every tile is either seen whole or skipped. Elsewhere it is one dense attention per chunk
and stream, which is also what defines the result.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

_TILE = 128


def _segments(length: int, chunk: int) -> list[tuple[slice, int]]:
    """(queries, number of clean keys before) per chunk and stream; noisy chunks add themselves."""
    half = length // 2
    return [
        (slice(offset + start, offset + start + chunk), start)
        for offset in (0, half)
        for start in range(0, half, chunk)
    ]


def _keys(tensor: Tensor, queries: slice, before: int) -> Tensor:
    """Keys or values of one segment as [B, H, S, D]."""
    return torch.cat([tensor[:, :before], tensor[:, queries]], dim=1).transpose(1, 2)


def block_causal_attention(q: Tensor, k: Tensor, v: Tensor, chunk_tokens: int) -> Tensor:
    """Attention of clean and noisy streams, by dense attention of each chunk.

    Args:
        q, k, v: [B, 2 S, H, D]: S tokens of the clean frames, then S of the noisy ones.
        chunk_tokens: tokens of one chunk; divides S.

    Returns:
        [B, 2 S, H, D].
    """
    parts = [
        F.scaled_dot_product_attention(
            q[:, queries].transpose(1, 2), _keys(k, queries, before), _keys(v, queries, before)
        )
        for queries, before in _segments(q.shape[1], chunk_tokens)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2)


@cache
def block_causal_mask(length: int, chunk_tokens: int, device: torch.device) -> BlockMask:
    """What `flex_block_causal_attention` needs to know about a sequence of 2 S tokens."""
    half = length // 2

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own, other = (query % half) // chunk_tokens, (key % half) // chunk_tokens
        key_noisy, query_noisy = key >= half, query >= half
        past = ~key_noisy & (other < own)
        return past | ((key_noisy == query_noisy) & (other == own))

    return create_block_mask(visible, None, None, length, length, device=device, BLOCK_SIZE=_TILE)


def flex_block_causal_attention(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    """The same in one kernel; to be called in compiled code. Arguments as above, and the mask."""
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    return flex_attention(*heads_first, block_mask=mask).transpose(1, 2)
