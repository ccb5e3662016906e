"""Block-sparse attention forward over index lists, in Triton.

One program computes BLOCK_M query rows of one head: it walks the list of its query block, BLOCK_N
keys a step, with an online softmax. Programs of one head follow each other, so that the head's
keys stay in L2. A query block or a key block may be larger than its tile; then several programs
share a list, or several steps share an id.

Precision: products of the inputs' type with float32 sums, softmax in float32 base 2, weights
rounded to the inputs' type before they meet the values. Only the last block of a slot is short:
its missing keys get a score of -inf and its missing values are read as zeros, so what lies in the
padding rows never matters. Every block has at least one valid key in its first tile, so the
running maximum is finite from the first step on.

Lengths, counts and list widths are runtime values that are not specialised: a growing cache
never compiles anything again.

Reference: `reference.block_sparse_attention`; FlashAttention-2 (arXiv 2307.08691) for the loop.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .checks import check_attention
from .configs import (
    BLOCK_SIZES,
    HEAD_DIMS,
    INT8_BLOCK_SIZES,
    AttentionConfig,
    attention_config,
)
from .grid import BlockGrid
from .launch import Launch, check_tensors, compute_capability, is_interpreted, strides

_RUNTIME = ["num_heads", "num_rows", "q_segment_tokens", "q_blocks_per_segment"]
_RUNTIME += ["kv_blocks_per_slot", "tail_tokens", "width"]
_RUNTIME += ["k_scales_stride_b", "k_scales_stride_h"]
_UNALIGNED = ["kv_indices", "kv_counts", "k_scales"]


@triton.jit(do_not_specialize=_RUNTIME, do_not_specialize_on_alignment=_UNALIGNED)
def block_sparse_attention_kernel(
    q,  # pointer, or descriptor [segments, tokens, H * D] with USE_TMA
    k,  # pointer, or descriptor [slots, tokens, H * D] with USE_TMA
    v,
    out,  # like q
    kv_indices,  # [B, H, NQ, width]
    kv_counts,  # [B, H, NQ]
    k_scales,  # [B, H, key blocks], for keys of int8; else None
    q_stride_b,  # with USE_TMA the batch strides count segments and slots
    q_stride_s,
    q_stride_h,
    k_stride_b,
    k_stride_s,
    k_stride_h,
    v_stride_b,
    v_stride_s,
    v_stride_h,
    out_stride_b,
    out_stride_s,
    out_stride_h,
    k_scales_stride_b,
    k_scales_stride_h,
    num_heads,
    num_rows,
    q_segment_tokens,
    q_blocks_per_segment,
    kv_blocks_per_slot,
    tail_tokens,
    width,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    Q_BLOCK: tl.constexpr,
    KV_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_TAIL: tl.constexpr,
    HAS_COUNTS: tl.constexpr,
    USE_TMA: tl.constexpr,
):
    """BLOCK_M query rows of one head against the key blocks in their list."""
    tl.static_assert(Q_BLOCK % BLOCK_M == 0)
    tl.static_assert(KV_BLOCK % BLOCK_N == 0)
    Q_PARTS: tl.constexpr = Q_BLOCK // BLOCK_M
    KV_PARTS: tl.constexpr = KV_BLOCK // BLOCK_N
    program = tl.program_id(0)
    part = program % Q_PARTS
    list_row = program // Q_PARTS
    q_block = list_row % num_rows
    head = (list_row // num_rows) % num_heads
    batch = (list_row // num_rows) // num_heads

    segment = q_block // q_blocks_per_segment
    segment_row = (q_block % q_blocks_per_segment) * Q_BLOCK + part * BLOCK_M
    columns = tl.arange(0, BLOCK_N)
    if USE_TMA:
        # The descriptor ends each segment at its last token: loads give zeros there, stores skip.
        at_head = head * HEAD_DIM
        b_q = q.load([batch * q_stride_b + segment, segment_row, at_head])
        b_q = b_q.reshape(BLOCK_M, HEAD_DIM)
    else:
        first_row = (segment * q_segment_tokens + segment_row).to(tl.int64)
        head = head.to(tl.int64)
        tile_rows = tl.arange(0, BLOCK_M)[:, None]
        dims = tl.arange(0, HEAD_DIM)
        row_mask = tile_rows < q_segment_tokens - segment_row
        q += batch.to(tl.int64) * q_stride_b + first_row * q_stride_s + head * q_stride_h
        b_q = tl.load(q + tile_rows * q_stride_s + dims[None, :], mask=row_mask, other=0.0)
        k += batch.to(tl.int64) * k_stride_b + head * k_stride_h
        v += batch.to(tl.int64) * v_stride_b + head * v_stride_h
        k_offsets = columns[None, :] * k_stride_s + dims[:, None]  # [D, BLOCK_N]
        v_offsets = columns[:, None] * v_stride_s + dims[None, :]  # [BLOCK_N, D]

    out_type = b_q.dtype
    if k_scales is not None:
        wide_q = b_q.to(tl.float32)
        most = tl.max(tl.abs(wide_q), 1)
        row_scale = most / 127.0
        inverse = 127.0 / tl.where(most > 0.0, most, 1.0)
        b_q = tl.floor(wide_q * inverse[:, None] + 0.5).to(tl.int8)
        k_scales += batch.to(tl.int64) * k_scales_stride_b + head.to(tl.int64) * k_scales_stride_h

    kv_indices += list_row.to(tl.int64) * width
    count = width
    if HAS_COUNTS:
        count = tl.load(kv_counts + list_row)
    # Parts of a short query block that hold no row at all have nothing to do.
    count = tl.where(segment_row < q_segment_tokens, count, 0)

    running_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    running_sum = tl.zeros([BLOCK_M], tl.float32)
    accumulator = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    # Read one step ahead: a tile's address must not wait for its id, or the pipeline stays shallow.
    next_block = tl.load(kv_indices, mask=count > 0, other=0)
    for step in tl.range(0, count * KV_PARTS):
        block = next_block
        next_step = tl.minimum(step + 1, count * KV_PARTS - 1)
        next_block = tl.load(kv_indices + next_step // KV_PARTS)
        part_token = (step % KV_PARTS) * BLOCK_N
        if HAS_TAIL:
            slot = block // kv_blocks_per_slot
            slot_block = block - slot * kv_blocks_per_slot
            valid = tl.where(slot_block == kv_blocks_per_slot - 1, tail_tokens, KV_BLOCK)
            valid -= part_token

        if USE_TMA:
            # With a tail the descriptor ends each slot at its last valid token, else a batch is
            # one slot.
            if HAS_TAIL:
                at_token = slot_block * KV_BLOCK + part_token
            else:
                slot = 0
                at_token = block * KV_BLOCK + part_token
            b_k = k.load([batch * k_stride_b + slot, at_token, at_head])
            b_k = b_k.reshape(BLOCK_N, HEAD_DIM).trans()
        else:
            token = block.to(tl.int64) * KV_BLOCK + part_token
            b_k = tl.load(k + token * k_stride_s + k_offsets)
        scores = tl.dot(b_q, b_k, input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        if k_scales is not None:
            scores = scores.to(tl.float32) * (row_scale * tl.load(k_scales + block))[:, None]
        if HAS_TAIL:
            scores = tl.where((columns < valid)[None, :], scores, float("-inf"))

        new_max = tl.maximum(running_max, tl.max(scores, 1) * scale_log2)
        weights = tl.exp2(scores * scale_log2 - new_max[:, None])
        decay = tl.exp2(running_max - new_max)
        running_sum = running_sum * decay + tl.sum(weights, 1)
        running_max = new_max
        accumulator *= decay[:, None]

        if USE_TMA:
            b_v = v.load([batch * v_stride_b + slot, at_token, at_head])
            b_v = b_v.reshape(BLOCK_N, HEAD_DIM)
        elif HAS_TAIL:
            # Zero, not only masked: a padding row's NaN times a weight of 0 is NaN.
            value_mask = (columns < valid)[:, None]
            b_v = tl.load(v + token * v_stride_s + v_offsets, mask=value_mask, other=0.0)
        else:
            b_v = tl.load(v + token * v_stride_s + v_offsets)
        accumulator = tl.dot(weights.to(b_v.dtype), b_v, accumulator, input_precision="ieee")

    # An empty list leaves a sum of 0; its rows are zeros.
    running_sum = tl.where(running_sum == 0.0, 1.0, running_sum)
    result = (accumulator / running_sum[:, None]).to(out_type)
    if USE_TMA:
        out.store([batch * out_stride_b + segment, segment_row, at_head], result[None, :, :])
    else:
        out += batch.to(tl.int64) * out_stride_b + first_row * out_stride_s + head * out_stride_h
        tl.store(out + tile_rows * out_stride_s + dims[None, :], result, mask=row_mask)


def block_sparse_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_indices: Tensor,
    kv_counts: Tensor | None,
    *,
    q_grid: BlockGrid,
    kv_grid: BlockGrid,
    scale: float | None = None,
    out: Tensor | None = None,
    k_scales: Tensor | None = None,
    config: AttentionConfig | None = None,
) -> Tensor:
    """`reference.block_sparse_attention` in one launch; see there for the arguments.

    Args:
        config: tiles and pipeline; default: this device's tuned entry of `configs`. One with
            `use_tma` demands strides that a tensor descriptor can express; the default falls back
            to pointers where they cannot.

    Raises:
        ValueError: shapes, types or strides that the kernel cannot do, with what it can.
    """
    out, scale = prepare(q, k, v, kv_indices, kv_counts, q_grid, kv_grid, scale, out, k_scales)
    head_dim = q.shape[3]
    blocks = q_grid.block_tokens, kv_grid.block_tokens
    block_sizes = BLOCK_SIZES if k_scales is None else INT8_BLOCK_SIZES
    if blocks not in block_sizes:
        raise ValueError(
            f"the Triton kernel does query and key blocks of {block_sizes} tokens"
            f"{'' if k_scales is None else ' with keys of int8'}, got {blocks}"
        )
    if not q.numel() or not k.numel() or not kv_indices.shape[3]:
        return out.zero_()
    obstacle = descriptor_obstacle(q, k, v, out, q_grid, kv_grid)
    if config is None:
        config = attention_config(
            compute_capability(q.device),
            head_dim,
            q_grid.block_tokens,
            kv_grid.block_tokens,
            allow_tma=obstacle is None,
            int8_keys=k_scales is not None,
        )
    elif config.use_tma and obstacle:
        raise ValueError(f"a configuration with use_tma cannot be met: {obstacle}")

    plan_attention(
        q, k, v, kv_indices, kv_counts, q_grid, kv_grid, scale, out, config, k_scales
    ).run()
    return out


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_indices: Tensor,
    kv_counts: Tensor | None,
    q_grid: BlockGrid,
    kv_grid: BlockGrid,
    scale: float | None,
    out: Tensor | None,
    k_scales: Tensor | None = None,
) -> tuple[Tensor, float]:
    """The output and the scale, once everything fits the kernels.

    Raises:
        ValueError: names the argument, what was expected and what was given.
    """
    check_attention(q, k, v, kv_indices, kv_counts, q_grid, kv_grid, out, k_scales)
    out = torch.empty_like(q) if out is None else out
    floats = {"q": q, "k": k, "v": v, "out": out}
    if k_scales is not None:
        floats.pop("k")
        for name, x in (("k", k), ("k_scales", k_scales)):
            if x.device != q.device or x.stride(-1) != 1:
                raise ValueError(
                    f"{name} must be on {q.device} and dense in its last axis, got {x.device} and "
                    f"strides {x.stride()}"
                )
    check_tensors(floats, HEAD_DIMS)
    for name, x in (("kv_indices", kv_indices), ("kv_counts", kv_counts)):
        if x is not None and (x.dtype != torch.int32 or x.device != q.device):
            raise ValueError(f"{name} must be int32 on {q.device}, got {x.dtype} on {x.device}")
    if q.dtype == torch.float32 and not is_interpreted():
        raise ValueError("the Triton kernel needs bfloat16 or float16 on a GPU, got float32")
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if not scale > 0:
        raise ValueError(f"the Triton kernel needs a scale above 0, got {scale}")
    return out, scale


def plan_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_indices: Tensor,
    kv_counts: Tensor | None,
    q_grid: BlockGrid,
    kv_grid: BlockGrid,
    scale: float,
    out: Tensor,
    config: AttentionConfig,
    k_scales: Tensor | None = None,
) -> Launch:
    """The launch for arguments that have been checked."""
    batch, _, heads, head_dim = q.shape
    has_tail = masks_tails(q_grid, kv_grid, k)
    operands: dict[str, Tensor | TensorDescriptor] = {"q": q, "k": k, "v": v, "out": out}
    all_strides = {}
    for name, x in operands.items():
        all_strides |= strides(name, x, "bsh")
    if config.use_tma:
        views = slot_views(q, k, v, out, q_grid, kv_grid)
        for name, view in views.items():
            tile = config.tile_m if name in ("q", "out") else config.tile_n
            all_strides[f"{name}_stride_b"] = view.batch_slots
            operands[name] = TensorDescriptor(
                view.base, view.shape, view.strides, [1, tile, head_dim]
            )
    num_rows, width = kv_indices.shape[2:]
    programs = batch * heads * num_rows * (q_grid.block_tokens // config.tile_m)
    arguments = {
        **operands,
        "kv_indices": kv_indices.contiguous(),
        "kv_counts": kv_indices if kv_counts is None else kv_counts.contiguous(),
        "k_scales": k_scales,
        **all_strides,
        **strides("k_scales", kv_indices if k_scales is None else k_scales, "bh"),
        "num_heads": heads,
        "num_rows": num_rows,
        "q_segment_tokens": q_grid.segment_tokens,
        "q_blocks_per_segment": q_grid.blocks_per_segment,
        "kv_blocks_per_slot": kv_grid.blocks_per_segment,
        "tail_tokens": kv_grid.tail_tokens,
        "width": width,
        "scale_log2": scale * math.log2(math.e),
        "HEAD_DIM": head_dim,
        "Q_BLOCK": q_grid.block_tokens,
        "KV_BLOCK": kv_grid.block_tokens,
        "BLOCK_M": config.tile_m,
        "BLOCK_N": config.tile_n,
        "HAS_TAIL": has_tail,
        "HAS_COUNTS": kv_counts is not None,
        "USE_TMA": config.use_tma,
    }
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return Launch(block_sparse_attention_kernel, (programs,), arguments, options)


def masks_tails(q_grid: BlockGrid, kv_grid: BlockGrid, k: Tensor) -> bool:
    """Whether the kernel looks for short blocks.

    Small blocks and keys of int8 have no variant that does not.
    """
    has_one_variant = min(q_grid.block_tokens, kv_grid.block_tokens) < 64 or k.dtype == torch.int8
    return has_one_variant or kv_grid.tail_tokens != kv_grid.block_tokens


def descriptor_obstacle(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, q_grid: BlockGrid, kv_grid: BlockGrid
) -> str | None:
    """Why the tensors' strides cannot be `slot_views`; None: they can."""
    slot = kv_grid.slot_tokens if masks_tails(q_grid, kv_grid, k) else 1
    pitches = {"q": q_grid.segment_tokens, "k": slot, "v": slot, "out": q_grid.segment_tokens}
    for name, x in (("q", q), ("k", k), ("v", v), ("out", out)):
        if obstacle := _obstacle(name, x, pitches[name]):
            return obstacle
    return None


