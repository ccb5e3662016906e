"""Frame slots: who is visible, where it lies, and what it costs."""

from __future__ import annotations

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightforcing.lightforcing_core import kv_cache
from lightforcing.lightforcing_core.errors import UserError
from lightforcing.lightforcing_core.kv_cache import CacheSpec, KVCache


def small_spec(**changes: object) -> CacheSpec:
    sizes = {
        "batch": 1,
        "num_layers": 2,
        "num_heads": 2,
        "head_dim": 4,
        "frame_tokens": 5,
        "capacity_frames": 6,
        "dtype": torch.float32,
    }
    return CacheSpec(**{**sizes, **changes})


def keys_of(spec: CacheSpec, frames: range, layer: int = 0) -> torch.Tensor:
    """Keys that name their frame, token and layer."""
    rows = [[[100 * f + t + 0.5 * layer]] for f in frames for t in range(spec.frame_tokens)]
    return torch.tensor(rows).expand(-1, spec.num_heads, spec.head_dim)[None]


@settings(max_examples=150, deadline=None)
@given(
    capacity=st.integers(1, 9),
    sink=st.integers(0, 8),
    lengths=st.lists(st.integers(1, 4), min_size=1, max_size=12),
)
def test_visible_frames_are_those_of_a_list_that_drops_its_oldest(
    capacity: int, sink: int, lengths: list[int]
) -> None:
    if sink >= capacity:
        return
    spec = small_spec(capacity_frames=capacity, sink_frames=sink)
    cache = KVCache(spec, "cpu")
    model: list[int] = []
    first = 0
    for length in lengths:
        frames = range(first, first + length)
        if length > max(capacity - sink, capacity - len(model)):
            with pytest.raises(UserError, match="does not fit a window"):
                cache.enter(frames)
            return
        for frame in frames:
            if len(model) == capacity:
                del model[sink]
            model.append(frame)
        cache.enter(frames)
        for layer in range(spec.num_layers):
            k = keys_of(spec, frames, layer)
            cache.write(layer, k, -k)
        assert sorted(cache.slot_frames) == model
        for layer in range(spec.num_layers):
            k, v = cache.visible(layer)
            expected = torch.cat(
                [keys_of(spec, range(f, f + 1), layer) for f in cache.slot_frames], 1
            )
            assert torch.equal(k, expected)
            assert torch.equal(v, -expected)
        cache.commit()
        first += length


def test_every_pass_rewrites_the_same_slots() -> None:
    spec = small_spec()
    cache = KVCache(spec, "cpu")
    cache.enter(range(2))
    for scale in (3.0, 2.0, 1.0):
        k = keys_of(spec, range(2))
        cache.write(0, scale * k, scale * k)
    assert cache.visible_frames == 2
    assert torch.equal(cache.visible(0)[0], keys_of(spec, range(2)))


def test_addresses_never_change() -> None:
    spec = small_spec(capacity_frames=4, sink_frames=1)
    cache = KVCache(spec, "cpu")
    before = [t.data_ptr() for t in (*cache.keys, *cache.values)]
    for chunk in range(6):
        frames = range(2 * chunk, 2 * chunk + 2)
        cache.enter(frames)
        k = keys_of(spec, frames)
        cache.write(0, k, k)
        assert cache.visible(0)[0].data_ptr() == before[0]
        cache.commit()
    assert [t.data_ptr() for t in (*cache.keys, *cache.values)] == before


def test_a_chunk_must_be_committed_before_the_next_enters() -> None:
    cache = KVCache(small_spec(), "cpu")
    cache.enter(range(1))
    with pytest.raises(RuntimeError, match="commit"):
        cache.enter(range(1, 2))


@pytest.mark.parametrize("block_tokens", [1, 2, 4, 5, 8])
def test_pooled_keys_are_the_means_of_each_frames_blocks(block_tokens: int) -> None:
    spec = small_spec(capacity_frames=3, sink_frames=1, block_tokens=block_tokens)
    cache = KVCache(spec, "cpu")
    frames_in_slot: dict[int, torch.Tensor] = {}
    for frame in range(5):  # the ring wraps
        cache.enter(range(frame, frame + 1))
        for layer in range(spec.num_layers):
            k = torch.randn(1, spec.frame_tokens, spec.num_heads, spec.head_dim)
            cache.write(layer, k, k)
            if layer == 1:
                frames_in_slot[cache.open_slots[0]] = k[0]
        cache.commit()
    for slot, k in frames_in_slot.items():
        for block, part in enumerate(k.split(block_tokens)):
            pooled = cache.pooled_keys[1][0, :, slot * spec.blocks_per_frame + block]
            assert torch.allclose(pooled, part.mean(0), atol=1e-6), (slot, block)
    assert cache.visible(0)[0].shape[1] == 3 * spec.frame_tokens  # padding is not visible


@pytest.mark.parametrize("block_tokens", [0, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_memory_computed_is_the_memory_taken(block_tokens: int, dtype: torch.dtype) -> None:
    spec = small_spec(block_tokens=block_tokens, dtype=dtype)
    cache = KVCache(spec, "cpu")
    tensors = (*cache.keys, *cache.values, *cache.pooled_keys)
    assert sum(t.numel() * t.element_size() for t in tensors) == spec.total_bytes


def test_published_sizes() -> None:
    """Self Forcing 1.3B at 832x480: 0.268 GiB a latent frame in bf16, 5.62 GiB for 21."""
    spec = CacheSpec(1, 30, 12, 128, frame_tokens=1560, capacity_frames=21)
    assert spec.total_bytes / 2**30 == pytest.approx(5.62, abs=0.01)


def test_too_little_memory_says_how_much_and_what_to_change(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kv_cache, "available_bytes", lambda device: 3 << 30)
    spec = CacheSpec(1, 30, 12, 128, frame_tokens=1560, capacity_frames=21)
    with pytest.raises(UserError, match=r"5\.62 GiB.*3\.00 GiB free.*window.*frames.*size"):
        KVCache(spec, "cpu")


def test_memory_is_reported_before_it_is_taken(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="lightforcing"):
        KVCache(small_spec(), "cpu")
    assert "key/value cache of 6 latent frames" in caplog.text
    assert "GiB free" in caplog.text


@pytest.mark.parametrize(
    "changes", [{"capacity_frames": 0}, {"sink_frames": 6}, {"sink_frames": -1}]
)
def test_impossible_sizes_are_refused(changes: dict[str, int]) -> None:
    with pytest.raises(UserError):
        small_spec(**changes)
