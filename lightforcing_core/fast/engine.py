"""Runs the forwards of one rollout: blocks compiled, attention fused, launches recorded.

A forward of 1.3B is about a thousand launches, and the host needs longer to issue them than the
GPU to do them. Forwards that launch the same with the same addresses are recorded as a CUDA graph
and replayed; one of a kind that was never run is run as it stands first, which compiles what must
be compiled. With one plan a chunk that is three graphs for a whole video: the dense first chunk, a
pass that chooses blocks, and one that does not, the clean pass among the latter.

Recordings belong to one run, whose cache they name, and go with it. What was compiled stays: an
engine that makes the next video too need not run anything first. Weights must stay where they are
while a run lasts.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..wan.forward import (
    PositionTable,
    RunBlock,
    SelfAttend,
    TextContext,
    after_attention,
    projections,
    run_block,
    wan_forward,
)
from .attention import FastSparseAttention, GraphKey
from .linears import with_eight_bit_linears

log = logging.getLogger("lightforcing")

SPEEDS = ("plain", "graphs", "compiled", "fp8")
"""As it stands; launches recorded; blocks compiled too; linear layers in eight bits too."""


@dataclass(frozen=True)
class _Recording:
    """A graph, what it reads that changes, and what it writes."""

    graph: torch.cuda.CUDAGraph
    x: Tensor
    timesteps: Tensor
    cos: Tensor
    sin: Tensor
    velocity: Tensor


class _Name(NamedTuple):
    """By which a recording is found."""

    key: GraphKey
    shape: torch.Size
    dtype: torch.dtype
    text: int

    @property
    def lasting(self) -> tuple[object, ...]:
        """What does not change while recordings are of use."""
        return self.key.generation, *self[1:]


class ForwardEngine:
    """Stands in for `wan_forward` in a rollout."""

    def __init__(self, tree: nn.Module, *, compiled: bool = True, graphs: bool = True) -> None:
        """
        Args:
            tree: Wan-shaped module tree, resident on a GPU.
            compiled: fuse what surrounds attention with torch.compile.
            graphs: record sparse forwards. Without a CUDA device nothing is recorded.
        """
        self.tree = tree
        self._graphs = graphs and tree.patch_embedding.weight.device.type == "cuda"
        self._runner = block_runner(compiled=compiled)
        self._seen: set[Hashable] = set()
        self._recordings: dict[_Name, _Recording] = {}
        self._pool: tuple[int, int] | None = None
        self._is_running = False

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
        if self._is_running:
            raise RuntimeError("this engine is making another video; give each its own")
        self._is_running = True
        try:
            yield
        finally:
            self._is_running = False
            self._recordings.clear()
            self._pool = None

    def __call__(
        self,
        x: Tensor,
        timesteps: Tensor,
        frame_indices: Sequence[int],
        text: TextContext,
        attend: SelfAttend,
        positions: PositionTable,
    ) -> Tensor:
        """Velocity; see `wan_forward` for the arguments."""
        key = None
        if self._graphs and isinstance(attend, FastSparseAttention) and attend.is_recordable:
            key = attend.graph_key()
        if key is None:
            return self._forward(x, timesteps, frame_indices, text, attend, positions)
        assert isinstance(attend, FastSparseAttention)
        kind = key._replace(generation=min(key.generation, 1)), x.shape, x.dtype
        if kind not in self._seen:
            self._seen.add(kind)
            return self._forward(x, timesteps, frame_indices, text, attend, positions)
        name = _Name(key, x.shape, x.dtype, id(text))
        recording = self._recordings.get(name)
        if recording is None:
            self._drop_others(name)
            recording = self._record(x, timesteps, frame_indices, text, attend, positions)
            self._recordings[name] = recording
        recording.x.copy_(x)
        recording.timesteps.copy_(timesteps)
        recording.cos.copy_(positions.cos)
        recording.sin.copy_(positions.sin)
        recording.graph.replay()
        attend.replayed()
        return recording.velocity.clone()

    def _forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        frame_indices: Sequence[int],
        text: TextContext,
        attend: SelfAttend,
        positions: PositionTable,
    ) -> Tensor:
        return wan_forward(
            self.tree, x, timesteps, frame_indices, text, attend, positions, self._runner
        )

    def _record(
        self,
        x: Tensor,
        timesteps: Tensor,
        frame_indices: Sequence[int],
        text: TextContext,
        attend: FastSparseAttention,
        positions: PositionTable,
    ) -> _Recording:
        held = PositionTable(
            positions.cos.clone(), positions.sin.clone(), positions.order, positions.places
        )
        x, timesteps = x.clone(), timesteps.clone()
        graph = torch.cuda.CUDAGraph()
        attend.record(True)
        try:
            # Another thread may allocate meanwhile: a decoder, a host's own work.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                velocity = self._forward(x, timesteps, frame_indices, text, attend, held)
        finally:
            attend.record(False)
        self._pool = self._pool or graph.pool()
        log.debug("recorded a forward as a CUDA graph")
        return _Recording(graph, x, timesteps, held.cos, held.sin, velocity)

    def _drop_others(self, name: _Name) -> None:
        """Forget recordings of other addresses, sizes or another text: they only hold memory."""
        for other in list(self._recordings):
            if other.lasting != name.lasting:
                del self._recordings[other]
        if not self._recordings:
            self._pool = None  # it went with the last graph that used it


def engine_for(tree: nn.Module, speed: str | None) -> ForwardEngine | None:
    """The engine of a speed, one of `SPEEDS`; None: graphs on a GPU, plain elsewhere.

    Raises:
        UserError: no such speed, or this machine cannot do it.
    """
    weight = tree.blocks[0].self_attn.q.weight
    is_gpu = weight.device.type == "cuda"
    speed = speed or ("graphs" if is_gpu else "plain")
    if speed not in SPEEDS:
        raise UserError(f"no speed '{speed}'; choose one of {', '.join(SPEEDS)}")
    if speed == "plain":
        return None
    if not is_gpu:
        raise UserError(f"the speed '{speed}' needs a CUDA device, this run is on {weight.device}")
    if speed == "fp8":
        tree = with_eight_bit_linears(tree)
    return ForwardEngine(tree, compiled=speed != "graphs")


def block_runner(*, compiled: bool = True) -> RunBlock:
    """Runs a block, handing projections to an attention that takes them."""
    before, after = projections, after_attention
    if compiled:
        from ..wan.compiled import compiled_block_runner

        before = torch.compile(projections, dynamic=False)
        after = torch.compile(after_attention, dynamic=False)
        plain = compiled_block_runner()
    else:
        plain = run_block

    def run(
        block: nn.Module,
        layer: int,
        hidden: Tensor,
        modulation: Tensor,
        num_heads: int,
        positions: PositionTable,
        text: TextContext,
        attend: SelfAttend,
    ) -> Tensor:
        if not (isinstance(attend, FastSparseAttention) and attend.takes_projections):
            return plain(block, layer, hidden, modulation, num_heads, positions, text, attend)
        x_q, x_k, x_v = before(block, hidden, modulation)
        attended = attend.project(layer, x_q, x_k, x_v, block.self_attn, positions)
        return after(block, hidden, attended, modulation, text.keys[layer], text.values[layer])

    return run
