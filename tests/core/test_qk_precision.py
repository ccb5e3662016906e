"""Query-key products in eight bits: what the cache keeps, how near the video stays, who can."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from lightforcing.lightforcing_core.backends import REFERENCE, AttentionJob, resolve_backend
from lightforcing.lightforcing_core.errors import UserError
from lightforcing.lightforcing_core.fast.engine import ForwardEngine
from lightforcing.lightforcing_core.kv_cache import CacheSpec, KVCache
from lightforcing.lightforcing_core.noise import SeededNoise
from lightforcing.lightforcing_core.rollout import Chunk, RolloutSettings, rollout
from lightforcing.lightforcing_core.schedule import Timeline, UniformSparsity
from lightforcing.lightforcing_core.selection import Hierarchical
from lightforcing.lightforcing_core.sparse import SparseAttention
from lightforcing.lightforcing_core.sparse_settings import PassBudgets, SparseSettings
from lightforcing.lightforcing_core.wan.config import WanConfig
from lightforcing.lightforcing_core.wan.forward import TextContext, prepare_text
from lightforcing.lightforcing_core.wan.modules import WanModel

INT8 = SparseSettings(
    UniformSparsity(0.6), Hierarchical(3, 1, 1), 4, 4, qk_precision="int8", backend="reference"
)
FULL = replace(INT8, qk_precision="full")
TOKENS, HEADS, DIM = 10, 2, 8


class Counting:
    """The reference's rounding, counting calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, *arguments: Any, **more: Any) -> None:
        self.calls += 1
        REFERENCE.quantise_blocks(*arguments, **more)


def cache_of(capacity: int, quantise: Any = REFERENCE.quantise_blocks) -> KVCache:
    spec = CacheSpec(2, 1, HEADS, DIM, TOKENS, capacity, 1, 4, torch.float32, int8_keys=True)
    cache = KVCache(spec, "cpu", quantise=quantise)
    for tensor in (*cache.keys, *cache.values):
        tensor[:, :, TOKENS:] = math.nan
    return cache


def test_what_is_visible_are_the_keys_less_one_shift_to_half_a_step() -> None:
    """In a ring with a sink, for open and committed chunks, dense and sparse ones."""
    cache = cache_of(7)
    attention = SparseAttention(cache, INT8, Timeline((2,) * 7, window_frames=7), REFERENCE)
    for chunk in range(7):
        cache.enter(range(2 * chunk, 2 * chunk + 2))
        attention.begin_chunk(chunk)
        for step in (0, 1, None):
            attention.begin_pass(step)
            q, k, v = torch.randn(3, 2, 2 * TOKENS, HEADS, DIM)
            out = attention(0, q, k + 5, v)
            assert not out.isnan().any()
            if not chunk:
                continue
            levels, scales = cache.visible_int8(0)
            keys, _ = cache.visible_slots(0)
            per_token = scales.repeat_interleave(4, 2).transpose(1, 2)[..., None]
            off = keys - levels * per_token
            off = off.unflatten(1, (-1, 12))[:, :, :TOKENS]
            step_size = per_token.unflatten(1, (-1, 12))[:, :, :TOKENS]
            kept = cache._shifts[0][:, None, None]
            assert ((off - kept).abs() <= 0.501 * step_size).all()
            assert (kept[:, 0, 0] - 5).abs().max() < 2
        cache.commit()


def test_keys_are_rounded_once_when_they_are_final() -> None:
    """In every sparse pass those of the open chunk, and those of a dense one at its commit."""
    quantise = Counting()
    cache = cache_of(6, quantise)
    settings = replace(INT8, budgets=PassBudgets(clean_pass=-1))
    attention = SparseAttention(cache, settings, Timeline((2, 2, 2)), REFERENCE)
    calls = []
    for chunk in range(3):
        cache.enter(range(2 * chunk, 2 * chunk + 2))
        attention.begin_chunk(chunk)
        for step in (0, 1, None):
            attention.begin_pass(step)
            attention(0, *torch.randn(3, 2, 2 * TOKENS, HEADS, DIM))
            calls.append(quantise.calls)
        cache.commit()
        calls.append(quantise.calls)
    assert calls == [0, 0, 0, 1, 2, 3, 3, 4, 5, 6, 6, 7]


def test_memory_is_announced() -> None:
    cache = cache_of(5)
    held = (cache.keys, cache.values, cache.pooled_keys, cache.int8_keys, cache.key_scales)
    assert sum(x.nbytes for tensors in held for x in tensors) == cache.spec.total_bytes
    with pytest.raises(ValueError, match="need blocks"):
        replace(cache.spec, block_tokens=0)


@pytest.fixture(scope="module")
def tree() -> WanModel:
    torch.manual_seed(0)
    config = WanConfig(
        dim=32, ffn_dim=32, num_heads=2, num_layers=2, text_dim=8, text_len=6, freq_dim=16
    )
    tree = WanModel(config).requires_grad_(False)
    for parameter in tree.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    return tree


