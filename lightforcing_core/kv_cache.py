"""Keys and values of past latent frames, in frame slots at fixed addresses.

A slot holds one latent frame of one layer. Slots are handed out in order until the cache is
full; then each entering frame takes the slot of the oldest frame that is not a sink. Nothing is
moved, cloned or read back: which frame lies where is known to the host as plain integers, and
attention does not care about the order of its keys. Visible slots are always a prefix.

Slots are padded to whole blocks when a block size is given, so that blocks never straddle
frames, and each block's mean key is kept beside them. A block's number, counted over the slots,
is what index lists of sparse attention hold. Keys can be kept in eight bits too, rounded when they
are final, less the mean key of the first chunk: the same for all keys, so that attention does not
see it.

Reference for what is visible when: Self Forcing `CausalWanSelfAttention` (`local_attn_size`,
`sink_size`), which shifts the whole window in memory instead.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.grid import BlockGrid
from ..kernels.reference import pool_blocks, quantise_blocks
from .errors import UserError
from .memory import GIB, available_bytes

log = logging.getLogger("lightforcing")


@dataclass(frozen=True)
class CacheSpec:
    """Size of a cache, known before anything is allocated.

    Attributes:
        capacity_frames: latent frames held at once, the open chunk included.
        sink_frames: the first frames of the video, which are never dropped.
        frame_tokens: tokens of one latent frame.
        block_tokens: tokens of an attention block; 0 means no blocks, no padding and no
            pooled keys.
        int8_keys: keep keys in eight bits beside the others; needs blocks.
    """

    batch: int
    num_layers: int
    num_heads: int
    head_dim: int
    frame_tokens: int
    capacity_frames: int
    sink_frames: int = 0
    block_tokens: int = 0
    dtype: torch.dtype = torch.bfloat16
    int8_keys: bool = False

    def __post_init__(self) -> None:
        if self.capacity_frames < 1:
            raise UserError(f"the cache must hold at least 1 frame, got {self.capacity_frames}")
        if not 0 <= self.sink_frames < self.capacity_frames:
            raise UserError(
                f"sink frames must be fewer than the {self.capacity_frames} latent frames of the "
                f"window, got {self.sink_frames}; lower the sink or raise the window"
            )
        if self.int8_keys and not self.block_tokens:
            raise ValueError("keys of eight bits need blocks, got block_tokens 0")

    def check_chunk(self, frames: int, visible_frames: int) -> None:
        """Raise if a chunk finds no room while so many frames are held.

        Raises:
            UserError: it would have to push out sinks or its own frames.
        """
        beside_sinks = self.capacity_frames - self.sink_frames
        unused = self.capacity_frames - visible_frames
        if frames > max(beside_sinks, unused):
            raise UserError(
                f"a chunk of {frames} latent frames does not fit a window of "
                f"{self.capacity_frames} frames of which {self.sink_frames} are sink; "
                "raise the window or lower the sink or the frames per chunk"
            )

    def check_chunks(self, lengths: Sequence[int]) -> None:
        """`check_chunk` for the chunks of a whole video, before the first one is made."""
        visible = 0
        for length in lengths:
            self.check_chunk(length, visible)
            visible = min(visible + length, self.capacity_frames)

    @property
    def grid(self) -> BlockGrid:
        """How a slot is cut into blocks; without a block size it is one block."""
        return BlockGrid(self.frame_tokens, self.block_tokens or self.frame_tokens)

    @property
    def blocks_per_frame(self) -> int:
        return self.grid.blocks_per_segment if self.block_tokens else 0

    @property
    def frame_stride(self) -> int:
        """Rows of one slot: frame tokens, padded to whole blocks."""
        return self.grid.slot_tokens

    @property
    def key_value_bytes(self) -> int:
        rows = self.batch * self.num_layers * self.capacity_frames * self.frame_stride
        return 2 * rows * self.num_heads * self.head_dim * self.dtype.itemsize

    @property
    def pooled_bytes(self) -> int:
        blocks = self.batch * self.num_layers * self.capacity_frames * self.blocks_per_frame
        return blocks * self.num_heads * self.head_dim * torch.float32.itemsize

    @property
    def int8_bytes(self) -> int:
        """Keys in eight bits and the scales of their blocks."""
        if not self.int8_keys:
            return 0
        scales = self.pooled_bytes // self.head_dim
        return self.key_value_bytes // (2 * self.dtype.itemsize) + scales

    @property
    def total_bytes(self) -> int:
        return self.key_value_bytes + self.pooled_bytes + self.int8_bytes

    def check_memory(self, device: torch.device) -> None:
        """Log the memory a cache of this size takes; raise if the device has less.

        Raises:
            UserError: with the GiB needed and free, and the settings that reduce it.
        """
        free = available_bytes(device)
        need = (
            f"the key/value cache of {self.capacity_frames} latent frames "
            f"({self.num_layers} layers, {self.frame_tokens} tokens a frame, "
            f"{str(self.dtype).removeprefix('torch.')}) takes {self.total_bytes / GIB:.2f} GiB"
        )
        if self.total_bytes > free:
            raise UserError(
                f"{need}, but {device} has {free / GIB:.2f} GiB free; use a smaller window, "
                "fewer frames, a smaller size or a 16-bit data type"
            )
        log.info("%s of %.2f GiB free on %s", need, free / GIB, device)


class KVCache:
    """Run state of one video: create it for a run, let it die with the run.

    Use: `enter(frames)`, then any number of forwards that `write` and read `visible`, then
    `commit()`; the next `enter` makes room.
    """

    def __init__(
        self,
        spec: CacheSpec,
        device: torch.device | str,
        pool: Callable[..., Tensor] = pool_blocks,
        quantise: Callable[..., None] = quantise_blocks,
    ) -> None:
        """
        Args:
            pool, quantise: make the pooled keys and those of eight bits, like `kernels.pool_blocks`
                and `kernels.quantise_blocks`.

        Raises:
            UserError: the device has too little memory.
        """
        self.spec = spec
        self._pool, self._quantise = pool, quantise
        device = torch.device(device)
        spec.check_memory(device)
        shape = (
            spec.batch,
            spec.capacity_frames,
            spec.frame_stride,
            spec.num_heads,
            spec.head_dim,
        )

        def layers(*shape: int, dtype: torch.dtype) -> list[Tensor]:
            # Zeros, not empty: the padding rows of a slot are read by block kernels.
            return [torch.zeros(shape, dtype=dtype, device=device) for _ in range(spec.num_layers)]

        self.keys = layers(*shape, dtype=spec.dtype)
        self.values = layers(*shape, dtype=spec.dtype)
        self.pooled_keys: list[Tensor] = []  # [B, H, capacity * blocks, D], block ids in order
        if spec.block_tokens:
            blocks = spec.capacity_frames * spec.blocks_per_frame
            shape = (spec.batch, spec.num_heads, blocks, spec.head_dim)
            self.pooled_keys = layers(*shape, dtype=torch.float32)
        self.int8_keys: list[Tensor] = []  # like keys, in steps of their block's scale
        self.key_scales: list[Tensor] = []  # float32 [B, H, capacity * blocks], block ids in order
        if spec.int8_keys:
            self.int8_keys = [torch.zeros_like(keys, dtype=torch.int8) for keys in self.keys]
            self.key_scales = layers(*shape[:3], dtype=torch.float32)
        self._shifts: dict[int, Tensor] = {}  # of each layer's keys of eight bits, [B, H, D]
        self._unpooled_layers: set[int] = set()  # written since their keys were last pooled
        self._unquantised_layers: set[int] = set()
        self._slot_frames: list[int] = []  # latent frame index in each used slot
        self._next_victim = spec.sink_frames
        self._open_slots: list[int] = []

    def restart(self) -> None:
        """Empty again, for another video; what lies in the slots is never read before it is
        written."""
        self._slot_frames, self._open_slots = [], []
        self._next_victim = self.spec.sink_frames
        self._unpooled_layers.clear()
        self._unquantised_layers.clear()
        self._shifts.clear()

    @property
    def visible_frames(self) -> int:
        """Latent frames that attention sees, the open chunk included."""
        return len(self._slot_frames)

    @property
    def slot_frames(self) -> tuple[int, ...]:
        """Absolute latent frame index held by each visible slot."""
        return tuple(self._slot_frames)

    @property
    def open_slots(self) -> tuple[int, ...]:
        """Slots of the chunk being denoised, in frame order."""
        return tuple(self._open_slots)

    def enter(self, frames: Sequence[int]) -> None:
        """Give slots to a chunk, dropping the oldest frames that are not sinks if need be.

        Args:
            frames: absolute latent frame indices of the chunk.

        Raises:
            UserError: the chunk does not fit beside the sinks.
            RuntimeError: the previous chunk was never committed.
        """
        if self._open_slots:
            raise RuntimeError("a chunk is open; commit() it before the next enters")
        self.spec.check_chunk(len(frames), self.visible_frames)
        for frame in frames:
            if self.visible_frames < self.spec.capacity_frames:
                slot = self.visible_frames
                self._slot_frames.append(frame)
            else:
                slot = self._next_victim
                self._slot_frames[slot] = frame
                wrapped = slot + 1 == self.spec.capacity_frames
                self._next_victim = self.spec.sink_frames if wrapped else slot + 1
            self._open_slots.append(slot)

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Store (or store again) the open chunk's keys and values of one layer.

        Args:
            k, v: [B, frames * frame_tokens, H, D]; k rotated with its absolute positions.
        """
        tokens = self.spec.frame_tokens
        if k.shape[1] != len(self._open_slots) * tokens:
            raise RuntimeError(
                f"the open chunk has {len(self._open_slots)} frames of {tokens} tokens, "
                f"got keys of {k.shape[1]} tokens"
            )
        k, v = k.unflatten(1, (-1, tokens)), v.unflatten(1, (-1, tokens))
        for first, start, length in _runs(self._open_slots):
            slots = slice(start, start + length)
            self.keys[layer][:, slots, :tokens] = k[:, first : first + length]
            self.values[layer][:, slots, :tokens] = v[:, first : first + length]
        self._unpooled_layers.add(layer)
        self._unquantised_layers.add(layer)

    def visible(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values that the open chunk attends to, each [B, S, H, D].

        Views of the cache, unless slots are padded: then copies without the padding.
        """
        tokens = self.spec.frame_tokens
        keys = self.keys[layer][:, : self.visible_frames, :tokens]
        values = self.values[layer][:, : self.visible_frames, :tokens]
        return keys.flatten(1, 2), values.flatten(1, 2)

    def visible_slots(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of all visible slots with their padding, each [B, S, H, D]; views."""
        slots = slice(0, self.visible_frames)
        return self.keys[layer][:, slots].flatten(1, 2), self.values[layer][:, slots].flatten(1, 2)

    def visible_pooled(self, layer: int) -> Tensor:
        """Mean keys of all visible blocks, float32 [B, H, blocks, D], a view.

        The open chunk's are made first, if its keys were written since.
        """
        self._pool_open(layer)
        return self.pooled_keys[layer][:, :, : self.visible_frames * self.spec.blocks_per_frame]

    def visible_int8(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys of all visible slots in eight bits, int8 [B, S, H, D], and the scales of their
        blocks, float32 [B, H, blocks]; views.

        The open chunk's are made first, if its keys were written since.
        """
        self._quantise_open(layer)
        slots = slice(0, self.visible_frames)
        blocks = slice(0, self.visible_frames * self.spec.blocks_per_frame)
        return self.int8_keys[layer][:, slots].flatten(1, 2), self.key_scales[layer][:, :, blocks]

    def commit(self) -> None:
        """Close the open chunk after its clean pass; what is made of its keys is final now."""
        for layer in range(len(self.pooled_keys)):
            self._pool_open(layer)
        for layer in range(len(self.int8_keys)):
            self._quantise_open(layer)
        self._open_slots = []

    def _pool_open(self, layer: int) -> None:
        """Pool the open chunk's keys of one layer, unless they are as they were last time."""
        if layer not in self._unpooled_layers:
            return
        self._unpooled_layers.remove(layer)
        per_frame = self.spec.blocks_per_frame
        for _, start, length in _runs(self._open_slots):
            keys = self.keys[layer][:, start : start + length].flatten(1, 2)
            blocks = slice(start * per_frame, (start + length) * per_frame)
            self.pooled_keys[layer][:, :, blocks] = self._pool(keys, self.spec.grid, padded=True)

    def _quantise_open(self, layer: int) -> None:
        """Round the open chunk's keys of one layer, unless they are as they were last time."""
        if layer not in self._unquantised_layers:
            return
        self._unquantised_layers.remove(layer)
        if layer not in self._shifts:
            self._shifts[layer] = self.visible_pooled(layer).mean(2)  # of the first chunk
        per_frame = self.spec.blocks_per_frame
        for _, start, length in _runs(self._open_slots):
            keys, out = (
                x[layer][:, start : start + length].flatten(1, 2)
                for x in (self.keys, self.int8_keys)
            )
            blocks = slice(start * per_frame, (start + length) * per_frame)
            scales = self.key_scales[layer][:, :, blocks]
            self._quantise(keys, self._shifts[layer], self.spec.grid, out=out, scales=scales)


def _runs(slots: Sequence[int]) -> list[tuple[int, int, int]]:
    """Consecutive slots as (offset in the chunk, first slot, count)."""
    runs: list[tuple[int, int, int]] = []
    for offset, slot in enumerate(slots):
        if runs and runs[-1][1] + runs[-1][2] == slot:
            first, start, length = runs[-1]
            runs[-1] = (first, start, length + 1)
        else:
            runs.append((offset, slot, 1))
    return runs
