"""Stream Video: samples, decodes and shows a video while it is made."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import folder_paths
import numpy as np
import torch
from comfy.utils import ProgressBar
from comfy_api.latest import InputImpl, io, ui
from torch import Tensor

from ..lightforcing_core.chunk import Chunk, ChunkStatistics
from ..lightforcing_core.layout import FrameSize, latent_frames
from ..lightforcing_core.preview import frame_strips
from ..lightforcing_core.selection_record import SelectionRecord, record_selection
from ..lightforcing_core.sparse import SparseAttention
from ..lightforcing_core.sparse_settings import SparseSettings
from ..lightforcing_core.vae.latent_stats import LATENT_CHANNELS, normalise_latents
from ..lightforcing_core.video_io import VideoWriter
from .adapter.decoding import BesideDecoder, decoding
from .adapter.noise_levels import noise_levels
from .adapter.sampler import sample_chunks
from .adapter.video_vae import as_image, streaming_vae
from .adapter.watching import RunInfo, RunWatcher
from .chunk_sampler import chunk_inputs, chunk_settings, speed_input
from .following import FRAME_RATE, followed
from .live import LiveRun
from .schema import check_choices, node_schema

SELECTION = io.Custom("LIGHTFORCING_SELECTION")


def video_inputs() -> list[io.Input]:
    """What nodes that make a whole video need before their chunk settings."""
    return [
        io.Model.Input("model", tooltip="From Load Model, with or without Sparse Attention."),
        io.Conditioning.Input(
            "positive", tooltip="The prompt: CLIP Text Encode or Prompt Schedule."
        ),
        io.Vae.Input("vae", tooltip="Wan 2.1 VAE, LightVAE, TAEHV or the embedded one."),
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
            tooltip="Pictures of the video, 4k + 1, an initial latent's own counted; 81 are five "
            "seconds.",
        ),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=2**64 - 1,
            control_after_generate=True,
            tooltip="Where the noise comes from; the same seed gives the same video.",
        ),
        io.Int.Input(
            "steps",
            default=0,
            min=0,
            max=50,
            tooltip="Denoising steps of a chunk, 1 to 50. 0: the noise levels the model was "
            "trained for (four steps for Self Forcing).",
        ),
    ]


def empty_video(width: int, height: int, length: int) -> Tensor:
    """Zeros of a video's size, float32 [1, 16, T, h, w].

    Raises:
        UserError: a size that is no multiple of 16, or a length that is not 4k + 1.
    """
    size = FrameSize(width, height)
    shape = (1, LATENT_CHANNELS, latent_frames(length), size.latent_height, size.latent_width)
    return torch.zeros(shape)


class StreamVideo(io.ComfyNode):
    """The whole way from a MODEL and a prompt to an mp4, watched chunk by chunk."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            node_id="LightForcingStreamVideo",
            display_name="Stream Video (Light Forcing)",
            description=(
                "Makes a video chunk by chunk and shows it while it is made: samples, decodes with "
                "a streaming VAE, plays the frames in the node and writes them to an mp4 that grows"
                " in the output folder. The sliders of Sparse Attention act from the next chunk on."
            ),
            inputs=[
                *video_inputs(),
                *chunk_inputs(),
                io.String.Input(
                    "filename_prefix",
                    default="video/lightforcing",
                    tooltip="Where in the output folder the mp4 goes. While it grows it ends in "
                    ".partial.mp4, after a stop in .interrupted.mp4; both play.",
                ),
                io.Boolean.Input(
                    "collect_images",
                    default=True,
                    tooltip="Whether the IMAGE output holds every picture, 4 bytes a colour of a "
                    "pixel: 0.4 GB for 81 at 832x480. Off, for long videos: the last chunk only.",
                ),
                io.Boolean.Input(
                    "record_selection",
                    default=False,
                    tooltip="Keep which blocks every query saw, for Sparsity Map. Costs a little "
                    "time and memory, about 2 MB a chunk for a 1.3B model at 832x480.",
                ),
                speed_input(),
            ],
            outputs=[
                io.Video.Output(display_name="VIDEO"),
                io.Image.Output(display_name="IMAGE"),
                io.Latent.Output(display_name="LATENT"),
                SELECTION.Output(
                    display_name="SELECTION", tooltip="For Sparsity Map, when it was recorded."
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            search_aliases=["self forcing", "real time video", "video preview", "autoregressive"],
        )

    @classmethod
    def validate_inputs(cls, noise_rule: str | None = None, speed: str | None = None) -> bool | str:
        return check_choices(cls, noise_rule=noise_rule, speed=speed)

    @classmethod
    def execute(
        cls,
        model: Any,
        positive: list[Any],
        vae: Any,
        width: int,
        height: int,
        length: int,
        seed: int,
        steps: int,
        filename_prefix: str,
        collect_images: bool,
        record_selection: bool,
        **chunks: Any,
    ) -> io.NodeOutput:
        latent_image = empty_video(width, height, length)
        settings = chunk_settings(**chunks)
        sigmas, first_chunk_sigmas = noise_levels(model, steps)
        if settings.first_chunk_sigmas is None:
            settings = replace(settings, first_chunk_sigmas=first_chunk_sigmas)
        path, subfolder = output_path(filename_prefix, width, height)
        decoder = streaming_vae(vae)
        decoder.load(latent_image.shape[3], latent_image.shape[4])
        made = _Made(collect_images, [], record_selection, [])
        node_id = str(cls.hidden.unique_id)

        @contextlib.contextmanager
        def watch(info: RunInfo) -> Iterator[RunWatcher]:
            writer = VideoWriter(path, width, height, FRAME_RATE)
            with followed(node_id, info) as live, writer:
                screen = _Screen(live, writer, made, info.timeline.num_chunks)
                with decoding(model, decoder, screen.show) as beside:
                    if settings.initial_latent is not None:
                        beside.hand_in(None, normalise_latents(settings.initial_latent.float()))
                    yield _StreamRun(live, beside, made)

        bar = ProgressBar(1, node_id=node_id)
        latents = sample_chunks(
            model,
            positive,
            sigmas,
            settings,
            seed=seed,
            latent_image=latent_image,
            watch=watch,
            callback=lambda step, clean, noisy, total: bar.update_absolute(step + 1, total),
            also_load=[decoder.patcher],
            also_bytes=decoder.pass_bytes(*latent_image.shape[3:]),
        )
        saved = ui.SavedResult(path.name, subfolder, io.FolderType.output)
        return io.NodeOutput(
            InputImpl.VideoFromFile(str(path)),
            torch.cat(made.images),
            {"samples": latents},
            tuple(made.records),
            ui=ui.PreviewVideo([saved]),
        )


def output_path(prefix: str, width: int, height: int) -> tuple[Path, str]:
    """The next free mp4 of the output folder, and the subfolder it lies in."""
    folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
        prefix, folder_paths.get_output_directory(), width, height
    )
    return Path(folder) / f"{name}_{counter:05}_.mp4", subfolder


