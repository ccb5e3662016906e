"""The engine that makes a rollout fast makes the same video."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightforcing.lightforcing_core.errors import UserError
from lightforcing.lightforcing_core.fast.attention import FastSparseAttention
from lightforcing.lightforcing_core.fast.decode import ChunkDecoder
from lightforcing.lightforcing_core.fast.engine import ForwardEngine, engine_for
from lightforcing.lightforcing_core.fast.linears import (
    EightBitLinear,
    eight_bit_obstacle,
    with_eight_bit_linears,
)
from lightforcing.lightforcing_core.kv_cache import KVCache
from lightforcing.lightforcing_core.noise import SeededNoise
from lightforcing.lightforcing_core.rollout import Chunk, RolloutSettings, rollout
from lightforcing.lightforcing_core.sparse_settings import (
    SparseSettings,
    make_policy,
    make_schedule,
)
from lightforcing.lightforcing_core.vae.streaming import VideoVAE
from lightforcing.lightforcing_core.vae.taehv import TAEHV, TAEHVConfig
from lightforcing.lightforcing_core.video_io import frames_to_uint8
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
    fast = made(tree, text, settings, engine=ForwardEngine(tree))
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
    engine = ForwardEngine(tree)
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
        engine=ForwardEngine(tree),
    ):  # fmt: skip
        addresses.add(len(keys))
    sparse = keys[4:]  # the first chunk is dense
    assert {key for _, key in keys[:4]} == {(0, 2, 2, False, False)}
    assert {key for step, key in sparse if step == 0} == {(1, 2, 0, True, False)}
    assert {key for step, key in sparse if step != 0} == {(1, 2, 0, False, False)}
    assert len(sparse) == 4 * 4 - 1  # the last has no clean pass


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kept_recordings_make_the_same_videos() -> None:
    """Bit for bit, for another prompt and seed too, and without recording anything again."""
    torch.manual_seed(5)
    config = WanConfig(dim=256, ffn_dim=512, num_heads=2, num_layers=3, text_dim=64, text_len=32)
    tree = WanModel(config).requires_grad_(False).cuda().bfloat16()
    settings = RolloutSettings(12, 3, sparse=SparseSettings(schedule=make_schedule(0.8)))
    engine = ForwardEngine(tree, keep=True)
    record = engine._record
    recorded = []
    engine._record = lambda *args: (recorded.append(1), record(*args))[1]
    for seed in range(4):
        with torch.no_grad():
            text = prepare_text(tree, torch.randn(1, 20, 64).cuda().bfloat16())
        videos = []
        for one in (engine, ForwardEngine(tree, graphs=False)):
            noise = SeededNoise(seed, (1, 16, 60, 104), torch.device("cuda"))
            chunks = rollout(tree, settings, text, noise, engine=one)
            videos.append(torch.cat([chunk.latents for chunk in chunks], 2))
        assert torch.equal(*videos)
    assert len(recorded) == 3 and engine.num_recordings == 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [{}, {"window_frames": 6, "sink_frames": 1}], ids=["", "ring"])
def test_kept_dense_recordings_make_the_same_videos(window: dict) -> None:
    torch.manual_seed(5)
    config = WanConfig(dim=256, ffn_dim=512, num_heads=2, num_layers=3, text_dim=64, text_len=32)
    tree = WanModel(config).requires_grad_(False).cuda().bfloat16()
    with torch.no_grad():
        text = prepare_text(tree, torch.randn(1, 20, 64).cuda().bfloat16())
    settings = RolloutSettings(12, 3, **window)
    kept = ForwardEngine(tree, keep=True)
    for seed in range(3):
        videos = []
        for engine in (kept, ForwardEngine(tree, graphs=False), None):
            noise = SeededNoise(seed, (1, 16, 60, 104), torch.device("cuda"))
            chunks = rollout(tree, settings, text, noise, engine=engine)
            videos.append(torch.cat([chunk.latents for chunk in chunks], 2))
        assert torch.equal(*videos[:2])
        assert (videos[0] - videos[2]).norm() / videos[2].norm() < 0.05
    assert kept.num_recordings == (2 if window else 4)  # one for each number of visible frames


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
        kept = ForwardEngine(tree) if engine else None
        made(tree, text, SETTINGS, engine=kept)
        assert [cache() for cache in caches] == [None]
        started = rollout(tree, SETTINGS, text, SeededNoise(1, (1, 16, 8, 10)), engine=kept)
        next(started)
        started.close()
        assert [cache() for cache in caches] == [None, None]
    finally:
        gc.enable()


def test_an_engine_that_keeps_its_memory_makes_the_same_videos(
    tree: WanModel, text: TextContext
) -> None:
    """One after the other, cancelled ones, other prompts and other sizes between them."""
    engine = ForwardEngine(tree, keep=True)
    with torch.no_grad():
        other = prepare_text(tree, torch.randn(1, 3, 16))
    for case in (SETTINGS, CASES["ring with sink"], SETTINGS):
        for prompt in (text, other):
            started = rollout(tree, case, prompt, SeededNoise(2, (1, 16, 8, 10)), engine=engine)
            next(started), next(started)
            started.close()
            kept = made(tree, prompt, case, engine=engine)
            fresh = made(tree, prompt, case, engine=ForwardEngine(tree))
            for a, b in zip(kept, fresh, strict=True):
                assert torch.equal(a.latents, b.latents)
    engine.release()


def test_an_engine_makes_one_video_at_a_time(tree: WanModel, text: TextContext) -> None:
    """A second one is refused before it touches the first one's cache."""
    engine = ForwardEngine(tree, keep=True)
    noise = SeededNoise(1, (1, 16, 8, 10))
    first = rollout(tree, SETTINGS, text, noise, engine=engine)
    chunks = [next(first)]
    with pytest.raises(RuntimeError, match="making another video"):
        next(rollout(tree, SETTINGS, text, noise, engine=engine))
    chunks += first
    for a, b in zip(chunks, made(tree, text, SETTINGS), strict=True):
        assert torch.allclose(a.latents, b.latents, atol=1e-5)


GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def on_gpu(sparse: SparseSettings | None, **more: Any) -> tuple[list[Tensor], list[float]]:
    torch.manual_seed(5)
    config = WanConfig(dim=256, ffn_dim=512, num_heads=2, num_layers=3, text_dim=64, text_len=32)
    tree = WanModel(config).requires_grad_(False).cuda().bfloat16()
    with torch.no_grad():
        text = prepare_text(tree, torch.randn(1, 20, 64).cuda().bfloat16())
    options = {"num_frames": 18, "frames_per_chunk": 3} | more.pop("settings", {})
    settings = RolloutSettings(sparse=sparse, **options)
    if more.pop("fp8", False):
        tree = with_eight_bit_linears(tree)
    engine = ForwardEngine(tree, **more) if more.pop("engine", True) else None
    for _ in range(2):  # what the first run compiles, the second records at once
        noise = SeededNoise(4, (1, 16, 60, 104), torch.device("cuda"))
        chunks, held = [], 0
        for chunk in rollout(tree, settings, text, noise, engine=engine):
            chunks.append(chunk)
            held = engine.num_recordings if engine is not None else 0
        # The dense first chunk, a pass that chooses, one that does not.
        assert held == (3 if more.get("graphs") else 0)
        assert engine is None or engine.num_recordings == 0
    return [c.latents for c in chunks], [c.statistics.density for c in chunks]


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("window", [{}, {"window_frames": 9, "sink_frames": 3}], ids=["", "ring"])
def test_replayed_graphs_make_the_same_video_bit_for_bit(window: dict) -> None:
    sparse = SparseSettings(schedule=make_schedule(0.8))
    expected, densities = on_gpu(sparse, graphs=False, settings=window)
    latents, replayed = on_gpu(sparse, graphs=True, settings=window)
    for a, b in zip(latents, expected, strict=True):
        assert torch.equal(a, b)
    assert replayed == densities
    plain, _ = on_gpu(sparse, engine=False, settings=window)
    for a, b in zip(plain, expected, strict=True):
        assert (a - b).norm() / a.norm() < 0.05


