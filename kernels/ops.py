"""The Triton implementations, each with the signature of its twin in `reference`. Needs Triton."""

from .triton_attention import block_sparse_attention_triton
from .triton_channels import convolve_channels_triton, convolve_to_planes_triton
from .triton_normalisation import normalise_channels_triton
from .triton_pooling import pool_blocks_triton
from .triton_projection import project_blocks_triton
from .triton_quantisation import quantise_blocks_triton
from .triton_repeated import attend_repeated_triton
from .triton_rows import add_norm_triton, rms_norm_triton, round_rows_triton
from .triton_selection import select_blocks_triton
from .triton_sums import scale_sums_triton

__all__ = [
    "add_norm_triton",
    "attend_repeated_triton",
    "block_sparse_attention_triton",
    "convolve_channels_triton",
    "convolve_to_planes_triton",
    "normalise_channels_triton",
    "pool_blocks_triton",
    "project_blocks_triton",
    "quantise_blocks_triton",
    "rms_norm_triton",
    "round_rows_triton",
    "scale_sums_triton",
    "select_blocks_triton",
]
