"""How a segment of tokens is cut into blocks."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BlockGrid:
    """Blocks of one segment; they never straddle segments, so the last one may be short.

    Attributes:
        segment_tokens: tokens of one segment.
        block_tokens: tokens of a whole block.

    Raises:
        ValueError: one of them is below 1.
    """

    segment_tokens: int
    block_tokens: int

    def __post_init__(self) -> None:
        if self.segment_tokens < 1 or self.block_tokens < 1:
            raise ValueError(
                "segment_tokens and block_tokens must be at least 1, "
                f"got {self.segment_tokens} and {self.block_tokens}"
            )

    @property
    def blocks_per_segment(self) -> int:
        return -(-self.segment_tokens // self.block_tokens)

    @property
    def slot_tokens(self) -> int:
        """Rows of a slot: one segment, padded to whole blocks."""
        return self.blocks_per_segment * self.block_tokens

    @property
    def tail_tokens(self) -> int:
        """Valid tokens of a segment's last block, 1..block_tokens."""
        return self.segment_tokens - (self.blocks_per_segment - 1) * self.block_tokens
