"""Settings of sparse attention, and what they say about a single pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from . import schedule as schedules
from . import selection as policies
from .backends import BACKENDS, QK_PRECISIONS
from .errors import UserError
from .layout import TOKEN_ORDERS, tile_order
from .schedule import MAX_SPARSITY, GrowthSchedule, Timeline, chunk_sparsity
from .selection import SelectionPolicy

_BLOCKS_BY_DEFAULT = (64, 32, 16)
_LEAST_BLOCKS_OF_A_FRAME = 8
# Settings that the key/value cache is laid out for.
_FIXED_IN_A_RUN = {
    "query_block_tokens": "query block size",
    "key_block_tokens": "key block size",
    "token_order": "token order",
    "qk_precision": "precision of query-key products",
    "backend": "backend",
}


@dataclass(frozen=True)
class PassBudgets:
    """Differences from the chunk's sparsity, added to it; the result stays within 0..0.999.

    -1 makes a pass dense. All are 0 by default, as released: the published figures have no
    separate budgets.

    Attributes:
        first_step: for the first denoising step of every chunk, whose attention is widest.
        clean_pass: for the pass that writes a finished chunk's keys and values.
        first_layers, last_layers: how many layers at either end get `edge_layers` too.
        edge_layers: for those.
    """

    first_step: float = 0.0
    clean_pass: float = 0.0
    first_layers: int = 0
    last_layers: int = 0
    edge_layers: float = -1.0

    def __post_init__(self) -> None:
        for name in ("first_step", "clean_pass", "edge_layers"):
            value = getattr(self, name)
            if not -1 <= value <= 1:
                raise UserError(
                    f"the difference {name} is added to a sparsity and must be within -1 (dense) "
                    f"and 1, got {value}"
                )
        if self.first_layers < 0 or self.last_layers < 0:
            raise UserError(
                "first_layers and last_layers count layers and must not be negative, got "
                f"{self.first_layers} and {self.last_layers}"
            )

    def sparsity(self, of_chunk: float, step: int | None, layer: int, num_layers: int) -> float:
        """Sparsity of one layer in one pass.

        Args: step from 0, None for the clean pass.
        """
        if of_chunk == 0:
            return 0.0  # a dense chunk stays dense
        difference = {0: self.first_step, None: self.clean_pass}.get(step, 0.0)
        if layer < self.first_layers or layer >= num_layers - self.last_layers:
            difference += self.edge_layers
        return min(max(of_chunk + difference, 0.0), MAX_SPARSITY)


@dataclass(frozen=True)
class SparseSettings:
    """How self-attention is made sparse. The defaults are the paper's, but for `plan_steps`.

    Attributes:
        schedule: sparsity by chunk.
        policy: which blocks are kept.
        query_block_tokens, key_block_tokens: block sizes; None: 64 as released, smaller where a
            frame has fewer than eight of those. On Hopper query blocks are then 128, as in the
            released code. Query blocks run over frame borders, key blocks end with their frame.
        token_order: which tokens of a frame make a block: 'raster', as released, strips of one row
            or two; 'tiles', compact pieces of the picture (`layout.tile_order`). Dense chunks are
            the same within rounding.
        plan_steps: denoising steps (from 0) at which blocks are chosen anew; the other steps and
            the clean pass take the latest choice. Default: once a chunk, at its first step. None:
            in every pass, as released.
        budgets: separate budgets of single passes and layers.
        dense_chunks: the first so many chunks are dense, whatever the schedule says; the others
            do not make up for it.
        keep_blocks: key blocks that each query block keeps in every chunk that the schedule does
            not leave dense, instead of what its sparsity comes to.
        qk_precision: of the products of queries and keys in sparse passes: 'full', or 'int8', in
            eight bits with keys less their mean; the rest stays in full. Dense passes are not
            concerned.
        backend: see `backends.resolve_backend`.
    """

    schedule: GrowthSchedule = schedules.PRESETS["short"]
    policy: SelectionPolicy = policies.PRESETS["short"]
    query_block_tokens: int | None = None
    key_block_tokens: int | None = None
    token_order: str = "raster"
    plan_steps: tuple[int, ...] | None = (0,)
    budgets: PassBudgets = field(default_factory=PassBudgets)
    dense_chunks: int = 0
    keep_blocks: int | None = None
    qk_precision: str = "full"
    backend: str = "auto"

    def __post_init__(self) -> None:
        for name in ("query_block_tokens", "key_block_tokens", "keep_blocks"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")
        if self.dense_chunks < 0:
            raise UserError(f"dense_chunks must not be negative, got {self.dense_chunks}")
        if self.plan_steps is not None:
            object.__setattr__(self, "plan_steps", tuple(self.plan_steps))
            if any(step < 0 for step in self.plan_steps):
                raise UserError(f"plan_steps counts steps from 0, got {self.plan_steps}")
        if self.token_order not in TOKEN_ORDERS:
            raise UserError(
                f"no token order '{self.token_order}'; choose one of {', '.join(TOKEN_ORDERS)}"
            )
        if self.qk_precision not in QK_PRECISIONS:
            raise UserError(
                f"no precision '{self.qk_precision}' of query-key products; choose one of "
                f"{', '.join(QK_PRECISIONS)}"
            )
        if self.backend not in BACKENDS:
            raise UserError(
                f"no attention backend '{self.backend}'; choose one of {', '.join(BACKENDS)}"
            )

    def plans_anew(self, step: int | None) -> bool:
        """Whether a pass chooses its blocks itself; None is the clean pass."""
        return self.plan_steps is None or step in self.plan_steps

    def sparsity(self, chunk: int, timeline: Timeline, key_blocks: int) -> float:
        """What is asked of a chunk (index from 0) that sees so many key blocks, 0..1."""
        if chunk < self.dense_chunks:
            return 0.0
        sparsity = chunk_sparsity(self.schedule, timeline, chunk)
        if not sparsity or self.keep_blocks is None:
            return sparsity
        # Half a block more than asked for, so that rounding down gives what was asked for.
        return max(1 - (self.keep_blocks + 0.5) / key_blocks, 0.0)

    def check_change(self, other: SparseSettings) -> None:
        """Raise if a run with these settings cannot go on with others.

        Raises:
            UserError: other block sizes, another token order, precision or backend.
        """
        for name, title in _FIXED_IN_A_RUN.items():
            now, then = getattr(self, name), getattr(other, name)
            if now != then:
                raise UserError(
                    f"the {title} cannot change while a video is being made: it is "
                    f"{now or 'automatic'}, asked for was {then or 'automatic'}; start a new run"
                )

    def frame_order(self, rows: int, columns: int) -> tuple[int, ...] | None:
        """Raster index of each token of a frame in order; None: they are in raster order."""
        if self.token_order == "raster":
            return None
        return tile_order(rows, columns, self.key_block(rows * columns))

    def query_block(self, frame_tokens: int) -> int:
        """Tokens of a query block for frames of so many tokens."""
        return self.query_block_tokens or default_block_tokens(frame_tokens)

    def key_block(self, frame_tokens: int) -> int:
        """Tokens of a key block for frames of so many tokens."""
        return self.key_block_tokens or default_block_tokens(frame_tokens)


def default_block_tokens(frame_tokens: int) -> int:
    """64 where a frame has at least eight such blocks, else 32 or 16.

    The mean of half a picture tells nothing about its parts, and a budget of a few large blocks
    can only be spent in lumps.
    """
    for tokens in _BLOCKS_BY_DEFAULT:
        if frame_tokens >= tokens * _LEAST_BLOCKS_OF_A_FRAME:
            return tokens
    return _BLOCKS_BY_DEFAULT[-1]


SCHEDULES = ("chunk_aware", "uniform", "linear", "hand_drawn")
POLICIES = ("hierarchical", "block_top_k", "sliding_window", "dense")


def make_schedule(
    sparsity: float | None = None,
    *,
    base_sparsity: float | None = None,
    kind: str = "chunk_aware",
    values: Sequence[float] = (),
) -> GrowthSchedule:
    """A schedule from what a command line or a node asks for.

    Args:
        sparsity: target (chunk_aware), the value (uniform), or where the ramp starts (linear);
            None: 0.88.
        base_sparsity: limit of the growth (chunk_aware), or where the ramp ends (linear);
            None: 0.10 above `sparsity`, at most 0.99.
        kind: one of SCHEDULES.
        values: of a hand-drawn schedule.

    Raises:
        UserError: unknown kind or values out of range.
    """
    target = schedules.PRESETS["short"].target if sparsity is None else sparsity
    base = schedules.default_base(target) if base_sparsity is None else base_sparsity
    if kind == "chunk_aware":
        # The default limit must not contradict a target above it.
        return schedules.ChunkAwareGrowth(
            target, max(base, target) if base_sparsity is None else base
        )
    if kind == "uniform":
        return schedules.UniformSparsity(target)
    if kind == "linear":
        return schedules.LinearRamp(target, base)
    if kind == "hand_drawn":
        return schedules.HandDrawn(tuple(values))
    raise UserError(f"no schedule '{kind}'; choose one of {', '.join(SCHEDULES)}")


def make_policy(
    kind: str = "hierarchical",
    *,
    keep_frames: int | None = None,
    keep_sink: int | None = None,
    keep_near: int | None = None,
    guarantee_sink: bool = False,
    guarantee_own_block: bool = False,
) -> SelectionPolicy:
    """A policy from what a command line or a node asks for; None: the short preset's.

    For a sliding window, keep_sink and keep_near are its frames, and without keep_near it takes
    as many as the sparsity leaves room for.

    Raises:
        UserError: unknown kind or values out of range.
    """
    short = policies.PRESETS["short"]
    sink = short.keep_sink if keep_sink is None else keep_sink
    if kind == "hierarchical":
        return policies.Hierarchical(
            short.keep_frames if keep_frames is None else keep_frames,
            sink,
            short.keep_near if keep_near is None else keep_near,
            guarantee_sink=guarantee_sink,
            guarantee_own_block=guarantee_own_block,
        )
    unused: dict[str, Any] = {"keep_frames": keep_frames, "guarantee_sink": guarantee_sink or None}
    if kind != "sliding_window":
        unused |= {"keep_sink": keep_sink, "keep_near": keep_near}
    if kind != "block_top_k":
        unused |= {"guarantee_own_block": guarantee_own_block or None}
    given = [name for name, value in unused.items() if value is not None]
    if kind in POLICIES and given:
        raise UserError(f"the policy '{kind}' has no {' or '.join(given)}; leave it out")
    if kind == "block_top_k":
        return policies.BlockTopK(guarantee_own_block)
    if kind == "sliding_window":
        return policies.SlidingWindow(sink, keep_near)
    if kind == "dense":
        return policies.Dense()
    raise UserError(f"no selection policy '{kind}'; choose one of {', '.join(POLICIES)}")
