"""Sparse attention over the cache equals what its definition says, wherever frames lie."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightforcing.lightforcing_core.attention import CachedAttention, dense_attention
from lightforcing.lightforcing_core.backends import REFERENCE
from lightforcing.lightforcing_core.errors import UserError
from lightforcing.lightforcing_core.kv_cache import CacheSpec, KVCache
from lightforcing.lightforcing_core.schedule import HandDrawn, Timeline, UniformSparsity
from lightforcing.lightforcing_core.selection import (
    BlockTopK,
    Dense,
    Hierarchical,
    SelectionPolicy,
    SlidingWindow,
)
from lightforcing.lightforcing_core.sparse import SparseAttention
from lightforcing.lightforcing_core.sparse_settings import PassBudgets, SparseSettings

HEADS, DIM = 2, 8


class Video:
    """Random queries, keys and values of a rollout, and the slow definition of its attention."""

    def __init__(
        self,
        settings: SparseSettings,
        lengths: Sequence[int],
        *,
        tokens: int = 10,
        window: int = -1,
        sink: int = 0,
        layers: int = 1,
    ) -> None:
        self.lengths, self.tokens, self.settings, self.layers = lengths, tokens, settings, layers
        self.capacity = sum(lengths) if window == -1 else window
        self.sink = sink
        spec = CacheSpec(
            1, layers, HEADS, DIM, tokens, self.capacity, sink, settings.key_block(tokens),
            torch.float32,
        )  # fmt: skip
        self.cache = KVCache(spec, "cpu")
        for tensor in (*self.cache.keys, *self.cache.values):
            tensor[:, :, tokens:] = math.nan  # padding rows must not matter
        timeline = Timeline(tuple(lengths), window_frames=window)
        self.attend = SparseAttention(self.cache, settings, timeline, REFERENCE)
        self.frames: dict[int, tuple[Tensor, Tensor]] = {}  # what is visible, clean or not

    def chunks(self) -> Iterator[tuple[int, range]]:
        """Enter each chunk; what the caller leaves open is closed by a clean pass."""
        first = 0
        for chunk, length in enumerate(self.lengths):
            frames = range(first, first + length)
            self.cache.enter(frames)
            while len(self.frames) + length > self.capacity:
                del self.frames[sorted(self.frames)[self.sink]]
            self.attend.begin_chunk(chunk)
            yield chunk, frames
            self.forward(frames, None)
            self.cache.commit()
            first += length

    def forward(self, frames: range, step: int | None) -> tuple[Tensor, Tensor]:
        """One pass over all layers; returns the first layer's queries and output."""
        self.attend.begin_pass(step)
        first: tuple[Tensor, Tensor] | None = None
        for layer in range(self.layers):
            q, k, v = torch.randn(3, 1, len(frames) * self.tokens, HEADS, DIM).unbind(0)
            out = self.attend(layer, q, k, v)
            if first is None:
                first = q, out
                for i, frame in enumerate(frames):
                    rows = slice(i * self.tokens, (i + 1) * self.tokens)
                    self.frames[frame] = k[0, rows], v[0, rows]
        assert first is not None
        return first


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """float64; q [Sq, H, D], k, v [Sk, H, D], mask [H, Sq, Sk]."""
    scores = torch.einsum("qhd,khd->hqk", q.double(), k.double()) / math.sqrt(DIM)
    weights = scores.masked_fill(~mask, -math.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v.double())


def by_definition(video: Video, q: Tensor, own: range, keep: set[int] | None) -> Tensor:
    """Attention to whole frames `keep`, or by the two-stage rule when it is None.

    Works on frames in the order of time and knows no slots; q [Sq, H, D].
    """
    order = sorted(video.frames)
    k = torch.cat([video.frames[f][0] for f in order])
    v = torch.cat([video.frames[f][1] for f in order])
    tokens = video.tokens
    mask = torch.zeros(HEADS, len(q), len(k), dtype=torch.bool)
    if keep is not None:
        for place, frame in enumerate(order):
            mask[:, :, place * tokens : (place + 1) * tokens] = frame in keep
        return masked_attention(q, k, v, mask)
    policy = video.settings.policy
    assert isinstance(policy, Hierarchical)
    cut_q, cut_k = video.settings.query_block(tokens), video.settings.key_block(tokens)
    key_blocks = [
        (place, rows)
        for place in range(len(order))
        for rows in (torch.arange(tokens) + place * tokens).split(cut_k)
    ]
    sparsity = video.settings.schedule.value  # type: ignore[attr-defined]
    top_k = max(int((1 - sparsity) * len(key_blocks)), 1)
    past = len(order) - len(own)
    for h in range(HEADS):
        for rows in torch.arange(len(own) * tokens).split(cut_q):
            query = q[rows, h].double().mean(0)
            score = {i: float(query @ k[b[1], h].double().mean(0)) for i, b in
                     enumerate(key_blocks)}  # fmt: skip
            eligible = set(range(len(order)))
            if past > policy.keep_frames:
                middle = range(policy.keep_sink, past - policy.keep_near)
                means = {
                    f: sum(s for i, s in score.items() if key_blocks[i][0] == f) for f in middle
                }
                best = sorted(middle, key=lambda f: -means[f])
                wanted = policy.keep_frames - policy.keep_sink - policy.keep_near
                eligible -= set(best[wanted:])
            candidates = [i for i in score if key_blocks[i][0] in eligible]
            for i in sorted(candidates, key=lambda i: -score[i])[:top_k]:
                mask[h, rows[:, None], key_blocks[i][1]] = True
    return masked_attention(q, k, v, mask)


