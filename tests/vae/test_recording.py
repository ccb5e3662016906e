"""Recorded passes of a decoder: the frames of one that does not record."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from lightforcing.lightforcing_core.fast.decode import ChunkDecoder
from lightforcing.lightforcing_core.vae import TAEHV, TAEHVConfig, VideoVAE, WanVAE, WanVAEConfig
from lightforcing.lightforcing_core.vae import recording as module
from lightforcing.lightforcing_core.vae.recording import RecordedPasses
from lightforcing.lightforcing_core.vae.wan_vae import WanVAEState
from lightforcing.lightforcing_core.video_io import frames_to_uint8

STREAM = SimpleNamespace(device=torch.device("cpu"))


class Graph:
    """Does again what was done while it was recorded."""

    def __init__(self) -> None:
        self.replays = 0
        self.again: Callable[[], None] = lambda: None

    def pool(self) -> None:
        return None

    def replay(self) -> None:
        self.replays += 1
        self.again()


class Passes(RecordedPasses[WanVAEState]):
    """Of a network that runs on the CPU, where what a graph would do again is done here."""

    def __init__(self, network: WanVAE) -> None:
        self.runs = 0
        self.network = network
        super().__init__(self.decode, WanVAEState, network.parameters)

    def decode(self, latents: Tensor, state: WanVAEState | None) -> tuple[Tensor, WanVAEState]:
        self.runs += 1
        self.last = latents, state, *self.network.decode(latents, state)
        return self.last[2:]

    def again(self, latents: Tensor, state: WanVAEState | None) -> None:
        made, new = self.network.decode(latents, state)
        (kept,) = [one for one in self._recordings.values() if one.latents is latents]
        kept.frames.copy_(made)
        torch._foreach_copy_(list(self._held), list(new.tensors))


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Passes:
    made = Passes(WanVAE(WanVAEConfig.from_dim(6)).eval().requires_grad_(False))

    @contextmanager
    def recording(graph: Graph, *_: object, after_run: bool) -> Iterator[None]:
        yield
        latents, state, _frames, _new = made.last
        graph.again = lambda: made.again(latents, state)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(module, "recording", recording)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3, 4))
    return made


def video(passes: Passes, chunks: list[Tensor]) -> list[Tensor]:
    state, frames = None, []
    for chunk in chunks:
        part, state = passes(chunk, state)
        frames.append(part)
    assert state is not None and state.latents_seen == sum(chunk.shape[2] for chunk in chunks)
    return frames


def chunks(height: int = 2) -> list[Tensor]:
    return [torch.randn(1, 16, 3, height, 3) for _ in range(4)]


def test_the_second_video_replays_what_the_first_one_ran(passes: Passes) -> None:
    first, second = chunks(), chunks()
    video(passes, first)
    assert passes.num_recordings == 0 and passes.runs == 4
    passes.record(STREAM)
    assert passes.num_recordings == 2 and passes.runs == 6
    made = video(passes, second)
    assert passes.runs == 6
    state = None
    for frames, chunk in zip(made, second, strict=True):
        expected, state = passes.network.decode(chunk, state)
        torch.testing.assert_close(frames, expected, rtol=0, atol=0)
    # Frames handed out are nobody else's.
    assert len({frames.data_ptr() for frames in made}) == 4
    passes.record(STREAM)
    assert passes.runs == 6 and passes.num_recordings == 2


def test_a_stream_may_go_on_from_another_state(passes: Passes) -> None:
    """One that was decoded otherwise, or a last chunk of another length."""
    video(passes, chunks())
    passes.record(STREAM)
    parts = [*chunks()[:2], torch.randn(1, 16, 2, 2, 3), chunks()[0]]
    made, state = video(passes, parts), None
    assert passes.runs == 7  # the short one
    for frames, part in zip(made, parts, strict=True):
        expected, state = passes.network.decode(part, state)
        torch.testing.assert_close(frames, expected, rtol=0, atol=0)


def test_recordings_go_with_the_size_and_the_weights(passes: Passes) -> None:
    video(passes, chunks())
    passes.record(STREAM)
    video(passes, chunks(height=4))
    passes.record(STREAM)
    assert passes.num_recordings == 2 and passes._held[0].shape[-2] == 4
    weight = next(passes.network.decoder.parameters())
    weight.data = weight.data.clone() * 1.5
    other = chunks(height=4)
    runs, made = passes.runs, video(passes, other)
    assert passes.runs == runs + 4 and passes.num_recordings == 0
    torch.testing.assert_close(made[0], passes.network.decode(other[0], None)[0])
    passes.record(STREAM)
    assert passes.num_recordings == 2


def test_without_room_or_with_an_error_nothing_is_recorded(
    passes: Passes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    video(passes, chunks())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 4))
    passes.record(STREAM)
    assert passes.num_recordings == 0

    def fails(*_: object) -> None:
        raise torch.cuda.OutOfMemoryError("no memory")

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4, 4))
    monkeypatch.setattr(passes, "_run", fails)
    video_was = chunks()
    passes._seen = {}
    monkeypatch.setattr(passes, "_run", passes.decode)
    video(passes, video_was)
    monkeypatch.setattr(passes, "_run", fails)
    with caplog.at_level(logging.WARNING, logger="lightforcing"):
        passes.record(STREAM)
    assert passes.num_recordings == 0 and "no memory" in caplog.text
    monkeypatch.setattr(passes, "_run", passes.decode)
    video(passes, chunks())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", ["wan", "taehv"])
def test_on_a_gpu_the_frames_are_the_same(kind: str) -> None:
    torch.manual_seed(0)
    if kind == "wan":
        network: WanVAE | TAEHV = WanVAE(WanVAEConfig.from_dim(24))
    else:
        network = TAEHV(TAEHVConfig(decoder_widths=(16, 16, 8, 8), encoder_width=None))
    vae = VideoVAE(network.cuda().half().eval().requires_grad_(False))
    parts = [torch.randn(1, 16, 3, 6, 10, device="cuda").half() for _ in range(4)]
    plain = vae.new_decoder()
    expected = [frames_to_uint8(plain.decode(part)) for part in parts]
    decoder = vae.new_decoder()
    for recordings in (0, 2, 2):
        decoder.reset()
        with ChunkDecoder(decoder, torch.device("cuda")) as decoding:
            for part in parts:
                decoding.submit(part)
            made = list(decoding.take(wait=True))
        assert decoder._passes.num_recordings == recordings
        for ours, theirs in zip(made, expected, strict=True):
            assert (ours.frames == theirs).all()


def test_nothing_is_recorded_with_the_other_allocator(
    passes: Passes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "is_asynchronous", lambda device: True)
    passes(torch.randn(1, 16, 2, 3, 5), None)
    with caplog.at_level(logging.INFO, logger="lightforcing"):
        passes.record(STREAM)
    assert passes.num_recordings == 0
    assert caplog.messages == ["decoding is not recorded with the allocator cudaMallocAsync"]
