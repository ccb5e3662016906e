"""The transformer blocks with what lies between matrix products and attention fused.

A block's residual sums, norms, modulation and rounding are three launches, the query norm of
cross-attention is a fourth, and norm, rotary and cache write of self-attention are a fifth; each
sum is joined to the norm that follows it, also where that belongs to the next block. The arithmetic
is that of `wan.forward.run_block`, rounded less often: modulation and sums stay in float32 until
they are stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.reference_rows import Rounded
from ..attention import dense_attention
from ..wan.forward import PositionTable, SelfAttend, TextContext, rotated_heads
from .linears import EightBitFeedForward, EightBitLinear
from .operations import FusedOperations

Normed = Tensor | Rounded
"""What a linear layer takes: rows in the model's type, or in eight bits."""


class FusedBlocks:
    """For `wan_forward`'s `run_blocks`.

    Self-attention that has `project` and says `takes_projections` is handed the projections;
    any other gets heads from the modules' own norms.
    """

    def __init__(self, operations: FusedOperations) -> None:
        self._add_norm = operations.add_norm
        self._attend_repeated = operations.attend_repeated
        self._repeated_head_dims = operations.repeated_head_dims
        self._own_modulation: Tensor | None = None

    def prepare(self, blocks: Sequence[nn.Module]) -> None:
        """Gather what all forwards of a video share; until the next call the blocks' own
        modulation must stay. Its address does for good: recordings name it. Only what was made in
        inference mode, where nothing can be written from outside, gets another, and its recordings
        go too (`ForwardEngine.attention`)."""
        own, held = _own_modulation(blocks), self._own_modulation
        is_closed = (
            held is not None and held.is_inference() and not torch.is_inference_mode_enabled()
        )
        if held is None or held.shape != own.shape or is_closed:
            self._own_modulation = own
        else:
            held.copy_(own)

    def __call__(
        self,
        blocks: Sequence[nn.Module],
        hidden: Tensor,
        modulation: Tensor,
        num_heads: int,
        positions: PositionTable,
        text: TextContext,
        attend: SelfAttend,
    ) -> Tensor:
        shape = hidden.shape
        own = self._own_modulation if self._own_modulation is not None else _own_modulation(blocks)
        # Shift, gain and gate of self-attention and of the feed-forward, float32
        # [layers, 6, B * F, dim].
        table = own.to(modulation.device) + modulation.float().flatten(0, 1).transpose(0, 1)
        rows = hidden.reshape(-1, shape[2]).contiguous()  # the sums are made in place
        normed: Normed | None = None
        for layer, block in enumerate(blocks):
            shift1, gain1, gate1, shift2, gain2, gate2 = table[layer]
            out = block.self_attn.o
            eight_bit = out.numbers if isinstance(out, EightBitLinear) else None
            if layer == 0:
                normed = self._add_norm(
                    rows, gain=gain1, shift=shift1, eps=block.norm1.eps, eight_bit=eight_bit
                )
            branch = self._self_attention(
                block.self_attn, layer, normed, shape, num_heads, positions, attend
            )
            norm = block.norm3
            normed = self._add_norm(
                rows,
                branch,
                gate1,
                gain=_row(norm.weight, rows),
                shift=_row(norm.bias, rows),
                eps=norm.eps,
                eight_bit=eight_bit,
            )
            branch = self._cross_attention(
                block.cross_attn, normed, text.keys[layer], text.values[layer], text.distinct
            )
            normed = self._add_norm(
                rows, branch, gain=gain2, shift=shift2, eps=block.norm2.eps, eight_bit=eight_bit
            )
            branch = self._feed_forward(block.ffn, normed)
            if layer + 1 < len(blocks):
                shift, gain = table[layer + 1, :2]
                normed = self._add_norm(
                    rows,
                    branch,
                    gate2,
                    gain=gain,
                    shift=shift,
                    eps=blocks[layer + 1].norm1.eps,
                    eight_bit=eight_bit,
                )
            else:
                self._add_norm(rows, branch, gate2, eps=block.norm2.eps)
        return rows.view(shape)

    def _self_attention(
        self,
        attention: nn.Module,
        layer: int,
        normed: Normed,
        shape: torch.Size,
        num_heads: int,
        positions: PositionTable,
        attend: Any,
    ) -> Tensor:
        batch = shape[0]
        if hasattr(attention, "qkv"):
            joined = self._linear(attention.qkv, normed).unflatten(0, (batch, -1))
            projected = joined.chunk(3, dim=2)
        else:
            projected = tuple(
                self._linear(linear, normed).unflatten(0, (batch, -1))
                for linear in (attention.q, attention.k, attention.v)
            )
        if getattr(attend, "takes_projections", False):
            attended = attend.project(layer, *projected, attention, positions)
        else:
            heads = rotated_heads(attention, *projected, num_heads, positions.cos, positions.sin)
            attended = attend(layer, *heads)
        return self._linear(attention.o, attended.reshape(-1, shape[2]))

    def _cross_attention(
        self,
        attention: nn.Module,
        normed: Normed,
        text_keys: Tensor,
        text_values: Tensor,
        distinct: Tensor | None,
    ) -> Tensor:
        q = self._linear(attention.q, normed)
        norm = attention.norm_q
        q = self._add_norm(q, gain=_row(norm.weight, q), eps=norm.eps, rms=True)
        batch, _, num_heads, head_dim = text_keys.shape
        q = q.view(batch, -1, num_heads, head_dim)
        if distinct is None or head_dim not in (self._repeated_head_dims or (head_dim,)):
            attended = dense_attention(q, text_keys, text_values)
        else:  # the padding of a prompt is one row many times over
            attended = self._attend_repeated(q, text_keys, text_values, distinct)
        return self._linear(attention.o, attended.flatten(0, 1).flatten(1))

    def _feed_forward(self, ffn: nn.Module, normed: Normed) -> Tensor:
        if isinstance(ffn, EightBitFeedForward):
            wide = ffn.first.multiply(*normed)
            return ffn.second.multiply(*ffn.second.round(wide, gelu=True))
        first, gelu, second = ffn
        if _is_plain(first, normed) and normed.is_cuda and gelu.approximate == "tanh":
            # The product's own epilogue, which on CUDA is the tanh form.
            wide = torch._addmm_activation(first.bias, normed, first.weight.t(), use_gelu=True)
        else:
            wide = gelu(first(normed))
        return second(wide)

    def _linear(self, linear: nn.Module, x: Normed) -> Tensor:
        if not isinstance(linear, EightBitLinear):
            return linear(x)
        return linear.multiply(*(x if isinstance(x, tuple) else linear.round(x)))


