"""The Wan VAE's and LightVAE's decoder on a GPU: channels-last, fewer passes over large features.

Normalisation and SiLU are one launch that writes straight into the buffer of the next causal
convolution, behind the two frames of before, so nothing is put together; the same launch adds the
bias and the shortcut of the convolution before it. Doubling the size happens inside the convolution
that follows it, and the last convolution makes frames limited to [0, 1].

Which convolution does it is decided by the number of channels: cuDNN is fast with many, and slow
with few.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.reference_channels import (
    PackedWeights,
    pack_enlarging,
    pack_in_cells,
    pack_in_pairs,
    pack_plain,
)
from .channel_operations import ChannelOperations
from .latent_stats import latent_statistics
from .wan_vae import WanVAE, WanVAEState
from .wan_vae_modules import CausalConv3d, FrameAttention, ResidualBlock, Upsampler

MOST_CHANNELS_IN_PAIRS = 32
"""Causal convolutions up to this width are made for two positions at once. On an H200, bfloat16, 12
frames of 832x480, cuDNN runs 24 channels at 70 TFLOP/s."""

_CACHED_FRAMES = 2
_TO_UNIT_RANGE = {"scale": 0.5, "shift": 0.5}  # pixels are nominally in [-1, 1]


class _Sum(NamedTuple):
    """Features that are `x + bias + residual`, added up by whoever reads them next.

    Attributes:
        x: [B, T, H, W, C], dense; may be overwritten by the sum.
        bias: [C].
        residual: like x.
    """

    x: Tensor
    bias: Tensor | None = None
    residual: Tensor | None = None


class _Stream:
    """The state of one call: hands out buffers with the cached frames, collects the new ones."""

    def __init__(self, run: ChannelOperations, old: Sequence[Tensor] | None) -> None:
        self.run = run
        self.new: list[Tensor] = []
        self._old = old

    @property
    def at_start(self) -> bool:
        return self._old is None

    def _past(self) -> Tensor | None:
        """The cached frames of the next convolution, channels last; None at the start."""
        if self._old is None:
            return None
        # Dense already, unless the state is a plain decoder's.
        return self._old[len(self.new)].permute(0, 2, 3, 4, 1).contiguous()

    def extended(self, like: Tensor, time: int) -> Tensor:
        """Room for [B, 2 + time, H, W, C], with the two frames before these in place."""
        batch, _, *rest = like.shape
        buffer = like.new_empty(batch, _CACHED_FRAMES + time, *rest)
        past = self._past()
        buffer[:, :_CACHED_FRAMES] = 0 if past is None else past
        return buffer

    def keep(self, buffer: Tensor) -> None:
        """Cache the last frames of a filled buffer, in the layout of `WanVAEState`."""
        # A copy, because a view would keep the whole chunk's features alive between calls.
        self.new.append(buffer[:, -_CACHED_FRAMES:].clone().permute(0, 4, 1, 2, 3))

    def normalised(self, features: _Sum, gain: Tensor, *, keep_sum: bool) -> Tensor:
        """The buffer of a causal convolution, filled with SiLU of the normalised sum.

        With `keep_sum`, `features.x` holds the sum afterwards.
        """
        x, bias, residual = features
        batch, time, *rest = x.shape
        buffer = x.new_empty(batch, _CACHED_FRAMES + time, *rest)
        kept = x.new_empty(batch, _CACHED_FRAMES, *rest)
        is_sum = bias is not None or residual is not None
        self.run.normalise(
            x,
            gain,
            bias=bias,
            residual=residual,
            total=x if keep_sum and is_sum else None,
            out=buffer,
            past=self._past(),
            kept=kept,
        )
        self.new.append(kept.permute(0, 4, 1, 2, 3))
        return buffer

    def settled(self, features: _Sum) -> Tensor:
        """The sum itself."""
        x, bias, residual = features
        if bias is not None or residual is not None:
            self.run.normalise(x, None, bias=bias, residual=residual, total=x)
        return x


def _use_channels_last(layer: nn.Conv3d) -> None:
    """Lay a layer's weight out as the fast convolutions want it; the values stay.

    In place, because a copy would hold the memory twice; other users of the layer see the same
    numbers in other strides. A weight that has them already is not touched.
    """
    # A host may run in inference mode, whose tensors nobody could change outside of it.
    with torch.inference_mode(False), torch.no_grad():
        weight = layer.weight.data
        laid_out = weight.contiguous(memory_format=torch.channels_last_3d)
        if weight.is_cuda and laid_out is not weight:
            # Other streams must not be given the place before this one has read it.
            weight.record_stream(torch.cuda.current_stream(weight.device))
        layer.weight.data = laid_out


def _conv3d(layer: nn.Conv3d, features: Tensor, padding: tuple[int, int, int]) -> Tensor:
    """cuDNN's, from [B, D, H, W, C] to the same; without the bias, which costs it a pass."""
    made = F.conv3d(features.permute(0, 4, 1, 2, 3), layer.weight, padding=padding)
    return made.permute(0, 2, 3, 4, 1).contiguous()  # dense already on a GPU


