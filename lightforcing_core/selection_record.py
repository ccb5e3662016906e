"""Which key blocks each query block saw, kept for looking at: a bit for every pair."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .errors import UserError
from .sparse import SparseAttention


@dataclass(frozen=True)
class SelectionRecord:
    """What one chunk attended to, of the first video of a batch.

    Attributes:
        chunk: from 0.
        query_frames: latent frames of the chunk itself.
        key_frames: latent frames it could see, its own included, ascending.
        query_blocks: of the chunk; 1, which stands for all, where every layer was dense.
        key_blocks: of one latent frame.
        num_layers, num_heads: of the model.
        bits: per layer uint8 [heads, rows, ceil(columns / 8)], the bits of whole rows packed; a
            row is a query block of the chunk, a column a key block of `key_frames`, in order.
            None: the layer was dense.
    """

    chunk: int
    query_frames: tuple[int, ...]
    key_frames: tuple[int, ...]
    query_blocks: int
    key_blocks: int
    num_layers: int
    num_heads: int
    bits: tuple[np.ndarray | None, ...]

    def share(self, layer: int | None = None, head: int | None = None) -> np.ndarray:
        """Share of the chosen layers and heads that kept each pair.

        Args: layer, head: from 0; None for the mean over all.
        Returns: float32 [rows, columns], 0..1.
        Raises:
            UserError: there is no such layer or head.
        """
        _check_index("layer", layer, self.num_layers)
        _check_index("head", head, self.num_heads)
        layers = range(self.num_layers) if layer is None else [layer]
        maps = [self._of_layer(index, head) for index in layers]
        return np.mean(maps, axis=0, dtype=np.float32)

    def _of_layer(self, layer: int, head: int | None) -> np.ndarray:
        columns = len(self.key_frames) * self.key_blocks
        packed = self.bits[layer]
        if packed is None:
            return np.ones((self.query_blocks, columns), np.float32)
        kept = np.unpackbits(packed if head is None else packed[head, None], axis=-1, count=columns)
        return kept.mean(axis=0, dtype=np.float32)


def _check_index(name: str, index: int | None, count: int) -> None:
    if index is not None and not 0 <= index < count:
        raise UserError(
            f"there is no {name} {index + 1}: the model has {count}; choose 1 to {count}, or 0 for "
            "the mean over all"
        )


def record_selection(attention: SparseAttention, chunk: int) -> SelectionRecord:
    """What the open chunk has attended to, by its latest plan; waits for the device.

    Args:
        attention: as the chunk has left it, before its clean pass.
        chunk: from 0.
    """
    cache, plans = attention.cache, attention.plans
    spec = cache.spec
    by_age = sorted(range(cache.visible_frames), key=lambda slot: cache.slot_frames[slot])
    per_frame = spec.blocks_per_frame
    columns = [slot * per_frame + block for slot in by_age for block in range(per_frame)]
    return SelectionRecord(
        chunk=chunk,
        query_frames=tuple(cache.slot_frames[slot] for slot in cache.open_slots),
        key_frames=tuple(cache.slot_frames[slot] for slot in by_age),
        query_blocks=max((counts.shape[-1] for _, counts in plans.values()), default=1),
        key_blocks=per_frame,
        num_layers=spec.num_layers,
        num_heads=spec.num_heads,
        bits=tuple(
            _pack(*plans[layer], columns) if layer in plans else None
            for layer in range(spec.num_layers)
        ),
    )


def _pack(kv_indices: Tensor, kv_counts: Tensor, columns: list[int]) -> np.ndarray:
    """Index lists [B, H, rows, top_k] as bits [H, rows, ceil(columns / 8)] of the first video."""
    indices, counts = kv_indices[0].long(), kv_counts[0]
    places = torch.arange(indices.shape[-1], device=indices.device)
    # What lies past a row's count is whatever was there; it all goes to one column too many.
    spare = len(columns)
    indices = torch.where(places < counts[..., None], indices, spare)
    kept = indices.new_zeros((*counts.shape, spare + 1), dtype=torch.uint8)
    kept.scatter_(-1, indices, 1)
    order = torch.tensor(columns, device=kept.device)
    return np.packbits(kept[..., order].cpu().numpy(), axis=-1)
