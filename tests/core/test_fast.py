"""The engine that makes a rollout fast makes the same video."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightforcing.lightforcing_core.fast.attention import FastSparseAttention
from lightforcing.lightforcing_core.fast.engine import ForwardEngine
from lightforcing.lightforcing_core.kv_cache import KVCache
from lightforcing.lightforcing_core.noise import SeededNoise
from lightforcing.lightforcing_core.rollout import Chunk, RolloutSettings, rollout
from lightforcing.lightforcing_core.sparse_settings import (
    SparseSettings,
    make_policy,
    make_schedule,
)
from lightforcing.lightforcing_core.wan.config import WanConfig
from lightforcing.lightforcing_core.wan.forward import TextContext, prepare_text
from lightforcing.lightforcing_core.wan.modules import WanModel

SPARSE = SparseSettings(
    make_schedule(0.5), make_policy(keep_frames=3, keep_near=1), 8, 8, backend="reference"
)
SETTINGS = RolloutSettings(9, 2, (1000.0, 700.0, 300.0), sparse=SPARSE)
CASES: dict[str, Any] = {
    "whole history, short last chunk": SETTINGS,
    "ring with sink": replace(SETTINGS, num_frames=14, window_frames=6, sink_frames=1),
    "own block": replace(
        SETTINGS,
        sparse=replace(
            SPARSE, policy=make_policy(keep_frames=3, keep_near=1, guarantee_own_block=True)
        ),
    ),
    "a plan in every pass": replace(SETTINGS, sparse=replace(SPARSE, plan_steps=None)),
    "no scores": replace(SETTINGS, sparse=replace(SPARSE, policy=make_policy("sliding_window"))),
    "tiles": replace(SETTINGS, sparse=replace(SPARSE, token_order="tiles")),
    "dense": replace(SETTINGS, sparse=None),
}


@pytest.fixture(scope="module")
def tree() -> WanModel:
    torch.manual_seed(3)
    config = WanConfig(
        dim=96, ffn_dim=64, num_heads=2, num_layers=2, text_dim=16, text_len=8, freq_dim=16
    )
    tree = WanModel(config).requires_grad_(False)
    for block in tree.blocks:  # gains of one would hide a gain that is left out
        for norm in (block.self_attn.norm_q, block.self_attn.norm_k):
            norm.weight.normal_(1.0, 0.3)
    return tree


@pytest.fixture(scope="module")
def text(tree: WanModel) -> TextContext:
    with torch.no_grad():
        return prepare_text(tree, torch.randn(1, 5, 16))


def made(tree: WanModel, text: TextContext, settings: RolloutSettings, **more: Any) -> list[Chunk]:
    noise = SeededNoise(1, (1, 16, 8, 10))  # 20 tokens a frame: blocks of 8, 8 and 4
    return list(rollout(tree, settings, text, noise, **more))


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_the_same_video_with_and_without(
    tree: WanModel, text: TextContext, settings: RolloutSettings
) -> None:
    plain = made(tree, text, settings)
    fast = made(tree, text, settings, engine=ForwardEngine(tree, compiled=False))
    for a, b in zip(plain, fast, strict=True):
        assert torch.allclose(a.latents, b.latents, atol=1e-5)
        assert a.statistics.density == pytest.approx(b.statistics.density, abs=1e-9)
        assert a.statistics.sparsity == b.statistics.sparsity


def test_settings_may_change_between_chunks(tree: WanModel, text: TextContext) -> None:
    """Other budgets, more blocks than planned for, dense, and back."""

    def by_chunk(chunk: int) -> SparseSettings | None:
        schedules = {1: 0.8, 2: 0.1, 4: 0.6}
        if chunk in schedules:
            return replace(SPARSE, schedule=make_schedule(schedules[chunk]))
        return None

    plain = made(tree, text, SETTINGS, sparse_for_chunk=by_chunk)
    engine = ForwardEngine(tree, compiled=False)
    fast = made(tree, text, SETTINGS, sparse_for_chunk=by_chunk, engine=engine)
    assert [c.statistics.sparsity > 0 for c in fast] == [False, True, True, False, True]
    for a, b in zip(plain, fast, strict=True):
        assert torch.allclose(a.latents, b.latents, atol=1e-5)


def test_every_chunks_passes_have_the_same_two_keys(
    tree: WanModel, text: TextContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a graph is found by: one of choosing passes, one of the others, for a whole video."""
    keys = []
    begin_pass = FastSparseAttention.begin_pass

    def listening(self: FastSparseAttention, step: int | None) -> None:
        begin_pass(self, step)
        keys.append((step, self.graph_key()))

    monkeypatch.setattr(FastSparseAttention, "begin_pass", listening)
    settings = replace(SETTINGS, num_frames=10)
    addresses = set()
    for _ in rollout(
        tree, settings, text, SeededNoise(1, (1, 16, 8, 10)),
        engine=ForwardEngine(tree, compiled=False),
    ):  # fmt: skip
        addresses.add(len(keys))
    sparse = keys[4:]  # the first chunk is dense
    assert {key for _, key in keys[:4]} == {(0, False, False)}
    assert {key for step, key in sparse if step == 0} == {(1, True, False)}
    assert {key for step, key in sparse if step != 0} == {(1, False, False)}
    assert len(sparse) == 4 * 4 - 1  # the last has no clean pass


