"""Block-sparse attention over index lists: torch references and Triton kernels of the same names.

Knows queries, keys, blocks, segments and index lists, and nothing of video. Importing this package
needs torch alone; the module `ops` needs Triton.
"""

from .grid import BlockGrid
from .reference import (
    block_sparse_attention,
    check_block_lists,
    pool_blocks,
    quantise_blocks,
    select_blocks,
)

__all__ = [
    "BlockGrid",
    "block_sparse_attention",
    "check_block_lists",
    "pool_blocks",
    "quantise_blocks",
    "select_blocks",
]
