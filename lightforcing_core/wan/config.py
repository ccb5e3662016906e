"""What a Wan-shaped denoiser is, as numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..errors import UserError


@dataclass(frozen=True)
class WanConfig:
    """Sizes of a Wan 2.1 text-to-video denoiser. The defaults are Wan2.1-T2V-1.3B.

    Only `num_heads` cannot be read from the tensors: checkpoints that do not say use a head
    dimension of 128, as every published Wan does.
    """

    dim: int = 1536
    ffn_dim: int = 8960
    num_heads: int = 12
    num_layers: int = 30
    in_dim: int = 16
    out_dim: int = 16
    text_dim: int = 4096
    text_len: int = 512
    freq_dim: int = 256
    patch_size: tuple[int, int, int] = (1, 2, 2)
    cross_attn_norm: bool = True
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.dim % self.num_heads:
            raise UserError(
                f"width {self.dim} does not split into {self.num_heads} heads; "
                "give a head count that divides the width"
            )
        if self.head_dim % 2:
            raise UserError(
                f"head dimension must be even for rotary positions, got {self.head_dim}; "
                "check the head count"
            )
        if self.patch_size[0] != 1:
            raise UserError(
                f"patches must span one latent frame, got {self.patch_size[0]} frames; "
                "autoregressive chunks need frames to stay apart"
            )

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @classmethod
    def from_tensors(
        cls,
        tensors: Mapping[str, torch.Tensor],
        *,
        num_heads: int | None = None,
        text_len: int = 512,
    ) -> WanConfig:
        """Read the sizes from tensors under Wan's own names (no prefix).

        Args:
            tensors: state dict; only shapes are read, meta tensors will do.
            num_heads: when the file says so; otherwise width / 128.
            text_len: rows of text the model attends (512 in every published Wan).

        Raises:
            UserError: a tensor that carries a size is missing.
        """

        def shape(name: str, rank: int = 2) -> torch.Size:
            if name not in tensors:
                raise UserError(
                    f"not a Wan denoiser: tensor '{name}' is missing; "
                    "expected a Wan 2.1 text-to-video checkpoint"
                )
            if tensors[name].ndim != rank:
                raise UserError(
                    f"'{name}' has shape {list(tensors[name].shape)}, expected {rank} "
                    "dimensions; this is not a Wan video checkpoint"
                )
            return tensors[name].shape

        patch = shape("patch_embedding.weight", 5)
        dim, in_dim = patch[0], patch[1]
        numbers = {k.split(".")[1] for k in tensors if k.startswith("blocks.")}
        layers = {int(number) for number in numbers if number.isdecimal()}
        if layers != set(range(len(layers))) or not layers:
            gaps = sorted(set(range(max(layers, default=0) + 1)) - layers)
            raise UserError(
                f"blocks are missing from the checkpoint: {gaps or 'all'}; expected one Wan model "
                "in one piece (or all shards of it): download it again"
            )
        if num_heads is None:
            if dim % 128:
                raise UserError(
                    f"the file does not say how many heads it has and width {dim} is not a "
                    "multiple of 128; add 'num_heads' to its metadata"
                )
            num_heads = dim // 128
        patch_size = (patch[2], patch[3], patch[4])
        return cls(
            dim=dim,
            ffn_dim=shape("blocks.0.ffn.0.weight")[0],
            num_heads=num_heads,
            num_layers=len(layers),
            in_dim=in_dim,
            out_dim=shape("head.head.weight")[0] // (patch_size[0] * patch_size[1] * patch_size[2]),
            text_dim=shape("text_embedding.0.weight")[1],
            text_len=text_len,
            freq_dim=shape("time_embedding.0.weight")[1],
            patch_size=patch_size,
            cross_attn_norm="blocks.0.norm3.weight" in tensors,
        )
