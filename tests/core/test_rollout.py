"""Behaviour of the chunk loop that is not mathematics."""

from __future__ import annotations

import copy
import gc
import weakref
from types import SimpleNamespace

import pytest
import torch

from lightforcing.lightforcing_core import rollout as rollout_module
from lightforcing.lightforcing_core.errors import Cancelled, UserError
from lightforcing.lightforcing_core.kv_cache import KVCache
from lightforcing.lightforcing_core.noise import SeededNoise
from lightforcing.lightforcing_core.rollout import Chunk, ModelCall, RolloutSettings, rollout
from lightforcing.lightforcing_core.wan.config import WanConfig
from lightforcing.lightforcing_core.wan.forward import TextContext, prepare_text, wan_forward
from lightforcing.lightforcing_core.wan.modules import WanModel

SHAPE = (1, 16, 4, 4)
STEPS = (1000.0, 500.0)


@pytest.fixture(scope="module")
def tree() -> WanModel:
    torch.manual_seed(0)
    config = WanConfig(
        dim=32, ffn_dim=32, num_heads=2, num_layers=2, text_dim=8, text_len=6, freq_dim=16
    )
    return WanModel(config).requires_grad_(False)


@pytest.fixture(scope="module")
def text(tree: WanModel) -> TextContext:
    return prepare_text(tree, torch.randn(1, 4, 8))


def run(tree: WanModel, text: TextContext, settings: RolloutSettings, seed: int = 0) -> list[Chunk]:
    return list(rollout(tree, settings, text, SeededNoise(seed, SHAPE)))


def test_statistics_say_what_happened(tree: WanModel, text: TextContext) -> None:
    settings = RolloutSettings(7, 3, STEPS, window_frames=5, sink_frames=1)
    chunks = [chunk.statistics for chunk in run(tree, text, settings)]
    assert [(c.index, c.first_frame, c.num_frames) for c in chunks] == [
        (0, 0, 3),
        (1, 3, 3),
        (2, 6, 1),
    ]
    assert [c.kv_frames for c in chunks] == [3, 5, 5]
    assert all((c.sparsity, c.density) == (0.0, 1.0) for c in chunks)
    assert all(c.seconds == c.denoise_seconds + c.clean_seconds > 0 for c in chunks)


