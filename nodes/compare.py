"""Compare: one video dense and sparse, from the same noise."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from comfy.utils import ProgressBar
from comfy_api.latest import InputImpl, io, ui
from torch import Tensor

from ..lightforcing_core.chunk import Chunk
from ..lightforcing_core.comparison import ComparedRun, comparison_report
from ..lightforcing_core.errors import UserError
from ..lightforcing_core.sparse_settings import SparseSettings
from ..lightforcing_core.vae import StreamingDecoder
from ..lightforcing_core.vae.latent_stats import normalise_latents
from ..lightforcing_core.video_compare import LAYOUTS, VideoComparison
from ..lightforcing_core.video_io import VideoWriter, frames_to_uint8
from ..lightforcing_core.video_quality import QualityMeter, VideoQuality
from .adapter.noise_levels import noise_levels
from .adapter.options import SparseChoice, sparse_of, without_sparse
from .adapter.sampler import ChunkSettings, sample_chunks
from .adapter.video_vae import StreamingVAE, streaming_vae
from .adapter.watching import RunInfo, RunWatcher
from .chunk_sampler import chunk_inputs, chunk_settings
from .following import FRAME_RATE
from .schema import check_choices, node_schema
from .stream import empty_video, output_path, video_inputs


class Compare(io.ComfyNode):
    """Dense against sparse: time, PSNR, SSIM and a video of both."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            node_id="LightForcingCompare",
            display_name="Compare (Light Forcing)",
            description=(
                "Makes the same video twice from the same noise, dense and with the Sparse "
                "Attention before it, and compares them: time, PSNR, SSIM, and a video of both side"
                " by side or behind a moving line."
            ),
            inputs=[
                *video_inputs(),
                *chunk_inputs(),
                io.Combo.Input(
                    "layout",
                    options=list(LAYOUTS),
                    default="side_by_side",
                    tooltip="side_by_side: dense to the left, sparse to the right; slider: both in "
                    "one place, divided by a line that moves.",
                ),
                io.Boolean.Input(
                    "warm_up",
                    default=True,
                    tooltip="Make two chunks first that are not counted: the first run on a GPU "
                    "compiles kernels. Off saves that time and makes the first figures too slow.",
                ),
                io.String.Input(
                    "filename_prefix",
                    default="video/compare",
                    tooltip="Where in the output folder the comparison's mp4 goes.",
                ),
            ],
            outputs=[
                io.Video.Output(display_name="VIDEO"),
                io.String.Output(display_name="report", tooltip="The comparison in words."),
                io.Float.Output(
                    display_name="PSNR", tooltip="Mean over the frames that differ, dB."
                ),
                io.Float.Output(display_name="SSIM", tooltip="Mean over the frames, 0 to 1."),
                io.Float.Output(
                    display_name="speed-up", tooltip="Sampling time, dense divided by sparse."
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            search_aliases=["dense against sparse", "psnr", "ssim", "side by side", "benchmark"],
        )

    @classmethod
    def validate_inputs(
        cls, noise_rule: str | None = None, layout: str | None = None
    ) -> bool | str:
        return check_choices(cls, noise_rule=noise_rule, layout=layout)

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
        layout: str,
        warm_up: bool,
        filename_prefix: str,
        **chunks: Any,
    ) -> io.NodeOutput:
        _check_sparse(model)
        latent_image = empty_video(width, height, length)
        settings = chunk_settings(**chunks)
        sigmas, first_chunk_sigmas = noise_levels(model, steps)
        if settings.first_chunk_sigmas is None:
            settings = replace(settings, first_chunk_sigmas=first_chunk_sigmas)
        path, subfolder = output_path(filename_prefix, width, height)
        decoder = streaming_vae(vae)
        decoder.load(latent_image.shape[3], latent_image.shape[4])
        dense_model = model.clone()
        without_sparse(dense_model)
        bar = _Bar(cls.hidden.unique_id, runs=2)

        def make(of: Any, image: Tensor) -> _Run:
            run = _Run(decoder, settings)
            sample_chunks(
                of,
                positive,
                sigmas,
                settings,
                seed=seed,
                latent_image=image,
                watch=run.watch,
                callback=bar.step,
                also_load=[decoder.patcher],
                also_bytes=decoder.pass_bytes(*image.shape[3:]),
            )
            bar.next_run()
            return run

        if warm_up:
            bar.runs += 1
            make(model, _short(latent_image, settings))
        dense, sparse = make(dense_model, latent_image), make(model, latent_image)
        quality = _write(path, layout, dense.frames, sparse.frames)
        report = comparison_report(dense.compared, sparse.compared, quality)
        facts = ui.PreviewVideo([ui.SavedResult(path.name, subfolder, io.FolderType.output)])
        return io.NodeOutput(
            InputImpl.VideoFromFile(str(path)),
            report.text,
            quality.mean_psnr,
            quality.mean_ssim,
            report.speed_up,
            ui={**facts.as_dict(), "text": (report.text,)},
        )


