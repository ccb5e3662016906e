"""Which key blocks a query block may attend to, and how many of them. Plain numbers, no tensor.

A policy turns what the host knows (which latent frame lies in which cache slot, which of them are
the chunk's own, how sparse the chunk shall be) into a `SelectionRule`: a role for every slot and
two counts. The kernels do the choosing, by score.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from ..kernels.checks import ROLE_ABSENT, ROLE_CANDIDATE, ROLE_ELIGIBLE, ROLE_FORCED
from .errors import UserError
from .schedule import kept_blocks


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if value < 0:
            raise UserError(f"{name} counts latent frames and must not be negative, got {value}")


@dataclass(frozen=True)
class KeyView:
    """The keys an open chunk sees.

    Attributes:
        slot_frames: absolute latent frame in each visible slot, any order.
        own_slots: slots of the chunk itself, in frame order.
        blocks_per_frame: key blocks of one slot.
    """

    slot_frames: tuple[int, ...]
    own_slots: tuple[int, ...]
    blocks_per_frame: int

    @property
    def past_slots(self) -> tuple[int, ...]:
        """Slots of past frames, oldest frame first."""
        past = set(range(len(self.slot_frames))) - set(self.own_slots)
        return tuple(sorted(past, key=lambda slot: self.slot_frames[slot]))

    @property
    def num_blocks(self) -> int:
        """All key blocks."""
        return len(self.slot_frames) * self.blocks_per_frame


@dataclass(frozen=True)
class SelectionRule:
    """What `select_blocks` is asked for, the same for every layer, head and query block.

    Attributes:
        roles: of each visible slot, one of the kernels' ROLE_ numbers.
        keep_candidates: how many candidate slots each query block keeps.
        top_k: key blocks each query block keeps; never more than it may choose from.
        own_block: whether each query block always keeps the block it lies in itself.
    """

    roles: tuple[int, ...]
    keep_candidates: int
    top_k: int
    own_block: bool = False

    @property
    def is_fixed(self) -> bool:
        """Whether scores decide nothing: every slot is taken whole or not at all."""
        return set(self.roles) <= {ROLE_ABSENT, ROLE_FORCED}


class SelectionPolicy(Protocol):
    """A way to choose key blocks. `kind` is its name in settings files.

    `rule` is asked for chunks with a past and a sparsity above 0; None means dense.
    """

    @property
    def kind(self) -> str: ...

    def rule(self, view: KeyView, sparsity: float) -> SelectionRule | None: ...


@dataclass(frozen=True)
class Hierarchical:
    """Light Forcing's two stages: a few past frames by their score, then blocks of those.

    With more than `keep_frames` past frames, the first `keep_sink` and the last `keep_near` of
    them and, per head and query block, the best of the others are eligible, `keep_frames` in all,
    and so is the chunk itself; otherwise all frames are. Then the best blocks of all eligible
    frames are kept: floor((1 - s) x all key blocks), those not eligible counted too.

    Attributes:
        keep_frames, keep_sink, keep_near: past latent frames. In a window the frames still held
            are counted, so its first ones are the sinks.
        guarantee_sink: keep every block of the sink frames, by score or not. Default: off, as
            released; a whole frame takes most of a small budget.
        guarantee_own_block: each query block keeps the block it lies in. Default: off, as
            released, where nothing at the level of blocks is certain.

    Guaranteed blocks are part of the budget; one too small for them is raised to them. Deviation:
    the released code fills a budget beyond the eligible blocks with masked ones; here it shrinks.

    Reference: Light Forcing (arXiv 2602.04789), Hierarchical Sparse Attention, and its
    `kernel.py`.
    """

    keep_frames: int = 6
    keep_sink: int = 1
    keep_near: int = 2
    guarantee_sink: bool = False
    guarantee_own_block: bool = False
    kind: str = field(default="hierarchical", init=False)

    def __post_init__(self) -> None:
        _check_counts(
            keep_frames=self.keep_frames, keep_sink=self.keep_sink, keep_near=self.keep_near
        )
        if self.keep_sink + self.keep_near > self.keep_frames:
            raise UserError(
                f"keep_frames counts sink and near frames too: it must be at least keep_sink + "
                f"keep_near = {self.keep_sink + self.keep_near}, got {self.keep_frames}"
            )

    def rule(self, view: KeyView, sparsity: float) -> SelectionRule:
        past = view.past_slots
        roles = [ROLE_ELIGIBLE] * len(view.slot_frames)
        keep_candidates = 0
        if len(past) > self.keep_frames:
            keep_candidates = self.keep_frames - self.keep_sink - self.keep_near
            for slot in past[self.keep_sink : len(past) - self.keep_near]:
                roles[slot] = ROLE_CANDIDATE
        if self.guarantee_sink:
            for slot in past[: self.keep_sink]:
                roles[slot] = ROLE_FORCED
        return _budgeted(view, roles, keep_candidates, sparsity, self.guarantee_own_block)


@dataclass(frozen=True)
class BlockTopK:
    """The best blocks of all frames, in one stage."""

    guarantee_own_block: bool = False
    kind: str = field(default="block_top_k", init=False)

    def rule(self, view: KeyView, sparsity: float) -> SelectionRule:
        roles = [ROLE_ELIGIBLE] * len(view.slot_frames)
        return _budgeted(view, roles, 0, sparsity, self.guarantee_own_block)


@dataclass(frozen=True)
class SlidingWindow:
    """Whole frames by age alone: the chunk itself, the last ones before it and the first ones.

    Attributes:
        sink_frames: first latent frames still held.
        near_frames: latent frames before the chunk; None: as many as the sparsity leaves room
            for. The chunk itself and the sink are kept even when they exceed it.
    """

    sink_frames: int = 1
    near_frames: int | None = None
    kind: str = field(default="sliding_window", init=False)

    def __post_init__(self) -> None:
        _check_counts(sink_frames=self.sink_frames, near_frames=self.near_frames or 0)

    def rule(self, view: KeyView, sparsity: float) -> SelectionRule:
        past = view.past_slots
        near = self.near_frames
        if near is None:
            affordable = kept_blocks(sparsity, view.num_blocks) // view.blocks_per_frame
            near = max(affordable - len(view.own_slots) - self.sink_frames, 0)
        kept = {*view.own_slots, *past[: self.sink_frames], *past[max(len(past) - near, 0) :]}
        roles = [
            ROLE_FORCED if slot in kept else ROLE_ABSENT for slot in range(len(view.slot_frames))
        ]
        return SelectionRule(tuple(roles), 0, len(kept) * view.blocks_per_frame)


@dataclass(frozen=True)
class Dense:
    """Every block, whatever the schedule says."""

    kind: str = field(default="dense", init=False)

    def rule(self, view: KeyView, sparsity: float) -> None:
        return None


PRESETS: dict[str, Hierarchical] = {
    "short": Hierarchical(6, 1, 2),
    "long": Hierarchical(3, 1, 1),
}


def own_blocks(
    view: KeyView, frame_tokens: int, query_block_tokens: int, key_block_tokens: int
) -> list[int]:
    """The key block in which each query block's middle token lies, as physical block ids.

    Query blocks of the chunk in order; they run over the borders of its frames.
    """
    ids: list[int] = []
    tokens = len(view.own_slots) * frame_tokens
    for start in range(0, tokens, query_block_tokens):
        end = min(start + query_block_tokens, tokens)
        frame, token = divmod((start + end - 1) // 2, frame_tokens)
        ids.append(view.own_slots[frame] * view.blocks_per_frame + token // key_block_tokens)
    return ids


def fixed_blocks(view: KeyView, rule: SelectionRule) -> list[int]:
    """The physical key blocks, ascending, that a fixed rule keeps for every query block."""
    per_frame = view.blocks_per_frame
    return [
        slot * per_frame + block
        for slot, role in enumerate(rule.roles)
        if role == ROLE_FORCED
        for block in range(per_frame)
    ]


def _budgeted(
    view: KeyView, roles: list[int], keep_candidates: int, sparsity: float, own_block: bool
) -> SelectionRule:
    """The rule whose top_k is the budget, within what is guaranteed and what is eligible."""
    forced = roles.count(ROLE_FORCED)
    eligible = forced + roles.count(ROLE_ELIGIBLE)
    eligible += min(keep_candidates, roles.count(ROLE_CANDIDATE))
    # The own block lies in the chunk, whose slots are never forced: it comes on top of them.
    guaranteed = forced * view.blocks_per_frame + int(own_block)
    top_k = max(kept_blocks(sparsity, view.num_blocks), guaranteed)
    top_k = min(top_k, eligible * view.blocks_per_frame)
    return SelectionRule(tuple(roles), keep_candidates, top_k, own_block)