def sparse(policy: SelectionPolicy, sparsity: float = 0.6, **changes: object) -> SparseSettings:
    blocks = {"query_block_tokens": 4, "key_block_tokens": 4}
    return SparseSettings(UniformSparsity(sparsity), policy, **{**blocks, **changes})


GEOMETRIES = {
    "whole history": {"lengths": (2, 2, 2, 2, 1)},
    "ring with sink": {"lengths": (2,) * 7, "window": 7, "sink": 1},
    "ring, no sink": {"lengths": (3, 3, 3, 3, 2), "window": 7},
    "frames of whole blocks": {"lengths": (2, 2, 2), "tokens": 12},
    "one block a frame": {"lengths": (1,) * 6, "tokens": 3},
}


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize("blocks", [(4, 4), (8, 4), (3, 5)], ids=str)
def test_hierarchical_attention_is_its_definition(geometry: dict, blocks: tuple[int, int]) -> None:
    settings = sparse(
        Hierarchical(3, 1, 1),
        query_block_tokens=blocks[0],
        key_block_tokens=blocks[1],
        plan_steps=None,
    )
    video = Video(settings, **geometry)
    for chunk, frames in video.chunks():
        for step in range(2):
            q, out = video.forward(frames, step)
            if chunk:
                expected = by_definition(video, q[0], frames, None)
                assert torch.allclose(out[0].double(), expected, atol=1e-5)


def test_frames_of_832x480_are_exact() -> None:
    """1560 tokens: 24 blocks of 64 and one of 24."""
    blocks = {"query_block_tokens": 64, "key_block_tokens": 64}
    video = Video(sparse(Hierarchical(1, 0, 1), 0.75, **blocks), (1, 1, 1), tokens=1560)
    for chunk, frames in video.chunks():
        q, out = video.forward(frames, 0)
        if chunk:
            expected = by_definition(video, q[0], frames, None)
            assert torch.allclose(out[0].double(), expected, atol=1e-5)
            assert video.attend.plans[0][0].shape == (1, HEADS, 25, (12, 18)[chunk - 1])


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_a_sliding_window_is_masked_attention(geometry: dict) -> None:
    video = Video(sparse(SlidingWindow(sink_frames=1, near_frames=2)), **geometry)
    for chunk, frames in video.chunks():
        q, out = video.forward(frames, 0)
        past = sorted(set(video.frames) - set(frames))
        keep = {*frames, *past[:1], *past[-2:]} if chunk else {*frames}
        expected = by_definition(video, q[0], frames, keep)
        assert torch.allclose(out[0].double(), expected, atol=1e-5)


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_a_full_list_is_dense_attention(geometry: dict) -> None:
    """Through the block-sparse path, not around it."""
    video = Video(sparse(SlidingWindow(0, near_frames=99)), **geometry)
    for chunk, frames in video.chunks():
        q, out = video.forward(frames, 0)
        assert torch.allclose(out, dense_attention(q, *video.cache.visible(0)), atol=1e-5)
        assert bool(video.attend.plans) == bool(chunk)
        assert video.attend.tally()().density == 1


@pytest.mark.parametrize("tokens", [10, 12], ids=["padded slots", "whole blocks"])
@pytest.mark.parametrize(
    "settings", [sparse(Hierarchical()), sparse(Hierarchical(), 0.0), sparse(Dense())], ids=str
)
def test_what_is_dense_equals_the_dense_engine_bit_for_bit(
    settings: SparseSettings, tokens: int
) -> None:
    """The first chunk, sparsity 0 and the dense policy; and nothing else."""
    video = Video(settings, (2, 2, 2), tokens=tokens)
    plain = KVCache(CacheSpec(1, 1, HEADS, DIM, tokens, 6, dtype=torch.float32), "cpu")
    dense = CachedAttention(plain)
    for chunk in range(3):
        frames = range(2 * chunk, 2 * chunk + 2)
        q, k, v = torch.randn(3, 1, 2 * tokens, HEADS, DIM).unbind(0)
        for cache in (plain, video.cache):
            cache.enter(frames)
        video.attend.begin_chunk(chunk)
        video.attend.begin_pass(0)
        same = torch.equal(video.attend(0, q, k, v), dense(0, q, k, v))
        is_dense = chunk == 0 or settings.policy == Dense() or settings.schedule.value == 0
        assert same == is_dense
        statistics = video.attend.tally()()
        assert (statistics.sparsity == 0, statistics.density == 1) == (is_dense, is_dense)
        for cache in (plain, video.cache):
            cache.commit()