def _check_sparse(model: Any) -> None:
    choice = sparse_of(model.model_options["transformer_options"])
    if choice is None or not choice.enabled:
        raise UserError(
            "there is nothing to compare: the model has no Sparse Attention, or it is switched "
            "off; put a Sparse Attention node before Compare and switch it on"
        )


def _short(latent_image: Tensor, settings: ChunkSettings) -> Tensor:
    """A latent image long enough for a dense and a sparse chunk."""
    given = 0 if settings.initial_latent is None else settings.initial_latent.shape[2]
    return latent_image[:, :, : given + 2 * (settings.frames_per_chunk or 3)]


class _Bar:
    """One progress bar over several runs; asks for interrupts as it moves."""

    def __init__(self, node_id: str | None, runs: int) -> None:
        self.runs = runs
        self._bar = ProgressBar(1000, node_id=node_id)
        self._done = 0

    def step(self, step: int, clean: Tensor, noisy: Tensor, total: int) -> None:
        share = (self._done + (step + 1) / total) / self.runs
        self._bar.update_absolute(round(1000 * min(share, 1)))

    def next_run(self) -> None:
        self._done += 1


class _Run:
    """One of the runs: its frames and what its chunks took."""

    def __init__(self, vae: StreamingVAE, settings: ChunkSettings) -> None:
        self.frames: list[np.ndarray] = []  # uint8 [t, H, W, 3]
        self.compared = ComparedRun()
        self._vae = vae
        self._settings = settings
        self._choice: SparseChoice | None = None
        self._decoder: StreamingDecoder | None = None

    @contextlib.contextmanager
    def watch(self, info: RunInfo) -> Iterator[RunWatcher]:
        """The sampler's `Watch`."""
        self._choice, self._decoder = info.choice, self._vae.new_decoder()
        initial = self._settings.initial_latent
        if initial is not None:
            self._decode(normalise_latents(initial.float()))
        yield self
        self._decoder = None

    def settings_for_chunk(self, chunk: int) -> SparseSettings | None:
        choice = self._choice
        return choice.settings if choice is not None and choice.enabled else None

    def chunk_done(self, chunk: Chunk) -> None:
        frames = self._decode(chunk.latents)
        self.compared.add(chunk.statistics, frames)

    def _decode(self, latents: Tensor) -> int:
        assert self._decoder is not None
        pixels = frames_to_uint8(self._decoder.decode(latents))
        self.frames.append(pixels)
        return len(pixels)


def _write(
    path: Path, layout: str, dense: Sequence[np.ndarray], sparse: Sequence[np.ndarray]
) -> VideoQuality:
    """Write the comparison's mp4, and measure."""
    meter, comparison = QualityMeter(), VideoComparison(layout, "dense", "sparse")
    height, width = dense[0].shape[1:3]
    with VideoWriter(path, *comparison.size(width, height), FRAME_RATE) as writer:
        for left, right in zip(dense, sparse, strict=True):
            meter.add(_unit(left), _unit(right))
            writer.write(comparison.compose(left, right))
    return meter.result()


def _unit(frames: np.ndarray) -> Tensor:
    """uint8 [t, H, W, 3] as float32 [t, 3, H, W] in 0..1."""
    return torch.from_numpy(frames).movedim(-1, 1).float() / 255