def blocks_obstacle(blocks: Sequence[nn.Module]) -> str | None:
    """Why these blocks cannot be fused; None: they can."""
    for layer, block in enumerate(blocks):
        norm = getattr(block, "norm3", None)
        if getattr(norm, "weight", None) is None or getattr(norm, "bias", None) is None:
            return f"block {layer} has no norm with weight and bias before its cross-attention"
        if isinstance(block.ffn, EightBitFeedForward):
            continue
        if len(block.ffn) != 3 or not isinstance(block.ffn[1], nn.GELU):
            return f"block {layer}'s feed-forward is not two linear layers around a GELU"
    return None


def _own_modulation(blocks: Sequence[nn.Module]) -> Tensor:
    """The blocks' own part of the modulation, float32 [layers, 6, 1, dim]; a gain is one more than
    the scale."""
    own = torch.stack([block.modulation[0].float() for block in blocks])
    own[:, 1::3] += 1
    return own[:, :, None]


def _row(parameter: Tensor, like: Tensor) -> Tensor:
    # Bare parameters may live elsewhere under a host that offloads.
    return parameter.to(like.device).unsqueeze(0)


def _is_plain(linear: nn.Module, x: Normed) -> bool:
    """Whether the layer is nothing but its weight and bias: no host's casts, no quantised weight,
    nothing hooked to it."""
    if not isinstance(linear, nn.Linear) or not isinstance(x, Tensor) or linear.bias is None:
        return False
    is_hooked = linear._forward_hooks or linear._forward_pre_hooks
    is_cast = getattr(linear, "comfy_cast_weights", False) or any(
        getattr(linear, name, None) for name in ("weight_function", "bias_function")
    )
    tensors = linear.weight, linear.bias
    return (
        not is_hooked
        and not is_cast
        and all(type(t) in (Tensor, nn.Parameter) for t in tensors)
        and all(t.dtype == x.dtype and t.device == x.device for t in tensors)
    )
