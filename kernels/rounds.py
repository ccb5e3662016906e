"""How equal pieces of work are dealt to the multiprocessors of a GPU, and which are cut."""

from __future__ import annotations

from dataclasses import dataclass

_PART_STEPS = 5.0
"""What a part costs beside its share, in steps: beginning, leaving its result, merging. By
measurement on an H200, steps of 64 keys."""
_MOST_PARTS = 8


@dataclass(frozen=True)
class Rounds:
    """The first `whole_tiles` pieces are done by a program each, every other by `num_parts`."""

    whole_tiles: int
    num_parts: int


def plan_rounds(tiles: int, steps: int, multiprocessors: int) -> Rounds:
    """Cut the pieces of the last round, or of the last two, where that ends sooner.

    Args:
        tiles: pieces of work, of about equal length.
        steps: of one piece; no part is shorter than one.
        multiprocessors: programs that run at a time.

    A gain too small for the launch that merges the parts is left.
    """
    best, best_steps = Rounds(tiles, 1), -(-tiles // multiprocessors) * steps - _PART_STEPS
    full = tiles // multiprocessors
    for whole_rounds in (full, full - 1):
        cut = tiles - whole_rounds * multiprocessors
        if whole_rounds < 0 or not cut:
            continue
        for num_parts in range(2, min(_MOST_PARTS, steps) + 1):
            rounds = -(-cut * num_parts // multiprocessors)
            cost = whole_rounds * steps + rounds * (-(-steps // num_parts) + _PART_STEPS)
            if cost < best_steps:
                best, best_steps = Rounds(tiles - cut, num_parts), cost
    return best
