"""Whole rollouts with sparse attention, and how it is asked for."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch
from torch import Tensor

from lightforcing.lightforcing_core import backends
from lightforcing.lightforcing_core.backends import (
    REFERENCE,
    AttentionJob,
    list_backends,
    resolve_backend,
)
from lightforcing.lightforcing_core.errors import UserError
from lightforcing.lightforcing_core.noise import SeededNoise
from lightforcing.lightforcing_core.rollout import Chunk, RolloutSettings, rollout
from lightforcing.lightforcing_core.schedule import (
    ChunkAwareGrowth,
    HandDrawn,
    LinearRamp,
    Timeline,
    UniformSparsity,
    chunk_sparsity,
)
from lightforcing.lightforcing_core.selection import (
    BlockTopK,
    Dense,
    Hierarchical,
    SlidingWindow,
)
from lightforcing.lightforcing_core.sparse import SparseAttention
from lightforcing.lightforcing_core.sparse_settings import (
    PassBudgets,
    SparseSettings,
    default_block_tokens,
    make_policy,
    make_schedule,
)
from lightforcing.lightforcing_core.wan.config import WanConfig
from lightforcing.lightforcing_core.wan.forward import TextContext, prepare_text
from lightforcing.lightforcing_core.wan.modules import WanModel

SHAPE = (1, 16, 6, 10)  # 15 tokens a frame: blocks of 4 leave a tail of 3
STEPS = (1000.0, 600.0)
SPARSE = SparseSettings(ChunkAwareGrowth(0.7, 0.8), Hierarchical(3, 1, 1), 4, 4)


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
    given: Tensor | None = None,
    **changes: object,
) -> list[Chunk]:
    settings = RolloutSettings(**{"num_frames": 9, "steps": STEPS, "sparse": sparse, **changes})
    return list(rollout(tree, settings, text, SeededNoise(0, SHAPE), given_latents=given))


def difference(a: list[Chunk], b: list[Chunk]) -> list[float]:
    return [
        float((x.latents - y.latents).norm() / y.latents.norm()) for x, y in zip(a, b, strict=True)
    ]


GEOMETRIES = {
    "short last chunk": {"num_frames": 8},
    "ring with sink": {"num_frames": 17, "window_frames": 7, "sink_frames": 1},
    "frame by frame": {"num_frames": 5, "frames_per_chunk": 1},
    "independent first frame": {"num_frames": 7, "independent_first_frame": True},
}


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_sparsity_zero_is_dense(tree: WanModel, text: TextContext, geometry: dict) -> None:
    dense = run(tree, text, None, **geometry)
    zero = run(tree, text, replace(SPARSE, schedule=make_schedule(0.0)), **geometry)
    assert max(difference(zero, dense)) < 1e-6
    assert all(c.statistics.density == 1 and c.statistics.sparsity == 0 for c in zero)


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_full_lists_are_dense_within_rounding(
    tree: WanModel, text: TextContext, geometry: dict
) -> None:
    dense = run(tree, text, None, **geometry)
    full = run(tree, text, replace(SPARSE, policy=SlidingWindow(0, 99)), **geometry)
    errors = difference(full, dense)
    assert errors[0] == 0 and max(errors) < 1e-4
    assert all(c.statistics.density == 1 for c in full)


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_sparse_chunks_follow_the_schedule(
    tree: WanModel, text: TextContext, geometry: dict
) -> None:
    settings = RolloutSettings(**{"num_frames": 9, "steps": STEPS, "sparse": SPARSE, **geometry})
    dense, chunks = run(tree, text, None, **geometry), run(tree, text, SPARSE, **geometry)
    errors = difference(chunks, dense)
    assert errors[0] == 0
    timeline = settings.timeline()
    for chunk, error in zip(chunks, errors, strict=True):
        s = chunk.statistics
        assert s.sparsity == chunk_sparsity(SPARSE.schedule, timeline, s.index)
        blocks = s.kv_frames * 4
        if s.sparsity:
            assert s.density == pytest.approx(max(int((1 - s.sparsity) * blocks), 1) / blocks)
            assert error > 1e-6
            assert 0 < s.select_seconds + s.attend_seconds < s.seconds
        else:
            assert s.density == 1
    assert any(chunk.statistics.sparsity > 0 for chunk in chunks)


def test_a_video_goes_on_after_given_frames(tree: WanModel, text: TextContext) -> None:
    picture = torch.randn(1, 16, 1, *SHAPE[2:])
    chunks = run(tree, text, SPARSE, picture, num_frames=6)
    assert [c.statistics.sparsity > 0 for c in chunks] == [False, True]
    clip = torch.randn(1, 16, 7, *SHAPE[2:])
    chunks = run(tree, text, SPARSE, clip, num_frames=6)
    assert all(0 < c.statistics.density < 1 for c in chunks)
    assert [c.statistics.kv_frames for c in chunks] == [10, 13]


def test_attention_is_told_which_pass_is_what(
    tree: WanModel, text: TextContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given frames are no chunk and have clean passes alone; the last chunk has none."""
    told: list[tuple[str, int | None]] = []
    for name in ("begin_chunk", "begin_pass"):
        original = getattr(SparseAttention, name)

        def spy(self, value, original=original, name=name) -> None:
            told.append((name.removeprefix("begin_"), value))
            original(self, value)

        monkeypatch.setattr(SparseAttention, name, spy)
    run(tree, text, SPARSE, torch.randn(1, 16, 4, *SHAPE[2:]), num_frames=6)
    given = [("chunk", None), ("pass", None)] * 2
    chunk = [("pass", 0), ("pass", 1)]
    assert told == [*given, ("chunk", 0), *chunk, ("pass", None), ("chunk", 1), *chunk]


