"""The comparison of `bench rollout`: what a careful user would write in plain PyTorch.

The same mathematics, torch.compile around everything but attention, cuDNN attention over a cache
that keys and values are copied into; no frame slots, no statistics, each chunk decoded by plain
torch when it is denoised.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import UserError
from ..layout import latent_frames
from ..timesteps import SELF_FORCING_STEPS, TRAIN_TIMESTEPS
from ..video_io import frames_to_uint8
from ..wan.compiled import compiled_block_runner
from ..wan.forward import position_table, wan_forward
from .case import (
    ChunkTimes,
    RolloutCase,
    Run,
    free_memory,
    random_denoiser,
    random_prompt,
    random_vae,
    wait,
)


class PlainLoop:
    """Makes a case's video; on the CPU nothing is compiled."""

    def __init__(self, case: RolloutCase, device: torch.device) -> None:
        if case.window_frames != -1:
            raise UserError(
                "the plain loop has no window: it keeps the whole history, got a window of "
                f"{case.window_frames} latent frames; leave it out of --methods"
            )
        self.case, self.device = case, device
        self.tree = random_denoiser(case, device)
        self.text = random_prompt(case, self.tree, device)
        self.vae = random_vae(case, device)
        self.runner = compiled_block_runner() if device.type == "cuda" else None
        self.frames = latent_frames(case.frames)
        config, tokens = case.config, case.size.frame_tokens
        shape = (1, self.frames * tokens, config.num_heads, config.head_dim)
        self.keys, self.values = (
            [torch.zeros(shape, device=device, dtype=case.dtype) for _ in range(config.num_layers)]
            for _ in range(2)
        )
        self.start = 0

    def release(self) -> None:
        """Free everything, what was compiled too."""
        del self.tree, self.text, self.vae, self.runner, self.keys, self.values
        if self.device.type == "cuda":
            torch.compiler.reset()
        free_memory(self.device)

    def _attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        end = self.start + k.shape[1]
        self.keys[layer][:, self.start : end] = k
        self.values[layer][:, self.start : end] = v
        past = (t[layer][:, :end].transpose(1, 2) for t in (self.keys, self.values))
        if self.device.type != "cuda":
            return F.scaled_dot_product_attention(q.transpose(1, 2), *past).transpose(1, 2)
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
            return F.scaled_dot_product_attention(q.transpose(1, 2), *past).transpose(1, 2)

    def _forward(self, latents: Tensor, timestep: float, first: int) -> Tensor:
        frames = range(first, first + latents.shape[2])
        times = torch.full((1, latents.shape[2]), timestep, device=self.device)
        positions = position_table(
            self.tree, frames, latents.shape[3], latents.shape[4], self.device
        )
        return wan_forward(
            self.tree,
            latents.to(self.case.dtype),
            times,
            frames,
            self.text,
            self._attend,
            positions,
            self.runner,
        )

    @torch.no_grad()
    def __call__(self) -> Run:
        begun = wait(self.device)
        noise = self.case.noise(self.device)
        decoder = None if self.vae is None else self.vae.new_decoder(use_kernels=False)
        result: list[ChunkTimes] = []
        per_chunk, tokens = self.case.frames_per_chunk, self.case.size.frame_tokens
        clean, first_frames = 0.0, None
        for first in range(0, self.frames, per_chunk):
            frames = range(first, min(first + per_chunk, self.frames))
            self.start = first * tokens
            started = wait(self.device)
            latents = noise.initial(frames).float()
            for step, timestep in enumerate(SELF_FORCING_STEPS):
                sigma = timestep / TRAIN_TIMESTEPS
                if step:
                    fresh = noise.renoise(frames, step).float()
                    latents = (1 - sigma) * latents + sigma * fresh
                latents = latents - sigma * self._forward(latents, timestep, first).float()
            denoised = wait(self.device)
            decode = None
            if decoder is not None:
                frames_to_uint8(decoder.decode(latents.to(self.case.dtype)))
                decode = wait(self.device) - denoised
                first_frames = first_frames or time.perf_counter() - begun
            result.append(ChunkTimes(denoised - started, clean, decode))
            if first + per_chunk < self.frames:
                started = wait(self.device)
                self._forward(latents, 0.0, first)
                clean = wait(self.device) - started
        return Run(result, wait(self.device) - begun, first_frames)
