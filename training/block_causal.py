"""Attention of teacher forcing: clean and noisy frames of a video in one sequence.

Clean chunk i attends to clean chunks up to i; noisy chunk i attends to clean chunks before i and to
itself. This is one operator with a backward of its own, opaque to the compiler, made of one dense
attention per chunk and stream: no mask, nothing computed in vain, and small compiled graphs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_Aten = torch.ops.aten


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
    if queries.start == before:
        return tensor[:, : queries.stop].transpose(1, 2)
    return torch.cat([tensor[:, :before], tensor[:, queries]], dim=1).transpose(1, 2)


def _attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Output [B, H, S, D] and log-sum-exp [B, H, S]."""
    if q.is_cuda:
        return _Aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, False)[:2]
    return _Aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False)


def _attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    if q.is_cuda:
        # No dropout: the random state is not read. No cumulative lengths: sequences are equal.
        state = torch.zeros(2, dtype=torch.uint64, device=q.device)
        lengths = (None, None, q.shape[2], k.shape[2])
        return _Aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, out, lse, *lengths, 0.0, False, state, state[:0]
        )
    return _Aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, out, lse, 0.0, False
    )


@torch.library.custom_op("lightforcing_training::block_causal", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    batch, length, heads, _ = q.shape
    sums = torch.empty(batch, heads, length, device=q.device, dtype=torch.float32)
    for queries, before in _segments(length, chunk):
        part, lse = _attention(
            q[:, queries].transpose(1, 2), _keys(k, queries, before), _keys(v, queries, before)
        )
        out[:, queries] = part.transpose(1, 2)
        sums[:, :, queries] = lse.view(batch, heads, -1)
    return out, sums


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    batch, length, heads, _ = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, q.new_empty(batch, heads, length, dtype=torch.float32)


@torch.library.custom_op("lightforcing_training::block_causal_backward", mutates_args=())
def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    grad_q = torch.empty_like(q, memory_format=torch.contiguous_format)
    grad_k = torch.zeros_like(k, memory_format=torch.contiguous_format)
    grad_v = torch.zeros_like(v, memory_format=torch.contiguous_format)
    for queries, before in _segments(q.shape[1], chunk):
        parts = _attention_backward(
            grad[:, queries].transpose(1, 2),
            q[:, queries].transpose(1, 2),
            _keys(k, queries, before),
            _keys(v, queries, before),
            out[:, queries].transpose(1, 2),
            sums[:, :, queries].contiguous(),
        )
        dq, dk, dv = (part.transpose(1, 2) for part in parts)
        grad_q[:, queries] = dq
        for total, part in ((grad_k, dk), (grad_v, dv)):
            total[:, :before] += part[:, :before]
            total[:, queries] += part[:, before:]
    return grad_q, grad_k, grad_v


@_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _save(ctx, inputs: tuple, output: tuple) -> None:
    q, k, v, ctx.chunk = inputs
    ctx.save_for_backward(q, k, v, *output)


def _differentiate(ctx, grad: Tensor, _: Tensor) -> tuple:
    return *_backward(grad.contiguous(), *ctx.saved_tensors, ctx.chunk), None


_forward.register_autograd(_differentiate, setup_context=_save)


def block_causal_attention(q: Tensor, k: Tensor, v: Tensor, chunk_tokens: int) -> Tensor:
    """Attention of clean and noisy streams.

    Args:
        q, k, v: [B, 2 S, H, D]: S tokens of the clean frames, then S of the noisy ones.
        chunk_tokens: tokens of one chunk; divides S.

    Returns:
        [B, 2 S, H, D].
    """
    return _forward(q, k, v, chunk_tokens)[0]


def plain_block_causal_attention(q: Tensor, k: Tensor, v: Tensor, chunk_tokens: int) -> Tensor:
    """The same by ordinary operators: what defines the result, and the way out where the fused
    kernels are missing. Arguments as in `block_causal_attention`."""
    parts = [
        F.scaled_dot_product_attention(
            q[:, queries].transpose(1, 2), _keys(k, queries, before), _keys(v, queries, before)
        )
        for queries, before in _segments(q.shape[1], chunk_tokens)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2)