@pytest.mark.parametrize("engine", [False, True])
def test_a_runs_cache_goes_with_it_at_once(
    tree: WanModel, text: TextContext, engine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not when Python next looks for cycles: on a GPU that can be many videos later."""
    caches = []
    create = KVCache.__init__

    def listening(self: KVCache, *args: Any) -> None:
        create(self, *args)
        caches.append(weakref.ref(self))

    monkeypatch.setattr(KVCache, "__init__", listening)
    gc.collect()
    gc.disable()
    try:
        kept = ForwardEngine(tree, compiled=False) if engine else None
        made(tree, text, SETTINGS, engine=kept)
        assert [cache() for cache in caches] == [None]
        started = rollout(tree, SETTINGS, text, SeededNoise(1, (1, 16, 8, 10)), engine=kept)
        next(started)
        started.close()
        assert [cache() for cache in caches] == [None, None]
    finally:
        gc.enable()


GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def on_gpu(sparse: SparseSettings | None, **more: Any) -> tuple[list[Tensor], list[float]]:
    torch.manual_seed(5)
    config = WanConfig(dim=256, ffn_dim=512, num_heads=2, num_layers=3, text_dim=64, text_len=32)
    tree = WanModel(config).requires_grad_(False).cuda().bfloat16()
    with torch.no_grad():
        text = prepare_text(tree, torch.randn(1, 20, 64).cuda().bfloat16())
    settings = RolloutSettings(18, 3, sparse=sparse, **more.pop("settings", {}))
    engine = ForwardEngine(tree, **more) if more.pop("engine", True) else None
    for _ in range(2):  # what the first run compiles, the second records at once
        noise = SeededNoise(4, (1, 16, 60, 104), torch.device("cuda"))
        chunks, held = [], 0
        for chunk in rollout(tree, settings, text, noise, engine=engine):
            chunks.append(chunk)
            held = engine.num_recordings if engine is not None else 0
        assert held == (2 if more.get("graphs") else 0)
        assert engine is None or engine.num_recordings == 0
    return [c.latents for c in chunks], [c.statistics.density for c in chunks]


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("window", [{}, {"window_frames": 9, "sink_frames": 3}], ids=["", "ring"])
def test_replayed_graphs_make_the_same_video_bit_for_bit(compiled: bool, window: dict) -> None:
    sparse = SparseSettings(schedule=make_schedule(0.8))
    expected, densities = on_gpu(sparse, compiled=compiled, graphs=False, settings=window)
    latents, replayed = on_gpu(sparse, compiled=compiled, graphs=True, settings=window)
    for a, b in zip(latents, expected, strict=True):
        assert torch.equal(a, b)
    assert replayed == densities
    plain, _ = on_gpu(sparse, engine=False, settings=window)
    for a, b in zip(plain, expected, strict=True):
        assert (a - b).norm() / a.norm() < 0.05
