"""`lightforcing generate`: the main job without ComfyUI."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from .common import AddCommand, StopRequest, add_weights, numbers, say, write_json
from .sparse import add_sparse_options, sparse_settings

if TYPE_CHECKING:
    import torch


def add_commands(command: AddCommand) -> None:
    """Register `generate`."""
    _add_generate(command("generate", _generate, "Make a video from a prompt."))


def _add_generate(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--prompt", required=True, help="what to show")
    sub.add_argument("--out", required=True, type=Path, metavar="FILE.mp4", help="where to")
    files = sub.add_argument_group("model files (default: the embedded model)")
    files.add_argument("--model", type=Path, help="autoregressive Wan checkpoint")
    files.add_argument("--vae", type=Path, help="Wan 2.1 VAE, LightVAE or TAEHV file")
    files.add_argument("--text-encoder", type=Path, help="UMT5 file or folder")
    files.add_argument(
        "--vae-latents",
        choices=("normalised", "denormalised"),
        help="what a TAEHV file takes: normalised (taew2_1) or denormalised (lighttaew2_1)",
    )
    add_weights(files)
    video = sub.add_argument_group("video")
    video.add_argument("--frames", type=int, help="pixel frames, 4k + 1 (default: model's, 81)")
    video.add_argument("--size", help="WIDTHxHEIGHT in pixels, multiples of 16")
    video.add_argument("--seed", type=int, default=0, help="same seed, same video (default 0)")
    video.add_argument("--image", type=Path, help="picture the video starts from")
    sampling = sub.add_argument_group("sampling (default: what the model's file says)")
    sampling.add_argument(
        "--steps", type=numbers, metavar="T,T,...", help="timesteps, 1000 is noise"
    )
    sampling.add_argument(
        "--first-steps", type=numbers, metavar="T,T,...", help="timesteps of the first chunk"
    )
    sampling.add_argument(
        "--shift", type=float, help="shift of the suggested timesteps (Self Forcing: 5)"
    )
    sampling.add_argument(
        "--clean-timestep",
        type=float,
        metavar="T",
        help="noise level at which a finished chunk is written to the cache (all published: 0)",
    )
    sampling.add_argument("--chunk", type=int, help="latent frames per chunk")
    sampling.add_argument(
        "--window", type=int, help="latent frames attention sees; -1 for the whole history"
    )
    sampling.add_argument("--sink", type=int, help="first latent frames kept in the window")
    sampling.add_argument(
        "--dense", action="store_true", help="attend to every visible key (the default)"
    )
    add_sparse_options(sub)
    machine = sub.add_argument_group("machine")
    machine.add_argument(
        "--preset",
        choices=("speed", "low-memory"),
        help="options for a purpose, each of which can be overridden. speed: sparsity 0.88 growing "
        "to 0.98, eight-bit products. low-memory: a window of 12 latent frames, sparsity 0.85 "
        "growing to 0.95, eight-bit weights, decoding one latent frame at a time, the text encoder "
        "on the CPU",
    )
    machine.add_argument("--device", help="cpu, cuda, cuda:1 (default: cuda where there is one)")
    machine.add_argument(
        "--speed",
        choices=("plain", "fast", "fp8", "int8"),
        help="GPU only: fused kernels and recorded forwards (fast, the default there), and linear "
        "layers in eight bits besides: fp8 (compute capability 8.9), int8 (8.0)",
    )
    machine.add_argument(
        "--decode-frames",
        type=int,
        metavar="N",
        help="latent frames decoded at a time (default 3); fewer take less memory",
    )
    machine.add_argument("--text-device", help="where the text encoder runs (default: as --device)")
    machine.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))


def _fill_from_preset(arguments: argparse.Namespace, dtype: torch.dtype | None) -> None:
    from ..generate import placement
    from ..presets import fill

    filled = fill(arguments.preset, vars(arguments), *placement(arguments.device, dtype))
    for option, value in filled.items():
        setattr(arguments, option, value)


def _generate(arguments: argparse.Namespace) -> int:
    # Late: torch takes seconds to import, and --help should not.
    import torch

    from ..checkpoints.lora import parse_strength
    from ..generate import GenerateRequest, generate
    from ..layout import FrameSize
    from ..progress import ChunkProgress

    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    if arguments.preset is not None:
        _fill_from_preset(arguments, dtype)
    request = GenerateRequest(
        prompt=arguments.prompt,
        out=arguments.out,
        model=arguments.model,
        vae=arguments.vae,
        text_encoder=arguments.text_encoder,
        vae_latents=arguments.vae_latents,
        family=arguments.family,
        loras=[parse_strength(text) for text in arguments.lora],
        frames=arguments.frames,
        size=FrameSize.parse(arguments.size) if arguments.size is not None else None,
        seed=arguments.seed,
        start_image=arguments.image,
        steps=arguments.steps,
        first_chunk_steps=arguments.first_steps,
        shift=arguments.shift,
        context_timestep=arguments.clean_timestep,
        frames_per_chunk=arguments.chunk,
        window_frames=arguments.window,
        sink_frames=arguments.sink,
        sparse=sparse_settings(arguments),
        speed=arguments.speed,
        decode_frames=arguments.decode_frames,
        text_device=arguments.text_device,
        preset=arguments.preset,
        device=arguments.device,
        dtype=dtype,
    )
    with StopRequest() as stop, ChunkProgress(arguments.console) as progress:
        result = generate(
            request, on_load=progress.loading, on_chunk=progress.update, should_stop=stop.asked
        )
    write_json(arguments.json, result.to_dict())
    say(
        f"{result.out}: {result.frames} frames of {result.size.width}x{result.size.height} in "
        f"{result.seconds:.1f} s ({result.frames / result.seconds:.1f} frames/s with decoding, "
        f"{result.device}, {str(result.dtype).removeprefix('torch.')})"
    )
    if result.peak_reserved_gib is not None:
        say(
            f"at most {result.peak_allocated_gib:.2f} GiB of GPU memory allocated, "
            f"{result.peak_reserved_gib:.2f} reserved"
        )
    settings = result.settings
    window = "whole history" if settings.window_frames == -1 else f"window {settings.window_frames}"
    steps = ", ".join(f"{round(step, 2):g}" for step in settings.steps)
    say(
        f"{settings.frames_per_chunk} frames a chunk, {window}, {settings.sink_frames} sink "
        f"frames, steps {steps}"
    )
    return 0
