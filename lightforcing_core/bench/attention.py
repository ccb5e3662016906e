"""`lightforcing bench attention`: dense, published and our sparse attention in one run.

One layer's self-attention of a chunk of an autoregressive video. Index lists are random and
distinct for every head and query block; density is counted, not assumed. Selection is timed from
random queries and keys. Every sparse output is first compared with a float64 computation.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...kernels import reference
from ...kernels.grid import BlockGrid
from ..schedule import ChunkAwareGrowth, Timeline, chunk_sparsity, kept_blocks
from ..selection import Hierarchical, KeyView, SelectionRule
from .common import Timing, device_name, machine_facts, time_call

log = logging.getLogger("lightforcing")

_TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-4}
_INT8_TOLERANCE = 2e-2  # products of queries and keys in eight bits
_PASSES = 5  # forwards of a chunk: four denoising steps and the clean pass


@dataclass(frozen=True)
class AttentionCase:
    """What to measure.

    Attributes:
        frame_tokens: tokens of a latent frame (768x512: 1536, 832x480: 1560).
        chunk_frames, total_frames: latent frames of a chunk and of the video.
        query_block, key_block: tokens of a block.
        target, base: of the growth schedule.
        policy: of the selection.
    """

    frame_tokens: int = 1536
    chunk_frames: int = 3
    total_frames: int = 21
    heads: int = 12
    head_dim: int = 128
    batch: int = 1
    query_block: int = 128
    key_block: int = 64
    target: float = 0.88
    base: float = 0.98
    policy: Hierarchical = field(default_factory=Hierarchical)
    dtype: torch.dtype = torch.bfloat16
    chunks: tuple[int, ...] = field(default=(1, 3, 6))

    @property
    def query_grid(self) -> BlockGrid:
        return BlockGrid(self.chunk_frames * self.frame_tokens, self.query_block)

    @property
    def key_grid(self) -> BlockGrid:
        return BlockGrid(self.frame_tokens, self.key_block)


SMALL = AttentionCase(
    frame_tokens=96, total_frames=15, heads=2, head_dim=64, query_block=32, key_block=32,
    dtype=torch.float32, chunks=(1, 4),
)  # fmt: skip


@dataclass(frozen=True)
class _Inputs:
    """One chunk's tensors: q [B, Sq, H, D], k and v [B, slots, H, D], lists of blocks."""

    q: Tensor
    k: Tensor
    v: Tensor
    indices: Tensor
    counts: Tensor
    rule: SelectionRule
    roles: Tensor
    past_frames: int
    total: int

    @property
    def density(self) -> float:
        """Kept share of (query block, key block) pairs, counted."""
        return float(self.counts.double().mean()) / self.total


def bench_attention(case: AttentionCase, device: torch.device, runs: int = 30) -> dict[str, Any]:
    """Measure all chunks of a case.

    Returns:
        `rows` (one per chunk and method), `device`, `versions`, `failed` (rows whose output was
        wrong; their times are left out).
    """
    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        for chunk in case.chunks:
            rows += list(_chunk_rows(case, chunk, device, runs))
    return {
        "device": device_name(device),
        "versions": machine_facts(device),
        "rows": rows,
        "failed": [f"{row['method']} chunk {row['chunk']}" for row in rows if row.get("wrong")],
    }