def test_golden_chunks_through_the_cache(golden_dir: Path) -> None:
    """Past frames committed one by one, into slots that a ring has reordered."""
    path = golden_dir / "light_forcing_attention.safetensors"
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        golden = json.loads(file.metadata()["golden"])
    tokens, block, own = golden["frame_tokens"], golden["block"], golden["frames_per_chunk"]
    for case in golden["cases"]:
        name = f"c{case['chunk']}"
        q, k, v = (tensors[f"{name}.{part}"] for part in "qkv")
        total = k.shape[1] // tokens
        spec = CacheSpec(
            1, 1, golden["heads"], golden["head_dim"], tokens, total, 0, block, torch.float32
        )
        cache = KVCache(spec, "cpu")
        settings = SparseSettings(
            HandDrawn(golden["sparsities"]),
            Hierarchical(golden["keep_frames"], golden["keep_sink"], golden["keep_near"]),
            block,
            block,
        )
        attend = SparseAttention(cache, settings, Timeline((own,) * 7), REFERENCE)
        extra = min(total - own, 5)  # frames that leave the ring again and shift all slots
        past = [
            *(torch.randn(2, 1, tokens, *k.shape[2:]) for _ in range(extra)),
            *torch.stack([k, v]).unflatten(2, (total, tokens)).unbind(2)[: total - own],
        ]
        for frame, (key, value) in enumerate(past):
            cache.enter([frame])
            cache.write(0, key, value)
            cache.commit()
        cache.enter(range(len(past), len(past) + own))
        attend.begin_chunk(case["chunk"])
        attend.begin_pass(0)
        out = attend(0, q, *(x[:, (total - own) * tokens :] for x in (k, v)))
        expected = tensors[f"{name}.out"]
        assert float((out - expected).norm() / expected.norm()) <= 1e-4
        statistics = attend.tally()()
        assert statistics.density == pytest.approx(case["topk"] / case["kv_blocks"])


class Counting:
    """The reference backend, counting what is asked of it."""

    name = "counting"

    def __init__(self) -> None:
        self.selects = self.attends = 0

    def pool_blocks(self, *args, **kwargs):
        return REFERENCE.pool_blocks(*args, **kwargs)

    def select_blocks(self, *args, **kwargs):
        self.selects += 1
        return REFERENCE.select_blocks(*args, **kwargs)

    def block_sparse_attention(self, *args, **kwargs):
        self.attends += 1
        return REFERENCE.block_sparse_attention(*args, **kwargs)


def calls_by_pass(settings: SparseSettings, steps: int = 4, layers: int = 3) -> list[tuple]:
    """(selects, sparse attends) of each pass of the second chunk, the clean pass last."""
    video = Video(settings, (2, 2), layers=layers)
    counting = Counting()
    video.attend._backend = counting
    calls = []
    for chunk, frames in video.chunks():
        if not chunk:
            continue
        for step in (*range(steps), None):
            before = counting.selects, counting.attends
            video.forward(frames, step)
            calls.append((counting.selects - before[0], counting.attends - before[1]))
    return calls


def test_a_plan_is_made_once_a_chunk_by_default() -> None:
    assert calls_by_pass(sparse(Hierarchical())) == [(3, 3)] + [(0, 3)] * 4


def test_plans_can_be_made_at_chosen_steps_or_in_every_pass_as_released() -> None:
    later = sparse(Hierarchical(), plan_steps=(0, 2))
    assert [selects for selects, _ in calls_by_pass(later)] == [3, 0, 3, 0, 0]
    never_first = sparse(Hierarchical(), plan_steps=(1,))
    assert [selects for selects, _ in calls_by_pass(never_first)] == [3, 3, 0, 0, 0]
    released = sparse(Hierarchical(), plan_steps=None)
    assert [selects for selects, _ in calls_by_pass(released)] == [3] * 5


def test_a_window_needs_no_scores() -> None:
    assert calls_by_pass(sparse(SlidingWindow(), plan_steps=None)) == [(0, 3)] * 5


