"""Block-sparse attention for Hopper (9.0) in Gluon: copies and two halves of the rows at once.

One program computes 128 query rows of one head. One warp reads the index list a step ahead and
copies key and value tiles into a ring of stages; two warpgroups of 64 rows share every tile. A
warpgroup issues the next scores before it waits for the last product with the values, so that the
softmax of one runs beside the matrix units' work for the other.

One program fills a multiprocessor, so 432 programs on 132 of them take four rounds with the last
one a quarter full. The tiles of that round are cut: several programs share a list, each leaves an
unfinished result, and `triton_merge` joins them (`plan_rounds` decides).

Masks, precision and the meaning of all arguments are those of `triton_attention`, whose kernel is
the plain twin of this one; only tensor descriptors, query blocks of 128 and key blocks of 64 and
128 are done here. The interpreter cannot run Gluon.

Reference: FlashAttention-3 (arXiv 2407.08608) for overlapping softmax and products.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .grid import BlockGrid
from .launch import Launch, compute_capability, multiprocessors
from .rounds import Rounds, plan_rounds
from .triton_attention import descriptor_obstacle, masks_tails, prepare, slot_views
from .triton_merge import plan_merge

# Triton 3.9 renamed the copies of 3.6; arguments and meaning are the same.
_load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_store_tile = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global

_RUNTIME = ["num_heads", "num_rows", "q_segment_tokens", "q_blocks_per_segment"]
_RUNTIME += ["kv_blocks_per_slot", "slot_reciprocal", "tail_tokens", "width"]
_RUNTIME += ["q_slots", "k_slots", "v_slots", "out_slots", "whole_tiles", "num_parts"]


@gluon.jit
def _divided(number, reciprocal):
    """number // divisor for number x divisor < 2^30, with `_reciprocal(divisor)`.

    A true division would be forty instructions of a loop of three hundred.
    """
    return ((number.to(gl.int64) * reciprocal) >> 30).to(gl.int32)


@gluon.jit
def _tile_of(step, block, kv_blocks_per_slot, slot_reciprocal, KV_BLOCK: gl.constexpr,
             TILE: gl.constexpr, HAS_TAIL: gl.constexpr):  # fmt: skip
    """Slot of a key tile, its first token there, and whether its block is a slot's last one.

    Without a tail a batch is one slot.
    """
    PARTS: gl.constexpr = KV_BLOCK // TILE
    slot = block * 0
    slot_block = block
    if HAS_TAIL:
        slot = _divided(block, slot_reciprocal)
        slot_block = block - slot * kv_blocks_per_slot
    is_short = slot_block == kv_blocks_per_slot - 1
    return slot, slot_block * KV_BLOCK + (step % PARTS) * TILE, is_short


@gluon.jit
def _copy_tiles(
    k, v, k_tiles, v_tiles, short_tiles, k_ready, k_free, v_ready, v_free, kv_indices, steps,
    kv_blocks_per_slot, slot_reciprocal, k_slot, v_slot, at_head,
    KV_BLOCK: gl.constexpr, TILE: gl.constexpr, HAS_TAIL: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The copying warp: fills a stage as soon as both warpgroups have left it."""
    PARTS: gl.constexpr = KV_BLOCK // TILE
    next_block = gl.load(kv_indices)
    for step in range(steps):
        block = next_block
        next_block = gl.load(kv_indices + gl.minimum(step + 1, steps - 1) // PARTS)
        slot, token, is_short = _tile_of(
            step, block, kv_blocks_per_slot, slot_reciprocal, KV_BLOCK, TILE, HAS_TAIL
        )
        stage = step % STAGES
        phase = (step // STAGES) & 1
        mbarrier.wait(k_free.index(stage), phase ^ 1)
        if HAS_TAIL:
            # Told along with the tile: for a warpgroup of 128 threads, asking the list is slow.
            layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
            flag = gl.full([1], 0, gl.int32, layout=layout) + is_short.to(gl.int32)
            short_tiles.index(stage).store(flag)
        mbarrier.expect(k_ready.index(stage), k.block_type.nbytes)
        _load_tile(k, [k_slot + slot, token, at_head], k_ready.index(stage), k_tiles.index(stage))
        mbarrier.wait(v_free.index(stage), phase ^ 1)
        mbarrier.expect(v_ready.index(stage), v.block_type.nbytes)
        _load_tile(v, [v_slot + slot, token, at_head], v_ready.index(stage), v_tiles.index(stage))


@gluon.jit
def _read_flag(flags, stage, HAS_TAIL: gl.constexpr):
    flag = stage * 0
    if HAS_TAIL:
        layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
        flag = gl.sum(flags.index(stage).load(layout), 0)
    return flag


@gluon.jit
def _masked(scores, step, is_short, tail_tokens, columns,
            KV_BLOCK: gl.constexpr, TILE: gl.constexpr, HAS_TAIL: gl.constexpr):  # fmt: skip
    if HAS_TAIL:
        PARTS: gl.constexpr = KV_BLOCK // TILE
        # A branch, for one block in 25: comparing every score costs a quarter of the speed.
        if is_short != 0:
            valid = tail_tokens - (step % PARTS) * TILE
            scores = gl.where((columns < valid)[None, :], scores, float("-inf"))
    return scores


@gluon.jit
def _attend_rows(
    HALF: gl.constexpr, q_tiles, k_tiles, v_tiles, short_tiles, q_ready, k_ready, k_free, v_ready,
    v_free, out, parts, log_sums, steps, tail_tokens, out_slot, segment_row, at_head, part,
    scale_log2, HEAD_DIM: gl.constexpr, KV_BLOCK: gl.constexpr, TILE: gl.constexpr, HAS_TAIL:
    gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A warpgroup: 64 rows against every tile of the list, or of its part."""
    dtype: gl.constexpr = q_tiles.dtype
    score_layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, TILE, 16]
    )
    sum_layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, HEAD_DIM, 16]
    )
    weight_layout: gl.constexpr = gl.DotOperandLayout(0, sum_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, score_layout)
    sum_row_layout: gl.constexpr = gl.SliceLayout(1, sum_layout)
    columns = gl.arange(0, TILE, layout=gl.SliceLayout(0, score_layout))
    no_scores = gl.zeros([64, TILE], gl.float32, layout=score_layout)
    running_max = gl.full([64], float("-inf"), gl.float32, layout=row_layout)
    running_sum = gl.zeros([64], gl.float32, layout=row_layout)
    accumulator = gl.zeros([64, HEAD_DIM], gl.float32, layout=sum_layout)

    q_tile = q_tiles.index(HALF).reshape([64, HEAD_DIM])
    mbarrier.wait(q_ready, 0)
    if steps > 0:
        mbarrier.wait(k_ready.index(0), 0)
        k_tile = k_tiles.index(0).reshape([TILE, HEAD_DIM]).permute((1, 0))
        scores = warpgroup_mma(q_tile, k_tile, no_scores, use_acc=False, is_async=True)
        is_short = _read_flag(short_tiles, 0, HAS_TAIL)
        scores = warpgroup_mma_wait(0, deps=[scores])
        mbarrier.arrive(k_free.index(0), count=1)
        scores = _masked(scores, 0, is_short, tail_tokens, columns, KV_BLOCK, TILE, HAS_TAIL)
        running_max = gl.max(scores, 1) * scale_log2
        weights = gl.exp2(scores * scale_log2 - running_max[:, None])
        running_sum = gl.sum(weights, 1)
        weights = gl.convert_layout(weights.to(dtype), weight_layout)

        for step in range(1, steps):
            stage = step % STAGES
            mbarrier.wait(k_ready.index(stage), (step // STAGES) & 1)
            k_tile = k_tiles.index(stage).reshape([TILE, HEAD_DIM]).permute((1, 0))
            scores = warpgroup_mma(q_tile, k_tile, no_scores, use_acc=False, is_async=True)

            before = (step - 1) % STAGES
            mbarrier.wait(v_ready.index(before), ((step - 1) // STAGES) & 1)
            v_tile = v_tiles.index(before).reshape([TILE, HEAD_DIM])
            accumulator = warpgroup_mma(weights, v_tile, accumulator, is_async=True)

            is_short = _read_flag(short_tiles, stage, HAS_TAIL)
            scores = warpgroup_mma_wait(1, deps=[scores])
            mbarrier.arrive(k_free.index(stage), count=1)
            scores = _masked(scores, step, is_short, tail_tokens, columns, KV_BLOCK, TILE, HAS_TAIL)
            new_max = gl.maximum(running_max, gl.max(scores, 1) * scale_log2)
            new_weights = gl.exp2(scores * scale_log2 - new_max[:, None])
            decay = gl.exp2(running_max - new_max)
            running_sum = running_sum * decay + gl.sum(new_weights, 1)
            running_max = new_max

            # The old weights are registers that the product reads until here. The new ones are
            # named so that the compiler cannot move the wait in front of the softmax.
            accumulator, weights, new_weights = warpgroup_mma_wait(
                0, deps=[accumulator, weights, new_weights]
            )
            mbarrier.arrive(v_free.index(before), count=1)
            accumulator *= gl.convert_layout(decay, sum_row_layout)[:, None]
            weights = gl.convert_layout(new_weights.to(dtype), weight_layout)

        last = (steps - 1) % STAGES
        mbarrier.wait(v_ready.index(last), ((steps - 1) // STAGES) & 1)
        v_tile = v_tiles.index(last).reshape([TILE, HEAD_DIM])
        accumulator = warpgroup_mma(weights, v_tile, accumulator, is_async=True)
        accumulator = warpgroup_mma_wait(0, deps=[accumulator])

    # An empty list leaves a sum of 0; its rows are zeros, and as a part it weighs nothing.
    log_sum = running_max + gl.log2(running_sum)
    running_sum = gl.where(running_sum == 0.0, 1.0, running_sum)
    accumulator /= gl.convert_layout(running_sum, sum_row_layout)[:, None]
    if part < 0:
        # The query tile is done with and has the result's size.
        q_tile.store(accumulator.to(dtype))
        fence_async_shared()
        _store_tile(out, [out_slot, segment_row + HALF * 64, at_head], q_tiles.index(HALF))
        tma.store_wait(0)
    else:
        first = part.to(gl.int64) * 128 + HALF * 64
        rows = gl.arange(0, 64, layout=sum_row_layout)
        dims = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, sum_layout))
        at = parts + first * HEAD_DIM + rows[:, None] * HEAD_DIM + dims[None, :]
        gl.store(at, accumulator)
        gl.store(log_sums + first + gl.arange(0, 64, layout=row_layout), log_sum)


@gluon.jit(do_not_specialize=_RUNTIME, do_not_specialize_on_alignment=["kv_indices", "kv_counts"])
def block_sparse_attention_gluon_kernel(
    q,  # descriptors [segments or slots, tokens, H * D] of [1, 64, D] and [1, TILE, D] tiles
    k,
    v,
    out,
    parts,  # [cut tiles x parts, 128, D] float32
    log_sums,  # [cut tiles x parts, 128] float32, base 2
    kv_indices,  # [B, H, NQ, width]
    kv_counts,  # [B, H, NQ]
    q_slots,  # segments or slots from one batch to the next
    k_slots,
    v_slots,
    out_slots,
    num_heads,
    num_rows,
    q_segment_tokens,
    q_blocks_per_segment,
    kv_blocks_per_slot,
    slot_reciprocal,
    tail_tokens,
    width,
    whole_tiles,
    num_parts,
    scale_log2,
    HEAD_DIM: gl.constexpr,
    KV_BLOCK: gl.constexpr,
    TILE: gl.constexpr,
    HAS_TAIL: gl.constexpr,
    HAS_COUNTS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """128 query rows of one head against the key blocks in their list, or in a part of it."""
    program = gl.program_id(0)
    part = program - whole_tiles  # below 0: the whole list
    list_row = gl.where(part < 0, program, whole_tiles + part // num_parts)
    q_block = list_row % num_rows
    head = (list_row // num_rows) % num_heads
    batch = (list_row // num_rows) // num_heads
    segment = q_block // q_blocks_per_segment
    segment_row = (q_block % q_blocks_per_segment) * 128
    at_head = head * HEAD_DIM
    kv_indices += list_row.to(gl.int64) * width
    count = width
    if HAS_COUNTS:
        count = gl.load(kv_counts + list_row)
    begin = count * 0
    if part >= 0:
        begin = count * (part % num_parts) // num_parts
        count = count * (part % num_parts + 1) // num_parts - begin
    kv_indices += begin
    steps = count * (KV_BLOCK // TILE)

    q_tiles = gl.allocate_shared_memory(q.dtype, [2, 1, 64, HEAD_DIM], q.layout)
    k_tiles = gl.allocate_shared_memory(k.dtype, [STAGES, 1, TILE, HEAD_DIM], k.layout)
    v_tiles = gl.allocate_shared_memory(v.dtype, [STAGES, 1, TILE, HEAD_DIM], v.layout)
    flag_layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    short_tiles = gl.allocate_shared_memory(gl.int32, [STAGES, 1], flag_layout)
    barrier_layout: gl.constexpr = mbarrier.MBarrierLayout()
    q_ready = gl.allocate_shared_memory(gl.int64, [1], barrier_layout)
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier_layout)
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier_layout)
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier_layout)
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier_layout)
    mbarrier.init(q_ready, count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(stage), count=1)
        mbarrier.init(v_ready.index(stage), count=1)
        # Both warpgroups leave a stage before it is filled again.
        mbarrier.init(k_free.index(stage), count=2)
        mbarrier.init(v_free.index(stage), count=2)
    fence_async_shared()

    mbarrier.expect(q_ready, 2 * q.block_type.nbytes)
    for half in gl.static_range(2):
        at = [batch * q_slots + segment, segment_row + half * 64, at_head]
        _load_tile(q, at, q_ready, q_tiles.index(half))

    k_slot = batch * k_slots
    v_slot = batch * v_slots
    out_slot = batch * out_slots + segment
    # Tuples written in place: assigned to a name first, their constants would become tensors.
    gl.warp_specialize(
        [
            (
                _attend_first_rows,
                (
                    q_tiles, k_tiles, v_tiles, short_tiles, q_ready, k_ready, k_free, v_ready,
                    v_free, out, parts, log_sums, steps, tail_tokens, out_slot, segment_row,
                    at_head, part, scale_log2, HEAD_DIM, KV_BLOCK, TILE, HAS_TAIL, STAGES,
                ),
            ),
            (
                _attend_last_rows,
                (
                    q_tiles, k_tiles, v_tiles, short_tiles, q_ready, k_ready, k_free, v_ready,
                    v_free, out, parts, log_sums, steps, tail_tokens, out_slot, segment_row,
                    at_head, part, scale_log2, HEAD_DIM, KV_BLOCK, TILE, HAS_TAIL, STAGES,
                ),
            ),
            (
                _copy_tiles,
                (
                    k, v, k_tiles, v_tiles, short_tiles, k_ready, k_free, v_ready, v_free,
                    kv_indices, steps, kv_blocks_per_slot, slot_reciprocal, k_slot, v_slot, at_head,
                    KV_BLOCK, TILE, HAS_TAIL, STAGES,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


@gluon.jit
def _attend_first_rows(
    q_tiles, k_tiles, v_tiles, short_tiles, q_ready, k_ready, k_free, v_ready, v_free, out, parts,
    log_sums, steps, tail_tokens, out_slot, segment_row, at_head, part, scale_log2, HEAD_DIM:
    gl.constexpr, KV_BLOCK: gl.constexpr, TILE: gl.constexpr, HAS_TAIL: gl.constexpr, STAGES:
    gl.constexpr,
):  # fmt: skip
    _attend_rows(
        0, q_tiles, k_tiles, v_tiles, short_tiles, q_ready, k_ready, k_free, v_ready, v_free, out,
        parts, log_sums, steps, tail_tokens, out_slot, segment_row, at_head, part, scale_log2,
        HEAD_DIM, KV_BLOCK, TILE, HAS_TAIL, STAGES,
    )  # fmt: skip


@gluon.jit
def _attend_last_rows(
    q_tiles, k_tiles, v_tiles, short_tiles, q_ready, k_ready, k_free, v_ready, v_free, out, parts,
    log_sums, steps, tail_tokens, out_slot, segment_row, at_head, part, scale_log2, HEAD_DIM:
    gl.constexpr, KV_BLOCK: gl.constexpr, TILE: gl.constexpr, HAS_TAIL: gl.constexpr, STAGES:
    gl.constexpr,
):  # fmt: skip
    _attend_rows(
        1, q_tiles, k_tiles, v_tiles, short_tiles, q_ready, k_ready, k_free, v_ready, v_free, out,
        parts, log_sums, steps, tail_tokens, out_slot, segment_row, at_head, part, scale_log2,
        HEAD_DIM, KV_BLOCK, TILE, HAS_TAIL, STAGES,
    )  # fmt: skip


@dataclass(frozen=True)
class GluonConfig:
    """Keys of a tile, and tiles in flight; `tile` divides the key block."""

    tile: int
    stages: int


KV_BLOCKS = (64, 128)
# 131 and 164 KB of 227; a third stage of 128 keys would not fit.
CONFIGS = {64: GluonConfig(64, 3), 128: GluonConfig(128, 2)}


def block_sparse_attention_gluon(
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
    config: GluonConfig | None = None,
    rounds: Rounds | None = None,
) -> Tensor:
    """`reference.block_sparse_attention` on Hopper, in one launch or two; see there.

    Args:
        config: tiles and stages; default: the shipped ones.
        rounds: which tiles are cut; default: `plan_rounds` for this GPU.

    Raises:
        ValueError: shapes, types, strides or a device that the kernel cannot do.
    """
    out, scale = prepare(q, k, v, kv_indices, kv_counts, q_grid, kv_grid, scale, out)
    if q.device.type != "cuda" or compute_capability(q.device) != 90:
        raise ValueError(f"the Gluon kernel needs a GPU of compute capability 9.0, got {q.device}")
    if q_grid.block_tokens != 128 or kv_grid.block_tokens not in KV_BLOCKS:
        raise ValueError(
            f"the Gluon kernel does query blocks of 128 and key blocks of {KV_BLOCKS} tokens, "
            f"got {q_grid.block_tokens} and {kv_grid.block_tokens}"
        )
    slot_blocks = kv_grid.blocks_per_segment
    if slot_blocks * (k.shape[1] // kv_grid.block_tokens + 1) >= 1 << 30:
        raise ValueError(
            f"the Gluon kernel cannot address {k.shape[1]} keys in slots of {slot_blocks} blocks; "
            "use the Triton kernel"
        )
    if obstacle := descriptor_obstacle(q, k, v, out, q_grid, kv_grid):
        raise ValueError(f"the Gluon kernel needs tensor descriptors: {obstacle}")
    width = kv_indices.shape[3]
    if not q.numel() or not k.numel() or not width:
        return out.zero_()
    config = CONFIGS[kv_grid.block_tokens] if config is None else config
    tiles = kv_indices.shape[:3].numel()
    if rounds is None:
        steps = width * kv_grid.block_tokens // 64
        rounds = plan_rounds(tiles, steps, multiprocessors(q.device))
    cut = tiles - rounds.whole_tiles
    shape = cut, rounds.num_parts, 128
    parts = torch.empty(*shape, q.shape[3], dtype=torch.float32, device=q.device)
    log_sums = torch.empty(shape, dtype=torch.float32, device=q.device)
    plan_gluon(
        q, k, v, kv_indices, kv_counts, q_grid, kv_grid, scale, out, config, parts, log_sums
    ).run()
    if cut:
        plan_merge(parts, log_sums, out, rounds.whole_tiles, q_grid).run()
    return out


def _reciprocal(divisor: int) -> int:
    """For `_divided`."""
    return (1 << 30) // divisor + 1


def plan_gluon(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_indices: Tensor,
    kv_counts: Tensor | None,
    q_grid: BlockGrid,
    kv_grid: BlockGrid,
    scale: float,
    out: Tensor,
    config: GluonConfig,
    parts: Tensor,
    log_sums: Tensor,
) -> Launch:
    """The launch for arguments that have been checked.

    Args:
        parts, log_sums: for the last tiles, which are cut; float32 [cut tiles, parts, 128, D] and
            [cut tiles, parts, 128].
    """
    batch, heads, num_rows, width = kv_indices.shape
    head_dim = q.shape[3]
    layout = gl.NVMMASharedLayout(
        swizzle_byte_width=128, element_bitwidth=8 * q.dtype.itemsize, rank=3
    )
    arguments: dict[str, object] = {}
    for name, view in slot_views(q, k, v, out, q_grid, kv_grid).items():
        rows = 64 if name in ("q", "out") else config.tile
        arguments[name] = TensorDescriptor(
            view.base, view.shape, view.strides, [1, rows, head_dim], layout
        )
        arguments[f"{name}_slots"] = view.batch_slots
    cut, num_parts = parts.shape[:2]
    whole_tiles = batch * heads * num_rows - cut
    arguments |= {
        "parts": parts,
        "log_sums": log_sums,
        "kv_indices": kv_indices.contiguous(),
        "kv_counts": kv_indices if kv_counts is None else kv_counts.contiguous(),
        "num_heads": heads,
        "num_rows": num_rows,
        "q_segment_tokens": q_grid.segment_tokens,
        "q_blocks_per_segment": q_grid.blocks_per_segment,
        "kv_blocks_per_slot": kv_grid.blocks_per_segment,
        "slot_reciprocal": _reciprocal(kv_grid.blocks_per_segment),
        "tail_tokens": kv_grid.tail_tokens,
        "width": width,
        "whole_tiles": whole_tiles,
        "num_parts": num_parts,
        "scale_log2": scale * math.log2(math.e),
        "HEAD_DIM": head_dim,
        "KV_BLOCK": kv_grid.block_tokens,
        "TILE": config.tile,
        "HAS_TAIL": masks_tails(q_grid, kv_grid, k),
        "HAS_COUNTS": kv_counts is not None,
        "STAGES": config.stages,
    }
    grid = (whole_tiles + cut * num_parts,)
    return Launch(block_sparse_attention_gluon_kernel, grid, arguments, {"num_warps": 4})
