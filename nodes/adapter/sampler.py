"""Making a video with a MODEL: the core's chunk loop as a ComfyUI sampler.

Every forward goes through the guider and the model's own wrappers, like that of any sampler; only
where the network itself would run, the core's forward runs on the same module tree.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...lightforcing_core.checkpoints.presets import Preset
from ...lightforcing_core.errors import UserError
from ...lightforcing_core.fast.linears import EIGHT_BIT_SPEEDS
from ...lightforcing_core.kv_cache import CacheSpec
from ...lightforcing_core.noise import (
    NativeNoise,
    NoiseSource,
    PartialNoise,
    ReleasedNoise,
    SeededNoise,
)
from ...lightforcing_core.rollout import cache_spec, rollout
from ...lightforcing_core.rollout_settings import RolloutSettings
from ...lightforcing_core.sparse_settings import SparseSettings
from ...lightforcing_core.timesteps import TRAIN_TIMESTEPS
from .chunk_run import ChunkRun, StepCallback
from .engine import SPEEDS, eight_bit_bytes, run_engine
from .forwards import ForwardTally
from .memory import chunk_bytes, reserve
from .options import facts_of, sparse_of
from .wan_tree import compute_dtype, wan_tree
from .watching import RunInfo, Watch, unwatched

NOISE_RULES = ("seeded", "native", "released")


@dataclass(frozen=True)
class ChunkSettings:
    """How the chunk sampler runs; None: what the model's file says, else Self Forcing's settings.

    Attributes:
        frames_per_chunk, window_frames, sink_frames: latent frames; a window of -1 is the whole
            history.
        first_chunk_sigmas: noise levels of the first chunk when it has its own, ending at 0.
        noise: one of NOISE_RULES.
        speed: one of SPEEDS: what runs the forwards.
        initial_latent: what the video begins with, as VAE Encode makes it (not normalised),
            [B, 16, n, h, w]; the sampled video holds it in its first n frames.
    """

    frames_per_chunk: int | None = None
    window_frames: int | None = None
    sink_frames: int | None = None
    first_chunk_sigmas: tuple[float, ...] | None = None
    noise: str = "seeded"
    speed: str = "auto"
    initial_latent: Tensor | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.noise not in NOISE_RULES:
            raise UserError(f"no noise rule '{self.noise}'; choose one of {', '.join(NOISE_RULES)}")
        if self.speed not in SPEEDS:
            raise UserError(f"no speed '{self.speed}'; choose one of {', '.join(SPEEDS)}")


class ChunkSampler(comfy.samplers.Sampler):
    """A SAMPLER that makes a video chunk by chunk. Holds settings only; a run's state dies with it.

    The length of the video is that of the latent image. Guidance must be 1.
    """

    def __init__(
        self,
        settings: ChunkSettings,
        watch: Watch | None = None,
        also_load: Sequence[ModelPatcher] = (),
        also_bytes: int = 0,
    ) -> None:
        """The last two as in `sample_chunks`."""
        self.settings = settings
        self.watch = watch
        self.also_load = tuple(also_load)
        self.also_bytes = also_bytes

    def sample(
        self,
        model_wrap: Any,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: StepCallback | None,
        noise: Tensor,
        latent_image: Tensor | None = None,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        """Called by a guider.

        Args:
            model_wrap: the guider; calling it runs the model.
            sigmas: noise levels, falling to 0.
            noise, latent_image: [B, 16, F, h, w]; the latter normalised, zeros for nothing.

        Returns:
            Normalised latents, float32 [B, 16, F, h, w].

        Raises:
            UserError: settings or other nodes that cannot work with this sampler.
        """
        _refuse(model_wrap, denoise_mask, noise)
        model, patcher = model_wrap.inner_model, model_wrap.model_patcher
        tree, dtype = wan_tree(model), compute_dtype(model)
        model_options = extra_args["model_options"]
        choice = sparse_of(model_options["transformer_options"])
        watched = self.watch is not None
        facts = facts_of(model_options)
        given = self._given(model, noise)
        settings = self._rollout_settings(
            facts.preset if facts else Preset(),
            sigmas,
            noise.shape[2] - (0 if given is None else given.shape[2]),
            # A watcher may switch it on in mid-run; that needs the cache's blocks from the start.
            choice.settings if choice is not None and (choice.enabled or watched) else None,
        )
        given_frames = 0 if given is None else given.shape[2]
        spec = cache_spec(
            tree,
            settings,
            batch=noise.shape[0],
            latent_height=noise.shape[3],
            latent_width=noise.shape[4],
            dtype=dtype,
            given_frames=given_frames,
        )
        forward_bytes = chunk_bytes(patcher, noise.shape, settings.frames_per_chunk)
        needed = spec.total_bytes + forward_bytes + self.also_bytes
        with_engine = needed + forward_bytes  # recordings keep what a forward takes to themselves
        speed = self.settings.speed
        if speed in EIGHT_BIT_SPEEDS:
            with_engine += eight_bit_bytes(tree)
        is_chosen = speed not in ("auto", "plain")
        reserve(patcher, with_engine if is_chosen else needed, self.also_load)
        tally = ForwardTally("fast" if speed == "auto" else speed)
        engine = run_engine(
            patcher,
            tree,
            dtype,
            speed,
            needed_bytes=with_engine,
            tally=tally,
            kind=_launch_kind(spec, settings.sparse),
        )
        source = self._noise(settings, noise, extra_args.get("seed"), given_frames)
        if sigmas[0] < 1 and latent_image is not None:
            source = PartialNoise(source, latent_image, float(sigmas[0]))

        lengths = settings.chunk_lengths(given_frames)
        run = ChunkRun(model_wrap, extra_args, callback, _steps(settings, lengths), dtype)
        parts = [] if given is None else [given.to(noise)]
        info = RunInfo(choice, settings, given_frames, spec, tally)
        with (self.watch or unwatched)(info) as watcher, run:
            chunks = rollout(
                tree,
                settings,
                None,
                source,
                given_latents=given,
                dtype=dtype,
                engine=engine,
                host=run,
                sparse_for_chunk=watcher.settings_for_chunk if settings.sparse else None,
            )
            with contextlib.closing(chunks):
                for chunk in chunks:
                    parts.append(chunk.latents)
                    watcher.chunk_done(chunk)
                    run.chunk_done(parts)
        return torch.cat(parts, dim=2)

    def _given(self, model: Any, noise: Tensor) -> Tensor | None:
        """The frames that the video begins with, normalised: the one conversion of them."""
        latents = self.settings.initial_latent
        if latents is None:
            return None
        if latents.ndim != 5 or latents.shape[2] >= noise.shape[2]:
            raise UserError(
                f"the initial latent {list(latents.shape)} must be a video latent with fewer frames"
                f" than the {noise.shape[2]} of the latent image, which says how long the video "
                "gets; make the latent image longer"
            )
        latents = model.process_latent_in(latents.to(noise.device, torch.float32))
        return latents.expand(noise.shape[0], -1, -1, -1, -1)

    def _rollout_settings(
        self, preset: Preset, sigmas: Tensor, num_frames: int, sparse: SparseSettings | None
    ) -> RolloutSettings:
        own = self.settings
        window = preset.window_frames if own.window_frames is None else own.window_frames
        per_chunk = own.frames_per_chunk or preset.frames_per_chunk
        sink = own.sink_frames
        if sink is None:
            # A preset's sink belongs to its window, and shrinks when that leaves it no room.
            sink = 0 if window == -1 else max(min(preset.sink_frames, window - per_chunk), 0)
        first = own.first_chunk_sigmas
        return RolloutSettings(
            num_frames=num_frames,
            frames_per_chunk=per_chunk,
            steps=steps_of(sigmas.tolist(), "SIGMAS"),
            first_chunk_steps=None if first is None else steps_of(first, "first chunk's SIGMAS"),
            window_frames=window,
            sink_frames=sink,
            context_timestep=preset.context_timestep,
            sparse=sparse,
        )

    def _noise(
        self, settings: RolloutSettings, noise: Tensor, seed: int | None, given_frames: int
    ) -> NoiseSource:
        if seed is None:
            raise UserError("no seed came with the noise; connect a RandomNoise node")
        if not noise.any():
            raise UserError(
                "the noise is all zeros (Disable Noise?), and autoregressive sampling starts from "
                "noise; connect a RandomNoise node"
            )
        batch, channels, _, height, width = noise.shape
        shape = (batch, channels, height, width)
        if self.settings.noise == "native":
            return NativeNoise(noise, seed, settings.frames_per_chunk, given_frames=given_frames)
        if self.settings.noise == "released":
            return ReleasedNoise(
                seed, shape, settings.num_frames, noise.device, given_frames=given_frames
            )
        return SeededNoise(seed, shape, noise.device)


def steps_of(sigmas: Sequence[float], name: str) -> tuple[float, ...]:
    """Noise levels that fall to 0 as timesteps of the forwards.

    Raises:
        UserError: they are no such list.
    """
    values = [float(sigma) for sigma in sigmas]
    if len(values) < 2 or values[-1] != 0:
        raise UserError(
            f"the {name} must fall to 0 in at least one step, got {[round(v, 4) for v in values]}; "
            "use BasicScheduler with 'simple' and denoise 1.0"
        )
    return tuple(TRAIN_TIMESTEPS * value for value in values[:-1])


def _launch_kind(spec: CacheSpec, sparse: SparseSettings | None) -> tuple[object, ...]:
    """What runs have in common that launch the same kernels."""
    if sparse is None:
        return (spec,)
    blocks = sparse.query_block_tokens, sparse.token_order, sparse.backend, sparse.qk_precision
    return (spec, *blocks)


def _steps(settings: RolloutSettings, lengths: Sequence[int]) -> int:
    """Denoising steps of a whole video."""
    first = len(settings.first_chunk_steps or settings.steps)
    return first + (len(lengths) - 1) * len(settings.steps)


def _refuse(model_wrap: Any, denoise_mask: Tensor | None, noise: Tensor) -> None:
    """What cannot work is said before anything is allocated."""
    guidance = getattr(model_wrap, "cfg", 1.0)
    if guidance != 1:
        raise UserError(
            f"guidance must be 1 for autoregressive models, got cfg {guidance:g}: they are "
            "distilled to need none, and a second, negative pass would write its own keys and "
            "values over those of the prompt; set cfg to 1.0 or use BasicGuider"
        )
    if denoise_mask is not None:
        raise UserError(
            "the latent has a noise mask, and autoregressive sampling cannot keep parts of a "
            "frame; remove Set Latent Noise Mask"
        )
    if noise.ndim != 5:
        raise UserError(
            f"the latent image must be a video, [batch, 16, frames, height, width], got "
            f"{list(noise.shape)}; use an Empty Video Latent node"
        )
    if noise.shape[3] % 2 or noise.shape[4] % 2:
        raise UserError(
            "width and height must be multiples of 16 pixels, got "
            f"{8 * noise.shape[4]}x{8 * noise.shape[3]}"
        )


def sample_chunks(
    model: ModelPatcher,
    positive: list[Any],
    sigmas: Tensor,
    settings: ChunkSettings,
    *,
    seed: int,
    latent_image: Tensor,
    watch: Watch | None = None,
    callback: StepCallback | None = None,
    also_load: Sequence[ModelPatcher] = (),
    also_bytes: int = 0,
) -> Tensor:
    """Make a video with a MODEL, chunk by chunk, without SamplerCustomAdvanced.

    Args:
        model: from any loader; a Sparse Attention node before it decides about sparsity.
        positive: CONDITIONING, plain or of Prompt Schedule.
        sigmas: noise levels, falling to 0.
        seed: 0 .. 2^64 - 1.
        latent_image: [B, 16, F, h, w], zeros for a new video; says length and size.
        watch: follows the run: gets every chunk as it is done, and may change its sparsity.
        callback: told of every denoising step: (step, clean latents, noisy latents, all steps).
        also_load: patchers that must be on the device during the run (a VAE that decodes it).
        also_bytes: that those take beside their weights.

    Returns:
        Latents as VAE Decode takes them (not normalised), float32 [B, 16, F, h, w].

    Raises:
        UserError: what cannot work, with what to do.
    """
    if also_load:
        positive = [
            [embeds, {**extra, "additional_models": [*also_load]}] for embeds, extra in positive
        ]
    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": positive})
    latent_image = comfy.sample.fix_empty_latent_channels(model, latent_image)
    if settings.noise == "native":
        noise = comfy.sample.prepare_noise(latent_image, seed)
    else:  # these rules draw their own; drawn here it would take the host as long as a step
        noise = torch.ones_like(latent_image)
    sampler = ChunkSampler(settings, watch, also_load, also_bytes)
    samples = guider.sample(noise, latent_image, sampler, sigmas, callback=callback, seed=seed)
    return samples.to(comfy.model_management.intermediate_device())
