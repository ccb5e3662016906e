"""Growth Schedule: how sparse each chunk will be, as a picture and as numbers."""

from __future__ import annotations

import numpy as np
import torch
from comfy_api.latest import io, ui

from ..lightforcing_core.layout import FrameSize, latent_frames
from ..lightforcing_core.schedule import schedule_report
from ..lightforcing_core.schedule_plot import draw_schedule
from ..lightforcing_core.sparse_settings import default_block_tokens, make_schedule
from .schema import check_choices, node_schema


class GrowthSchedule(io.ComfyNode):
    """Draws the sparsity of every chunk of a video before it is made."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            node_id="LightForcingGrowthSchedule",
            display_name="Growth Schedule (Light Forcing)",
            description=(
                "Plots how sparse each chunk of a video will be and how many key blocks each query "
                "block keeps, and gives the sparsities as a list. Needs no model."
            ),
            inputs=[
                io.Int.Input(
                    "length",
                    default=81,
                    min=1,
                    max=16381,
                    step=4,
                    tooltip="Pictures of the video, 4k + 1; 81 are five seconds.",
                ),
                io.Int.Input(
                    "width",
                    default=832,
                    min=16,
                    max=8192,
                    step=16,
                    tooltip="Pixels, a multiple of 16; with the height it says how many blocks a "
                    "frame has.",
                ),
                io.Int.Input(
                    "height",
                    default=480,
                    min=16,
                    max=8192,
                    step=16,
                    tooltip="Pixels, a multiple of 16.",
                ),
                io.Int.Input(
                    "frames_per_chunk",
                    default=3,
                    min=1,
                    max=64,
                    tooltip="Latent frames denoised together, 1 to 64.",
                ),
                io.Int.Input(
                    "window_frames",
                    default=-1,
                    min=-1,
                    max=4096,
                    tooltip="Latent frames attention can see; -1: the whole video so far.",
                ),
                io.Float.Input(
                    "target_sparsity",
                    default=0.88,
                    min=0.0,
                    max=0.99,
                    step=0.01,
                    display_mode=io.NumberDisplay.slider,
                    tooltip="Share of attention to skip over the whole video, 0 to 0.99.",
                ),
                io.Float.Input(
                    "base_sparsity",
                    default=0.98,
                    min=0.0,
                    max=0.99,
                    step=0.01,
                    display_mode=io.NumberDisplay.slider,
                    tooltip="Sparsity that late chunks grow towards, from the target to 0.99.",
                ),
                io.Combo.Input(
                    "schedule",
                    options=["chunk_aware", "uniform", "linear"],
                    default="chunk_aware",
                    tooltip="chunk_aware: the paper's growth; uniform: the target everywhere; "
                    "linear: from the target to the base.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="IMAGE"),
                io.Float.Output(
                    display_name="sparsities",
                    is_output_list=True,
                    tooltip="Sparsity of each chunk, 0 to 0.99, the first chunk first.",
                ),
            ],
            is_output_node=True,
            search_aliases=["sparsity curve", "growth plot", "chunk aware growth"],
        )

    @classmethod
    def validate_inputs(cls, schedule: str | None = None) -> bool | str:
        return check_choices(cls, schedule=schedule)

    @classmethod
    def execute(
        cls,
        length: int,
        width: int,
        height: int,
        frames_per_chunk: int,
        window_frames: int,
        target_sparsity: float,
        base_sparsity: float,
        schedule: str,
    ) -> io.NodeOutput:
        frame_tokens = FrameSize(width, height).frame_tokens
        report = schedule_report(
            make_schedule(target_sparsity, base_sparsity=base_sparsity, kind=schedule),
            frames=latent_frames(length),
            frames_per_chunk=frames_per_chunk,
            window_frames=window_frames or -1,
            frame_tokens=frame_tokens,
            block_tokens=default_block_tokens(frame_tokens),
        )
        picture = np.asarray(draw_schedule(report), dtype=np.float32) / 255
        image = torch.from_numpy(picture)[None]
        return io.NodeOutput(image, report["sparsities"], ui=ui.PreviewImage(image, cls=cls))
