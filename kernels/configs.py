"""Which tiles, warps and pipeline stages each GPU gets; fixed, so that nothing is tuned in a run.

Every entry compiles without register spills and within the shared memory of its architecture
(99 KB on 8.6, 8.9 and 12.0), with and without short blocks; `compile` proves it. Entries are
chosen by what compiles and by the measurements named beside them. Other choices are tried by
handing an `AttentionConfig` to the launcher.
"""

from __future__ import annotations

from dataclasses import dataclass

ARCHS = (80, 86, 89, 90, 100, 120)
"""Compute capabilities with entries of their own; a newer one gets the nearest below it."""
SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10,
                120: 99 << 10}  # fmt: skip
"""Shared memory that one program may use."""
BLOCK_SIZES = tuple(
    (q, kv) for q in (16, 32, 64, 128) for kv in (16, 32, 64, 128) if q >= 64 or kv < 64
)
"""Query and key block that the attention kernel can do together."""
INT8_BLOCK_SIZES = ((64, 64), (128, 64), (128, 128))
"""The same where keys are int8."""
HEAD_DIMS = (64, 128)


@dataclass(frozen=True)
class AttentionConfig:
    """How one program of the attention kernel is shaped.

    Attributes:
        tile_m: query rows of a program; divides the query block.
        tile_n: keys of a step; divides the key block.
        num_stages: key and value tiles in flight.
        use_tma: load and store through tensor descriptors (9.0 and 10.0).
    """

    tile_m: int
    tile_n: int
    num_warps: int
    num_stages: int
    use_tma: bool = False


# (head dim, query block, key block) -> (tile_m, tile_n, num_warps, num_stages), for 64 and 128
# queries; a key block of 128 that is not listed is done as two tiles of 64. Smaller query blocks
# are bound by launches and loads and share one rule.
_Table = dict[tuple[int, int, int], tuple[int, int, int, int]]
_MMA_SYNC: _Table = {
    # 8 warps: with 4 the accumulators of 128 x 128 floats spill. 3 stages are 96 KB.
    (128, 128, 64): (128, 64, 8, 3),
    (128, 128, 32): (128, 32, 8, 3),
    # 128 rows of 16 keys spill at 8 warps.
    (128, 128, 16): (64, 16, 4, 2),
    # Two programs a multiprocessor at 37 KB; 64 x 64 with 4 warps spills.
    (128, 64, 64): (64, 32, 4, 2),
    (128, 64, 32): (64, 32, 4, 2),
    (128, 64, 16): (64, 16, 4, 2),
    (64, 128, 64): (128, 64, 8, 3),
    (64, 128, 32): (128, 32, 8, 3),
    (64, 128, 16): (64, 16, 4, 3),
    (64, 64, 64): (64, 64, 4, 3),
    (64, 64, 32): (64, 32, 4, 3),
    (64, 64, 16): (64, 16, 4, 3),
}
_WGMMA: _Table = {
    # Measured on an H200 at head dim 128: 128 x 64 with 4 warps and 3 stages is the fastest plain
    # loop (419 TFLOP/s; 8 warps 310, 128 x 128 with 8 warps 376).
    (128, 128, 64): (128, 64, 4, 3),
    # 3 stages spill two registers here.
    (128, 128, 128): (128, 64, 4, 2),
    (128, 128, 32): (128, 32, 4, 3),
    (128, 128, 16): (128, 16, 4, 3),
    # 2 stages leave room for two programs a multiprocessor.
    (128, 64, 64): (64, 64, 4, 2),
    (128, 64, 32): (64, 32, 4, 3),
    (128, 64, 16): (64, 16, 4, 3),
    (64, 128, 64): (128, 64, 4, 3),
    (64, 128, 32): (128, 32, 4, 3),
    (64, 128, 16): (128, 16, 4, 3),
    (64, 64, 64): (64, 64, 4, 3),
    (64, 64, 32): (64, 32, 4, 3),
    (64, 64, 16): (64, 16, 4, 3),
}
# Pointers into wgmma hold addresses in registers: 8 warps, or the accumulators spill.
_WGMMA_POINTERS: _Table = _WGMMA | {
    (128, 128, 64): (128, 64, 8, 3),
    (128, 128, 128): (128, 64, 8, 3),
    (64, 128, 64): (128, 64, 8, 3),
}
# Not measured. 8 warps, since newer compilers spill with 4.
_TCGEN05: _Table = _WGMMA_POINTERS
# Only for strides that no descriptor can express: Triton 3.9 fails to pipeline masked loads here.
_TCGEN05_POINTERS: _Table = {key: (m, n, w, 1) for key, (m, n, w, _) in _TCGEN05.items()}
_TMA_TABLES = {90: _WGMMA, 100: _TCGEN05}
_POINTER_TABLES = {90: _WGMMA_POINTERS, 100: _TCGEN05_POINTERS}


def table_arch(capability: int) -> int:
    """The architecture of `ARCHS` whose entries a device of this capability (90 for 9.0) gets.

    Raises:
        ValueError: older than 8.0.
    """
    if capability < ARCHS[0]:
        raise ValueError(
            f"the Triton kernels need compute capability 8.0 or newer, got {capability / 10}"
        )
    return max(arch for arch in ARCHS if arch <= capability)


def attention_config(
    capability: int,
    head_dim: int,
    q_block: int,
    kv_block: int,
    *,
    allow_tma: bool = True,
    int8_keys: bool = False,
) -> AttentionConfig:
    """The shipped configuration of the attention kernel.

    Args:
        capability: compute capability as one number, 90 for 9.0.
        head_dim: one of `HEAD_DIMS`.
        q_block, kv_block: tokens of a block, a pair of `BLOCK_SIZES`.
        allow_tma: False where the strides cannot be a tensor descriptor.
        int8_keys: blocks are then a pair of `INT8_BLOCK_SIZES`.

    Raises:
        ValueError: nothing is shipped for this device.
    """
    arch = table_arch(capability)
    if q_block < 64:
        return AttentionConfig(q_block, kv_block, 4, 2)
    use_tma = allow_tma and arch in _TMA_TABLES
    table = _TMA_TABLES[arch] if use_tma else _POINTER_TABLES.get(arch, _MMA_SYNC)
    entry = table.get((head_dim, q_block, kv_block)) or table[head_dim, q_block, 64]
    return AttentionConfig(*entry, use_tma)


def selection_warps(tile: int) -> int:
    """Warps of the selection kernel for a row of so many scores.

    The search for the k-th key is a chain of 32 sums over the row, and sums within one warp need
    no barrier; beyond 32 scores a thread the registers run out.
    """
    return 1 if tile <= 1024 else min(32, tile // 512)
