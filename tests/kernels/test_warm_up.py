"""Before a run's first chunk everything is compiled that the run will launch."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from triton.runtime.jit import JITFunction

from lightforcing.kernels import compile as compiling
from lightforcing.kernels import triton_attention
from lightforcing.kernels.launch import Launch
from lightforcing.lightforcing_core.fast.engine import ForwardEngine
from lightforcing.lightforcing_core.noise import SeededNoise
from lightforcing.lightforcing_core.rollout import RolloutSettings, rollout
from lightforcing.lightforcing_core.selection import (
    BlockTopK,
    Dense,
    Hierarchical,
    SelectionPolicy,
    SlidingWindow,
)
from lightforcing.lightforcing_core.sparse import SparseAttention
from lightforcing.lightforcing_core.sparse_settings import (
    PassBudgets,
    SparseSettings,
    make_schedule,
)
from lightforcing.lightforcing_core.wan.config import WanConfig
from lightforcing.lightforcing_core.wan.forward import prepare_text
from lightforcing.lightforcing_core.wan.modules import WanModel


class Recorder:
    """Stands in for launches: notes what Triton would compile for, and computes nothing."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.variants: set[str] = set()
        self.at_first_chunk: set[str] | None = None
        monkeypatch.setattr(Launch, "run", lambda launch: self.note(launch))
        begin_chunk = SparseAttention.begin_chunk

        def begin(attention: SparseAttention, chunk: int | None) -> None:
            if self.at_first_chunk is None:
                self.at_first_chunk, self.variants = self.variants, set()
            begin_chunk(attention, chunk)

        monkeypatch.setattr(SparseAttention, "begin_chunk", begin)

    def note(self, launch: Launch) -> None:
        # The interpreter's function knows its parameters' specialisation only as options.
        jitted = JITFunction(launch.kernel.fn, **launch.kernel.kwargs)
        source = compiling._source(replace(launch, kernel=jitted))
        key = (source.name, source.signature, source.constants, source.attrs)
        self.variants.add(repr((*key, launch.compile_options)))


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    if torch.cuda.is_available():
        pytest.skip("on a GPU tests/core/test_gpu.py asks Triton itself")
    return Recorder(monkeypatch)


def run(
    settings: SparseSettings,
    *,
    batch: int = 1,
    may_change: bool = False,
    fast: bool = False,
    **changes: object,
) -> None:
    config = WanConfig(
        dim=128, ffn_dim=32, num_heads=2, num_layers=2, text_dim=8, text_len=6, freq_dim=16
    )
    tree = WanModel(config).requires_grad_(False).half()
    text = prepare_text(tree, torch.randn(batch, 4, 8, dtype=torch.float16))
    rest = {"num_frames": 8, "steps": (1000.0, 500.0), **changes}
    chunks = rollout(
        tree,
        RolloutSettings(sparse=settings, **rest),
        text,
        SeededNoise(0, (batch, 16, 8, 10)),  # 20 tokens a frame
        engine=ForwardEngine(tree) if fast else None,
        sparse_for_chunk=(lambda chunk: settings) if may_change else None,
    )
    for _ in chunks:
        pass


def sparse(policy: SelectionPolicy, block: int = 16, **changes: object) -> SparseSettings:
    return SparseSettings(make_schedule(0.5), policy, block, block, backend="triton", **changes)


RUNS = {
    "whole history": {},
    "history beyond one selection tile": {"num_frames": 70, "frames_per_chunk": 6},
    "ring with sink": {"num_frames": 14, "window_frames": 7, "sink_frames": 1},
    "short last chunk, two videos": {"num_frames": 7, "batch": 2},
    "after one first frame": {"num_frames": 7, "independent_first_frame": True},
}
POLICIES = {
    "hierarchical": Hierarchical(3, 1, 1),
    "own block": BlockTopK(guarantee_own_block=True),
    "window": SlidingWindow(),
    "dense": Dense(),
}


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("geometry", RUNS.values(), ids=RUNS)
def test_a_run_launches_what_was_compiled_and_all_of_it(
    geometry: dict,
    policy: SelectionPolicy,
    capability: int,
    recorder: Recorder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Blocks of 64 through descriptors where the architecture has them; every pass sparse."""
    monkeypatch.setattr(triton_attention, "compute_capability", lambda device: capability)
    run(sparse(policy, 64), **geometry)
    assert recorder.variants == recorder.at_first_chunk
    assert recorder.variants


@pytest.mark.parametrize(
    "settings",
    [
        sparse(Hierarchical(3, 1, 1), plan_steps=None),
        sparse(Hierarchical(), budgets=PassBudgets(first_step=-1, clean_pass=0.2, first_layers=1)),
        sparse(Hierarchical(), token_order="tiles", keep_blocks=2),
        sparse(Hierarchical(), 64, qk_precision="int8"),
    ],
    ids=["a plan in every pass", "budgets of passes and layers", "tiles", "eight bits"],
)
def test_every_kind_of_pass_is_prepared(settings: SparseSettings, recorder: Recorder) -> None:
    run(settings)
    assert recorder.variants == recorder.at_first_chunk


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("geometry", RUNS.values(), ids=RUNS)
def test_an_engine_launches_nothing_else(
    geometry: dict, policy: SelectionPolicy, recorder: Recorder
) -> None:
    """Its fused kernels, and those of chunks that it leaves to the plain path."""
    run(sparse(policy, 64), fast=True, **geometry)
    assert recorder.at_first_chunk is not None
    assert recorder.variants - recorder.at_first_chunk == set()
    assert any("project" in variant for variant in recorder.variants)  # the first chunk is dense


def test_settings_that_may_change_find_every_policy_prepared(recorder: Recorder) -> None:
    run(sparse(SlidingWindow()), may_change=True)
    prepared = recorder.at_first_chunk
    assert prepared is not None and recorder.variants < prepared
    for policy in POLICIES.values():
        recorder.at_first_chunk, recorder.variants = None, set()
        run(sparse(policy))
        assert recorder.variants <= prepared


def test_a_single_chunk_and_the_reference_need_nothing(
    recorder: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="lightforcing"):
        run(sparse(Hierarchical()), num_frames=3)
        run(SparseSettings(make_schedule(0.5), backend="reference"))
        assert recorder.at_first_chunk == set()
        assert "kernels ready" not in caplog.text
        run(sparse(Hierarchical()))
    assert caplog.text.count("kernels ready after") == 1
