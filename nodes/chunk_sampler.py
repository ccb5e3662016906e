"""Chunk Sampler: a SAMPLER for SamplerCustomAdvanced."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io
from torch import Tensor

from .adapter.engine import SPEEDS
from .adapter.sampler import NOISE_RULES, ChunkSampler, ChunkSettings, steps_of
from .following import watch_live
from .schema import check_choices, node_schema

# Inputs that the nodes which sample share, and what they come to.


def chunk_inputs() -> list[io.Input]:
    """Frames per chunk, window, sink, noise rule, first chunk's noise levels and initial latent."""
    return [
        io.Int.Input(
            "frames_per_chunk",
            default=0,
            min=0,
            max=64,
            tooltip="Latent frames denoised together (4 pictures each), 1 to 64. 0: what the model "
            "was trained for, 3 when its file does not say.",
        ),
        io.Int.Input(
            "window_frames",
            default=0,
            min=-1,
            max=4096,
            tooltip="Latent frames attention can see, sink and current chunk counted. -1: the "
            "whole video so far; 0: what the model was trained for. Bounds memory and time.",
        ),
        io.Int.Input(
            "sink_frames",
            default=-1,
            min=-1,
            max=64,
            tooltip="First latent frames that stay visible in a window, 0 to 64. -1: what the "
            "model was trained for.",
        ),
        io.Combo.Input(
            "noise_rule",
            options=list(NOISE_RULES),
            default="seeded",
            tooltip="How noise follows from the seed. seeded: by latent frame and step, the same "
            "on every device, for any chunk length and any length of video; native: as ComfyUI's "
            "SamplerARVideo draws it; released: as Self Forcing's script does.",
        ),
        io.Sigmas.Input(
            "first_chunk_sigmas",
            optional=True,
            tooltip="Noise levels of the first chunk, where they differ (one- and two-step models "
            "take four steps there). Without it the sampler's SIGMAS hold for all chunks.",
        ),
        io.Latent.Input(
            "initial_latent",
            optional=True,
            tooltip="What the video begins with, from VAE Encode: one picture (image to video) or "
            "a clip to go on with. It takes the first frames of the latent image's length.",
        ),
    ]


def speed_input() -> io.Input:
    """What runs the forwards; the last widget of its node, where older graphs have none."""
    return io.Combo.Input(
        "speed",
        options=list(SPEEDS),
        default="auto",
        optional=True,
        tooltip="What runs the model. auto: fast where it can be used, else plain. fast: fused "
        "kernels, recorded as CUDA graphs; needs Triton and a model that lies whole on the GPU in "
        "bfloat16 or float16. fp8 (RTX 40 and newer) and int8 (RTX 30 and newer): also multiply in "
        "eight bits, with copies of the weights that take half as much memory again (1.3 GB for "
        "1.3B) while they run. plain: the model's own layers.",
    )


def chunk_settings(
    *,
    frames_per_chunk: int,
    window_frames: int,
    sink_frames: int,
    noise_rule: str,
    speed: str = "auto",
    first_chunk_sigmas: Tensor | None = None,
    initial_latent: dict[str, Any] | None = None,
    first_chunk_levels: tuple[float, ...] | None = None,
) -> ChunkSettings:
    """The settings that these inputs come to.

    Args: first_chunk_levels: noise levels of the first chunk when no `first_chunk_sigmas` are
        connected; None: those of all chunks.

    Raises:
        UserError: noise levels that do not fall to 0.
    """
    first = first_chunk_levels
    if first_chunk_sigmas is not None:
        first = tuple(first_chunk_sigmas.tolist())
        steps_of(first, "first chunk's SIGMAS")
    return ChunkSettings(
        frames_per_chunk=frames_per_chunk or None,
        window_frames=window_frames or None,
        sink_frames=None if sink_frames < 0 else sink_frames,
        first_chunk_sigmas=first,
        noise=noise_rule,
        speed=speed,
        initial_latent=None if initial_latent is None else initial_latent["samples"],
    )


class ChunkSamplerNode(io.ComfyNode):
    """Samples an autoregressive Wan MODEL chunk by chunk, on the keys and values of the past."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            node_id="LightForcingChunkSampler",
            display_name="Chunk Sampler (Light Forcing)",
            description=(
                "A sampler for SamplerCustomAdvanced that makes a video chunk by chunk with an "
                "autoregressive Wan 2.1 MODEL, dense or with Sparse Attention. Use BasicGuider "
                "(guidance 1), BasicScheduler with 'simple' and 4 steps, and an empty video latent "
                "of the length wanted."
            ),
            inputs=[*chunk_inputs(), speed_input()],
            outputs=[io.Sampler.Output(display_name="SAMPLER")],
            hidden=[io.Hidden.unique_id],
            # Its result names the node, which a cached one of another node would not.
            not_idempotent=True,
            search_aliases=["self forcing sampler", "ar sampler", "autoregressive", "causal video"],
        )

    @classmethod
    def validate_inputs(cls, noise_rule: str | None = None, speed: str | None = None) -> bool | str:
        return check_choices(cls, noise_rule=noise_rule, speed=speed)

    @classmethod
    def execute(cls, **inputs: Any) -> io.NodeOutput:
        watch = watch_live(str(cls.hidden.unique_id))
        return io.NodeOutput(ChunkSampler(chunk_settings(**inputs), watch))
