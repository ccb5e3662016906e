"""Claims about decoding beside sampling, with threads that are real and streams that are not."""

from __future__ import annotations

import contextlib
import gc
import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import comfy.model_management
import comfy.model_patcher
import imageio_ffmpeg
import pytest
import torch
from host import (
    BASE,
    NODES,
    Interrupted,
    UserError,
    caches_alive,
    ours,
    run_node,
    settings_of,
    with_sparsity,
)

decoding = ours("nodes.adapter.decoding")
memory = ours("nodes.adapter.memory")
streaming = ours("lightforcing_core.vae.streaming").StreamingDecoder
live = ours("nodes.live")

THREAD = "lightforcing-decode"
SIZE = {"width": 128, "height": 64, "length": 33}  # three chunks
SECONDS = 20  # until a test gives up


class Stream:
    """Of a device that does at once what it is told."""

    def wait_event(self, event) -> None:
        pass


class Event:
    def record(self, stream) -> None:
        pass


class Pool(ThreadPoolExecutor):
    """Knows what it has not done yet."""

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        # Not the futures: an error in one holds the tensors of where it was raised.
        self.handed_in, self.done = 0, []

    def submit(self, *arguments):
        future = super().submit(*arguments)
        self.handed_in += 1
        future.add_done_callback(lambda _: self.done.append(None))
        return future

    def is_idle(self) -> bool:
        end = time.monotonic() + 0.5  # it is told of a moment after whoever waited for it
        while self.handed_in != len(self.done) and time.monotonic() < end:
            time.sleep(0.01)
        return 0 < self.handed_in == len(self.done)


@pytest.fixture
def beside(monkeypatch):
    """Chunks are decoded in another thread, as on a GPU; the pool of that thread."""
    pool = Pool(1, THREAD)
    monkeypatch.setattr(decoding, "_side", lambda device: (Stream(), pool))
    for module in (decoding, ours("nodes.benchmark")):
        monkeypatch.setattr(module, "beside_obstacle", lambda model, vae: None)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: Stream())
    for name in ("device", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda of: contextlib.nullcontext())
    yield pool
    pool.shutdown()


@pytest.fixture
def stream(loaded, prompt, monkeypatch):
    """Makes a video with Stream Video; its outputs."""
    model, _, vae, *_ = loaded
    node = NODES["LightForcingStreamVideo"]
    monkeypatch.setattr(node, "hidden", SimpleNamespace(unique_id="9"), raising=False)

    def make(used=None, **inputs):
        inputs = {**SIZE, "seed": 3, "positive": prompt, "vae": vae, **inputs}
        return run_node("StreamVideo", model=used or with_sparsity(model), **inputs)

    return make


@pytest.fixture
def told(monkeypatch):
    """Events of runs, with the thread that told them."""
    events = []
    monkeypatch.setattr(
        live.LiveRun,
        "_tell",
        lambda run, event, data: events.append((event, data, threading.current_thread().name)),
    )
    return events


def decoders_alive() -> int:
    return sum(type(thing) is streaming for thing in gc.get_objects())


def left(name: str) -> list[str]:
    return [p.name.split("_.")[1] for p in sorted((BASE / "output").rglob(f"{name}*.mp4"))]


def frames_in(name: str) -> int:
    (path,) = (BASE / "output").rglob(f"{name}*.mp4")
    return imageio_ffmpeg.count_frames_and_secs(str(path))[0]


def before_decoding(monkeypatch, act) -> None:
    """Have `act` called with the number of every chunk that is about to be decoded."""
    decode, numbers = streaming.decode, itertools.count()

    def decoded(self, latents):
        act(next(numbers))
        return decode(self, latents)

    monkeypatch.setattr(streaming, "decode", decoded)


def test_chunks_decoded_beside_are_the_same_pictures(stream, request, loaded, monkeypatch) -> None:
    """Also those that a video begins with, and when only the last chunk's are wanted.

    In the mode of the node's thread, for what was made in inference mode cannot be written outside.
    """
    model, _, vae, *_ = loaded
    start = vae.encode(torch.full((1, 64, 128, 3), 0.4))
    cases = ({}, {"collect_images": False}, {"initial_latent": {"samples": start}}, {"used": model})
    expected = [stream(**case) for case in cases]
    beside = request.getfixturevalue("beside")
    modes = set()
    before_decoding(monkeypatch, lambda number: modes.add(torch.is_inference_mode_enabled()))
    for case, (video, images, latents, _) in zip(cases, expected, strict=True):
        for mode in (False, True):
            with torch.inference_mode(mode):
                got = stream(**case)
            assert torch.equal(got[1], images) and modes == {mode}
            modes.clear()
            assert torch.equal(got[2]["samples"], latents["samples"])
            assert got[0].get_dimensions() == video.get_dimensions()
    assert [len(images) for _, images, *_ in expected] == [33, 12, 33, 33]
    assert beside.is_idle()


