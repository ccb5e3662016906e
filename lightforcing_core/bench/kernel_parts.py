"""Which part of the work a kernel belongs to, by its name."""

from __future__ import annotations

import re

SELECT, ATTEND, LINEARS, GLUE = "select", "attend", "linears", "glue"
CLEAN, DECODE, COPY, IDLE = "clean pass", "decode", "copy", "idle"

PARTS = (SELECT, ATTEND, LINEARS, GLUE, CLEAN, DECODE, COPY, IDLE)
"""Where time goes; CLEAN and DECODE by when and on which stream a kernel runs, the others by name.

SELECT is choosing blocks, ATTEND attention (to the prompt too), LINEARS matrix products, COPY
moving and clearing memory, IDLE when the device does nothing, GLUE the rest.
"""

# The first that matches counts. Each with the reason for its place.
_CUDA: tuple[tuple[str, str], ...] = (
    # The driver's own copies and clears.
    (COPY, r"^memcpy|^memset"),
    # kernels/triton_selection.py.
    (SELECT, r"block_scores_kernel|select_blocks_kernel"),
    # kernels/*_attention.py, triton_repeated.py (to the prompt), and triton_merge.py, which joins
    # the parts of split rows.
    (ATTEND, r"block_sparse_attention|merge_parts_kernel|attend_repeated_kernel"),
    # cuDNN names its attention by sdpa or flash_fprop, the flash and memory-efficient kernels of
    # torch by flash_fwd and fmha. Before products: some of these are made with CUTLASS and say so.
    (ATTEND, r"sdpa|flash_fprop|flash_fwd|flash_attn|fmha|attention"),
    # kernels/triton_projection.py, triton_pooling.py, triton_quantisation.py, triton_rows.py:
    # norms, rotation, cache write, rounding. Before products: 'project' is none.
    (GLUE, r"project_blocks_kernel|pool_blocks_kernel|quantise_blocks_kernel|round_rows_kernel"
           r"|add_norm_kernel|rms_norm_kernel|row_scales_kernel|scale_sums_kernel"),
    # cuBLAS and cuBLASLt: nvjet on Hopper and newer, xmma, cutlass and gemm before; split-K sums
    # belong to their product.
    (LINEARS, r"nvjet|gemm|gemv|cutlass|xmma|splitk|cublas|scaled_mm"),
    # Only the patch embedding outside of decoding: a product over patches.
    (LINEARS, r"conv.*fprop|implicit_convolve|cudnn.*conv"),
)  # fmt: skip

# torch's operators, as the CPU records them; the outermost one counts.
_CPU: tuple[tuple[str, str], ...] = (
    (ATTEND, r"scaled_dot_product"),
    (LINEARS, r"^aten::(linear|addmm|mm|conv\w*|convolution)$"),
    # Sorting is done for nothing but choosing blocks.
    (SELECT, r"^aten::(topk|sort|argsort)$"),
    # In the reference of sparse attention; nothing else multiplies batches of matrices.
    (ATTEND, r"^aten::(matmul|bmm|einsum|softmax|logsumexp)$"),
    (COPY, r"^aten::(copy_|clone|contiguous|to|_to_copy)$"),
)


def part_of(name: str, *, is_cuda: bool) -> str:
    """The part of a CUDA kernel, or of one of torch's operators; GLUE when no rule knows it."""
    for part, pattern in _CUDA if is_cuda else _CPU:
        if re.search(pattern, name, re.IGNORECASE):
            return part
    return GLUE
