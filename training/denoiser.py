"""The denoiser as training sees it: construction, the four levels, teacher-forced velocity."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from ..lightforcing_core.attention import dense_attention
from ..lightforcing_core.checkpoints.metadata import file_metadata as wan_file_metadata
from ..lightforcing_core.timesteps import SELF_FORCING_STEPS, TRAIN_TIMESTEPS
from ..lightforcing_core.wan.config import WanConfig
from ..lightforcing_core.wan.forward import (
    PositionTable,
    position_table,
    prepare_text,
    wan_forward,
)
from ..lightforcing_core.wan.modules import WanModel
from .block_causal import (
    BlockMask,
    block_causal_attention,
    block_causal_mask,
    flex_block_causal_attention,
)
from .common import Sizes
from .pool import CHUNK
from .scenes import FRAMES, HEIGHT, WIDTH

LATENT_HEIGHT, LATENT_WIDTH = HEIGHT // 8, WIDTH // 8
LEVELS = tuple(step / TRAIN_TIMESTEPS for step in SELF_FORCING_STEPS)  # sigma
SHIFT = 5.0
TEXT_ROWS = 32
TEXT_DIM = 4096


def build_denoiser(sizes: Sizes) -> WanModel:
    """A Wan tree with fresh weights, as Wan initialises them.

    `text_len` is the number of distinct rows: the encoder repeats them to 512, which changes
    nothing for attention, so training need not.
    """
    model = WanModel(
        WanConfig(
            dim=sizes.dim,
            ffn_dim=sizes.ffn_dim,
            num_heads=sizes.num_heads,
            num_layers=sizes.num_layers,
            text_dim=TEXT_DIM,
            text_len=TEXT_ROWS,
        )
    )
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    for module in (*model.text_embedding, *model.time_embedding):
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
    nn.init.xavier_uniform_(model.patch_embedding.weight.flatten(1))
    nn.init.zeros_(model.head.head.weight)
    return model


def file_metadata(sizes: Sizes) -> dict[str, str]:
    """Metadata of the weights file: ComfyUI's causal flag, and our own facts."""
    facts = {
        "num_heads": sizes.num_heads,
        "frames_per_chunk": CHUNK,
        "steps": [round(step, 4) for step in SELF_FORCING_STEPS],
        "shift": SHIFT,
        "window_frames": -1,
        "sink_frames": 0,
        "width": WIDTH,
        "height": HEIGHT,
        "frames": FRAMES,
    }
    return wan_file_metadata(facts)


def per_frame(per_chunk: Tensor) -> Tensor:
    """[B, chunks] -> [B, frames]."""
    return per_chunk.repeat_interleave(CHUNK, dim=1)


def broadcast(per_chunk: Tensor) -> Tensor:
    """[B, chunks] -> [B, 1, frames, 1, 1], to multiply latents with."""
    return per_frame(per_chunk)[:, None, :, None, None]


class Positions:
    """Rotary tables of the shapes that training uses, made once."""

    def __init__(self, model: WanModel, device: torch.device, latent_frames: int) -> None:
        def table(indices: list[int]) -> PositionTable:
            return position_table(model, indices, LATENT_HEIGHT, LATENT_WIDTH, device)

        frames = list(range(latent_frames))
        self.both_streams = table(frames + frames)
        self.opening = table(frames[:CHUNK])
        self.chunks = [table(frames[i : i + CHUNK]) for i in range(0, latent_frames, CHUNK)]


def _clip_attend(chunk_tokens: int, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return block_causal_attention(q, k, v, chunk_tokens)


def _flex_clip_attend(mask: BlockMask, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flex_block_causal_attention(q, k, v, mask)


def _opening_attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return dense_attention(q, k, v)


def clip_velocity(
    model: WanModel,
    positions: Positions,
    clean: Tensor,
    noisy: Tensor,
    sigma: Tensor,
    text_rows: Tensor,
) -> Tensor:
    """Velocity of all chunks of a clip at once, each given the clean chunks before it.

    Args:
        model: the denoiser.
        positions: its rotary tables.
        clean, noisy: [B, 16, F, h, w].
        sigma: noise level of each chunk, [B, F / CHUNK], 0..1.
        text_rows: [B, TEXT_ROWS, TEXT_DIM].

    Returns:
        [B, 16, F, h, w].
    """
    frames = clean.shape[2]
    tokens = clean.shape[3] * clean.shape[4] // 4 * CHUNK
    timesteps = per_frame(sigma) * TRAIN_TIMESTEPS
    both = torch.cat([clean, noisy], dim=2)
    if both.is_cuda:
        length = 2 * tokens * frames // CHUNK
        attend = partial(_flex_clip_attend, block_causal_mask(length, tokens, both.device))
    else:
        attend = partial(_clip_attend, tokens)
    velocity = wan_forward(
        model,
        both,
        torch.cat([torch.zeros_like(timesteps), timesteps], dim=1),
        [*range(frames), *range(frames)],
        prepare_text(model, text_rows),
        attend,
        positions.both_streams,
    )
    return velocity[:, :, frames:]


def opening_velocity(
    model: WanModel, positions: Positions, noisy: Tensor, sigma: Tensor, text_rows: Tensor
) -> Tensor:
    """Velocity of first chunks: noisy [B, 16, 3, h, w], sigma [B, 1]."""
    return wan_forward(
        model,
        noisy,
        per_frame(sigma) * TRAIN_TIMESTEPS,
        range(CHUNK),
        prepare_text(model, text_rows),
        _opening_attend,
        positions.opening,
    )