def test_a_chunk_is_sampled_while_the_one_before_is_decoded(
    stream, beside, told, monkeypatch
) -> None:
    """And is shown before the one after is, with the settings that it was sampled with."""
    begun = [threading.Event() for _ in range(3)]
    answers = [None, settings_of(target_sparsity=0.5, base_sparsity=0.7), None]

    def settings(self, chunk):
        begun[chunk].set()
        self._used[chunk] = chunk  # names the settings
        return answers[chunk]

    monkeypatch.setattr(live.LiveRun, "settings_for_chunk", settings)
    waited = []
    before_decoding(
        monkeypatch,
        lambda number: waited.append(number == 2 or begun[number + 1].wait(SECONDS)),
    )
    stream()
    assert waited == [True] * 3
    kinds = [(event.split(".")[1], data.get("chunk", data.get("index"))) for event, data, _ in told]
    assert kinds[1:-1] == [(kind, k) for k in range(3) for kind in ("frames", "chunk")]
    assert all(thread.startswith(THREAD) for *_, thread in told[1:-1])
    marks = [data for event, data, _ in told if event == live.CHUNK]
    assert [mark["settings"] for mark in marks] == [0, 1, 2]


def test_seconds_of_chunks_are_those_of_the_video(stream, beside, told, monkeypatch) -> None:
    """Decoding that goes on beside sampling is not counted twice."""
    before_decoding(monkeypatch, lambda number: time.sleep(0.2))
    started = time.perf_counter()
    stream()
    taken = time.perf_counter() - started
    seconds = [data["seconds"] for event, data, _ in told if event == live.CHUNK]
    assert 0.6 < sum(seconds) < taken and min(seconds) > 0.2


@pytest.mark.parametrize("what", ["decoder", "file"])
def test_a_chunk_that_cannot_be_decoded_or_written_ends_the_run(
    stream, beside, told, monkeypatch, what
) -> None:
    """With its own error, soon; nothing that follows is shown, nor what waits already."""
    asked, handed_in = [], threading.Semaphore(0)
    hand_in = decoding.BesideDecoder.hand_in
    monkeypatch.setattr(
        decoding.BesideDecoder,
        "hand_in",
        lambda self, *what: (hand_in(self, *what), handed_in.release()),
    )

    def fail(number):
        asked.append(number)
        if number == 1:
            for _ in range(3):
                handed_in.acquire(timeout=SECONDS)
            raise UserError("no room")

    if what == "decoder":
        before_decoding(monkeypatch, fail)
    else:
        writer, counted = ours("lightforcing_core.video_io").VideoWriter, itertools.count()
        write = writer.write
        monkeypatch.setattr(
            writer, "write", lambda self, frames: (fail(next(counted)), write(self, frames))
        )
    steps = []
    monkeypatch.setattr(
        comfy.utils.ProgressBar, "update_absolute", lambda self, step, total: steps.append(step)
    )
    with pytest.raises(UserError, match="no room"):
        stream(length=201, filename_prefix=f"failed_{what}")
    assert [data["index"] for event, data, _ in told if event == live.CHUNK] == [0]
    assert asked == [0, 1] and 8 <= len(steps) <= 16  # of 17 chunks with four steps
    assert left(f"failed_{what}") == ["interrupted.mp4"] and frames_in(f"failed_{what}") == 9
    assert beside.is_idle() and caches_alive() == 0


@pytest.mark.parametrize("what", ["interrupt", "error"])
def test_a_run_that_ends_early_keeps_the_chunks_that_are_being_decoded(
    stream, beside, monkeypatch, what
) -> None:
    """And leaves neither a thread nor a decoder's memory, without waiting for Python's search."""
    decoded = threading.Event()
    before_decoding(monkeypatch, lambda number: decoded.wait(0.3))

    def update(self, step, total):
        if step < 6:
            return
        decoded.set()
        if what == "error":
            raise RuntimeError("another node's")
        comfy.model_management.interrupt_current_processing()

    monkeypatch.setattr(comfy.utils.ProgressBar, "update_absolute", update)
    gc.collect()
    before = decoders_alive()
    gc.disable()
    try:
        with pytest.raises(Interrupted if what == "interrupt" else RuntimeError) as raised:
            stream(filename_prefix=f"ended_{what}")
        raised.value.__traceback__ = None
        del raised
        assert decoders_alive() == before and beside.is_idle()
    finally:
        gc.enable()
    assert left(f"ended_{what}") == ["interrupted.mp4"] and frames_in(f"ended_{what}") == 9


