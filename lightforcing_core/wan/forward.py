"""One Wan forward for every host.

`wan_forward` takes a module tree with Wan's names and calls its modules, so weights, LoRA,
offload and casts stay the host's. Self-attention is handed to the caller's `attend`: that is
the one seam where the key/value cache, sparsity and training masks come in.

Reference: Wan 2.1 `WanModel.forward` and Self Forcing `CausalWanModel` (modulation per latent
frame). Deviations: the text is projected once per prompt (`prepare_text`), and timesteps can be
embedded once per run (`prepare_time`), not in every forward; the order of float32 roundings
differs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..attention import dense_attention
from ..errors import UserError
from .rope import apply_rope, rope_angles


class SelfAttend(Protocol):
    """Self-attention of one layer; may keep the keys and values it is given.

    Args: layer index, then q, k, v, each [B, S, H, D] with q and k already rotated.
    Returns: [B, S, H, D].
    """

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class TextContext:
    """Cross-attention keys and values of one prompt, one [B, text_len, H, D] pair per layer.

    Attributes:
        distinct: int32 [1] on their device: from row distinct - 1 on all rows are alike, the
            padding of the prompt. None: not known.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    distinct: Tensor | None = None


@dataclass(frozen=True)
class TimeContext:
    """What the timesteps of some latent frames come to; the same in every forward at them.

    Attributes:
        timesteps: [B, F], 0..1000.
        embedded: [B, F, 1, dim], for the head.
        modulation: [B, F, 6, dim], for the blocks.
    """

    timesteps: Tensor
    embedded: Tensor
    modulation: Tensor


@dataclass(frozen=True)
class PositionTable:
    """Where the tokens of some latent frames are.

    Attributes:
        cos, sin: rotary, float32 [tokens, D / 2], in the order of the tokens.
        order: int64 [tokens of a frame], raster index of each token; None: they are in raster
            order.
        places: int64 [tokens of a frame], its inverse: the place of each raster index.
    """

    cos: Tensor
    sin: Tensor
    order: Tensor | None = None
    places: Tensor | None = None


def _parameter(parameter: Tensor, like: Tensor) -> Tensor:
    # Bare parameters may live elsewhere under a host that offloads; modules cast themselves.
    return parameter.to(device=like.device, dtype=like.dtype)


def _heads(x: Tensor, num_heads: int) -> Tensor:
    return x.unflatten(-1, (num_heads, -1))


def prepare_text(tree: nn.Module, embeds: Tensor) -> TextContext:
    """Project a prompt once: text MLP, then each layer's cross-attention keys and values.

    Args:
        tree: Wan-shaped module tree.
        embeds: [B, L, text_dim] with L <= text_len, in the tree's compute dtype and device.
            Missing rows are zeros; every row is attended, as in Wan.

    Raises:
        UserError: more rows than text_len, or another width than the model takes.
    """
    text_dim = tree.text_embedding[0].weight.shape[1]
    if embeds.ndim != 3 or embeds.shape[2] != text_dim or embeds.shape[1] > tree.text_len:
        raise UserError(
            f"prompt embeddings must be [batch, at most {tree.text_len}, {text_dim}] for this "
            f"model, got {list(embeds.shape)}; use the text encoder that belongs to the model"
        )
    context = tree.text_embedding(F.pad(embeds, (0, 0, 0, tree.text_len - embeds.shape[1])))
    keys, values = [], []
    for block in tree.blocks:
        attention = block.cross_attn
        keys.append(_heads(attention.norm_k(attention.k(context)), tree.num_heads))
        values.append(_heads(attention.v(context), tree.num_heads))
    return TextContext(tuple(keys), tuple(values), _distinct_rows(embeds, tree.text_len))


def _distinct_rows(embeds: Tensor, text_len: int) -> Tensor:
    """Rows up to and with the first of the zeros that a prompt ends with; int32 [1]. Found on the
    device, so that nothing waits."""
    is_used = embeds.ne(0).any(2).any(0)
    places = torch.arange(1, embeds.shape[1] + 1, device=embeds.device)
    used = (is_used * places).amax(0, keepdim=True) if len(places) else places.new_zeros(1)
    return (used + 1).clamp(max=text_len).int()


