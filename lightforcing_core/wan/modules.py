"""A plain module tree with Wan's names, for use without ComfyUI.

It holds weights and calls nothing but its own layer: the mathematics between the layers is
`forward.wan_forward`, which takes this tree or any other with the same attribute names
(ComfyUI's `diffusion_model` for one). Names are those of the published Wan 2.1 checkpoints.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .config import WanConfig


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, computed in float32, with a learned gain."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        scale = torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return (x32 * scale).to(x.dtype) * self.weight.to(x.dtype)


class Attention(nn.Module):
    """Projections and query/key norms (over the full width, before the heads are split)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.o = nn.Linear(dim, dim)
        self.norm_q = RMSNorm(dim, eps)
        self.norm_k = RMSNorm(dim, eps)


class Block(nn.Module):
    """One transformer block: self-attention, cross-attention to the text, feed-forward."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        dim, eps = config.dim, config.eps
        self.norm1 = nn.LayerNorm(dim, eps, elementwise_affine=False)
        self.self_attn = Attention(dim, eps)
        self.norm3 = nn.LayerNorm(dim, eps) if config.cross_attn_norm else nn.Identity()
        self.cross_attn = Attention(dim, eps)
        self.norm2 = nn.LayerNorm(dim, eps, elementwise_affine=False)
        self.ffn = nn.Sequential(
            nn.Linear(dim, config.ffn_dim),
            nn.GELU(approximate="tanh"),
            nn.Linear(config.ffn_dim, dim),
        )
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)


class Head(nn.Module):
    """Last norm, modulation and projection back to patches."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        patch = config.patch_size[0] * config.patch_size[1] * config.patch_size[2]
        self.norm = nn.LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.head = nn.Linear(config.dim, patch * config.out_dim)
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)


class WanModel(nn.Module):
    """The weights of one denoiser. Call `forward.wan_forward(tree, ...)` to run it."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.config = config
        # The names that ComfyUI's classes use too: the forward reads them from either tree.
        self.num_heads = config.num_heads
        self.freq_dim = config.freq_dim
        self.text_len = config.text_len
        self.patch_size = config.patch_size
        self.out_dim = config.out_dim
        dim = config.dim
        self.patch_embedding = nn.Conv3d(
            config.in_dim, dim, config.patch_size, stride=config.patch_size
        )
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(
            nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, dim * 6))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.head = Head(config)
