"""Decoding on a thread of its own, as on a GPU, without one."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from lightforcing.lightforcing_core.fast.decode import ChunkDecoder, DecodedChunk
from lightforcing.lightforcing_core.vae import StreamingDecoder, VideoVAE, WanVAE, WanVAEConfig


class OnAThread(ChunkDecoder):
    """Notes what each chunk was decoded by, and takes a moment for it."""

    def __init__(self, decoder: StreamingDecoder) -> None:
        super().__init__(decoder, torch.device("cuda"))
        self.threads: list[int] = []

    def _decode_beside(self, latents: Tensor, ready: object) -> DecodedChunk:
        time.sleep(0.05)
        self.threads.append(threading.get_ident())
        return DecodedChunk(latents.numpy(), 0.0)


@pytest.fixture
def decoder(monkeypatch: pytest.MonkeyPatch) -> StreamingDecoder:
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: SimpleNamespace(device=device))
    monkeypatch.setattr(Tensor, "record_stream", lambda self, stream: None)
    return VideoVAE(WanVAE(WanVAEConfig.from_dim(6))).new_decoder()


def submit(decoding: ChunkDecoder, chunks: int) -> None:
    for index in range(chunks):
        decoding.submit(torch.full((1,), float(index)), SimpleNamespace())


def test_one_thread_serves_every_video(decoder: StreamingDecoder) -> None:
    """cuDNN plans anew for each thread."""
    threads = []
    for _ in range(2):
        with OnAThread(decoder) as decoding:
            submit(decoding, 3)
            assert [c.frames[0] for c in decoding.take(wait=True)] == [0, 1, 2]
        threads += decoding.threads
    assert len(threads) == 6 and set(threads).isdisjoint({threading.get_ident()})
    assert len(set(threads)) == 1


def test_leaving_waits_for_the_chunk_that_has_begun_and_drops_the_others(
    decoder: StreamingDecoder,
) -> None:
    with OnAThread(decoder) as decoding:
        submit(decoding, 2)
        time.sleep(0.02)
    assert len(decoding.threads) == 1
    time.sleep(0.1)
    assert len(decoding.threads) == 1
    with OnAThread(decoder) as decoding:
        submit(decoding, 1)
        assert len(list(decoding.take(wait=True))) == 1
