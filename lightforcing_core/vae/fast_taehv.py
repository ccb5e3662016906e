"""TAEHV's decoder on a GPU: one launch per convolution, features channels-last throughout.

What plain torch does in passes over large features happens inside the convolutions here: a
`MemBlock` reads a frame and the one before it as a window of two in depth, so no pairs are put
together; its shortcut and rectifications are applied in the accumulator; growing in time, doubling
the size and the convolution after them are linear and become one convolution with folded weights,
so the doubled features never exist; the last one makes planes limited to [0, 1].
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.reference_channels import (
    PackedWeights,
    pack_enlarging,
    pack_in_cells,
    pack_plain,
)
from .channel_operations import ChannelOperations
from .taehv import TAEHV, TAEHVDecoderState

_BLOCKS_PER_STAGE = 3
_FRAMES_AT_ONCE = 2  # of the last stage, before they grow in time and size


def _pack(conv: torch.nn.Conv2d, *, frames: int = 1) -> PackedWeights:
    """A 3x3 convolution of one frame, or of a frame and the one before it."""
    weight = conv.weight.detach()
    if frames == 2:
        # The layer's channels are the frame, then the previous one; in depth the order is time's.
        now, previous = weight.chunk(2, dim=1)
        return pack_plain(torch.stack([previous, now], dim=2))
    return pack_plain(weight.unsqueeze(2))


class _Block:
    """One MemBlock's weights, packed."""

    def __init__(self, block: torch.nn.Module) -> None:
        convs = block.conv[0], block.conv[2], block.conv[4]
        first, second, third = convs
        self.packed = _pack(first, frames=2), _pack(second), _pack(third)
        self.biases = tuple(conv.bias.detach() for conv in convs)

    def __call__(self, run: ChannelOperations, extended: Tensor, out: Tensor) -> None:
        """`extended` is [B, 1 + T, h, w, C] with the previous frame first; out [B, T, h, w, C]."""
        first, second, third = self.packed
        biases = self.biases
        hidden = run.convolve(extended, first, bias=biases[0], is_rectified=True)
        hidden = run.convolve(hidden, second, bias=biases[1], is_rectified=True)
        run.convolve(
            hidden, third, bias=biases[2], residual=extended[:, 1:], is_rectified=True, out=out
        )


def _fold_growth(grow: torch.nn.Conv2d, stride: int, conv: torch.nn.Conv2d) -> Tensor:
    """[stride, out channels, channels, 3, 3]: a convolution of each frame that one grows to."""
    growths = grow.weight.detach().float().flatten(1).unflatten(0, (stride, -1))
    folded = torch.einsum("omyx,smc->socyx", conv.weight.detach().float(), growths)
    return folded.to(conv.weight.dtype)


class FastTAEHVDecoder:
    """The decoder of a TAEHV network with weights packed for channels-last kernels.

    Args:
        network: its decoder's weights are read once, here.
        operations: the kernels, or their torch twins.
    """

    def __init__(self, network: TAEHV, operations: ChannelOperations) -> None:
        self._run = operations
        layers = network.decoder
        self._clamp = layers[0]
        self._first = pack_plain(layers[1].weight.detach().unsqueeze(2))
        self._first_bias = layers[1].bias.detach()
        self._stages: list[tuple[list[_Block], PackedWeights]] = []
        for start in (3, 9, 15):
            blocks = [_Block(layers[start + i]) for i in range(_BLOCKS_PER_STAGE)]
            grow, conv = layers[start + _BLOCKS_PER_STAGE + 1], layers[start + 5]
            folded = _fold_growth(grow.conv, grow.stride, conv)
            self._stages.append((blocks, pack_enlarging(folded)))
        self._last = pack_in_cells(layers[22].weight.detach().unsqueeze(2))
        self._last_bias = layers[22].bias.detach()

    def decode(
        self, latents: Tensor, state: TAEHVDecoderState | None
    ) -> tuple[Tensor, TAEHVDecoderState]:
        """Decode consecutive latent frames; like `TAEHV.decode`, but limited to [0, 1].

        Args:
            latents: [B, T, latent channels, h, w], T >= 1, in the network's dtype.
            state: what the call for the frames before returned; None at the start of a stream.
                Those of `TAEHV.decode` serve too.

        Returns:
            Frames [B, 4 T, 3, 8 h, 8 w], float32 in [0, 1], infinity and NaN as NaN, not trimmed;
            and the new state.
        """
        memories: list[Tensor] = []

        def extended(shape: tuple[int, ...]) -> Tensor:
            """Room for the frames of a MemBlock, with the frame before them in place."""
            batch, time, *rest = shape
            buffer = latents.new_empty(batch, time + 1, *rest)
            if state is None:
                buffer[:, 0].zero_()
            else:
                buffer[:, 0].copy_(state.memories[len(memories)].permute(0, 2, 3, 1))
            return buffer

        # Contiguous, because the permuted input is not and the clamp keeps its order.
        features = self._clamp(latents).permute(0, 1, 3, 4, 2).contiguous()
        convolution, bias = self._first, self._first_bias
        for stage, (blocks, enlarging) in enumerate(self._stages):
            shape = convolution.out_shape(features)
            buffer = extended(shape)
            self._run.convolve(
                features, convolution, bias=bias, is_rectified=stage == 0, out=buffer[:, 1:]
            )
            for index, block in enumerate(blocks):
                is_last = index == len(blocks) - 1
                # A copy, because a view would keep the whole chunk's features alive.
                memories.append(buffer[:, -1].clone().permute(0, 3, 1, 2))
                target = buffer.new_empty(shape) if is_last else extended(shape)
                block(self._run, buffer, target if is_last else target[:, 1:])
                buffer = target
            features, convolution, bias = buffer, enlarging, None
        # Piece by piece: features of all frames at full size are the largest thing by far.
        frames = torch.cat(
            [
                self._run.convolve_to_planes(
                    self._run.convolve(part, convolution, is_rectified=True),
                    self._last,
                    bias=self._last_bias,
                    scale=1.0,
                    shift=0.0,
                )
                for part in features.split(_FRAMES_AT_ONCE, dim=1)
            ],
            dim=1,
        )
        seen = latents.shape[1] + (state.latents_seen if state else 0)
        return frames, TAEHVDecoderState(tuple(memories), seen)
