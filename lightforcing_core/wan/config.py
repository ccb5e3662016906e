"""What a Wan-shaped denoiser is, as numbers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..errors import UserError

# Far beyond every published Wan; within them no product of sizes overflows and a model of such
# sizes is built on the meta device in a second.
MAX_LAYERS = 200
MAX_SIZE = 2**17
MAX_TEXT_LEN = 2**16
# A file of a published width that lacks blocks is an incomplete one, not a shallower model.
PUBLISHED_LAYERS = {1536: 30, 5120: 40}


_BLOCK_NORM = re.compile(r"blocks\.\d+\.norm3\.")


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
        for name in ("dim", "ffn_dim", "in_dim", "out_dim", "text_dim", "freq_dim"):
            _check_size(name, getattr(self, name), MAX_SIZE)
        for size in self.patch_size:
            _check_size("patch_size", size, MAX_SIZE)
        _check_size("num_layers", self.num_layers, MAX_LAYERS)
        _check_size("text_len", self.text_len, MAX_TEXT_LEN)
        if not 1 <= self.num_heads <= self.dim:
            raise UserError(
                f"num_heads must be from 1 to the width {self.dim}, got {_short(self.num_heads)}; "
                "check the head count"
            )
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
        if self.freq_dim % 2:
            raise UserError(
                f"freq_dim must be even (sines and cosines of the time), got {self.freq_dim}; this "
                "is no Wan denoiser, or its file is damaged"
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
        num_layers: int | None = None,
        text_len: int = 512,
    ) -> WanConfig:
        """Read the sizes from tensors under Wan's own names (no prefix).

        Args:
            tensors: state dict; only shapes are read, meta tensors will do.
            num_heads: when the file says so; otherwise width / 128.
            num_layers: when the file says so; otherwise what a published width has, and of any
                other width as many as there are blocks.
            text_len: rows of text the model attends (512 in every published Wan).

        Raises:
            UserError: a tensor that carries a size is missing, a size is out of bounds, or
                blocks are missing or too many.
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
            for size in tensors[name].shape:
                if not 1 <= size <= MAX_SIZE:
                    raise UserError(
                        f"'{name}' has shape {list(tensors[name].shape)}, expected sizes from 1 "
                        f"to {MAX_SIZE}; the file is damaged: download it again"
                    )
            return tensors[name].shape

        patch = shape("patch_embedding.weight", 5)
        dim, in_dim = patch[0], patch[1]
        num_layers = _count_layers(tensors, dim, num_layers)
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
            num_layers=num_layers,
            in_dim=in_dim,
            out_dim=shape("head.head.weight")[0] // (patch_size[0] * patch_size[1] * patch_size[2]),
            text_dim=shape("text_embedding.0.weight")[1],
            text_len=text_len,
            freq_dim=shape("time_embedding.0.weight")[1],
            patch_size=patch_size,
            cross_attn_norm=any(_BLOCK_NORM.match(name) for name in tensors),
        )


def _count_layers(tensors: Mapping[str, torch.Tensor], dim: int, stated: int | None) -> int:
    """How many blocks the model has; raises when they are not exactly those in the file."""
    if stated is not None:
        _check_size("num_layers", stated, MAX_LAYERS)
    published = PUBLISHED_LAYERS.get(dim)
    if published is not None and stated not in (None, published):
        raise UserError(
            f"metadata 'num_layers' says {stated} layers, a Wan model of width {dim} has "
            f"{published}; correct the metadata"
        )
    layers: set[int] = set()
    for name in tensors:
        number = name.split(".", 2)[1] if name.startswith("blocks.") else ""
        if not number.isdecimal():
            continue
        # Before it is made a number: there may be a thousand digits.
        if len(number) > len(str(MAX_LAYERS)) or int(number) >= MAX_LAYERS:
            raise UserError(
                f"'{_short(name)}' is of a block that no Wan model has, expected at most "
                f"{MAX_LAYERS} blocks; give another file"
            )
        layers.add(int(number))
    expected = published or stated or max(layers, default=0) + 1
    gaps = sorted(set(range(expected)) - layers)
    if gaps:
        shown = "all" if not layers else f"{gaps[:10]}{' and more' if len(gaps) > 10 else ''}"
        raise UserError(
            f"blocks are missing from the checkpoint: {shown} of {expected}; expected one Wan "
            "model in one piece (or all shards of it): download it again"
        )
    if len(layers) > expected:
        raise UserError(
            f"the checkpoint has {len(layers)} blocks, expected {expected} "
            f"({f'of width {dim}' if published else 'its metadata says so'}); give another file"
        )
    return expected


def _check_size(name: str, value: int, most: int) -> None:
    if not 1 <= value <= most:
        raise UserError(
            f"{name} must be from 1 to {most}, got {_short(value)}; this is no Wan denoiser, or "
            "its file is damaged"
        )


def _short(value: object) -> str:
    """A name or number for a message."""
    # Python refuses to write numbers of more than 4300 digits.
    huge = isinstance(value, int) and value.bit_length() > 1000
    text = "a number of more than 300 digits" if huge else str(value)
    return text if len(text) <= 80 else f"{text[:40]}...{text[-20:]}"
