"""Convolutions and normalisation of channels-last features, in plain torch, and packed weights.

Features are [B, D, H, W, C]: batch, depth, height, width, channels, channels dense. A convolution
sees a window that slides over depth (no padding: the caller puts the earlier slices in front) and
over height and width (a border of zeros, so that 3x3 keeps the size).

`PackedWeights` describes four kinds of window with one set of numbers:

- plain: a 3x3 window makes one position.
- in pairs: a 3x4 window makes two positions of a row. A third more products, but few channels fill
  the hardware better.
- in cells: a 4x4 window makes the 2x2 positions in its middle at once. More products, many with
  zeros, but the input is read 2.25 times less often and few channels fill the hardware better.
- enlarging: 3x3 after doubling height and width by repetition, without the doubled input. In four
  phases, one for each of the positions that come from one: its window is 2x2, of summed weights,
  with 2.25 times fewer products.

All arithmetic of the twins is in float32 or wider and rounded once, at the end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

_SMALLEST_TILE = 16  # what a matrix instruction takes at least
_NORM_EPS = 1e-12


@dataclass(frozen=True)
class PackedWeights:
    """Weights of one convolution as matrices that a kernel reads in order.

    Attributes:
        matrix: [phases, depth_taps * rows * run, columns_out], where a run is the `columns` input
            positions of one row of the window, channels inside, padded with zeros to whole
            `block_k`; columns_out are the results, padded to whole `block_n`.
        channels, out_channels: of input and output features.
        depth_taps, rows, columns: size of the window.
        step: distance of two windows in height and in width, in input positions.
        cell: output positions of each window in height and in width.
        grow: output slices for each input slice.
        is_phased: whether every output position of a cell has a window and a matrix of its own.
        block_n, block_k: what the matrix was padded to.
    """

    matrix: Tensor
    channels: int
    out_channels: int
    depth_taps: int
    rows: int
    columns: int
    step: tuple[int, int]
    cell: tuple[int, int]
    grow: int
    is_phased: bool
    block_n: int
    block_k: int

    @property
    def results(self) -> int:
        """Numbers that one matrix makes of one window."""
        return self.out_channels * (1 if self.is_phased else math.prod(self.cell))

    @property
    def run(self) -> int:
        """Numbers of one row of the window, without padding."""
        return self.columns * self.channels

    def out_shape(self, x: Tensor) -> tuple[int, int, int, int, int]:
        """Shape of the output for an input, checked.

        Raises:
            ValueError: x is not [B, D, H, W, channels] with enough slices and fitting sizes.
        """
        if x.ndim != 5 or x.shape[-1] != self.channels or x.shape[1] < self.depth_taps:
            raise ValueError(
                f"x must be [B, D, H, W, {self.channels}] with D of at least {self.depth_taps}, "
                f"got {tuple(x.shape)}"
            )
        batch, depth, height, width, _ = x.shape
        if height % self.step[0] or width % self.step[1]:
            raise ValueError(
                "height and width must be multiples of {} and {}, got {} and {}".format(
                    *self.step, height, width
                )
            )
        tall, wide = (cell // step for cell, step in zip(self.cell, self.step, strict=True))
        slices = (depth - self.depth_taps + 1) * self.grow
        return batch, slices, height * tall, width * wide, self.out_channels


def _blocks(results: int, run: int) -> tuple[int, int]:
    """Tile sizes along results and along a run."""
    if results > 64:
        # 192 is three tiles of 64; two of 128 would compute a quarter for nothing.
        block_n = 64 if results % 128 and results % 64 == 0 else 128
    else:
        block_n = max(_SMALLEST_TILE, 1 << (results - 1).bit_length())
    block_k = next((size for size in (64, 32) if run % size == 0), 0)
    return block_n, block_k or min(max(_SMALLEST_TILE, 1 << (run - 1).bit_length()), 32)


def _pack(
    taps: Tensor,
    dtype: torch.dtype,
    out_channels: int,
    *,
    step: tuple[int, int],
    cell: tuple[int, int],
    grow: int,
    is_phased: bool,
) -> PackedWeights:
    """From [phases, results, channels, depth taps, rows, columns]."""
    _, results, channels, depth_taps, rows, columns = taps.shape
    run = columns * channels
    block_n, block_k = _blocks(results, run)
    lines = taps.permute(0, 3, 4, 5, 2, 1).flatten(1, 2).flatten(2, 3)
    lines = F.pad(lines, (0, -results % block_n, 0, -run % block_k))
    matrix = lines.flatten(1, 2).to(dtype).contiguous()
    return PackedWeights(matrix, channels, out_channels, depth_taps, rows, columns, step, cell,
                         grow, is_phased, block_n, block_k)  # fmt: skip


def _check_weight(weight: Tensor) -> None:
    if weight.ndim != 5 or weight.shape[-2:] != (3, 3):
        raise ValueError(f"weight must be [results, C, taps, 3, 3], got {tuple(weight.shape)}")


def _pack_grouped(weight: Tensor, cell: tuple[int, int]) -> PackedWeights:
    """One window for all positions of a cell."""
    _check_weight(weight)
    results, channels, depth_taps = weight.shape[:3]
    high, wide = cell
    taps = weight.new_zeros(1, high, wide, results, channels, depth_taps, 2 + high, 2 + wide)
    for y in range(high):
        for x in range(wide):
            taps[0, y, x, ..., y : y + 3, x : x + 3] = weight
    taps = taps.flatten(1, 3)
    return _pack(taps, weight.dtype, results, step=cell, cell=cell, grow=1, is_phased=False)


def pack_plain(weight: Tensor) -> PackedWeights:
    """Weights [results, C, depth taps, 3, 3] for a window per position.

    Raises:
        ValueError: another shape.
    """
    return _pack_grouped(weight, (1, 1))


def pack_in_cells(weight: Tensor) -> PackedWeights:
    """Weights [results, C, depth taps, 3, 3] for a window per 2x2 positions.

    Raises:
        ValueError: another shape.
    """
    return _pack_grouped(weight, (2, 2))


def pack_in_pairs(weight: Tensor) -> PackedWeights:
    """Weights [results, C, depth taps, 3, 3] for a window per two positions of a row.

    Raises:
        ValueError: another shape.
    """
    return _pack_grouped(weight, (1, 2))


def _sums() -> Tensor:
    """[2, 2, 3]: which of three taps on doubled rows fall on which original row, by parity."""
    sums = torch.zeros(2, 2, 3)
    for parity in range(2):
        for tap in range(3):
            # The window of a phase starts at the row before, or at the own one for odd rows.
            sums[parity, (parity + tap + 1) // 2 - parity, tap] = 1
    return sums


def pack_enlarging(weight: Tensor) -> PackedWeights:
    """Weights for doubling height and width by repetition, then 3x3, for one or more slices each.

    Args:
        weight: [grow, results, C, 3, 3]; output slice `d * grow + g` is made with weight g.

    Raises:
        ValueError: another shape.
    """
    if weight.ndim != 5 or weight.shape[-2:] != (3, 3):
        raise ValueError(f"weight must be [grow, results, C, 3, 3], got {tuple(weight.shape)}")
    grow, results = weight.shape[:2]
    sums = _sums().to(weight.device)
    # Summed in float32: rounded once.
    taps = torch.einsum("yas,xbt,grcst->gyxrcab", sums, sums, weight.float())
    taps = taps.flatten(0, 2).unsqueeze(3)  # a single tap in depth
    return _pack(taps, weight.dtype, results, step=(1, 1), cell=(2, 2), grow=grow, is_phased=True)


def frames_of_program(depth: int, taps: int, most: int) -> int:
    """How many slices a program should make, so that few are read in all."""
    possible = range(min(depth, most), 0, -1)
    return min(possible, key=lambda frames: -(-depth // frames) * (frames + taps - 1))


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _convolve(x: Tensor, weights: PackedWeights) -> Tensor:
    """[B, D', H', W', results] unrounded."""
    wide = _wide(x)
    shape = weights.out_shape(x)
    matrix, sizes = weights.matrix.to(wide), (weights.depth_taps, weights.rows)
    taps = matrix.unflatten(1, (*sizes, -1))[:, :, :, : weights.run, : weights.results]
    taps = taps.unflatten(3, (weights.columns, -1)).permute(0, 5, 4, 1, 2, 3)
    features = x.to(wide).permute(0, 4, 1, 2, 3)
    stride = (1, *weights.step)
    if not weights.is_phased:
        padded = F.pad(features, (1, 1, 1, 1))
        made = F.conv3d(padded, taps[0], stride=stride)
        made = made.unflatten(1, (*weights.cell, -1)).permute(0, 4, 5, 1, 6, 2, 3)
        return made.reshape(shape)
    out = x.new_empty(shape, dtype=wide)
    for phase, tap in enumerate(taps):
        y, left = phase // 2 % 2, phase % 2
        padded = F.pad(features, (1 - left, left, 1 - y, y))
        part = F.conv3d(padded, tap, stride=stride).permute(0, 2, 3, 4, 1)
        out[:, phase // 4 :: weights.grow, y::2, left::2] = part
    return out


def _normalised(value: Tensor, gain: Tensor) -> Tensor:
    norm = value.square().sum(-1, keepdim=True).sqrt()
    return value * (value.shape[-1] ** 0.5 / norm.clamp_min(_NORM_EPS)) * gain.to(value.dtype)


def convolve_channels(
    x: Tensor,
    weights: PackedWeights,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    gain: Tensor | None = None,
    is_rectified: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Convolution, bias, sum with other features and rectification in one.

    Args:
        x: [B, D, H, W, C]; whole slices, whose batches may lie apart.
        weights: packed by one of the functions here, in x's dtype.
        bias: [out channels].
        residual: added after the bias, in the output's shape, slices as in x.
        gain: [out channels]; the sum is normalised with it and activated, as `normalise_channels`
            does, before it is rounded.
        is_rectified: negative results become zero.
        out: where the result goes, slices as in x, not the residual; None: new memory.

    Returns:
        [B, (D - depth taps + 1) * grow, H', W', out channels], in x's dtype.

    Raises:
        ValueError: shapes that do not fit.
    """
    made = _convolve(x, weights)
    if bias is not None:
        made = made + bias.to(made.dtype)
    if residual is not None:
        made = made + residual.to(made.dtype)
    if gain is not None:
        made = F.silu(_normalised(made, gain))
    if is_rectified:
        made = made.relu()
    if out is None:
        return made.to(x.dtype)
    return out.copy_(made)


def convolve_to_planes(
    x: Tensor, weights: PackedWeights, *, bias: Tensor, scale: float, shift: float
) -> Tensor:
    """Convolution to a few planes, `scale * value + shift`, limited to [0, 1].

    Args:
        x: [B, D, H, W, C]; whole slices, whose batches may lie apart.
        weights: packed by one of the functions here, in x's dtype.
        bias: [out channels].
        scale, shift: applied after the bias.

    Returns:
        [B, D - depth taps + 1, out channels, H', W'], float32 (float64 for float64); infinity and
        NaN are NaN.

    Raises:
        ValueError: shapes that do not fit.
    """
    made = (_convolve(x, weights) + bias.to(_wide(x))) * scale + shift
    made = torch.where(made.isinf(), torch.nan, made.clamp(0, 1))
    return made.movedim(-1, 2).contiguous()


def check_extension(
    x: Tensor, gain: Tensor | None, out: Tensor | None, past: Tensor | None, kept: Tensor | None
) -> None:
    """What `normalise_channels` asks of the output and of slices in front of it.

    Raises:
        ValueError: shapes that do not fit, or one given without another.
    """
    batch, slices, *rest = x.shape
    if kept is None:
        if past is not None:
            raise ValueError("past needs kept")
        if out is not None and out.shape != x.shape:
            raise ValueError(f"out must be {tuple(x.shape)}, got {tuple(out.shape)}")
        return
    if gain is None or out is None:
        raise ValueError("kept needs gain and out")
    count = kept.shape[1]
    for name, value, expected in (
        ("kept", kept, count),
        ("past", kept if past is None else past, count),
        ("out", out, slices + count),
    ):
        if value.shape != (batch, expected, *rest):
            raise ValueError(f"{name} must be {(batch, expected, *rest)}, got {tuple(value.shape)}")


def normalise_channels(
    x: Tensor,
    gain: Tensor | None,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    total: Tensor | None = None,
    out: Tensor | None = None,
    past: Tensor | None = None,
    kept: Tensor | None = None,
    is_activated: bool = True,
) -> Tensor | None:
    """Sum, then every position's channels at the length sqrt(C) times a gain, then SiLU.

    Args:
        x: [B, D, H, W, C], dense.
        gain: [C]; None: only the sum is wanted.
        bias: [C], added to x.
        residual: like x, added to x.
        total: like x, where the sum goes; None: it is not kept. May be x or the residual.
        out: where the result goes; whole slices, whose batches may lie apart; None: new memory.
        past: with `kept`, the slices that come before the result, dense; None: zeros.
        kept: [B, P, H, W, C], dense. With it `out` has P slices more than x: first those of the
            past, then the result; and its last P are copied here, to be the past of the next call.
        is_activated: apply SiLU, `v / (1 + exp(-v))`.

    Returns:
        The normalised features, like x, or `out`; None without a gain.

    Raises:
        ValueError: shapes that do not fit.
    """
    check_extension(x, gain, out, past, kept)
    wide = _wide(x)
    value = x.to(wide)
    if bias is not None:
        value = value + bias.to(wide)
    if residual is not None:
        value = value + residual.to(wide)
    if total is not None:
        total.copy_(value)
    if gain is None:
        return None
    value = _normalised(value, gain)
    if is_activated:
        value = F.silu(value)
    if kept is None:
        return value.to(x.dtype) if out is None else out.copy_(value)
    count = kept.shape[1]
    out[:, :count] = 0 if past is None else past
    out[:, count:] = value
    kept.copy_(out[:, -count:])
    return out