@pytest.fixture(scope="module")
def text(tree: WanModel) -> TextContext:
    return prepare_text(tree, torch.randn(1, 4, 8))


def run(
    tree: WanModel,
    text: TextContext,
    sparse: SparseSettings | None,
    engine: ForwardEngine | None = None,
    **changes: Any,
) -> list[Chunk]:
    given = changes.pop("given", None)
    rest = {"num_frames": 9, "steps": (1000.0, 600.0), **changes}
    settings = RolloutSettings(sparse=sparse, **rest)
    noise = SeededNoise(0, (1, 16, 6, 10))
    return list(rollout(tree, settings, text, noise, given_latents=given, engine=engine))


def difference(a: list[Chunk], b: list[Chunk]) -> list[float]:
    return [
        float((x.latents - y.latents).norm() / y.latents.norm()) for x, y in zip(a, b, strict=True)
    ]


GEOMETRIES = {
    "whole history": {},
    "ring with sink": {"num_frames": 14, "window_frames": 7, "sink_frames": 1},
    "after given frames": {"given": torch.randn(1, 16, 4, 6, 10)},
}


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_the_video_stays_near_and_dense_chunks_are_untouched(
    tree: WanModel, text: TextContext, geometry: dict
) -> None:
    """Near the same lists in full; a sparsity of 0 is the dense engine."""
    errors = difference(run(tree, text, INT8, **geometry), run(tree, text, FULL, **geometry))
    assert 0 < max(errors) < 0.1
    dense = run(tree, text, None, **geometry)
    zero = replace(INT8, schedule=UniformSparsity(0.0))
    assert max(difference(run(tree, text, zero, **geometry), dense)) < 1e-6


def test_the_engine_makes_the_same_video(tree: WanModel, text: TextContext) -> None:
    """But for keys that lie between two levels and fall to the other one."""
    fast = run(tree, text, INT8, ForwardEngine(tree))
    assert max(difference(fast, run(tree, text, INT8))) < 1e-3


def test_a_cache_without_them_is_refused() -> None:
    spec = CacheSpec(1, 1, HEADS, DIM, TOKENS, 4, 0, 4, torch.float32)
    with pytest.raises(UserError, match="the cache has no keys of eight bits"):
        SparseAttention(KVCache(spec, "cpu"), INT8, Timeline((2, 2)), REFERENCE)
    with pytest.raises(UserError, match="the cache has keys of eight bits"):
        SparseAttention(cache_of(4), FULL, Timeline((2, 2)), REFERENCE)


def test_the_precision_holds_for_a_run() -> None:
    with pytest.raises(UserError, match=r"precision of query-key products cannot change"):
        INT8.check_change(FULL)


def test_unknown_precisions_are_refused() -> None:
    with pytest.raises(UserError, match=r"no precision 'int4' .* choose one of full, int8"):
        replace(INT8, qk_precision="int4")


def test_a_backend_says_why_it_cannot() -> None:
    job = AttentionJob(torch.device("cpu"), torch.float16, 128, 64, 32, qk_precision="int8")
    with pytest.raises(UserError) as caught:
        resolve_backend("gluon", job)
    assert "it has no int8 products" in str(caught.value)
    assert "128 and 128 tokens, asked were 64 and 32" in str(caught.value)


def test_triton_makes_the_same_video() -> None:
    """Interpreted, in a process of its own: Triton decides that when it is imported."""
    program = """
import torch
from lightforcing.lightforcing_core.noise import SeededNoise
from lightforcing.lightforcing_core.rollout import RolloutSettings, rollout
from lightforcing.lightforcing_core.sparse_settings import (
    SparseSettings, make_policy, make_schedule
)
from lightforcing.lightforcing_core.wan.config import WanConfig
from lightforcing.lightforcing_core.wan.forward import prepare_text
from lightforcing.lightforcing_core.wan.modules import WanModel

torch.manual_seed(0)
config = WanConfig(
    dim=64, ffn_dim=32, num_heads=1, num_layers=1, text_dim=8, text_len=6, freq_dim=16
)
tree = WanModel(config).requires_grad_(False)
text = prepare_text(tree, torch.randn(1, 4, 8))
videos = []
for backend in ("reference", "triton"):
    sparse = SparseSettings(
        make_schedule(0.5), make_policy(keep_frames=3, keep_near=1), 64, 64, qk_precision="int8",
        backend=backend,
    )
    settings = RolloutSettings(5, 1, (1000.0,), window_frames=4, sink_frames=1, sparse=sparse)
    noise = SeededNoise(0, (1, 16, 16, 20))  # 80 tokens a frame: a tail of 16
    videos.append(torch.cat([c.latents for c in rollout(tree, settings, text, noise)], 2))
print(float((videos[0] - videos[1]).norm() / videos[0].norm()))
"""
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1e-4