def timestep_embedding(timesteps: Tensor, freq_dim: int) -> Tensor:
    """Sinusoid of the timesteps: cosines, then sines; float64 inside.

    Args: timesteps float [N], 0..1000. Returns: float64 [N, freq_dim].
    """
    half = freq_dim // 2
    exponents = torch.arange(half, dtype=torch.float64, device=timesteps.device) / half
    angles = torch.outer(timesteps.double(), 10000.0**-exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def prepare_time(tree: nn.Module, timesteps: Tensor, dtype: torch.dtype) -> TimeContext:
    """Embed timesteps [B, F], 0..1000, one for each latent frame; dtype of the forward."""
    sinusoid = timestep_embedding(timesteps.flatten(), tree.freq_dim).to(dtype)
    embedded = tree.time_embedding(sinusoid)  # [B * F, dim]
    modulation = tree.time_projection(embedded).view(*timesteps.shape, 6, -1)
    return TimeContext(timesteps, embedded.view(*timesteps.shape, 1, -1), modulation)


def position_table(
    tree: nn.Module,
    frame_indices: Sequence[int],
    height: int,
    width: int,
    device: torch.device,
    order: Sequence[int] | None = None,
) -> PositionTable:
    """Positions of latent frames of the given latent size (height and width in latents).

    Args:
        order: raster index of each token of a frame, such as `layout.tile_order`; the forward
            then takes tokens in this order, and so does attention. None: raster.

    Raises:
        ValueError: an order that does not name every token of a frame once.
    """
    head_dim = tree.patch_embedding.weight.shape[0] // tree.num_heads
    rows, columns = height // tree.patch_size[1], width // tree.patch_size[2]
    if order is None:
        return PositionTable(*rope_angles(frame_indices, rows, columns, head_dim, device))
    if sorted(order) != list(range(rows * columns)):
        raise ValueError(
            f"the order of tokens must name each of 0..{rows * columns - 1} once, "
            f"got {len(order)} numbers"
        )
    places = torch.tensor(order)
    inverse = places.argsort().to(device)
    places = places.to(device)
    cos, sin = (
        table.unflatten(0, (len(frame_indices), -1))[:, places].flatten(0, 1)
        for table in rope_angles(frame_indices, rows, columns, head_dim, device)
    )
    return PositionTable(cos, sin, places, inverse)


def _check_latents(tree: nn.Module, x: Tensor, timesteps: Tensor, frames: int) -> None:
    _, patch_h, patch_w = tree.patch_size
    if x.ndim != 5 or x.shape[1] != tree.patch_embedding.weight.shape[1]:
        channels = tree.patch_embedding.weight.shape[1]
        raise UserError(
            f"latents must be [batch, {channels}, frames, height, width], got {list(x.shape)}"
        )
    if x.shape[3] % patch_h or x.shape[4] % patch_w:
        raise UserError(
            f"latent size {x.shape[4]}x{x.shape[3]} does not divide by the patch "
            f"{patch_w}x{patch_h}; choose a width and height in pixels divisible by 16"
        )
    if timesteps.shape != (x.shape[0], x.shape[2]) or frames != x.shape[2]:
        raise UserError(
            f"need one timestep per batch entry and frame, [{x.shape[0]}, {x.shape[2]}], and as "
            f"many frame indices; got {list(timesteps.shape)} and {frames}"
        )


def wan_forward(
    tree: nn.Module,
    x: Tensor,
    timesteps: Tensor | TimeContext,
    frame_indices: Sequence[int],
    text: TextContext,
    attend: SelfAttend,
    positions: PositionTable | None = None,
    run_blocks: RunBlocks | None = None,
) -> Tensor:
    """Velocity of some latent frames.

    Args:
        tree: Wan-shaped module tree (`modules.WanModel`, or a host's).
        x: noisy latents [B, C, F, h, w], normalised; h and w divisible by the patch.
        timesteps: [B, F], 0..1000, one per latent frame; or what `prepare_time` made of them for
            the dtype of x, to reuse it.
        frame_indices: F absolute latent frame indices (rotary positions).
        text: from `prepare_text`.
        attend: self-attention of every layer.
        positions: from `position_table` for the same indices and size, to reuse it or for another
            order of tokens. Attention is given tokens in that order; x and the result have none.
        run_blocks: runs the blocks, instead of `run_each_block`: compiled or fused.

    Returns:
        Velocity eps - x0, [B, C_out, F, h, w], dtype of x.

    Raises:
        UserError: shapes that do not fit the model.
    """
    if isinstance(timesteps, TimeContext):
        time = timesteps
        _check_latents(tree, x, time.timesteps, len(frame_indices))
    else:
        _check_latents(tree, x, timesteps, len(frame_indices))
        time = prepare_time(tree, timesteps, x.dtype)
    _, _, frames, height, width = x.shape
    if positions is None:
        positions = position_table(tree, frame_indices, height, width, x.device)
    hidden = _embed_patches(tree, x).flatten(3)  # [B, dim, F, T]
    if positions.order is not None:
        hidden = hidden.index_select(3, positions.order)
    hidden = hidden.flatten(2).transpose(1, 2)  # [B, F * T, dim]

    run = run_blocks or run_each_block
    hidden = run(tree.blocks, hidden, time.modulation, tree.num_heads, positions, text, attend)

    embedded = time.embedded
    shift, scale = (_parameter(tree.head.modulation, embedded) + embedded).unbind(2)
    out = tree.head.head(_modulate(tree.head.norm(hidden), shift, scale))
    if positions.places is not None:
        out = out.unflatten(1, (frames, -1)).index_select(2, positions.places).flatten(1, 2)
    return _unpatchify(out, frames, height, width, tree.patch_size)


def _embed_patches(tree: nn.Module, x: Tensor) -> Tensor:
    # ComfyUI keeps this one layer in float32, whatever the type of the others.
    wide = tree.patch_embedding.weight.dtype == torch.float32
    return tree.patch_embedding(x.float() if wide else x).to(x.dtype)


class RunBlocks(Protocol):
    """The transformer blocks; hidden [B, F * T, dim], modulation [B, F, 6, dim]."""

    def __call__(
        self,
        blocks: Iterable[nn.Module],
        hidden: Tensor,
        modulation: Tensor,
        num_heads: int,
        positions: PositionTable,
        text: TextContext,
        attend: SelfAttend,
    ) -> Tensor: ...


def run_each_block(
    blocks: Iterable[nn.Module],
    hidden: Tensor,
    modulation: Tensor,
    num_heads: int,
    positions: PositionTable,
    text: TextContext,
    attend: SelfAttend,
) -> Tensor:
    """The transformer blocks as they stand; see `RunBlocks`."""
    for layer, block in enumerate(blocks):
        hidden = run_block(block, layer, hidden, modulation, num_heads, positions, text, attend)
    return hidden


def run_block(
    block: nn.Module,
    layer: int,
    hidden: Tensor,
    modulation: Tensor,
    num_heads: int,
    positions: PositionTable,
    text: TextContext,
    attend: SelfAttend,
) -> Tensor:
    """One transformer block."""
    q, k, v = before_attention(block, hidden, modulation, num_heads, positions.cos, positions.sin)
    attended = attend(layer, q, k, v)
    return after_attention(
        block, hidden, attended, modulation, text.keys[layer], text.values[layer]
    )


def before_attention(
    block: nn.Module,
    hidden: Tensor,
    modulation: Tensor,
    num_heads: int,
    cos: Tensor,
    sin: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a block's self-attention, each [B, F * T, H, D], rotated."""
    attention = block.self_attn
    shift, scale, _ = _six(block, modulation)[:3]
    normed = _modulate(block.norm1(hidden), shift, scale)
    projected = attention.q(normed), attention.k(normed), attention.v(normed)
    return rotated_heads(attention, *projected, num_heads, cos, sin)


def rotated_heads(
    attention: nn.Module,
    x_q: Tensor,
    x_k: Tensor,
    x_v: Tensor,
    num_heads: int,
    cos: Tensor,
    sin: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the three projections [B, S, H * D]: heads [B, S, H, D], normed and rotated but v."""
    q = _heads(attention.norm_q(x_q), num_heads)
    k = _heads(attention.norm_k(x_k), num_heads)
    return apply_rope(q, cos, sin), apply_rope(k, cos, sin), _heads(x_v, num_heads)


def after_attention(
    block: nn.Module,
    hidden: Tensor,
    attended: Tensor,
    modulation: Tensor,
    text_keys: Tensor,
    text_values: Tensor,
) -> Tensor:
    """The rest of a block: [B, F * T, dim] from its input and its self-attention's result."""
    _, _, gate1, shift2, scale2, gate2 = _six(block, modulation)
    hidden = _gate(hidden, block.self_attn.o(attended.flatten(2)), gate1)

    attention = block.cross_attn
    num_heads = text_keys.shape[2]
    q = _heads(attention.norm_q(attention.q(block.norm3(hidden))), num_heads)
    crossed = dense_attention(q, text_keys, text_values)
    hidden = hidden + attention.o(crossed.flatten(2))

    normed = _modulate(block.norm2(hidden), shift2, scale2)
    return _gate(hidden, block.ffn(normed), gate2)


def _six(block: nn.Module, modulation: Tensor) -> tuple[Tensor, ...]:
    """Shift, scale and gate of self-attention and of the feed-forward, each [B, F, dim]."""
    return (_parameter(block.modulation, modulation) + modulation).unbind(2)


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x [B, F * T, dim] times (1 + scale) plus shift, each [B, F, dim], frame by frame."""
    per_frame = x.unflatten(1, (shift.shape[1], -1))
    return torch.addcmul(shift.unsqueeze(2), per_frame, 1 + scale.unsqueeze(2)).flatten(1, 2)


def _gate(residual: Tensor, x: Tensor, gate: Tensor) -> Tensor:
    """residual + x * gate, gate [B, F, dim] applied frame by frame."""
    frames = gate.shape[1]
    gated = torch.addcmul(
        residual.unflatten(1, (frames, -1)), x.unflatten(1, (frames, -1)), gate.unsqueeze(2)
    )
    return gated.flatten(1, 2)


def _unpatchify(
    x: Tensor, frames: int, height: int, width: int, patch: tuple[int, int, int]
) -> Tensor:
    """[B, F * T, 1 * ph * pw * C] to [B, C, F, h, w]."""
    _, patch_h, patch_w = patch
    x = x.view(x.shape[0], frames, height // patch_h, width // patch_w, patch_h, patch_w, -1)
    return x.permute(0, 6, 1, 2, 4, 3, 5).reshape(x.shape[0], -1, frames, height, width)