def _inputs(case: AttentionCase, chunk: int, device: torch.device) -> _Inputs:
    generator = torch.Generator(device).manual_seed(1000 + chunk)
    past = chunk * case.chunk_frames
    slots = past + case.chunk_frames
    shape = (case.batch, slots * case.key_grid.slot_tokens, case.heads, case.head_dim)

    def draw(shape: tuple[int, ...]) -> Tensor:
        values = torch.randn(shape, generator=generator, device=device)
        return values.to(case.dtype)

    q = draw((case.batch, case.chunk_frames * case.frame_tokens, case.heads, case.head_dim))
    total = slots * case.key_grid.blocks_per_segment
    timeline = Timeline((case.chunk_frames,) * (case.total_frames // case.chunk_frames))
    sparsity = chunk_sparsity(ChunkAwareGrowth(case.target, case.base), timeline, chunk)
    kept = kept_blocks(sparsity, total)
    query_blocks = case.query_grid.blocks_per_segment
    order = torch.rand(
        (case.batch, case.heads, query_blocks, total), generator=generator, device=device
    )
    indices = order.argsort(-1)[..., :kept].sort(-1).values.int()
    counts = torch.full(indices.shape[:3], kept, dtype=torch.int32, device=device)
    view = KeyView(tuple(range(slots)), tuple(range(past, slots)), case.key_grid.blocks_per_segment)
    rule = case.policy.rule(view, sparsity)
    roles = torch.tensor(rule.roles, dtype=torch.int32, device=device)
    return _Inputs(q, draw(shape), draw(shape), indices, counts, rule, roles, past, total)


def _chunk_rows(
    case: AttentionCase, chunk: int, device: torch.device, runs: int
) -> Iterator[dict[str, Any]]:
    x = _inputs(case, chunk, device)
    facts = {
        "chunk": chunk,
        "queries": x.q.shape[1],
        "keys": (x.past_frames + case.chunk_frames) * case.frame_tokens,
    }
    dense_flops = 4 * case.batch * case.heads * facts["queries"] * facts["keys"] * case.head_dim
    sparse_flops = dense_flops * x.density
    times: dict[str, Timing] = {}

    def row(method: str, kind: str, work: Callable[[], object], flops: float, **extra: Any) -> dict:
        try:
            times[method] = time_call(work, device, runs)
        except (RuntimeError, ValueError) as error:
            return {"method": method, "kind": kind, **facts, "skipped": _first_line(error)}
        result = {"method": method, "kind": kind, **facts, **times[method].to_dict(), **extra}
        if flops:
            result["tflops"] = round(flops / times[method].median_ms / 1e9, 1)
        return result

    for name, work in _dense(case, x).items():
        yield row(name, "dense", work, dense_flops, density=1.0)
    expected = _expected(case, x)
    for name, work in _sparse(case, x, device).items():
        try:
            error = _error(work(), expected)
        except (RuntimeError, ValueError) as problem:
            yield {"method": name, "kind": "attend", **facts, "skipped": _first_line(problem)}
            continue
        checked = {"density": round(x.density, 5), "rel_err": float(f"{error:.3e}")}
        if not error <= (_INT8_TOLERANCE if "int8" in name else _TOLERANCE[case.dtype]):
            yield {"method": name, "kind": "attend", **facts, **checked, "wrong": True}
            continue
        yield row(name, "attend", work, sparse_flops, **checked)
    pooled_q = reference.pool_blocks(x.q, case.query_grid, padded=False)
    pooled_k = reference.pool_blocks(x.k, case.key_grid, padded=True)
    for name, work in _selections(case, x, pooled_q, pooled_k, device).items():
        yield row(name, "select", work, 0.0)
    yield from _combined(facts, times)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _combined(facts: dict[str, Any], times: dict[str, Timing]) -> Iterator[dict[str, Any]]:
    """Selection and attention together, per pass of a chunk, against others.

    `over_released` is against the released rule with our plain Triton loop, which is faster than
    the released kernel on the cards where both were measured.
    """
    pool, select = times.get("triton pooling"), times.get("triton selection")
    ours = [times[name] for name in ("triton", "gluon") if name in times]
    attend = min(ours, key=lambda timing: timing.median_ms, default=None)
    if attend is None or pool is None or select is None:
        return
    once = pool.median_ms + select.median_ms
    for name, share in (("select every pass + attend", 1.0), ("select once + attend", 1 / _PASSES)):
        total = attend.median_ms + once * share
        speedups = {
            f"over_{dense.replace(' ', '_')}": round(times[dense].median_ms / total, 2)
            for dense in ("cudnn", "flash2", "sdpa")
            if dense in times
        }
        if "triton" in times:
            released = times["released rule, plain torch"].median_ms + times["triton"].median_ms
            speedups["over_released"] = round(released / total, 2)
        yield {"method": name, "kind": "together", **facts, "ms": round(total, 5), **speedups}


def _real_rows(case: AttentionCase, x: Tensor) -> Tensor:
    """Keys or values without the padding of slots: [B, H, frames * frame_tokens, D]."""
    grid = case.key_grid
    slots = x.unflatten(1, (-1, grid.slot_tokens))[:, :, : grid.segment_tokens]
    return slots.flatten(1, 2).transpose(1, 2).contiguous()


@contextmanager
def _only(backend: SDPBackend) -> Iterator[None]:
    with sdpa_kernel([backend]):
        yield


def _dense(case: AttentionCase, x: _Inputs) -> dict[str, Callable[[], Tensor]]:
    q = x.q.transpose(1, 2).contiguous()
    k, v = _real_rows(case, x.k), _real_rows(case, x.v)
    if not x.q.is_cuda:
        return {"sdpa": lambda: F.scaled_dot_product_attention(q, k, v)}

    def run(backend: SDPBackend) -> Tensor:
        with _only(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return {
        "cudnn": lambda: run(SDPBackend.CUDNN_ATTENTION),
        "flash2": lambda: run(SDPBackend.FLASH_ATTENTION),
    }


def _expected(case: AttentionCase, x: _Inputs) -> Tensor:
    """Float64 result of the first head and batch member: [Sq, D]."""
    one = slice(0, 1)
    return reference.block_sparse_attention(
        x.q[one, :, one].double(), x.k[one, :, one].double(), x.v[one, :, one].double(),
        x.indices[one, one], x.counts[one, one], q_grid=case.query_grid, kv_grid=case.key_grid,
    )[0, :, 0]  # fmt: skip


def _error(out: Tensor, expected: Tensor) -> float:
    got = out[0, :, 0].double()
    return float((got - expected).norm() / expected.norm())


def _sparse(
    case: AttentionCase, x: _Inputs, device: torch.device
) -> dict[str, Callable[[], Tensor]]:
    """Methods that attend over the same index lists; results [B, Sq, H, D]."""
    grids = {"q_grid": case.query_grid, "kv_grid": case.key_grid}
    if device.type != "cuda":
        lists = (x.indices, x.counts)
        return {
            "reference": lambda: reference.block_sparse_attention(x.q, x.k, x.v, *lists, **grids)
        }
    from ...kernels.ops import block_sparse_attention_triton

    methods: dict[str, Callable[[], Tensor]] = {
        "triton": lambda: block_sparse_attention_triton(x.q, x.k, x.v, x.indices, x.counts, **grids)
    }
    if torch.cuda.get_device_capability(device) == (9, 0):
        from ...kernels.gluon_attention import block_sparse_attention_gluon

        methods["gluon"] = lambda: block_sparse_attention_gluon(
            x.q, x.k, x.v, x.indices, x.counts, **grids
        )
    k_scales, levels = _int8_keys(case, x)
    methods["triton int8"] = lambda: block_sparse_attention_triton(
        x.q, levels, x.v, x.indices, x.counts, k_scales=k_scales, **grids
    )
    flex = _flex(case, x)
    if flex is not None:
        methods["flex"] = flex
    return methods


def _int8_keys(case: AttentionCase, x: _Inputs) -> tuple[Tensor, Tensor]:
    """Scales and keys in eight bits, less their mean; rounded at commit, so not timed here."""
    scales = x.k.new_empty(
        case.batch, case.heads, x.k.shape[1] // case.key_block, dtype=torch.float32
    )
    levels = torch.empty_like(x.k, dtype=torch.int8)
    shift = _real_rows(case, x.k).float().mean(2)
    reference.quantise_blocks(x.k, shift, case.key_grid, out=levels, scales=scales)
    return scales, levels


def _flex(case: AttentionCase, x: _Inputs) -> Callable[[], Tensor] | None:
    """FlexAttention over the same lists; it needs frames of whole blocks."""
    if case.frame_tokens % case.key_block or case.frame_tokens % case.query_block:
        return None
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    total = x.total
    padding = (0, total - x.indices.shape[-1])
    mask = BlockMask.from_kv_blocks(
        torch.zeros_like(x.counts),
        F.pad(x.indices, padding),
        x.counts,
        F.pad(x.indices, padding),
        BLOCK_SIZE=(case.query_block, case.key_block),
        seq_lengths=(x.q.shape[1], x.k.shape[1]),
    )
    compiled = torch.compile(flex_attention, dynamic=False)
    q = x.q.transpose(1, 2).contiguous()
    k, v = (t.transpose(1, 2).contiguous() for t in (x.k, x.v))
    options = {"BLOCK_M": case.query_block, "BLOCK_N": case.key_block}
    return lambda: compiled(q, k, v, block_mask=mask, kernel_options=options).transpose(1, 2)


def _selections(
    case: AttentionCase, x: _Inputs, pooled_q: Tensor, pooled_k: Tensor, device: torch.device
) -> dict[str, Callable[[], object]]:
    settings = {
        "blocks_per_segment": case.key_grid.blocks_per_segment,
        "roles": x.roles,
        "keep_candidates": x.rule.keep_candidates,
        "top_k": x.rule.top_k,
        "own_blocks": None,
    }
    methods: dict[str, Callable[[], object]] = {
        "released rule, plain torch": lambda: released_selection(case, x),
    }
    if device.type != "cuda":
        methods["reference selection"] = lambda: reference.select_blocks(
            pooled_q, pooled_k, **settings
        )
        return methods
    from ...kernels.ops import pool_blocks_triton, quantise_blocks_triton, select_blocks_triton

    methods["triton selection"] = lambda: select_blocks_triton(pooled_q, pooled_k, **settings)
    # Keys of committed frames are pooled once; a pass pools its queries and its own keys.
    own = slice(x.past_frames * case.key_grid.slot_tokens, None)
    methods["triton pooling"] = lambda: (
        pool_blocks_triton(x.q, case.query_grid, padded=False),
        pool_blocks_triton(x.k[:, own], case.key_grid, padded=True),
    )
    scales, levels = _int8_keys(case, x)
    shift = torch.zeros(case.batch, case.heads, case.head_dim, device=device)
    own_scales = scales[:, :, own.start // case.key_block :]
    methods["triton rounding of own keys"] = lambda: quantise_blocks_triton(
        x.k[:, own], shift, case.key_grid, out=levels[:, own], scales=own_scales
    )
    return methods


def released_selection(case: AttentionCase, x: _Inputs) -> Tensor:
    """The published two-stage rule, restated in plain torch: [B, H, query blocks, kept].

    It pools the whole cache on every call, as the released code does. Source: light_forcing
    `kernel.py` as described in its paper, section on hierarchical selection; frames of whole
    blocks are padded here where the released code cannot run.
    """
    grid = case.key_grid

    def blocks(t: Tensor, size: int) -> Tensor:
        padded = F.pad(t, (0, 0, 0, 0, 0, -t.shape[1] % size))
        return padded.unflatten(1, (-1, size)).float().mean(2).to(case.dtype).transpose(1, 2)

    query, key = blocks(x.q, case.query_block), blocks(x.k, case.key_block)
    scores = query @ key.transpose(-1, -2)
    policy, dynamic = case.policy, x.rule.keep_candidates
    middle = range(policy.keep_sink, x.past_frames - policy.keep_near)
    if x.past_frames > policy.keep_frames:
        per_frame = key.unflatten(2, (-1, grid.blocks_per_segment))
        frames = per_frame.float().mean(3).to(case.dtype)
        frame_scores = query @ frames[:, :, middle.start : middle.stop].transpose(-1, -2)
        best = frame_scores.topk(dynamic, dim=-1).indices + middle.start
        eligible = torch.ones(
            (*scores.shape[:3], per_frame.shape[2]), dtype=torch.bool, device=scores.device
        )
        eligible[..., middle.start : middle.stop] = False
        eligible.scatter_(-1, best, True)
        mask = eligible.repeat_interleave(grid.blocks_per_segment, dim=-1)
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.topk(x.rule.top_k, dim=-1).indices