def _pack(weight: Tensor, most_channels: int, *, is_even: bool) -> PackedWeights | None:
    """A causal convolution's weight for our kernel; None where cuDNN is faster."""
    widest = max(weight.shape[:2])
    if is_even and widest <= MOST_CHANNELS_IN_PAIRS:
        return pack_in_pairs(weight)
    return pack_plain(weight) if widest <= most_channels else None


class _Causal:
    """A causal 3x3x3 convolution of a filled buffer.

    Args:
        layer: its weights.
        most_channels: see `ChannelOperations`.
        is_even: the width is whole pairs, as after an enlargement.
    """

    def __init__(self, layer: CausalConv3d, most_channels: int, *, is_even: bool) -> None:
        self._layer = layer
        self._packed = _pack(layer.weight.detach(), most_channels, is_even=is_even)
        if self._packed is None:
            _use_channels_last(layer)

    def normalised(self, stream: _Stream, buffer: Tensor, gain: Tensor) -> Tensor:
        """The buffer of the next causal convolution: SiLU of this one's normalised result."""
        if self._packed is None:
            return stream.normalised(self(stream, buffer), gain, keep_sum=False)
        batch, time, height, width, _ = self._packed.out_shape(buffer)
        made = stream.extended(buffer.new_empty(batch, 0, height, width, len(gain)), time)
        out = made[:, _CACHED_FRAMES:]
        bias = self._layer.bias.detach()
        stream.run.convolve(buffer, self._packed, bias=bias, gain=gain, out=out)
        stream.keep(made)
        return made

    def __call__(self, stream: _Stream, buffer: Tensor, residual: Tensor | None = None) -> _Sum:
        bias = self._layer.bias.detach()
        if self._packed is None:
            return _Sum(_conv3d(self._layer, buffer, (0, 1, 1)), bias, residual)
        # Whoever normalises the sum reads it all anyway: the residual costs less there.
        return _Sum(stream.run.convolve(buffer, self._packed, bias=bias), None, residual)


def _linear(layer: nn.Conv2d | nn.Conv3d, features: Tensor, *, with_bias: bool = True) -> Tensor:
    """A 1x1 convolution of [..., C]."""
    return F.linear(features, layer.weight.flatten(1), layer.bias if with_bias else None)


class _Residual:
    def __init__(self, block: ResidualBlock, most_channels: int, *, is_even: bool) -> None:
        parts = block.residual
        self._gains = tuple(parts[name].gamma.detach().flatten() for name in ("0", "3"))
        self._first = _Causal(parts["2"], most_channels, is_even=is_even)
        self._second = _Causal(parts["6"], most_channels, is_even=is_even)
        self._shortcut = block.shortcut

    def __call__(self, stream: _Stream, features: _Sum) -> _Sum:
        buffer = stream.normalised(features, self._gains[0], keep_sum=True)
        buffer = self._first.normalised(stream, buffer, self._gains[1])
        shortcut = features.x
        if isinstance(self._shortcut, nn.Conv3d):
            shortcut = _linear(self._shortcut, shortcut)
        return self._second(stream, buffer, residual=shortcut)


class _Attention:
    def __init__(self, block: FrameAttention) -> None:
        self._block = block
        self._gain = block.norm.gamma.detach().flatten()

    def __call__(self, stream: _Stream, features: _Sum) -> _Sum:
        x = stream.settled(features)
        normal = stream.run.normalise(x, self._gain, is_activated=False)
        images = normal.flatten(2, 3).flatten(0, 1).unsqueeze(1)  # [B*T, 1, H*W, C]
        query, key, value = _linear(self._block.to_qkv, images).chunk(3, dim=-1)
        attended = F.scaled_dot_product_attention(query, key, value)
        projected = _linear(self._block.proj, attended, with_bias=False)
        return _Sum(projected.reshape(x.shape), self._block.proj.bias.detach(), x)


