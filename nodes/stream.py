"""Stream Video: samples, decodes and shows a video while it is made."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import folder_paths
import torch
from comfy.utils import ProgressBar
from comfy_api.latest import InputImpl, io, ui
from torch import Tensor

from ..lightforcing_core.chunk import Chunk
from ..lightforcing_core.layout import FrameSize, latent_frames
from ..lightforcing_core.preview import frame_strips
from ..lightforcing_core.selection_record import SelectionRecord, record_selection
from ..lightforcing_core.sparse import SparseAttention
from ..lightforcing_core.sparse_settings import SparseSettings
from ..lightforcing_core.vae import StreamingDecoder
from ..lightforcing_core.vae.latent_stats import LATENT_CHANNELS, normalise_latents
from ..lightforcing_core.video_io import VideoWriter, frames_to_uint8
from .adapter.noise_levels import noise_levels
from .adapter.sampler import RunInfo, RunWatcher, sample_chunks
from .adapter.video_vae import as_image, streaming_vae
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
                run = _StreamRun(live, writer, decoder.new_decoder(), made)
                if settings.initial_latent is not None:
                    run.begin_with(normalise_latents(settings.initial_latent.float()))
                yield run

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
    """The sampler's `RunWatcher`: decodes, writes and shows every chunk."""

    def __init__(
        self, live: LiveRun, writer: VideoWriter, decoder: StreamingDecoder, made: _Made
    ) -> None:
        self._live = live
        self._writer = writer
        self._decoder = decoder
        self._made = made

    def begin_with(self, latents: Tensor) -> None:
        """Frames that are given; normalised latents [1, 16, n, h, w]."""
        self._show(None, latents)

    def settings_for_chunk(self, chunk: int) -> SparseSettings | None:
        return self._live.settings_for_chunk(chunk)

    def chunk_done(self, chunk: Chunk) -> None:
        if chunk.ready is not None:
            # The clean pass may be under way in front of the decoding; it counts as the next
            # chunk's.
            torch.cuda.synchronize(chunk.latents.device)
        started = time.perf_counter()
        index = chunk.statistics.index
        frames = self._show(index, chunk.latents)
        if self._made.record and isinstance(chunk.attention, SparseAttention):
            self._made.records.append(record_selection(chunk.attention, index))
        seconds = chunk.statistics.seconds + time.perf_counter() - started
        self._live.chunk_done(chunk.statistics, pixel_frames=frames, seconds=seconds)

    def _show(self, chunk: int | None, latents: Tensor) -> int:
        """Frames of video that these latents are."""
        frames = self._decoder.decode(latents)
        pixels = frames_to_uint8(frames)
        self._writer.write(pixels)
        self._live.frames_made(chunk, frame_strips(pixels))
        if not self._made.collect:
            self._made.images.clear()
        self._made.images.append(as_image(frames)[0])
        return len(pixels)
