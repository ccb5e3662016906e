"""The transformer blocks with what lies between matrix products and attention fused.

A block's residual sums, norms, modulation and rounding are three launches, the query norm of
cross-attention is a fourth, and norm, rotary and cache write of self-attention are two more; each
sum is joined to the norm that follows it, also where that belongs to the next block. The arithmetic
is that of `wan.forward.run_block`, rounded less often: modulation and sums stay in float32 until
they are stored. Products of eight-bit numbers are scaled, and get their bias, where they are read
by a kernel of ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...kernels.eight_bit import Rounded, Scaling
from ..attention import dense_attention
from ..wan.forward import PositionTable, SelfAttend, TextContext, rotated_heads
from .linears import EightBitFeedForward, EightBitLinear
from .operations import FusedOperations

Normed = Tensor | Rounded
"""What a linear layer takes: rows in the model's type, or in eight bits."""
Product = tuple[Tensor, Scaling | None]
"""What it gives: rows in the model's type, or what still has to be scaled."""


class _Own(NamedTuple):
    """What all forwards of a video share, of all layers; float32.

    Attributes:
        modulation: [layers, 6, 1, dim], the blocks' own part; a gain is one more than the scale.
        columns: [layers, 2, 1, dim], scales of the two layers whose product is gated, in eight
            bits; else empty.
        biases: [layers, 2, 1, dim], of the same.
    """

    modulation: Tensor
    columns: Tensor
    biases: Tensor


class _Table(NamedTuple):
    """Of all layers, a row for each frame: float32 [layers, ..., B * F, dim].

    Attributes:
        rows: [layers, 6, ...]: shift, gain and gate of self-attention and of the feed-forward. In
            eight bits the gates are those of products: times the scales of the columns.
        offsets: [layers, 2, ...]: what the biases of those products add; else None.
    """

    rows: Tensor
    offsets: Tensor | None