class _Enlarging:
    def __init__(self, block: Upsampler) -> None:
        self._time_conv = block.time_conv
        if self._time_conv is not None:
            _use_channels_last(self._time_conv)
        layer = block.resample["1"]
        self._packed = pack_enlarging(layer.weight.detach()[None])
        self._bias = layer.bias.detach()

    def _grow(self, stream: _Stream, x: Tensor) -> Tensor:
        # The first frame of a stream stays one and is no part of the history.
        first = 1 if stream.at_start else 0
        count = x.shape[1] - first
        buffer = stream.extended(x, count)
        buffer[:, _CACHED_FRAMES:].copy_(x[:, first:])
        stream.keep(buffer)
        if count == 0:
            return x
        pairs = _conv3d(self._time_conv, buffer, (0, 0, 0)).unflatten(-1, (2, -1))
        grown = x.new_empty(x.shape[0], first + 2 * count, *x.shape[2:])
        grown[:, :first].copy_(x[:, :first])
        bias = self._time_conv.bias.detach().unflatten(0, (2, -1))
        for half in range(2):
            torch.add(pairs[..., half, :], bias[half], out=grown[:, first + half :: 2])
        return grown

    def __call__(self, stream: _Stream, features: _Sum) -> _Sum:
        x = stream.settled(features)
        if self._time_conv is not None:
            x = self._grow(stream, x)
        return _Sum(stream.run.convolve(x, self._packed, bias=self._bias))


def _blocks_of(
    layers: Iterable[nn.Module], most_channels: int
) -> Iterator[Callable[[_Stream, _Sum], _Sum]]:
    is_even = False  # a latent frame may have any size
    for layer in layers:
        if isinstance(layer, ResidualBlock):
            yield _Residual(layer, most_channels, is_even=is_even)
        elif isinstance(layer, FrameAttention):
            yield _Attention(layer)
        else:
            yield _Enlarging(layer)
            is_even = True


class FastWanDecoder:
    """The decoder of a Wan VAE or LightVAE, channels-last.

    Args:
        network: its wide convolutions' weights are laid out anew in place, those for our kernels
            are packed once, here; neither changes a value.
        operations: the kernels, or their torch twins.
    """

    def __init__(self, network: WanVAE, operations: ChannelOperations) -> None:
        self._run = operations
        self._conv2 = network.conv2
        self._mean, self._deviation = latent_statistics(network.conv2.weight)
        decoder = network.decoder
        most = operations.most_channels
        self._first = _Causal(decoder.conv1, most, is_even=False)
        self._blocks = list(_blocks_of((*decoder.middle, *decoder.upsamples), most))
        self._gain = decoder.head["0"].gamma.detach().flatten()
        self._last = pack_in_cells(decoder.head["2"].weight.detach())
        self._last_bias = decoder.head["2"].bias.detach()

    def decode(self, latents: Tensor, state: WanVAEState | None) -> tuple[Tensor, WanVAEState]:
        """Decode consecutive latent frames; like `WanVAE.decode`, but mapped to [0, 1].

        Args:
            latents: normalised, [B, 16, T, h, w], T >= 1, in the network's dtype.
            state: what the call for the frames before returned; None at the start of a stream.
                Those of `WanVAE.decode` serve too.

        Returns:
            Frames [B, t, 3, 8 h, 8 w], float32 in [0, 1], infinity and NaN as NaN, with
            t = 1 + 4 (T - 1) at the start of a stream and 4 T later; and the new state.
        """
        stream = _Stream(self._run, state.features if state else None)
        own = (latents.float() * self._deviation + self._mean).to(latents.dtype)
        x = self._conv2(own).permute(0, 2, 3, 4, 1)
        buffer = stream.extended(x, x.shape[1])
        buffer[:, _CACHED_FRAMES:].copy_(x)
        stream.keep(buffer)
        features = self._first(stream, buffer)
        for block in self._blocks:
            features = block(stream, features)
        buffer = stream.normalised(features, self._gain, keep_sum=False)
        frames = self._run.convolve_to_planes(
            buffer, self._last, bias=self._last_bias, **_TO_UNIT_RANGE
        )
        seen = latents.shape[2] + (state.latents_seen if state else 0)
        return frames, WanVAEState(tuple(stream.new), seen)
