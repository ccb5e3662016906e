"""Runs the forwards of one rollout: what lies between matrix products fused, launches recorded.

A forward of 1.3B is about a thousand launches, and the host needs longer to issue them than the
GPU to do them. Forwards that launch the same with the same addresses are recorded as a CUDA graph
and replayed; one of a kind that was never run is run as it stands first, which compiles what must
be compiled. With one plan a chunk that is three graphs for a whole video: the dense first chunk, a
pass that chooses blocks, and one that does not, the clean pass among the latter. A dense video
needs one for every chunk.

Recordings belong to one run, whose cache they name, and go with it. What was compiled stays: an
engine that makes the next video too need not run anything first. An engine that keeps its memory
also keeps the cache and the recordings for the next video of the same size, which then records
nothing. Weights must stay where they are while a run lasts, or an engine that keeps.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from ..backends import AttentionBackend
from ..errors import UserError
from ..graphs import graphs_obstacle, recording
from ..kv_cache import CacheSpec, KVCache
from ..schedule import Timeline
from ..sparse_settings import SparseSettings
from ..wan.forward import PositionTable, SelfAttend, TextContext, TimeContext, wan_forward
from .attention import FastSparseAttention
from .dense_attention import FastDenseAttention, GraphKey
from .linears import EIGHT_BIT_SPEEDS, block_dtype, product_dtype, with_eight_bit_linears
from .operations import fused_obstacles, fused_operations
from .stack import FusedBlocks, blocks_obstacle

log = logging.getLogger("lightforcing")

SPEEDS = ("plain", "fast", *EIGHT_BIT_SPEEDS)
"""As it stands; fused and recorded; linear layers in eight bits too."""


@dataclass(frozen=True)
class _Recording:
    """A graph, what it reads that changes, and what it writes."""

    graph: torch.cuda.CUDAGraph
    x: Tensor
    time: TimeContext
    positions: PositionTable
    velocity: Tensor


FastAttention = FastSparseAttention | FastDenseAttention


class _Name(NamedTuple):
    """By which a recording is found."""

    key: GraphKey
    shape: torch.Size
    dtype: torch.dtype


class ForwardEngine:
    """Stands in for `wan_forward` in a rollout."""

    def __init__(
        self,
        tree: nn.Module,
        *,
        graphs: bool = True,
        keep: bool = False,
        seen: set[Hashable] | None = None,
    ) -> None:
        """
        Args:
            tree: Wan-shaped module tree, resident on a GPU.
            graphs: record forwards, dense ones only if they are kept. Where `graphs_obstacle`
                is in the way, or without a CUDA device, nothing is recorded.
            keep: hold the cache and the recordings from one video to the next; `release` frees
                them.
            seen: kinds of forwards that engines before this one have run, in the same process for
                the same model; this one adds its own. They need not be run before they are
                recorded.
        """
        self.tree = tree
        self._keep = keep
        self._kept: tuple[Hashable, FastAttention] | None = None
        self._text: TextContext | None = None
        self._text_from: TextContext | None = None
        device = tree.patch_embedding.weight.device
        obstacle = graphs_obstacle(device)
        self._graphs = graphs and device.type == "cuda" and not obstacle
        if graphs and obstacle:
            log.warning("forwards are fused but not recorded, which can be slower: %s", obstacle)
        self._blocks = FusedBlocks(fused_operations(device))
        self._seen: set[Hashable] = set() if seen is None else seen
        self._recordings: dict[_Name, _Recording] = {}
        self._pool: tuple[int, int] | None = None
        self._is_running = self._has_run = False

    @property
    def num_recordings(self) -> int:
        """Graphs held at present."""
        return len(self._recordings)

    @contextmanager
    def run(self) -> Iterator[None]:
        """One video: its recordings, and the memory they hold, go when it is over.

        Raises:
            RuntimeError: another video of this engine is not over.
        """
        self._refuse_second_video()
        self._is_running = True
        try:
            with torch.no_grad():
                self._blocks.prepare(self.tree.blocks)
            yield
        finally:
            self._is_running = False
            if not self._keep:
                self.release()

    def _refuse_second_video(self) -> None:
        if self._is_running:
            raise RuntimeError("this engine is making another video; give each its own")

    def release(self) -> None:
        """Free what is held between videos."""
        self.forget_recordings()
        self._kept = self._text = self._text_from = None

    def forget_recordings(self) -> None:
        """Weights have moved: what was recorded names where they were."""
        self._recordings.clear()
        self._pool = None

    def attention(
        self,
        spec: CacheSpec,
        settings: SparseSettings,
        timeline: Timeline,
        backend: AttentionBackend,
        device: torch.device,
    ) -> FastSparseAttention:
        """Sparse attention over a cache of this kind: new, or what the last video left.

        Raises:
            RuntimeError: another video of this engine is not over.
        """
        blocks = settings.query_block_tokens, settings.token_order
        kind = spec, blocks, backend.name, str(device), torch.is_inference_mode_enabled()
        kept = self._take_kept(kind)
        if kept is not None:
            assert isinstance(kept, FastSparseAttention)
            kept.restart(settings, timeline)
            return kept
        cache = KVCache(spec, device, backend.pool_blocks)
        attend = FastSparseAttention(
            cache, settings, timeline, backend, product_dtype(self.tree, spec.dtype)
        )
        if self._keep:
            self._kept = kind, attend
        return attend

    def dense_attention(self, spec: CacheSpec, device: torch.device) -> FastDenseAttention:
        """Dense attention over a cache of this kind: new, or what the last video left.

        Raises:
            RuntimeError: another video of this engine is not over.
        """
        kind = spec, "dense", str(device), torch.is_inference_mode_enabled()
        kept = self._take_kept(kind)
        if kept is not None:
            assert isinstance(kept, FastDenseAttention)
            kept.restart()
            return kept
        attend = FastDenseAttention(KVCache(spec, device), device)
        if self._keep:
            self._kept = kind, attend
        return attend

    def _take_kept(self, kind: Hashable) -> FastAttention | None:
        """What the last video left, if it is of this kind; else nothing is left.

        What was made in inference mode cannot be written outside of it.
        """
        self._refuse_second_video()
        if self._kept is not None and self._kept[0] == kind:
            return self._kept[1]
        self.release()
        return None

    def __call__(
        self,
        x: Tensor,
        time: TimeContext,
        frame_indices: Sequence[int],
        text: TextContext,
        attend: SelfAttend,
        positions: PositionTable,
    ) -> Tensor:
        """Velocity; see `wan_forward` for the arguments, and `prepare_time` for the time."""
        key = None
        if self._graphs and self._may_record(attend):
            key = attend.graph_key()
        if key is None:
            self._has_run = True
            return self._forward(x, time, frame_indices, text, attend, positions)
        kind = key._replace(generation=min(key.generation, 1)), x.shape, x.dtype
        if kind not in self._seen:
            self._seen.add(kind)
            self._has_run = True
            return self._forward(x, time, frame_indices, text, attend, positions)
        name = _Name(key, x.shape, x.dtype)
        text = self._held_text(text)
        recorded = self._recordings.get(name)
        if recorded is None:
            self._drop_others(name)
            recorded = self._record(x, time, frame_indices, text, attend, positions)
            self._recordings[name] = recorded
        recorded.x.copy_(x)
        recorded.time.embedded.copy_(time.embedded)
        recorded.time.modulation.copy_(time.modulation)
        recorded.positions.cos.copy_(positions.cos)
        recorded.positions.sin.copy_(positions.sin)
        recorded.graph.replay()
        attend.replayed()
        return recorded.velocity.clone()

    def _may_record(self, attend: SelfAttend) -> TypeGuard[FastAttention]:
        """Dense chunks have a recording each, which a single video would not earn back."""
        if isinstance(attend, FastDenseAttention):
            return self._keep and attend.is_recordable
        return isinstance(attend, FastSparseAttention) and attend.is_recordable

    def _forward(
        self,
        x: Tensor,
        time: TimeContext,
        frame_indices: Sequence[int],
        text: TextContext,
        attend: SelfAttend,
        positions: PositionTable,
    ) -> Tensor:
        return wan_forward(self.tree, x, time, frame_indices, text, attend, positions, self._blocks)

    def _record(
        self,
        x: Tensor,
        time: TimeContext,
        frame_indices: Sequence[int],
        text: TextContext,
        attend: FastAttention,
        positions: PositionTable,
    ) -> _Recording:
        held = PositionTable(
            positions.cos.clone(), positions.sin.clone(), positions.order, positions.places
        )
        x = x.clone()
        time = TimeContext(time.timesteps, time.embedded.clone(), time.modulation.clone())
        velocity = torch.empty_like(x)
        graph = torch.cuda.CUDAGraph()
        attend.record(True)
        try:
            with recording(graph, x.device, self._pool, after_run=self._has_run):
                velocity.copy_(self._forward(x, time, frame_indices, text, attend, held))
        finally:
            attend.record(False)
        self._pool, self._has_run = self._pool or graph.pool(), False
        log.debug("recorded a forward as a CUDA graph")
        return _Recording(graph, x, time, held, velocity)

    def _held_text(self, text: TextContext) -> TextContext:
        """The prompt at the addresses that recordings name."""
        if self._text is None or [x.shape for x in _tensors(self._text)] != [
            x.shape for x in _tensors(text)
        ]:
            self.forget_recordings()
            self._text = TextContext(
                tuple(x.clone() for x in text.keys),
                tuple(x.clone() for x in text.values),
                None if text.distinct is None else text.distinct.clone(),
            )
            self._text_from = text
        elif self._text_from is not text:
            torch._foreach_copy_(_tensors(self._text), _tensors(text))
            self._text_from = text
        return self._text

    def _drop_others(self, name: _Name) -> None:
        """Forget recordings of other addresses and sizes: they only hold memory."""
        for other in list(self._recordings):
            old = other.key.generation not in (0, name.key.generation)
            if (old and name.key.generation) or other[1:] != name[1:]:
                del self._recordings[other]
        if not self._recordings:
            self._pool = None  # it went with the last graph that used it


def _tensors(text: TextContext) -> list[Tensor]:
    return [*text.keys, *text.values, *([] if text.distinct is None else [text.distinct])]


def engine_for(
    tree: nn.Module, speed: str | None, *, keep: bool = False, replace: bool = False
) -> ForwardEngine | None:
    """The engine of a speed, one of `SPEEDS`; None: fast where this machine can, else plain.

    Args:
        replace: where linear layers become eight-bit ones, the tree given gets them too and the
            others go, which saves their memory.

    Raises:
        UserError: no such speed, or this machine cannot do it; lists every reason.
    """
    if speed not in (None, *SPEEDS):
        raise UserError(f"no speed '{speed}'; choose one of {', '.join(SPEEDS)}")
    if speed == "plain":
        return None
    if obstacles := fast_obstacles(tree):
        if speed is None:
            log.info("forwards as they stand, not fused: %s", "; ".join(obstacles))
            return None
        raise UserError(
            f"the speed '{speed}' cannot be used: {'; '.join(obstacles)}; choose 'plain'"
        )
    if speed in EIGHT_BIT_SPEEDS:
        tree = with_eight_bit_linears(tree, EIGHT_BIT_SPEEDS[speed], replace=replace)
    return ForwardEngine(tree, keep=keep)


def fast_obstacles(tree: nn.Module) -> list[str]:
    """Why the forwards of this tree cannot be fused where it lies; empty: they can."""
    device = tree.blocks[0].self_attn.q.weight.device
    obstacles = fused_obstacles(device, block_dtype(tree))
    if (unlike := blocks_obstacle(tree.blocks)) is not None:
        obstacles.append(unlike)
    return obstacles