def _obstacle(name: str, x: Tensor, pitch: int) -> str | None:
    """Why x [B, S, H, D] cannot be a descriptor of units `pitch` rows apart; None: it can."""
    batch, _, heads, head_dim = x.shape
    stride_b, stride_s, stride_h, _ = x.stride()
    if heads > 1 and stride_h != head_dim:
        return f"the heads of a token of {name} must lie side by side, got strides {x.stride()}"
    if any(n % 16 for n in (x.data_ptr(), stride_s * x.itemsize)):
        return f"{name} needs an address and rows of whole 16 bytes, got strides {x.stride()}"
    if batch > 1 and stride_b % (stride_s * pitch):
        return f"batches of {name} must be a multiple of {pitch} rows apart, got {x.stride()}"
    return None


@dataclass(frozen=True)
class SlotView:
    """A tensor [B, S, H, D] as [slots, valid tokens, H * D], for a tensor descriptor.

    Loads beyond a slot's last valid token give zeros there, and stores skip.

    Attributes:
        batch_slots: slots from one batch to the next.
    """

    base: Tensor
    shape: list[int]
    strides: list[int]
    batch_slots: int


def slot_views(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, q_grid: BlockGrid, kv_grid: BlockGrid
) -> dict[str, SlotView]:
    """Segments of queries, and slots of keys; without short key blocks a batch is one slot."""
    segment = q_grid.segment_tokens
    views = {"q": _slot_view(q, segment, segment), "out": _slot_view(out, segment, segment)}
    for name, x in (("k", k), ("v", v)):
        if masks_tails(q_grid, kv_grid, k):
            views[name] = _slot_view(x, kv_grid.slot_tokens, kv_grid.segment_tokens)
        else:
            # The stride of a batch of one may be anything.
            pitch = x.shape[1] if x.shape[0] == 1 else x.stride(0) // x.stride(1)
            views[name] = _slot_view(x, pitch, x.shape[1])
    return views


def _slot_view(x: Tensor, pitch: int, valid: int) -> SlotView:
    """A slot begins every `pitch` rows."""
    batch, rows, heads, head_dim = x.shape
    batch_slots = 0 if batch == 1 else x.stride(0) // (x.stride(1) * pitch)
    slots = max(1, rows // pitch) + (batch - 1) * batch_slots
    shape = [slots, valid, heads * head_dim]
    return SlotView(x, shape, [x.stride(1) * pitch, x.stride(1), 1], batch_slots)
