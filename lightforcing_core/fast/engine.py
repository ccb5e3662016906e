"""Runs the forwards of one rollout: blocks compiled, attention fused, launches recorded.

A forward of 1.3B is about a thousand launches, and the host needs longer to issue them than the
GPU to do them. Forwards that launch the same with the same addresses are recorded as a CUDA graph
the second time they come and replayed from then on; the first time compiles what must be compiled.
With one plan a chunk that is two graphs for a whole video: a pass that chooses blocks and one that
does not, the clean pass among the latter.

An engine belongs to one run and one tree. Weights must stay where they are while it lives.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

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
from .attention import FastSparseAttention

log = logging.getLogger("lightforcing")


@dataclass(frozen=True)
class _Recording:
    """A graph, what it reads that changes, and what it writes."""

    graph: torch.cuda.CUDAGraph
    x: Tensor
    timesteps: Tensor
    cos: Tensor
    sin: Tensor
    velocity: Tensor


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
        self._recordings: dict[Hashable, _Recording] = {}
        self._pool: tuple[int, int] | None = None

    @property
    def num_recordings(self) -> int:
        """Graphs held at present."""
        return len(self._recordings)

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
        if self._graphs and isinstance(attend, FastSparseAttention):
            key = attend.graph_key()
        if key is None:
            return self._forward(x, timesteps, frame_indices, text, attend, positions)
        assert isinstance(attend, FastSparseAttention)
        key = key, x.shape, x.dtype, id(text)
        recording = self._recordings.get(key)
        if recording is None:
            if key not in self._seen:
                self._seen.add(key)
                return self._forward(x, timesteps, frame_indices, text, attend, positions)
            self._drop_others(key)
            recording = self._record(x, timesteps, frame_indices, text, attend, positions)
            self._recordings[key] = recording
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

    def _drop_others(self, key: tuple[Hashable, ...]) -> None:
        """Forget recordings of other sizes or another text: they would only hold memory."""
        for other in list(self._recordings):
            assert isinstance(other, tuple)
            if other[1:] != key[1:] or other[0][0] != key[0][0]:  # type: ignore[index]
                del self._recordings[other]


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
        if not isinstance(attend, FastSparseAttention):
            return plain(block, layer, hidden, modulation, num_heads, positions, text, attend)
        x_q, x_k, x_v = before(block, hidden, modulation)
        attended = attend.project(layer, x_q, x_k, x_v, block.self_attn, positions)
        return after(block, hidden, attended, modulation, text.keys[layer], text.values[layer])

    return run