class FusedBlocks:
    """For `wan_forward`'s `run_blocks`.

    Self-attention that has `project` and says `takes_projections` is handed the projections;
    any other gets heads from the modules' own norms.
    """

    def __init__(self, operations: FusedOperations) -> None:
        self._add_norm = operations.add_norm
        self._rms_norm = operations.rms_norm
        self._attend_repeated = operations.attend_repeated
        self._repeated_head_dims = operations.repeated_head_dims
        self._own: _Own | None = None

    def prepare(self, blocks: Sequence[nn.Module]) -> None:
        """Gather what all forwards of a video share; until the next call the blocks' own
        modulation must stay. Its address does for good: recordings name it. Only what was made in
        inference mode, where nothing can be written from outside, gets another, and its recordings
        go too (`ForwardEngine.attention`). A tree whose layers were exchanged needs another
        engine."""
        own, held = _own(blocks), self._own
        is_closed = (
            held is not None
            and held.modulation.is_inference()
            and not torch.is_inference_mode_enabled()
        )
        if held is None or is_closed or [x.shape for x in held] != [x.shape for x in own]:
            self._own = own
        else:
            for to, x in zip(held, own, strict=True):
                to.copy_(x)

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
        table, offsets = _table(self._own or _own(blocks), modulation)
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
            branch, scaling = self._self_attention(
                block.self_attn, layer, normed, shape, num_heads, positions, attend
            )
            norm = block.norm3
            normed = self._add_norm(
                rows,
                branch,
                gate1,
                None if offsets is None else offsets[layer, 0],
                branch_scales=None if scaling is None else scaling.rows,
                gain=_row(norm.weight, rows),
                shift=_row(norm.bias, rows),
                eps=norm.eps,
                eight_bit=eight_bit,
            )
            branch, scaling = self._cross_attention(
                block.cross_attn, normed, text.keys[layer], text.values[layer], text.distinct
            )
            normed = self._add_norm(
                rows,
                branch,
                *((None, None) if scaling is None else _columns(scaling)),
                branch_scales=None if scaling is None else scaling.rows,
                gain=gain2,
                shift=shift2,
                eps=block.norm2.eps,
                eight_bit=eight_bit,
            )
            branch, scaling = self._feed_forward(block.ffn, normed)
            gated = {
                "gate": gate2,
                "offset": None if offsets is None else offsets[layer, 1],
                "branch_scales": None if scaling is None else scaling.rows,
            }
            if layer + 1 < len(blocks):
                shift, gain = table[layer + 1, :2]
                normed = self._add_norm(
                    rows,
                    branch,
                    **gated,
                    gain=gain,
                    shift=shift,
                    eps=blocks[layer + 1].norm1.eps,
                    eight_bit=eight_bit,
                )
            else:
                self._add_norm(rows, branch, **gated, eps=block.norm2.eps)
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
    ) -> Product:
        scaling = None
        takes_projections = getattr(attend, "takes_projections", False)
        if hasattr(attention, "qkv"):
            if takes_projections:
                joined, scaling = self._product(attention.qkv, normed)
            else:  # the modules' norms want the values themselves
                joined = self._linear(attention.qkv, normed)
            projected = joined.unflatten(0, (shape[0], -1)).chunk(3, dim=2)
        else:
            projected = tuple(
                self._linear(linear, normed).unflatten(0, (shape[0], -1))
                for linear in (attention.q, attention.k, attention.v)
            )
        if takes_projections:
            attended = attend.project(layer, *projected, attention, positions, scaling)
        else:
            heads = rotated_heads(attention, *projected, num_heads, positions.cos, positions.sin)
            attended = attend(layer, *heads)
        return self._product(attention.o, attended.reshape(-1, shape[2]))

    def _cross_attention(
        self,
        attention: nn.Module,
        normed: Normed,
        text_keys: Tensor,
        text_values: Tensor,
        distinct: Tensor | None,
    ) -> Product:
        q, scaling = self._product(attention.q, normed)
        norm = attention.norm_q
        gain = norm.weight.to(q.device)
        q = self._rms_norm(q, gain, eps=norm.eps, dtype=text_keys.dtype, scaling=scaling)
        batch, _, num_heads, head_dim = text_keys.shape
        q = q.view(batch, -1, num_heads, head_dim)
        if distinct is None or head_dim not in (self._repeated_head_dims or (head_dim,)):
            attended = dense_attention(q, text_keys, text_values)
        else:  # the padding of a prompt is one row many times over
            attended = self._attend_repeated(q, text_keys, text_values, distinct)
        return self._product(attention.o, attended.flatten(0, 1).flatten(1))

    def _feed_forward(self, ffn: nn.Module, normed: Normed) -> Product:
        if isinstance(ffn, EightBitFeedForward):
            if ffn.first.numbers == torch.int8:
                wide, scaling = ffn.first.product(*normed)
            else:  # for rows as wide as these, scaling costs more than the product saves
                wide, scaling = ffn.first.multiply(*normed), None
            return ffn.second.product(*ffn.second.round(wide, gelu=True, scaling=scaling))
        first, gelu, second = ffn
        if _is_plain(first, normed) and normed.is_cuda and gelu.approximate == "tanh":
            # The product's own epilogue, which on CUDA is the tanh form.
            wide = torch._addmm_activation(first.bias, normed, first.weight.t(), use_gelu=True)
        else:
            wide = gelu(first(normed))
        return second(wide), None

    def _product(self, linear: nn.Module, x: Normed) -> Product:
        if not isinstance(linear, EightBitLinear):
            return linear(x), None
        return linear.product(*(x if isinstance(x, tuple) else linear.round(x)))

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


def _own(blocks: Sequence[nn.Module]) -> _Own:
    modulation = torch.stack([block.modulation[0].float() for block in blocks])
    modulation[:, 1::3] += 1
    if not isinstance(blocks[0].self_attn.o, EightBitLinear):
        nothing = modulation.new_zeros(0)
        return _Own(modulation[:, :, None], nothing, nothing)
    layers = [layer for block in blocks for layer in (block.self_attn.o, block.ffn.second)]
    zeros = modulation.new_zeros(modulation.shape[2])
    columns, biases = (
        torch.stack(rows).unflatten(0, (-1, 2)).unsqueeze(2)
        for rows in (
            [x.scale[0].to(zeros) for x in layers],
            [zeros if x.bias is None else x.bias.to(zeros) for x in layers],
        )
    )
    return _Own(modulation[:, :, None], columns, biases)


def _table(own: _Own, modulation: Tensor) -> _Table:
    """With what the timesteps add, [B, F, 6, dim]."""
    own = _Own(*(x.to(modulation.device) for x in own))
    rows = own.modulation + modulation.float().flatten(0, 1).transpose(0, 1)
    if not own.columns.numel():
        return _Table(rows, None)
    gates = rows[:, 2::3]
    offsets = gates * own.biases
    gates *= own.columns
    return _Table(rows, offsets)


def _columns(scaling: Scaling) -> tuple[Tensor, Tensor | None]:
    """As gate and offset of a product that has no others."""
    return scaling.columns, None if scaling.bias is None else scaling.bias[None]


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
