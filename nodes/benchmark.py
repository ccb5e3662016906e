"""Benchmark: how fast a MODEL makes videos here, and where the time goes."""

from __future__ import annotations

import contextlib
import functools
import operator
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from comfy.utils import ProgressBar
from comfy_api.latest import io, ui
from torch import Tensor

from ..lightforcing_core.bench.case import ChunkTimes, Run, wait
from ..lightforcing_core.bench.common import device_name
from ..lightforcing_core.bench.profile_plot import draw_profile
from ..lightforcing_core.bench.report import measure, report_text
from ..lightforcing_core.bench.video import PassMarks
from ..lightforcing_core.chunk import Chunk, ChunkStatistics
from ..lightforcing_core.sparse_settings import SparseSettings
from .adapter.decoding import BesideDecoder, beside_obstacle, decoding
from .adapter.forwards import ForwardTally, empty_prompt, host_version, load_device, with_listener
from .adapter.noise_levels import noise_levels
from .adapter.options import facts_of, sparse_of
from .adapter.sampler import ChunkSettings, sample_chunks
from .adapter.video_vae import StreamingVAE, streaming_vae
from .adapter.watching import RunInfo, RunWatcher
from .schema import node_schema
from .stream import empty_video

Mark = Callable[[str, int], None]


class Benchmark(io.ComfyNode):
    """A page of numbers and a picture, for comparing machines and settings."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            node_id="LightForcingBenchmark",
            display_name="Benchmark (Light Forcing)",
            description=(
                "Makes a few videos as Chunk Sampler does and says how fast it was and where the "
                "time of each chunk went: a report to paste into an issue, and a picture. Needs no "
                "prompt; nothing is saved."
            ),
            inputs=[
                io.Model.Input(
                    "model", tooltip="From Load Model, with or without Sparse Attention."
                ),
                io.Int.Input(
                    "width",
                    default=832,
                    min=16,
                    max=8192,
                    step=16,
                    tooltip="Pixels, a multiple of 16. The embedded model: 256.",
                ),
                io.Int.Input(
                    "height",
                    default=480,
                    min=16,
                    max=8192,
                    step=16,
                    tooltip="Pixels, a multiple of 16. The embedded model: 128.",
                ),
                io.Int.Input(
                    "length",
                    default=81,
                    min=1,
                    max=16381,
                    step=4,
                    tooltip="Pictures of a video, 4k + 1; 81 are five seconds.",
                ),
                io.Int.Input(
                    "videos",
                    default=3,
                    min=1,
                    max=100,
                    tooltip="Videos that count. One before them warms up, one after them is "
                    "profiled.",
                ),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="Decodes every chunk too: Wan 2.1 VAE, LightVAE, TAEHV or the embedded "
                    "one. Without it only sampling is measured.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="report", tooltip="What was measured, as a page."),
                io.Image.Output(display_name="IMAGE"),
            ],
            is_output_node=True,
            search_aliases=["speed test", "profile", "frames per second", "performance"],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> float:
        """Never the same: who runs it again wants new numbers."""
        return time.time()

    @classmethod
    def execute(
        cls, model: Any, width: int, height: int, length: int, videos: int, vae: Any = None
    ) -> io.NodeOutput:
        latent_image = empty_video(width, height, length)
        prompt = empty_prompt(model)
        sigmas, first_chunk_sigmas = noise_levels(model, 0)
        settings = ChunkSettings(first_chunk_sigmas=first_chunk_sigmas)
        decoder = None if vae is None else streaming_vae(vae)
        if decoder is not None:
            decoder.load(*latent_image.shape[3:])
        bar = _Bar(videos + 2)
        described: dict[str, str] = {}
        tallies: list[ForwardTally] = []

        def make(mark: Mark) -> Run:
            run = _Run(model, decoder, mark)
            sample_chunks(
                with_listener(model, run.before_forward),
                prompt,
                sigmas,
                settings,
                seed=0,
                latent_image=latent_image,
                watch=run.watch,
                callback=bar.step,
                also_load=[] if decoder is None else [decoder.patcher],
                also_bytes=0 if decoder is None else decoder.pass_bytes(*latent_image.shape[3:]),
            )
            bar.next_run()
            if run.info is not None:
                tallies.append(run.info.forwards)
                # The first video only warms up, and records less than those that count.
                forwards = functools.reduce(operator.add, tallies[1:] or tallies)
                video = f"{length} frames of {width}x{height}"
                described.update(_describe(model, run.info, forwards, decoder, video))
            return run.result()

        found = measure(
            make,
            load_device(model),
            length,
            videos,
            described,
            decodes_beside=decoder is not None and beside_obstacle(model, decoder) is None,
        )
        text = report_text(found)
        note = f"{described['video']}; {device_name(found.device)}, torch {torch.__version__}"
        picture = draw_profile(found.rows, "Where the time of a video goes", note)
        image = torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255)[None]
        shown = ui.PreviewImage(image, cls=cls).as_dict()
        return io.NodeOutput(text, image, ui={**shown, "text": (text,)})


def _describe(
    model: Any, info: RunInfo, forwards: ForwardTally, decoder: StreamingVAE | None, video: str
) -> dict[str, str]:
    """What the report says about the videos."""
    facts = facts_of(model.model_options)
    choice = sparse_of(model.model_options["transformer_options"])
    settings, spec = info.settings, info.spec
    attention = "dense"
    if choice is not None and choice.enabled:
        attention = f"sparse, {choice.settings.schedule.kind} schedule, as in the table below"
    window = settings.window_frames
    history = "whole history" if window == -1 else f"window of {window} latent frames"
    vae = "none"
    if decoder is not None:
        name = type(decoder.video_vae.network).__name__
        when = "after each" if beside_obstacle(model, decoder) else "beside the next"
        vae = f"{name}, {_short(decoder.dtype)}, {when} chunk"
    return {
        "ComfyUI": host_version(),
        "model": f"{facts.name if facts else 'of another loader'}, {spec.num_layers} layers, "
        f"{spec.num_heads} heads of {spec.head_dim}, {_short(spec.dtype)}",
        "video": video,
        "chunks": f"{len(settings.chunk_lengths())} of {settings.frames_per_chunk} latent frames, "
        f"{len(settings.steps)} steps, {history}",
        "forwards": str(forwards),
        "attention": attention,
        "vae": vae,
    }


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class _Run:
    """One video: its times, and marks of its passes."""

    def __init__(self, model: Any, vae: StreamingVAE | None, mark: Mark) -> None:
        self.info: RunInfo | None = None
        self._model, self._vae, self._mark = model, vae, mark
        self._marks: PassMarks | None = None
        self._decoder: BesideDecoder[None] | None = None
        self._sampled: list[ChunkStatistics] = []
        self._decoded = _Decoded()
        self._begun = self._sampled_at = 0.0

    def before_forward(self) -> None:
        """The network is about to run."""
        if self._marks is not None:
            self._marks.before_pass()

    @contextlib.contextmanager
    def watch(self, info: RunInfo) -> Iterator[RunWatcher]:
        """The sampler's `Watch`."""
        self.info = info
        self._begun = time.perf_counter()
        self._marks = marks = PassMarks(self._mark, info.settings)
        try:
            with self._decoding() as self._decoder:
                yield self
        finally:
            self._decoder = self._marks = None
        marks.end()

    def _decoding(self) -> contextlib.AbstractContextManager[BesideDecoder[None] | None]:
        if self._vae is None:
            return contextlib.nullcontext()
        return decoding(self._model, self._vae, self._decoded.note)

    def settings_for_chunk(self, chunk: int) -> SparseSettings | None:
        """As the Sparse Attention node says."""
        choice = self.info.choice if self.info is not None else None
        return choice.settings if choice is not None and choice.enabled else None

    def chunk_done(self, chunk: Chunk) -> None:
        """Have it decoded."""
        assert self._marks is not None
        self._sampled.append(chunk.statistics)
        if self._decoder is not None:
            if not self._decoder.is_beside:
                # The clean pass may be under way in front of it, and has a column of its own.
                wait(chunk.latents.device)
            self._marks.before_decoding()
            self._decoder.hand_in(None, chunk.latents, chunk.ready)
        self._sampled_at = time.perf_counter()
        self._marks.chunk_done()

    def result(self) -> Run:
        """When the video is made."""
        decoded = self._decoded.seconds
        chunks = [
            ChunkTimes(
                part.denoise_seconds,
                part.clean_seconds,
                decoded[i] if decoded else None,
                part.sparsity,
                part.density,
            )
            for i, part in enumerate(self._sampled)
        ]
        shown_at = self._decoded.at
        first = shown_at[0] - self._begun if shown_at else None
        return Run(chunks, max([self._sampled_at, *shown_at]) - self._begun, first)


class _Decoded:
    """Notes what decoding took; knows no decoder, whose memory it would hold."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.at: list[float] = []  # when the frames lay on the host

    def note(self, what: None, frames: Tensor, pixels: np.ndarray, seconds: float) -> None:
        """A chunk's frames lie on the host."""
        self.seconds.append(seconds)
        self.at.append(time.perf_counter())


class _Bar:
    """One progress bar over all videos; asks for interrupts as it moves."""

    def __init__(self, runs: int) -> None:
        self._bar = ProgressBar(1000)
        self._runs, self._done = runs, 0

    def step(self, step: int, clean: Tensor, noisy: Tensor, total: int) -> None:
        """A denoising step is done."""
        share = (self._done + (step + 1) / total) / self._runs
        self._bar.update_absolute(round(1000 * min(share, 1)))

    def next_run(self) -> None:
        """A video is done."""
        self._done += 1