def test_a_schedule_is_told_the_window_and_what_was_given() -> None:
    settings = RolloutSettings(8, 3, window_frames=7, sink_frames=1)
    assert settings.timeline(2) == Timeline((3, 3, 2), 2, 7)


def test_dense_runs_say_so(tree: WanModel, text: TextContext) -> None:
    for chunk in run(tree, text, None):
        s = chunk.statistics
        assert (s.sparsity, s.density, s.select_seconds) == (0, 1, 0)
        assert s.attend_seconds > 0


def test_plan_reuse_changes_the_result_a_little(tree: WanModel, text: TextContext) -> None:
    dense = run(tree, text, None)
    once, released = (run(tree, text, replace(SPARSE, plan_steps=p)) for p in ((0,), None))
    assert difference(once, released)[0] == 0
    assert 0 < difference(once, released)[2] < 2 * difference(released, dense)[2]


def test_settings_are_plain_data() -> None:
    """They go into a run's JSON, and say there which schedule and policy they are."""
    data = json.loads(json.dumps(asdict(RolloutSettings(9, sparse=SPARSE))))
    assert data["sparse"]["schedule"] == {"target": 0.7, "base": 0.8, "kind": "chunk_aware"}
    assert data["sparse"]["policy"]["kind"] == "hierarchical"


def test_defaults_are_the_papers_but_for_the_reuse_of_plans() -> None:
    settings = SparseSettings()
    assert settings.schedule == ChunkAwareGrowth(0.88, 0.98)
    assert settings.policy == Hierarchical(6, 1, 2, False, False)
    assert settings.budgets.sparsity(0.9, None, 0, 30) == 0.9
    assert settings.plan_steps == (0,)
    assert settings.key_block(1536) == settings.query_block(1560) == 64


@pytest.mark.parametrize(
    ("tokens", "block"), [(1560, 64), (512, 64), (511, 32), (128, 16), (6, 16)]
)
def test_blocks_shrink_with_the_frame(tokens: int, block: int) -> None:
    assert default_block_tokens(tokens) == block


