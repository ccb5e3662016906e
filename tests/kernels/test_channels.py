"""Convolutions and normalisation of channels-last features against torch in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightforcing.kernels import triton_channels, triton_normalisation
from lightforcing.kernels.ops import (
    convolve_channels_triton,
    convolve_to_planes_triton,
    normalise_channels_triton,
)
from lightforcing.kernels.reference_channels import (
    PackedWeights,
    convolve_channels,
    convolve_to_planes,
    frames_of_program,
    normalise_channels,
    pack_enlarging,
    pack_in_cells,
    pack_in_pairs,
    pack_plain,
)
from lightforcing.kernels.triton_channels import (
    ConvolutionTile,
    convolution_tile,
    plan_convolution,
    takes_hopper_kernel,
)

# kind, channels in, channels out, taps in depth
KINDS = [
    ("plain", 32, 32, 3),
    ("plain", 24, 24, 3),
    ("plain", 6, 5, 2),
    ("plain", 64, 192, 1),
    ("plain", 48, 48, 3),
    ("plain", 96, 96, 3),  # on Hopper a kernel of its own
    ("plain", 16, 80, 3),
    ("pairs", 24, 24, 3),  # here too
    ("pairs", 32, 32, 3),
    ("pairs", 8, 5, 2),
    ("cells", 24, 24, 3),
    ("cells", 32, 3, 1),
    ("cells", 7, 3, 3),
    ("phases", 32, 40, 1),
    ("phases", 12, 8, 2),
    ("phases", 48, 24, 1),
    ("phases", 5, 3, 1),
]
EVERY_KIND = pytest.mark.parametrize(
    ("kind", "channels", "results", "taps"), KINDS, ids=lambda value: str(value)
)


def make(
    kind: str, channels: int, results: int, taps: int, **like: object
) -> tuple[Tensor, object]:
    """Weights as a layer has them, and packed. For 'phases' the taps are the growth."""
    first = taps if kind == "phases" else results
    shape = (first, results, channels) if kind == "phases" else (first, channels, taps)
    weight = (torch.randn(*shape, 3, 3) / (channels * 9) ** 0.5).to(**like)
    if kind == "plain":
        return weight, pack_plain(weight)
    if kind == "cells":
        return weight, pack_in_cells(weight)
    if kind == "pairs":
        return weight, pack_in_pairs(weight)
    return weight, pack_enlarging(weight)


def plain_torch(kind: str, x: Tensor, weight: Tensor) -> Tensor:
    """The same as layers would do it: x and the result are [B, D, H, W, C]."""
    features, weight = x.double().movedim(-1, 1), weight.double()
    if kind in ("plain", "pairs", "cells"):
        return F.conv3d(features, weight, padding=(0, 1, 1)).movedim(1, -1)
    doubled = features.repeat_interleave(2, -1).repeat_interleave(2, -2)
    parts = [F.conv3d(doubled, w.unsqueeze(2), padding=(0, 1, 1)) for w in weight]
    return torch.stack(parts, dim=3).flatten(2, 3).movedim(1, -1)


def inside(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """A piece of a larger buffer, which is NaN around it."""
    batch, depth, *rest = shape
    buffer = torch.full((batch, depth + 3, *rest), float("nan"), device=device, dtype=dtype)
    return buffer[:, 2:-1]


@EVERY_KIND
def test_packed_weights_mean_the_layers(kind: str, channels: int, results: int, taps: int) -> None:
    weight, packed = make(kind, channels, results, taps, dtype=torch.float64)
    x = torch.randn(2, 4, 6, 10, channels, dtype=torch.float64)
    expected = plain_torch(kind, x, weight)
    torch.testing.assert_close(convolve_channels(x, packed), expected, rtol=1e-5, atol=1e-6)
    assert packed.out_shape(x) == expected.shape


@EVERY_KIND
@pytest.mark.parametrize("fused", [False, True], ids=["bare", "fused"])
def test_the_kernel_does_what_the_twin_does(
    kind: str,
    channels: int,
    results: int,
    taps: int,
    fused: bool,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    _, packed = make(kind, channels, results, taps, device=device, dtype=dtype)
    x = inside((2, 4, 6, 10, channels), device, dtype)
    x.normal_()
    shape = packed.out_shape(x)
    options: dict = {}
    if fused:
        bias = torch.randn(results, device=device).to(dtype)
        residual = inside(shape, device, dtype).normal_()
        options = {"bias": bias, "residual": residual, "is_rectified": True}
        options["out"] = inside(shape, device, dtype)
    made = convolve_channels_triton(x, packed, **options)
    wide = {k: v.double() if isinstance(v, Tensor) else v for k, v in options.items()}
    wide["out"] = None
    expected = convolve_channels(x.double(), replace(packed, matrix=packed.matrix.double()), **wide)
    tolerance = 1e-4 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(made.double(), expected, rtol=tolerance, atol=tolerance)
    if fused:
        assert made.data_ptr() == options["out"].data_ptr()


@pytest.mark.parametrize(("kind", "taps"), [("plain", 3), ("pairs", 3), ("plain", 2)])
@pytest.mark.parametrize(("depth", "frames"), [(1, 1), (2, 2), (3, 3), (4, 4), (5, 4), (5, 2)])
def test_slices_made_by_one_program_are_those_of_many(
    kind: str, taps: int, depth: int, frames: int, device: torch.device, dtype: torch.dtype
) -> None:
    """Also where the last group overlaps the one before."""
    _, packed = make(kind, 8, 6, taps, device=device, dtype=dtype)
    x = torch.randn(2, depth + taps - 1, 4, 6, 8, device=device).to(dtype)
    bias = torch.randn(6, device=device).to(dtype)
    residual = torch.randn(packed.out_shape(x), device=device).to(dtype)
    made = []
    for count in (1, frames):
        out = torch.empty_like(residual)
        tile = ConvolutionTile(64, count, 4, 2)
        plan_convolution(x, packed, bias, residual, out, tile=tile, is_rectified=True).run()
        made.append(out)
    tolerance = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(made[1], made[0], rtol=tolerance, atol=tolerance)


def test_which_weights_are_for_hoppers_own_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_channels, "_HAS_PAIRS_KERNEL", True)

    def taken(pack: Callable[[Tensor], PackedWeights], *sizes: int) -> bool:
        return takes_hopper_kernel(pack(torch.zeros(*sizes, 3, 3)))

    assert taken(pack_plain, 96, 96, 3) and taken(pack_plain, 96, 16, 3)
    assert not taken(pack_plain, 64, 64, 3)  # few channels gain nothing
    assert not taken(pack_plain, 192, 192, 3)  # several tiles
    assert not taken(pack_plain, 128, 128, 2)
    assert taken(pack_in_pairs, 24, 24, 3) and taken(pack_in_pairs, 32, 32, 3)
    assert not taken(pack_in_pairs, 5, 8, 3)  # a narrower tile
    assert not taken(pack_in_pairs, 24, 20, 3)  # no whole sixteens
    assert not taken(pack_in_pairs, 48, 48, 3)
    assert not taken(pack_enlarging, 1, 96, 96)


def test_programs_make_as_many_slices_as_reads_least() -> None:
    counts = {depth: frames_of_program(depth, 3, 4) for depth in (1, 2, 3, 4, 5, 6, 9, 12)}
    assert counts == {1: 1, 2: 2, 3: 3, 4: 4, 5: 3, 6: 3, 9: 3, 12: 4}
    assert convolution_tile(pack_plain(torch.zeros(48, 48, 3, 3, 3)), 12, 90).frames == 4


@pytest.mark.parametrize("kind", ["plain", "phases"])
def test_offsets_may_take_64_bits(
    kind: str, device: torch.device, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, packed = make(kind, 16, 8, 1, device=device, dtype=dtype)
    x = torch.randn(2, 2, 4, 6, 16, device=device).to(dtype)
    residual = torch.randn(packed.out_shape(x), device=device).to(dtype)
    small = convolve_channels_triton(x, packed, residual=residual)
    monkeypatch.setattr(triton_channels, "_reach", lambda tensor: 2**40)
    large = convolve_channels_triton(x, packed, residual=residual)
    torch.testing.assert_close(large, small, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["plain", "cells"])
def test_planes_are_scaled_and_limited_and_bad_numbers_are_nan(
    kind: str, device: torch.device, dtype: torch.dtype
) -> None:
    _, packed = make(kind, 24, 3, 3, device=device, dtype=dtype)
    x = torch.randn(2, 4, 4, 18, 24, device=device).to(dtype)
    x[1, 3, 2, 17, 5] = float("nan")
    bias = torch.randn(3, device=device).to(dtype)
    made = convolve_to_planes_triton(x, packed, bias=bias, scale=0.5, shift=0.5)
    expected = convolve_to_planes(
        x.double(),
        replace(packed, matrix=packed.matrix.double()),
        bias=bias.double(),
        scale=0.5,
        shift=0.5,
    )
    assert made.shape == (2, 2, 3, 4, 18) and made.dtype == torch.float32
    torch.testing.assert_close(made.double(), expected, rtol=1e-3, atol=1e-3, equal_nan=True)
    assert expected.isnan().any() and expected.nan_to_num(1.0).min() == 0


@pytest.mark.parametrize("channels", [3, 24, 96, 384])
@pytest.mark.parametrize("activated", [True, False])
def test_normalisation(
    channels: int, activated: bool, device: torch.device, dtype: torch.dtype
) -> None:
    x = torch.randn(2, 3, 5, 7, channels, device=device).to(dtype)
    x[0, 0, 0, 0] = 0  # a vector without length
    gain, bias = (torch.randn(channels, device=device).to(dtype) for _ in range(2))
    residual, total = torch.randn_like(x), torch.empty_like(x)
    out = inside(x.shape, device, dtype)
    tolerance = 1e-4 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    close = {"rtol": tolerance, "atol": tolerance}

    made = normalise_channels_triton(x, gain, is_activated=activated)
    expected = normalise_channels(x.double(), gain.double(), is_activated=activated)
    torch.testing.assert_close(made.double(), expected, **close)

    options = {"bias": bias, "residual": residual}
    wide = {name: value.double() for name, value in options.items()}
    sums = torch.empty_like(expected)
    expected = normalise_channels(
        x.double(), gain.double(), **wide, total=sums, is_activated=activated
    )
    made = normalise_channels_triton(
        x, gain, **options, total=total, out=out, is_activated=activated
    )
    assert made.data_ptr() == out.data_ptr()
    torch.testing.assert_close(out.double(), expected, **close)
    torch.testing.assert_close(total.double(), sums, **close)
    total.fill_(float("nan"))
    assert normalise_channels_triton(x, None, **options, total=total) is None
    torch.testing.assert_close(total.double(), sums, **close)


@pytest.mark.parametrize(
    ("kind", "channels"), [("plain", 48), ("plain", 96), ("pairs", 24), ("pairs", 6)]
)
def test_a_convolution_may_normalise_its_result(
    kind: str, channels: int, device: torch.device, dtype: torch.dtype
) -> None:
    _, packed = make(kind, channels, channels, 3, device=device, dtype=dtype)
    x = torch.randn(2, 5, 4, 6, channels, device=device).to(dtype)
    x[1, :, :3, :3] = 0  # one vector without length
    gain = torch.randn(channels, device=device).to(dtype)
    residual = torch.randn(packed.out_shape(x), device=device).to(dtype)
    residual[1, :, 0, 0] = 0
    made = convolve_channels_triton(x, packed, residual=residual, gain=gain)
    wide = replace(packed, matrix=packed.matrix.double())
    total = convolve_channels(x.double(), wide, residual=residual.double())
    tolerance = 1e-4 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    close = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(made.double(), normalise_channels(total, gain.double()), **close)
    twin = convolve_channels(x, packed, residual=residual, gain=gain)
    torch.testing.assert_close(made, twin, **close)


@pytest.mark.parametrize("slices", [1, 2, 5])
@pytest.mark.parametrize("has_past", [True, False])
def test_normalisation_behind_slices_of_before(
    slices: int, has_past: bool, device: torch.device, dtype: torch.dtype
) -> None:
    x = torch.randn(2, slices, 3, 7, 24, device=device).to(dtype)
    gain = torch.randn(24, device=device).to(dtype)
    past = torch.randn(2, 2, 3, 7, 24, device=device).to(dtype) if has_past else None
    made, expected = [], []
    for run, found in ((normalise_channels_triton, made), (normalise_channels, expected)):
        out = inside((2, 2 + slices, 3, 7, 24), device, dtype)
        kept = torch.full((2, 2, 3, 7, 24), float("nan"), device=device, dtype=dtype)
        total = torch.empty_like(x)
        assert run(x, gain, residual=x, total=total, out=out, past=past, kept=kept) is out
        found += [out, kept, total]
    tolerance = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    for ours, theirs in zip(made, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(made[0][:, -2:], made[1], rtol=0, atol=0)
    assert (made[0][:, :2] == (0 if past is None else past)).all()


def test_positions_of_a_norm_may_take_64_bits(
    device: torch.device, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(2, 3, 5, 7, 24, device=device).to(dtype)
    gain = torch.randn(24, device=device).to(dtype)
    past = torch.randn(2, 2, 5, 7, 24, device=device).to(dtype)
    made = []
    for most in (triton_normalisation._MOST, 0):
        monkeypatch.setattr(triton_normalisation, "_MOST", most)
        out = torch.empty(2, 5, 5, 7, 24, device=device, dtype=dtype)
        kept = torch.empty_like(past)
        normalise_channels_triton(x, gain, out=out, past=past, kept=kept)
        made.append((out, kept))
    for small, large in zip(*made, strict=True):
        torch.testing.assert_close(large, small, rtol=0, atol=0)


def test_what_does_not_fit_is_refused(device: torch.device, dtype: torch.dtype) -> None:
    _, packed = make("cells", 8, 4, 2, device=device, dtype=dtype)
    assert isinstance(packed, PackedWeights)
    x = torch.randn(1, 3, 4, 6, 8, device=device).to(dtype)
    vector = torch.zeros(8, device=device, dtype=dtype)
    with pytest.raises(ValueError, match="D of at least 2"):
        convolve_channels_triton(x[:, :1], packed)
    with pytest.raises(ValueError, match="multiples of 2 and 2"):
        convolve_channels_triton(x[:, :, :3].contiguous(), packed)
    with pytest.raises(ValueError, match="dense slices"):
        convolve_channels_triton(x[:, :, :2], packed)
    with pytest.raises(ValueError, match=r"bias must be dense \[4\]"):
        convolve_channels_triton(x, packed, bias=vector)
    with pytest.raises(ValueError, match="residual must be"):
        convolve_channels_triton(x, packed, residual=x)
    both = torch.zeros(packed.out_shape(x), device=device, dtype=dtype)
    with pytest.raises(ValueError, match="results fit one tile"):
        convolve_channels_triton(x, packed, gain=vector[:4])
    with pytest.raises(ValueError, match="out must not be the residual"):
        convolve_channels_triton(x, packed, residual=both, out=both)
    with pytest.raises(ValueError, match=r"gain must be dense \[8\]"):
        normalise_channels_triton(x, vector[:4])
    with pytest.raises(ValueError, match="x must be dense"):
        normalise_channels_triton(x[:, :, ::2], vector)
    with pytest.raises(ValueError, match="kept needs gain and out"):
        normalise_channels_triton(x, None, kept=x)
    with pytest.raises(ValueError, match="past needs kept"):
        normalise_channels_triton(x, vector, past=x)
    with pytest.raises(ValueError, match=r"out must be \(1, 6"):
        normalise_channels_triton(x, vector, kept=x, out=torch.empty_like(x))
    with pytest.raises(ValueError, match=r"\[results, C, taps, 3, 3\]"):
        pack_plain(torch.zeros(4, 8, 1, 3, 1))
    with pytest.raises(ValueError, match=r"\[grow, results, C, 3, 3\]"):
        pack_enlarging(torch.zeros(4, 8, 3, 3))
