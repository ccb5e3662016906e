"""Compiling one transformer block and using it for all layers.

Compiling the whole denoiser takes minutes, since every layer is unrolled; one block takes seconds
and gives the same fused kernels. `wan_forward` calls its module's `run_block` for each layer, and
that is what is replaced while `compiled_blocks` is active. Only training does this, in a process
of its own.

Attention that keeps state (the key/value cache) cannot be traced: it is called through an operator
that is opaque to the compiler and takes the layer as a tensor, so that layers share one graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..lightforcing_core.attention import CachedAttention
from ..lightforcing_core.wan import forward as wan
from ..lightforcing_core.wan.forward import PositionTable, SelfAttend, TextContext

_stateful: list[SelfAttend] = []


@torch.library.custom_op("lightforcing_training::stateful_attention", mutates_args=())
def _stateful_attention(q: Tensor, k: Tensor, v: Tensor, layer: Tensor) -> Tensor:
    return _stateful[-1](int(layer), q, k, v).contiguous()


@_stateful_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, layer: Tensor) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@contextmanager
def compiled_blocks(enabled: bool = True) -> Iterator[None]:
    """Within this context `wan_forward` runs compiled blocks."""
    if not enabled:
        yield
        return
    original = wan.run_block
    # One entry per batch shape and kind of attention.
    torch._dynamo.config.recompile_limit = 64

    def one_block(
        block: nn.Module,
        hidden: Tensor,
        modulation: Tensor,
        num_heads: int,
        tables: tuple[Tensor, Tensor, Tensor, Tensor],
        layer: Tensor,
        attend: SelfAttend | None,
    ) -> Tensor:
        cos, sin, keys, values = tables

        def through_operator(_: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return _stateful_attention(q, k, v, layer)

        return original(
            block,
            0,
            hidden,
            modulation,
            num_heads,
            PositionTable(cos, sin),
            TextContext((keys,), (values,)),
            attend or through_operator,
        )

    compiled = torch.compile(one_block, dynamic=False)
    layers = [torch.tensor(i) for i in range(64)]

    def run_block(
        block: nn.Module,
        layer: int,
        hidden: Tensor,
        modulation: Tensor,
        num_heads: int,
        positions: PositionTable,
        text: TextContext,
        attend: SelfAttend,
    ) -> Tensor:
        tables = (positions.cos, positions.sin, text.keys[layer], text.values[layer])
        stateless = None if isinstance(attend, CachedAttention) else attend
        _stateful.append(attend)
        try:
            return compiled(
                block, hidden.contiguous(), modulation, num_heads, tables, layers[layer], stateless
            )
        finally:
            _stateful.pop()

    wan.run_block = run_block
    try:
        yield
    finally:
        wan.run_block = original