def test_what_a_command_line_asks_for() -> None:
    assert make_schedule() == ChunkAwareGrowth(0.88, 0.98)
    assert make_schedule(0.5) == ChunkAwareGrowth(0.5, 0.6)
    assert make_schedule(0.95) == ChunkAwareGrowth(0.95, 0.99)
    assert make_schedule(0.995) == ChunkAwareGrowth(0.995, 0.995)
    assert make_schedule(0.5, base_sparsity=0.9) == ChunkAwareGrowth(0.5, 0.9)
    assert make_schedule(0.5, kind="uniform") == UniformSparsity(0.5)
    assert make_schedule(0.5, base_sparsity=0.9, kind="linear") == LinearRamp(0.5, 0.9)
    assert make_schedule(kind="hand_drawn", values=[0, 0.5]) == HandDrawn((0, 0.5))
    assert make_policy() == Hierarchical(6, 1, 2)
    assert make_policy(keep_frames=3, keep_near=1) == Hierarchical(3, 1, 1)
    assert make_policy("block_top_k") == BlockTopK()
    assert make_policy("sliding_window", keep_sink=2, keep_near=4) == SlidingWindow(2, 4)
    assert make_policy("sliding_window") == SlidingWindow(1, None)
    assert make_policy("dense") == Dense()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_schedule(1.2), "target sparsity"),
        (lambda: make_schedule(0.9, base_sparsity=0.8), "must not be below"),
        (lambda: make_schedule(kind="wavy"), "no schedule 'wavy'"),
        (lambda: make_policy("best"), "no selection policy 'best'"),
        (lambda: make_policy("block_top_k", keep_frames=6), "has no keep_frames"),
        (lambda: make_policy("dense", guarantee_own_block=True), "has no guarantee_own_block"),
        (lambda: SparseSettings(key_block_tokens=0), "key_block_tokens"),
        (lambda: SparseSettings(plan_steps=(-1,)), "plan_steps"),
        (lambda: SparseSettings(backend="cuda"), "no attention backend 'cuda'"),
        (lambda: PassBudgets(first_step=2.0), "first_step"),
        (lambda: PassBudgets(last_layers=-1), "last_layers"),
    ],
)
def test_settings_out_of_range_are_refused_in_one_line(make, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def job(**changes: object) -> AttentionJob:
    values = {
        "device": torch.device("cpu"),
        "dtype": torch.float32,
        "head_dim": 128,
        "query_block_tokens": 64,
        "key_block_tokens": 64,
    }
    return AttentionJob(**{**values, **changes})


def test_an_explicit_backend_is_met_or_refused_with_every_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError) as caught:
        resolve_backend("triton", job(query_block_tokens=24, dtype=torch.float64))
    for reason in ("no CUDA device", "this run is on cpu", "query blocks", "24", "float64"):
        assert reason in str(caught.value)
    assert "key blocks" not in str(caught.value) and "\n" not in str(caught.value)
    assert resolve_backend("reference", job()) is REFERENCE
    with pytest.raises(UserError, match="no attention backend"):
        resolve_backend("fastest", job())