@pytest.mark.gpu
@GPU
def test_eight_bit_linears_round_and_nothing_else() -> None:
    if eight_bit_obstacle(torch.device("cuda"), torch.bfloat16):
        pytest.skip("eight-bit products need compute capability 8.9")
    linear = torch.nn.Linear(1536, 8960).cuda().bfloat16()
    x = torch.randn(2, 300, 1536, device="cuda", dtype=torch.bfloat16)
    x[0, 0] = 0  # a row of zeros has no scale of its own
    with torch.no_grad():
        got = EightBitLinear(linear)(x)
        expected = linear.double()(x.double())
    assert got.dtype == torch.bfloat16 and got.shape == expected.shape
    assert (got.double() - expected).norm() / expected.norm() < 0.05
    assert torch.allclose(got[0, 0].double(), linear.bias, atol=1e-2)


@pytest.mark.gpu
@GPU
def test_a_forward_in_eight_bits_is_within_five_percent() -> None:
    if eight_bit_obstacle(torch.device("cuda"), torch.bfloat16):
        pytest.skip("eight-bit products need compute capability 8.9")
    sparse = SparseSettings(schedule=make_schedule(0.8))
    settings = {"num_frames": 3, "steps": (1000.0,)}
    full, _ = on_gpu(sparse, graphs=False, settings=settings)
    rounded, _ = on_gpu(sparse, graphs=False, settings=settings, fp8=True)
    error = (rounded[0] - full[0]).norm() / full[0].norm()
    assert 0 < error < 0.05


@pytest.mark.gpu
@GPU
def test_decoding_beside_gives_the_frames_of_decoding_after() -> None:
    torch.manual_seed(0)
    network = TAEHV(TAEHVConfig(decoder_widths=(16, 16, 8, 8), encoder_width=None))
    vae = VideoVAE(network.cuda().eval())
    chunks = [torch.randn(1, 16, 3, 16, 16, device="cuda") for _ in range(5)]
    plain = vae.new_decoder()
    expected = [frames_to_uint8(plain.decode(chunk)) for chunk in chunks]
    with ChunkDecoder(vae.new_decoder(), torch.device("cuda")) as decoding:
        got = []
        for chunk in chunks:
            decoding.submit(chunk.clone())
            got += decoding.take(wait=False)
        got += decoding.take(wait=True)
    assert [x.frames.shape[0] for x in got] == [9, 12, 12, 12, 12]
    for a, b in zip(got, expected, strict=True):
        assert (a.frames == b).all()


def test_errors_of_decoding_come_where_the_frames_are_taken() -> None:
    network = TAEHV(TAEHVConfig(decoder_widths=(8, 8, 8, 8), encoder_width=None))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vae = VideoVAE(network.to(device).eval())
    with pytest.raises(UserError, match="NaN"), ChunkDecoder(vae.new_decoder(), device) as decoding:
        decoding.submit(torch.full((1, 16, 3, 8, 8), float("nan"), device=device))
        list(decoding.take(wait=True))


@pytest.mark.parametrize("speed", ["fast", "fp8"])
def test_a_speed_that_needs_a_gpu_is_refused_without_one(tree: WanModel, speed: str) -> None:
    with pytest.raises(
        UserError, match=f"'{speed}' cannot be used: the kernels need a CUDA device"
    ):
        engine_for(tree, speed)
    assert engine_for(tree, "plain") is None and engine_for(tree, None) is None
    with pytest.raises(UserError, match="no speed 'warp'"):
        engine_for(tree, "warp")