@dataclass
class _Made:
    """What a run leaves for the node's outputs, filled while it goes on."""

    collect: bool
    images: list[Tensor]  # float32 [t, H, W, 3]
    record: bool
    records: list[SelectionRecord]


class _StreamRun:
    """The sampler's `RunWatcher`: has every chunk decoded."""

    def __init__(self, live: LiveRun, decoder: BesideDecoder[_Sampled | None], made: _Made) -> None:
        self._live = live
        self._decoder = decoder
        self._made = made

    def settings_for_chunk(self, chunk: int) -> SparseSettings | None:
        return self._live.settings_for_chunk(chunk)

    def chunk_done(self, chunk: Chunk) -> None:
        sampled = _Sampled(chunk.statistics, time.perf_counter())
        self._decoder.hand_in(sampled, chunk.latents, chunk.ready)
        if self._made.record and isinstance(chunk.attention, SparseAttention):
            index = chunk.statistics.index
            self._made.records.append(record_selection(chunk.attention, index))


@dataclass(frozen=True)
class _Sampled:
    """What is known of a chunk when it is sampled, at a moment of `time.perf_counter`."""

    statistics: ChunkStatistics
    moment: float


class _Screen:
    """Writes and shows every chunk that is decoded; knows no decoder, whose memory it would hold.

    Its methods are called in the order of the video, by the thread that decodes.
    """

    def __init__(self, live: LiveRun, writer: VideoWriter, made: _Made, num_chunks: int) -> None:
        self._live = live
        self._writer = writer
        self._made = made
        self._num_chunks = num_chunks
        self._shown_at: float | None = None  # the latest chunk

    def show(
        self, sampled: _Sampled | None, frames: Tensor, pixels: np.ndarray, seconds: float
    ) -> None:
        """Frames of a chunk; without one, those that the video begins with."""
        self._writer.write(pixels)
        statistics = None if sampled is None else sampled.statistics
        index = None if statistics is None else statistics.index
        self._live.frames_made(index, frame_strips(pixels))
        if self._made.collect or index == self._num_chunks - 1:
            self._made.images.append(as_image(frames)[0])
        if sampled is not None:
            self._live.chunk_done(
                sampled.statistics, pixel_frames=len(pixels), seconds=self._seconds(sampled)
            )

    def _seconds(self, sampled: _Sampled) -> float:
        """What a chunk has added to the time of the video: decoding goes on beside sampling."""
        now, before = time.perf_counter(), self._shown_at
        self._shown_at = now
        if before is None:
            return sampled.statistics.seconds + now - sampled.moment
        return now - before