def test_a_backend_that_cannot_be_met_stops_a_run_before_its_first_chunk(
    tree: WanModel, text: TextContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    noise = SeededNoise(0, SHAPE)
    settings = RolloutSettings(9, sparse=replace(SPARSE, backend="triton"))
    with pytest.raises(UserError, match="'triton' cannot be used"):
        next(rollout(tree, settings, text, noise))


def test_auto_takes_the_reference_on_a_cpu_and_logs_it_once(
    tree: WanModel, text: TextContext, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="lightforcing"):
        run(tree, text, SPARSE)
    lines = [r.getMessage() for r in caplog.records if "sparse attention" in r.getMessage()]
    assert len(lines) == 1 and "reference" in lines[0]


def test_auto_never_takes_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_triton_obstacles", lambda job: [])
    assert resolve_backend("auto", job()) is REFERENCE


def test_backends_are_listed_with_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    triton, gluon, reference = list_backends()
    assert [triton.available, gluon.available, reference.available] == [False, False, True]
    assert "Triton is not installed" in triton.reason
    assert "Triton is not installed" in gluon.reason


def test_gluon_says_all_that_it_cannot_do() -> None:
    with pytest.raises(UserError) as caught:
        resolve_backend("gluon", job())
    for reason in ("9.0", "query blocks are 128", "'auto' or 'reference'"):
        assert reason in str(caught.value)


def test_on_hopper_auto_takes_gluon_where_its_query_blocks_fit(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(backends, "_triton_obstacles", lambda job: [])
    monkeypatch.setattr(backends, "_gluon_machine_obstacles", list)
    there = replace(job(), device=torch.device("cuda"), dtype=torch.bfloat16, key_block_tokens=64)
    free = resolve_backend("auto", replace(there, query_block_is_free=True))
    assert (free.name, free.query_block_tokens) == ("gluon", 128)
    with caplog.at_level(logging.INFO, logger="lightforcing"):
        chosen = resolve_backend("auto", replace(there, query_block_tokens=64))
    assert (chosen.name, chosen.query_block_tokens) == ("triton", None)
    assert "query blocks are 128" in caplog.text


@pytest.mark.parametrize("order", ["raster", "tiles"])
def test_triton_makes_the_same_video(order: str) -> None:
    """Interpreted, in a process of its own: Triton decides that when it is imported."""
    program = """
import sys, torch
from lightforcing.lightforcing_core.backends import list_backends
from lightforcing.lightforcing_core.noise import SeededNoise
from lightforcing.lightforcing_core.rollout import RolloutSettings, rollout
from lightforcing.lightforcing_core.sparse_settings import (
    SparseSettings, make_policy, make_schedule
)
from lightforcing.lightforcing_core.wan.config import WanConfig
from lightforcing.lightforcing_core.wan.forward import prepare_text
from lightforcing.lightforcing_core.wan.modules import WanModel

if not list_backends()[0].available:
    sys.exit(list_backends()[0].reason)
torch.manual_seed(0)
config = WanConfig(
    dim=64, ffn_dim=32, num_heads=1, num_layers=1, text_dim=8, text_len=6, freq_dim=16
)
tree = WanModel(config).requires_grad_(False)
text = prepare_text(tree, torch.randn(1, 4, 8))
videos = []
for backend in ("reference", "triton"):
    policy = make_policy(keep_frames=3, keep_near=1, guarantee_own_block=True)
    sparse = SparseSettings(make_schedule(0.5), policy, 16, 16, sys.argv[1], backend=backend)
    settings = RolloutSettings(6, 1, (1000.0,), window_frames=5, sink_frames=1, sparse=sparse)
    noise = SeededNoise(0, (1, 16, 8, 10))  # 20 tokens a frame: a tail of 4
    videos.append(torch.cat([c.latents for c in rollout(tree, settings, text, noise)], 2))
print(float((videos[0] - videos[1]).norm() / videos[0].norm()))
"""
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program, order], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1e-5


def test_the_first_chunks_can_be_kept_dense(tree: WanModel, text: TextContext) -> None:
    chunks = run(tree, text, replace(SPARSE, dense_chunks=2), num_frames=12)
    assert [c.statistics.density == 1 for c in chunks] == [True, True, False, False]


@pytest.mark.parametrize("keep", [1, 5, 9])
def test_a_number_of_blocks_overrides_the_sparsity(
    tree: WanModel, text: TextContext, keep: int
) -> None:
    settings = replace(SPARSE, keep_blocks=keep, policy=BlockTopK())
    chunks = run(tree, text, settings, num_frames=12)
    kept = [c.statistics.density * 4 * c.statistics.kv_frames for c in chunks]  # 4 blocks a frame
    assert kept == pytest.approx([12, keep, keep, keep])


def test_settings_change_between_chunks(tree: WanModel, text: TextContext) -> None:
    """Each chunk is asked for its own, in order, and what comes later changes nothing before."""
    asked: list[int] = []

    def by_chunk(chunk: int) -> SparseSettings | None:
        asked.append(chunk)
        return {2: None, 3: replace(SPARSE, schedule=UniformSparsity(0.5))}.get(chunk, SPARSE)

    settings = RolloutSettings(num_frames=15, steps=STEPS, sparse=SPARSE)
    noise = SeededNoise(0, SHAPE)
    changed = list(rollout(tree, settings, text, noise, sparse_for_chunk=by_chunk))
    plain = run(tree, text, SPARSE, num_frames=15)
    assert asked == [0, 1, 2, 3, 4]
    assert difference(changed, plain)[:2] == [0, 0] and difference(changed, plain)[2] > 1e-3
    assert [c.statistics.density == 1 for c in changed] == [True, False, True, False, False]
    assert [c.statistics.sparsity for c in changed][2:4] == [0, 0.5]


def test_dense_by_chunk_is_the_dense_engine(tree: WanModel, text: TextContext) -> None:
    noise, settings = SeededNoise(0, SHAPE), RolloutSettings(9, steps=STEPS, sparse=SPARSE)
    never = list(rollout(tree, settings, text, noise, sparse_for_chunk=lambda chunk: None))
    assert max(difference(never, run(tree, text, None))) == 0


@pytest.mark.parametrize(
    "change", [{"key_block_tokens": 5}, {"query_block_tokens": 5}, {"backend": "reference"}]
)
def test_block_sizes_and_backend_hold_for_a_run(
    tree: WanModel, text: TextContext, change: dict
) -> None:
    chunks = rollout(
        tree,
        RolloutSettings(num_frames=9, steps=STEPS, sparse=SPARSE),
        text,
        SeededNoise(0, SHAPE),
        sparse_for_chunk=lambda chunk: replace(SPARSE, **change) if chunk else SPARSE,
    )
    next(chunks)
    with pytest.raises(UserError, match="start a new run"):
        next(chunks)


def test_a_chunk_brings_its_plans(tree: WanModel, text: TextContext) -> None:
    settings = RolloutSettings(num_frames=6, steps=STEPS, sparse=SPARSE)
    plans = []
    for chunk in rollout(tree, settings, text, SeededNoise(0, SHAPE)):
        assert isinstance(chunk.attention, SparseAttention)
        plans.append(sorted(chunk.attention.plans))
    assert plans == [[], [0, 1]]