def test_the_last_clean_pass_never_runs(
    tree: WanModel, text: TextContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[float] = []

    def counted(tree, x, time, *rest):
        calls.append(float(time.timesteps[0, 0]))
        return wan_forward(tree, x, time, *rest)

    monkeypatch.setattr("lightforcing.lightforcing_core.rollout.wan_forward", counted)
    chunks = run(tree, text, RolloutSettings(6, 2, STEPS))
    assert calls == [1000, 500, 0, 1000, 500, 0, 1000, 500]
    assert [c.statistics.forwards for c in chunks] == [2, 3, 3]


@pytest.mark.parametrize("has_host", [False, True])
def test_timesteps_are_embedded_once_per_run(
    tree: WanModel, text: TextContext, has_host: bool
) -> None:
    """But before every forward of a host, which may change the weights in between."""
    embedded = []
    hook = tree.time_embedding.register_forward_hook(lambda *_: embedded.append(1))

    def host(call):
        return call.latents - call.timestep / 1000 * call.velocity(call.latents, text)

    try:
        noise = SeededNoise(0, SHAPE)
        list(
            rollout(
                tree,
                RolloutSettings(6, 2, STEPS),
                text,
                noise,
                host=host if has_host else None,
            )
        )
    finally:
        hook.remove()
    assert len(embedded) == (8 if has_host else len({*STEPS, 0.0}))


def test_a_longer_video_begins_with_the_shorter_one(tree: WanModel, text: TextContext) -> None:
    short = run(tree, text, RolloutSettings(4, 2, STEPS))
    long = run(tree, text, RolloutSettings(8, 2, STEPS))
    for a, b in zip(short, long, strict=False):
        assert torch.equal(a.latents, b.latents)


def test_the_seed_decides(tree: WanModel, text: TextContext) -> None:
    settings = RolloutSettings(2, 2, STEPS)
    first, again, other = (run(tree, text, settings, seed)[0].latents for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


@pytest.mark.parametrize("allowed", [0, 1, 2, 4])
def test_cancelling_stops_before_the_next_forward(
    tree: WanModel, text: TextContext, allowed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    forwards = 0

    def counted(*arguments):
        nonlocal forwards
        forwards += 1
        return wan_forward(*arguments)

    monkeypatch.setattr("lightforcing.lightforcing_core.rollout.wan_forward", counted)
    noise = SeededNoise(0, SHAPE)
    chunks = rollout(
        tree, RolloutSettings(6, 2, STEPS), text, noise, should_stop=lambda: forwards >= allowed
    )
    with pytest.raises(Cancelled):
        list(chunks)
    assert forwards == allowed


def test_a_consumer_may_leave_early_and_keeps_its_grad_mode(
    tree: WanModel, text: TextContext
) -> None:
    chunks = rollout(tree, RolloutSettings(6, 2, STEPS), text, SeededNoise(0, SHAPE))
    next(chunks)
    assert torch.is_grad_enabled()
    chunks.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_frames": 0}, "at least 1"),
        ({"frames_per_chunk": 0}, "at least 1"),
        ({"steps": ()}, "step list"),
        ({"steps": (500, 800)}, "step list"),
        ({"window_frames": 0}, "window"),
        ({"window_frames": 2}, "does not fit a window"),
        ({"window_frames": 3, "sink_frames": 1}, "does not fit a window"),
        ({"sink_frames": 1}, "without a window"),
        ({"context_timestep": 1000.0}, "clean pass"),
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_refused(
    tree: WanModel, text: TextContext, changes: dict[str, object], message: str
) -> None:
    values = {"num_frames": 6, "frames_per_chunk": 3, "steps": STEPS, **changes}
    with pytest.raises(UserError, match=message):
        run(tree, text, RolloutSettings(**values))


@pytest.mark.parametrize(
    "changes",
    [{"window_frames": 3, "sink_frames": 1}, {"window_frames": 4, "sink_frames": 2}],
    ids=str,
)
def test_a_window_too_small_is_noticed_before_the_first_chunk(
    tree: WanModel, text: TextContext, changes: dict[str, int]
) -> None:
    chunks = rollout(tree, RolloutSettings(9, 3, STEPS, **changes), text, SeededNoise(0, SHAPE))
    with pytest.raises(UserError, match="does not fit a window"):
        next(chunks)


def test_a_video_shorter_than_its_window_may_name_sinks(tree: WanModel, text: TextContext) -> None:
    windowed = RolloutSettings(3, 3, STEPS, window_frames=7, sink_frames=3)
    a = run(tree, text, windowed)[0].latents
    b = run(tree, text, RolloutSettings(3, 3, STEPS))[0].latents
    assert torch.equal(a, b)


@pytest.mark.parametrize(
    "shape", [(1, 16, 1, 8, 8), (2, 16, 1, 4, 4), (1, 8, 1, 4, 4), (16, 1, 4, 4)], ids=str
)
def test_given_latents_of_another_size_are_refused(
    tree: WanModel, text: TextContext, shape: tuple[int, ...]
) -> None:
    noise = SeededNoise(0, SHAPE)
    with pytest.raises(UserError, match="given latents"):
        next(rollout(tree, RolloutSettings(2, 2), text, noise, given_latents=torch.zeros(shape)))


def test_given_latents_with_nan_are_refused(tree: WanModel, text: TextContext) -> None:
    given = torch.full((1, 16, 1, 4, 4), float("nan"))
    noise = SeededNoise(0, SHAPE)
    with pytest.raises(UserError, match="NaN"):
        next(rollout(tree, RolloutSettings(2, 2), text, noise, given_latents=given))


def test_latents_that_do_not_divide_by_the_patch_are_refused(
    tree: WanModel, text: TextContext
) -> None:
    with pytest.raises(UserError, match="divide by the patch"):
        list(rollout(tree, RolloutSettings(2, 2), text, SeededNoise(0, (1, 16, 5, 4))))


def test_embeddings_of_another_model_are_refused(tree: WanModel) -> None:
    for shape in ((1, 4, 9), (1, 7, 8), (4, 8)):
        with pytest.raises(UserError, match="prompt embeddings"):
            prepare_text(tree, torch.randn(shape))


def test_the_forward_runs_on_a_foreign_tree_with_wans_names(
    tree: WanModel, text: TextContext
) -> None:
    """A host's tree may wrap its layers and keep other classes; only names count."""

    class Casting(torch.nn.Module):
        def __init__(self, inner: torch.nn.Linear) -> None:
            super().__init__()
            self.inner = inner
            self.weight = inner.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(x, self.inner.weight, self.inner.bias)

    class Holder(torch.nn.Module):
        pass

    foreign = Holder()
    for name in ("patch_embedding", "text_embedding", "time_embedding", "time_projection", "head"):
        setattr(foreign, name, getattr(tree, name))
    foreign.blocks = torch.nn.ModuleList()
    for block in tree.blocks:
        copy = Holder()
        for name in ("norm1", "norm2", "norm3", "cross_attn", "ffn", "modulation"):
            setattr(copy, name, getattr(block, name))
        copy.self_attn = Holder()
        for name in ("norm_q", "norm_k"):
            setattr(copy.self_attn, name, getattr(block.self_attn, name))
        for name in ("q", "k", "v", "o"):
            setattr(copy.self_attn, name, Casting(getattr(block.self_attn, name)))
        foreign.blocks.append(copy)
    for name in ("num_heads", "freq_dim", "text_len", "patch_size"):
        setattr(foreign, name, getattr(tree, name))
    settings = RolloutSettings(4, 2, STEPS)
    for ours, theirs in zip(run(tree, text, settings), run(foreign, text, settings), strict=True):
        assert torch.equal(ours.latents, theirs.latents)


def test_a_host_runs_the_forwards(tree: WanModel, text: TextContext) -> None:
    """It sees every forward in order, and with its own prompt and formula nothing changes."""
    calls: list[tuple[float, int | None, int]] = []

    def host(call: ModelCall) -> torch.Tensor:
        calls.append((call.timestep, call.step, call.frames[0]))
        velocity = call.velocity(call.latents, text)
        return (call.latents.double() - call.timestep / 1000 * velocity.double()).float()

    settings = RolloutSettings(4, 2, STEPS)
    hosted = list(rollout(tree, settings, None, SeededNoise(0, SHAPE), host=host))
    assert calls == [(1000, 0, 0), (500, 1, 0), (0, None, 0), (1000, 0, 2), (500, 1, 2)]
    for a, b in zip(hosted, run(tree, text, settings), strict=True):
        assert torch.equal(a.latents, b.latents)


def test_the_patch_embedding_may_be_float32(tree: WanModel, text: TextContext) -> None:
    """As in ComfyUI, which keeps this one layer wide."""
    narrow = copy.deepcopy(tree).bfloat16()
    narrow.patch_embedding.float()
    prompt = TextContext(
        tuple(key.bfloat16() for key in text.keys), tuple(value.bfloat16() for value in text.values)
    )
    chunks = list(rollout(narrow, RolloutSettings(2, 2, STEPS), prompt, SeededNoise(0, SHAPE)))
    wide = run(tree, text, RolloutSettings(2, 2, STEPS))
    assert (chunks[0].latents - wide[0].latents).norm() < 0.05 * wide[0].latents.norm()


def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref]:
    """The order of a GPU's launches, on the CPU; returns references to the caches that are made."""
    caches: list[weakref.ref] = []
    table = rollout_module.position_table

    def cache(spec, device, *rest):
        made = KVCache(spec, "cpu", *rest)
        caches.append(weakref.ref(made))
        return made

    def positions(tree, frames, height, width, device, order):
        return table(tree, frames, height, width, torch.device("cpu"), order)

    event = SimpleNamespace(
        record=lambda *_: None, synchronize=lambda: None, elapsed_time=lambda _: 0.0
    )
    monkeypatch.setattr(rollout_module, "KVCache", cache)
    monkeypatch.setattr(rollout_module, "position_table", positions)
    monkeypatch.setattr(torch.cuda, "Event", lambda **_: event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _=None: None)
    return caches


@pytest.mark.parametrize("is_left", [False, True], ids=["to the failure", "left before it"])
def test_a_failed_clean_pass_comes_after_its_chunk_and_holds_no_memory(
    tree: WanModel, text: TextContext, monkeypatch: pytest.MonkeyPatch, is_left: bool
) -> None:
    caches = as_on_a_gpu(monkeypatch)
    noise = SeededNoise(0, SHAPE)
    noise.device = SimpleNamespace(type="cuda")
    monkeypatch.setattr(SeededNoise, "_draw", lambda *_: torch.zeros(1, 16, 2, 4, 4))
    asked: list[int] = []

    def stops_in_the_clean_pass() -> bool:
        asked.append(0)
        return len(asked) == 3

    gc.disable()
    try:
        chunks = rollout(
            tree, RolloutSettings(4, 2, STEPS), text, noise, should_stop=stops_in_the_clean_pass
        )
        assert next(chunks).statistics.forwards == 2
        assert len(asked) == 3
        if not is_left:
            with pytest.raises(Cancelled):
                next(chunks)
        chunks.close()
        del chunks
        assert caches[0]() is None
    finally:
        gc.enable()


def test_a_failed_clean_pass_holds_no_tensors_while_its_chunk_is_decoded(
    tree: WanModel, text: TextContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_on_a_gpu(monkeypatch)
    noise = SeededNoise(0, SHAPE)
    noise.device = SimpleNamespace(type="cuda")
    monkeypatch.setattr(SeededNoise, "_draw", lambda *_: torch.zeros(1, 16, 2, 4, 4))
    held: list[weakref.ref] = []

    def host(call: ModelCall) -> torch.Tensor:
        activations = call.latents.clone()
        if call.step is None:
            held.append(weakref.ref(activations))
            raise torch.OutOfMemoryError("no room")
        return activations

    chunks = rollout(
        tree, RolloutSettings(4, 2, STEPS), None, noise, host=host, dtype=torch.float32
    )
    assert next(chunks).latents.shape[2] == 2
    assert len(held) == 1 and held[0]() is None
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        next(chunks)