def test_a_finished_run_leaves_no_decoder(stream, beside, loaded) -> None:
    model, _, vae, *_ = loaded
    gc.collect()
    before = decoders_alive()
    gc.disable()
    try:
        stream()
        run_node("Benchmark", model=model, vae=vae, videos=1, **SIZE)
        assert decoders_alive() == before and beside.is_idle()
    finally:
        gc.enable()


def test_an_interrupt_is_heeded_while_the_last_chunks_are_decoded(
    stream, beside, monkeypatch
) -> None:
    def stop(number):
        if number == 2:
            comfy.model_management.interrupt_current_processing()

    before_decoding(monkeypatch, stop)
    with pytest.raises(Interrupted):
        stream(filename_prefix="late")
    assert left("late") == ["interrupted.mp4"] and beside.is_idle()
    comfy.model_management.interrupt_current_processing(False)


def test_a_benchmark_decodes_as_a_stream_does(beside, loaded, monkeypatch) -> None:
    """Each chunk while the next one is sampled; the page says so, and its times are whole."""
    model, _, vae, *_ = loaded
    threads, asked = set(), []
    before_decoding(monkeypatch, lambda number: threads.add(threading.current_thread().name))
    reports = ours("nodes.benchmark")
    measure = reports.measure

    def measured(*arguments, **more):
        asked.append(more)
        return measure(*arguments, **more)

    monkeypatch.setattr(reports, "measure", measured)
    report, _ = run_node("Benchmark", model=with_sparsity(model), vae=vae, videos=1, **SIZE)
    assert len(threads) == 1 and threads.pop().startswith(THREAD)
    assert asked == [{"decodes_beside": True}]
    assert "beside the next chunk" in report and "every frame on the host" in report


def test_a_benchmark_says_where_chunks_are_decoded_in_line(loaded) -> None:
    model, _, vae, *_ = loaded
    report, _ = run_node("Benchmark", model=model, vae=vae, videos=1, **SIZE)
    assert "TAEHV, float32, after each chunk" in report


# ---- with ComfyUI's memory management


@pytest.mark.parametrize("move", ["detach", "load"])
def test_weights_move_when_the_chunk_under_way_is_decoded(loaded, move) -> None:
    """In ComfyUI's own ways, by the patcher that it has."""
    patcher, order, begun = loaded[2].patcher, [], threading.Event()

    def decode():
        with memory.weights_in_use():
            begun.set()
            time.sleep(0.2)
            order.append("decoded")

    thread = threading.Thread(target=decode)
    thread.start()
    begun.wait(SECONDS)
    if move == "detach":
        patcher.detach()
    else:
        patcher.load(torch.device("cpu"))
    order.append("moved")
    thread.join()
    assert order == ["decoded", "moved"]


def test_decoding_holds_the_weights(loaded, monkeypatch) -> None:
    held = []
    in_use = memory.weights_in_use()
    before_decoding(monkeypatch, lambda number: held.append(in_use._is_owned()))
    shown = []
    decoder = decoding.BesideDecoder(
        loaded[2].streaming, lambda *what: shown.append(in_use._is_owned()), beside=False
    )
    with decoder:
        decoder.hand_in(None, torch.zeros(1, 16, 3, 8, 16))
    assert held == [True] and shown == [False]


def test_where_chunks_cannot_be_decoded_beside(monkeypatch) -> None:
    cuda, cpu = torch.device("cuda:0"), torch.device("cpu")

    def vae(*places):
        weights = [SimpleNamespace(device=place) for place in places]
        network = SimpleNamespace(parameters=lambda: iter(weights))
        return SimpleNamespace(video_vae=SimpleNamespace(device=places[0], network=network))

    model = SimpleNamespace(load_device=cuda)
    obstacle = decoding.beside_obstacle
    assert obstacle(model, vae(cuda, cuda)) is None
    assert obstacle(SimpleNamespace(load_device=torch.device("cuda")), vae(cuda)) is None
    assert "the VAE is on cpu" in obstacle(model, vae(cpu))
    assert "the VAE is on cuda:1, the model on cuda:0" in obstacle(
        model, vae(torch.device("cuda:1"))
    )
    assert "the model on cpu" in obstacle(SimpleNamespace(load_device=cpu), vae(cuda))
    assert "offloaded" in obstacle(model, vae(cuda, cpu))
    dynamic = SimpleNamespace(load_device=cuda, is_dynamic=lambda: True)
    assert "as they are needed" in obstacle(dynamic, vae(cuda))
    monkeypatch.setattr(comfy.model_management, "intermediate_device", lambda: cuda)
    assert "pictures stay" in obstacle(model, vae(cuda))