@pytest.mark.parametrize(
    ("budgets", "expected"),
    [
        # A pass with a budget of its own has a plan of its own; the pass after it needs one too.
        (PassBudgets(first_step=-0.3), [(3, 3), (3, 3), (0, 3), (0, 3), (0, 3)]),
        (PassBudgets(first_step=-1), [(0, 0), (3, 3), (0, 3), (0, 3), (0, 3)]),
        (PassBudgets(clean_pass=-1), [(3, 3), (0, 3), (0, 3), (0, 3), (0, 0)]),
        (PassBudgets(clean_pass=0.2), [(3, 3), (0, 3), (0, 3), (0, 3), (3, 3)]),
        (PassBudgets(first_layers=1), [(2, 2)] + [(0, 2)] * 4),
        (PassBudgets(first_layers=1, last_layers=1), [(1, 1)] + [(0, 1)] * 4),
        (PassBudgets(last_layers=2, edge_layers=-0.1), [(3, 3)] + [(0, 3)] * 4),
    ],
    ids=repr,
)
def test_passes_and_layers_may_have_budgets_of_their_own(
    budgets: PassBudgets, expected: list[tuple]
) -> None:
    assert calls_by_pass(sparse(Hierarchical(), budgets=budgets)) == expected


def test_density_is_the_mean_over_layers_and_passes() -> None:
    """12 key blocks; 0.6 keeps 4, 0.3 keeps 8, dense 12."""
    budgets = PassBudgets(first_step=-0.3, last_layers=1)
    video = Video(sparse(BlockTopK(), 0.6, budgets=budgets), (2, 2), tokens=12, layers=3)
    for chunk, frames in video.chunks():
        for step in range(4):
            video.forward(frames, step)
        statistics = video.attend.tally()()
        if chunk:
            kept = (2 * 8 + 12) + 3 * (2 * 4 + 12)
            assert statistics.density == pytest.approx(kept / (12 * 12))
            assert statistics.sparsity == 0.6
            assert statistics.select_seconds > 0
        else:
            assert (statistics.sparsity, statistics.density) == (0, 1)
            assert statistics.select_seconds == 0
        assert statistics.attend_seconds > 0


def test_a_dense_chunk_has_no_plans() -> None:
    settings = replace(sparse(Hierarchical()), schedule=HandDrawn((0, 0.5, 0)))
    video = Video(settings, (2, 2, 2))
    planned = []
    for _, frames in video.chunks():
        video.forward(frames, 0)
        planned.append(bool(video.attend.plans))
    assert planned == [False, True, False]


class NoReadback(TorchDispatchMode):
    """Refuses what would make a host wait for its device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(name in str(func) for name in ("_local_scalar_dense", "nonzero", "is_nonzero")):
            raise AssertionError(f"{func} reads the device back")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "policy",
    [Hierarchical(2, 1, 1, True, True), BlockTopK(), SlidingWindow()],
    ids=lambda p: p.kind,
)
def test_nothing_is_read_back_within_a_chunk(policy: SelectionPolicy) -> None:
    video = Video(sparse(policy), (2, 2, 2), window=5, sink=1, layers=2)
    for _, frames in video.chunks():
        with NoReadback():
            for step in (0, 1, None):
                video.forward(frames, step)
    with pytest.raises(AssertionError, match="reads the device back"), NoReadback():
        torch.ones(()).item()


def test_the_guaranteed_own_block_is_in_every_list() -> None:
    video = Video(sparse(Hierarchical(3, 1, 1, guarantee_own_block=True), 0.9), (2, 2, 2, 2))
    for chunk, frames in video.chunks():
        video.forward(frames, 0)
        if chunk:
            indices, _ = video.attend.plans[0]
            # Two frames of 10 tokens, five query blocks of 4 with the middles 1, 5, 9, 13, 17.
            a, b = (3 * slot for slot in video.cache.open_slots)
            own = [a, a + 1, a + 2, b, b + 1]
            assert (indices == torch.tensor(own)[:, None]).any(-1).all()


def test_given_frames_are_written_dense() -> None:
    video = Video(sparse(Hierarchical()), (2, 2, 2))
    video.attend.begin_chunk = lambda chunk, begin=video.attend.begin_chunk: begin(None)
    for _, frames in video.chunks():
        q, out = video.forward(frames, None)
        assert torch.equal(out, dense_attention(q, *video.cache.visible(0)))


def test_a_cache_of_other_blocks_is_refused() -> None:
    cache = KVCache(CacheSpec(1, 1, HEADS, DIM, 10, 6, 0, 5, torch.float32), "cpu")
    with pytest.raises(UserError, match=r"key blocks of 5 tokens.*set to 4"):
        SparseAttention(cache, sparse(Hierarchical()), Timeline((2,)), REFERENCE)
