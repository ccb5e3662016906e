"""Linear layers with eight-bit products: their numbers, their products, a forward through them."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from torch import Tensor, nn

from lightforcing.lightforcing_core.attention import dense_attention
from lightforcing.lightforcing_core.errors import UserError
from lightforcing.lightforcing_core.fast import linears
from lightforcing.lightforcing_core.fast.engine import ForwardEngine
from lightforcing.lightforcing_core.fast.linears import (
    EightBitFeedForward,
    EightBitLinear,
    eight_bit_obstacle,
    eight_bit_speed,
    with_eight_bit_linears,
)
from lightforcing.lightforcing_core.fast.operations import fused_operations
from lightforcing.lightforcing_core.fast.stack import FusedBlocks
from lightforcing.lightforcing_core.noise import SeededNoise
from lightforcing.lightforcing_core.rollout import RolloutSettings, rollout
from lightforcing.lightforcing_core.sparse_settings import (
    SparseSettings,
    make_policy,
    make_schedule,
)
from lightforcing.lightforcing_core.wan.config import WanConfig
from lightforcing.lightforcing_core.wan.forward import prepare_text, wan_forward
from lightforcing.lightforcing_core.wan.modules import WanModel

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NUMBERS = pytest.mark.parametrize("numbers", [torch.float8_e4m3fn, torch.int8], ids=["fp8", "int8"])
# What rounding rows of normal numbers to eight bits costs: e4m3 has steps of 1/8 of a number, int8
# of 1/127 of the largest in its row.
TOLERANCE = {torch.float8_e4m3fn: 0.05, torch.int8: 0.02}


@pytest.fixture
def tree() -> WanModel:
    torch.manual_seed(3)
    config = WanConfig(
        dim=96, ffn_dim=64, num_heads=2, num_layers=2, text_dim=16, text_len=8, freq_dim=16
    )
    return WanModel(config).requires_grad_(False)


def video(tree: nn.Module, like: WanModel, *, fused: bool) -> Tensor:
    torch.manual_seed(1)
    with torch.no_grad():
        text = prepare_text(like, torch.randn(1, 5, 16))
    noise = SeededNoise(1, (1, 16, 8, 10))
    settings = RolloutSettings(4, 2, (1000.0, 500.0))
    engine = ForwardEngine(tree) if fused else None
    with torch.no_grad():
        chunks = rollout(tree, settings, text, noise, engine=engine)
        return torch.cat([chunk.latents for chunk in chunks], dim=2)


def skip_if_it_cannot(numbers: torch.dtype) -> None:
    if DEVICE.type == "cuda" and (obstacle := eight_bit_obstacle(DEVICE, torch.bfloat16, numbers)):
        pytest.skip(obstacle)


def dequantised(layer: EightBitLinear) -> Tensor:
    return layer.weight.double() * layer.scale.double().t()


@NUMBERS
@pytest.mark.parametrize("per_channel", [True, False], ids=["per channel", "per tensor"])
def test_given_numbers_stay_bit_for_bit(numbers: torch.dtype, per_channel: bool) -> None:
    weight = (torch.randn(48, 32) * 40).clamp(-127, 127).to(numbers)
    scale = torch.rand(48, 1) if per_channel else torch.tensor(0.02)
    layer = EightBitLinear.of(weight, scale, None, torch.bfloat16)
    joined = EightBitLinear(layer, layer, numbers=numbers)
    for got in (layer, joined.part(0, 48), joined.part(48, 96)):
        assert got.weight.dtype == numbers and got.scale.shape == (1, 48)
        assert torch.equal(got.weight.view(torch.uint8), weight.view(torch.uint8))
        assert torch.equal(dequantised(got), weight.double() * scale.double())


@NUMBERS
@pytest.mark.parametrize("rows", [2, 40])
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no bias"])
def test_a_product_is_that_of_the_dequantised_numbers(
    numbers: torch.dtype, rows: int, has_bias: bool
) -> None:
    """Of both sides: nothing but the result is rounded."""
    skip_if_it_cannot(numbers)
    weight = (torch.randn(48, 64, device=DEVICE) * 40).clamp(-127, 127).to(numbers)
    bias = torch.randn(48, device=DEVICE).bfloat16() if has_bias else None
    layer = EightBitLinear.of(weight, torch.rand(48, 1), bias, torch.bfloat16)
    x = torch.randn(2, rows // 2, 64, device=DEVICE).bfloat16()
    x[0, 0] = 0
    rounded, scale = layer.round(x.flatten(0, 1))
    exact = (rounded.double() * scale.double()) @ dequantised(layer).t()
    if bias is not None:
        exact += bias.double()
    got = layer(x)
    assert got.shape == (2, rows // 2, 48) and got.dtype == torch.bfloat16
    error = (got.double().flatten(0, 1) - exact).abs()
    assert (error <= 2**-8 * exact.abs() + 1e-3 * exact.abs().max()).all()


@NUMBERS
def test_rounding_a_layer_costs_little(numbers: torch.dtype) -> None:
    torch.manual_seed(0)
    skip_if_it_cannot(numbers)
    linear = nn.Linear(256, 96, device=DEVICE).bfloat16().requires_grad_(False)
    x = torch.randn(50, 256, device=DEVICE).bfloat16()
    exact = linear.double()(x.double())
    got = EightBitLinear(linear.bfloat16(), numbers=numbers)(x)
    assert 0 < (got.double() - exact).norm() / exact.norm() < TOLERANCE[numbers]


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("replace", [False, True])
def test_a_video_in_int8_is_within_five_percent(tree: WanModel, fused: bool, replace: bool) -> None:
    """By the forward as it stands and by the one that rounds where rows are made."""
    like = copy.deepcopy(tree)
    expected = video(tree, like, fused=False)
    fast = with_eight_bit_linears(tree, torch.int8, replace=replace)
    got = video(fast, like, fused=fused)
    assert 0 < (got - expected).norm() / expected.norm() < 0.05
    assert (fast is tree) == replace


def strong(seed: int, *, has_bias: bool) -> WanModel:
    """A tree in int8 whose blocks, biases and modulation all show in what it computes."""
    torch.manual_seed(seed)
    config = WanConfig(
        dim=96, ffn_dim=64, num_heads=2, num_layers=2, text_dim=16, text_len=8, freq_dim=16
    )
    tree = WanModel(config).requires_grad_(False)
    for block in tree.blocks:
        for layer in block.modules():
            if isinstance(layer, nn.Linear):
                layer.bias.normal_(0, 0.5)
        block.modulation.normal_()
        attention, crossed = block.self_attn, block.cross_attn
        for norm in (attention.norm_q, attention.norm_k, crossed.norm_q, block.norm3):
            norm.weight.normal_(1, 0.3)
        block.norm3.bias.normal_(0, 0.3)
        crossed.norm_k.weight.mul_(6)  # so that it matters what the text is asked
    with_eight_bit_linears(tree, torch.int8, replace=True)
    for layer in tree.blocks.modules() if not has_bias else ():
        if isinstance(layer, EightBitLinear):
            layer.bias = None
    return tree


@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("batch", [1, 2])
def test_scaling_products_where_they_are_read_changes_nothing(has_bias: bool, batch: int) -> None:
    tree = strong(1, has_bias=has_bias)
    x, timesteps = torch.randn(batch, 16, 2, 8, 10), torch.full((batch, 2), 500.0)
    timesteps[:, 1] = 300
    with torch.no_grad():
        text = prepare_text(tree, torch.randn(batch, 5, 16))
        arguments = tree, x, timesteps, range(2), text, lambda _, *heads: dense_attention(*heads)
        plain = wan_forward(*arguments)
        fused = wan_forward(*arguments, None, FusedBlocks(fused_operations(CPU)))
    # A number that lies between two of eight bits may be rounded either way, which is rare.
    assert (fused - plain).norm() / plain.norm() < 5e-3


@pytest.mark.parametrize("sparse", [None, "half"], ids=["dense", "sparse"])
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_video_with_projections_scaled_where_they_are_read(
    sparse: str | None, has_bias: bool, batch: int
) -> None:
    """And once more by an engine that keeps its memory, whose layers have other numbers by then."""
    tree = strong(2, has_bias=has_bias)
    policy = make_policy(keep_frames=3, keep_near=1)
    settings = RolloutSettings(
        6,
        2,
        (1000.0, 500.0),
        sparse=sparse and SparseSettings(make_schedule(0.5), policy, 8, 8, backend="reference"),
    )
    with torch.no_grad():
        text = prepare_text(tree, torch.randn(batch, 5, 16))
    engine = ForwardEngine(tree, keep=True)
    for _ in range(2):
        plain, fused = (
            torch.cat(
                [chunk.latents for chunk in rollout(tree, settings, text, noise, engine=one)], 2
            )
            for one, noise in ((one, SeededNoise(1, (batch, 16, 8, 10))) for one in (None, engine))
        )
        assert (fused - plain).norm() / plain.norm() < 0.01
        for block in tree.blocks:
            block.self_attn.o.scale.mul_(1.5)
            block.modulation.normal_()
            if has_bias:
                block.ffn.second.bias.normal_()


def test_the_tree_given_stays_unless_it_is_to_be_replaced(tree: WanModel) -> None:
    before = {name: module for name, module in tree.named_modules()}
    fast = with_eight_bit_linears(tree, torch.int8)
    assert dict(tree.named_modules()) == before
    assert isinstance(fast.blocks[1].ffn, EightBitFeedForward)
    assert fast.head is tree.head and fast.blocks[0].cross_attn.k is tree.blocks[0].cross_attn.k
    assert fast.blocks[0].self_attn.q.weight.data_ptr() == (
        fast.blocks[0].self_attn.qkv.weight.data_ptr()
    )


def test_replacing_never_holds_two_blocks_twice(
    tree: WanModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    originals = [weakref.ref(block.ffn[0].weight) for block in tree.blocks]
    alive = []
    make = EightBitLinear.__init__

    def listening(self: EightBitLinear, *args: object, **more: object) -> None:
        alive.append(sum(original() is not None for original in originals))
        make(self, *args, **more)

    monkeypatch.setattr(EightBitLinear, "__init__", listening)
    with_eight_bit_linears(tree, torch.int8, replace=True)
    half = len(alive) // 2
    assert alive[:half] == [2] * half and alive[half:] == [1] * half
    assert [original() for original in originals] == [None, None]
    assert with_eight_bit_linears(tree, torch.int8, replace=True) is tree  # nothing left to do


def test_what_cannot_be_is_said() -> None:
    assert eight_bit_obstacle(CPU, torch.float32, torch.int8, (96, 64)) is None
    assert "multiples of 8, not 20, 100" in str(
        eight_bit_obstacle(CPU, torch.float32, torch.int8, (96, 100, 20))
    )
    assert "need bfloat16 or float16 or float32 weights, these are float64" in str(
        eight_bit_obstacle(CPU, torch.float64, torch.int8)
    )
    assert "need a CUDA device" in str(eight_bit_obstacle(CPU, torch.bfloat16))
    assert eight_bit_speed(CPU) == "int8"


@pytest.mark.parametrize(
    ("capability", "speed", "obstacles"),
    [
        ((7, 5), "int8", ["8.9 or higher, cuda has 7.5", "8.0 or higher, cuda has 7.5"]),
        ((8, 0), "int8", ["8.9 or higher, cuda has 8.0", None]),
        ((8, 9), "fp8", [None, None]),
        ((9, 0), "fp8", [None, None]),
    ],
)
def test_the_card_decides(
    monkeypatch: pytest.MonkeyPatch, capability: tuple, speed: str, obstacles: list
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    device = torch.device("cuda")
    assert eight_bit_speed(device) == speed
    for numbers, expected in zip((torch.float8_e4m3fn, torch.int8), obstacles, strict=True):
        got = eight_bit_obstacle(device, torch.bfloat16, numbers)
        assert got is None if expected is None else expected in str(got)


def test_widths_that_no_product_takes_are_refused() -> None:
    config = WanConfig(
        dim=36, ffn_dim=64, num_heads=2, num_layers=1, text_dim=16, text_len=8, freq_dim=16
    )
    with pytest.raises(UserError, match=r"cannot be used: they need widths .* multiples of 8, not"):
        with_eight_bit_linears(WanModel(config), torch.int8)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@NUMBERS
def test_a_forward_on_the_gpu_is_within_five_percent(numbers: torch.dtype) -> None:
    """Fused and recorded; the first chunk is one dense forward, the second is sparse."""
    skip_if_it_cannot(numbers)
    torch.manual_seed(5)
    config = WanConfig(dim=256, ffn_dim=512, num_heads=2, num_layers=3, text_dim=64, text_len=32)
    tree = WanModel(config).requires_grad_(False).cuda().bfloat16()
    with torch.no_grad():
        text = prepare_text(tree, torch.randn(1, 20, 64).cuda().bfloat16())
    settings = RolloutSettings(6, 3, (1000.0,), sparse=SparseSettings(schedule=make_schedule(0.5)))
    videos = []
    for one in (tree, with_eight_bit_linears(tree, numbers)):
        noise = SeededNoise(4, (1, 16, 60, 104), DEVICE)
        chunks = rollout(one, settings, text, noise, engine=ForwardEngine(one))
        videos.append(torch.cat([chunk.latents for chunk in chunks], dim=2).float())
    assert 0 < (videos[1] - videos[0]).norm() / videos[0].norm() < 0.05


def test_a_tree_in_other_numbers_is_not_taken_for_done(tree: WanModel) -> None:
    """Asked for int8, a block in e4m3 becomes int8 in every layer."""
    block = tree.blocks[0]
    before = {name: block.get_submodule(name).weight.clone() for name in ("self_attn.q", "ffn.2")}
    linears._exchange(block, torch.float8_e4m3fn)
    with_eight_bit_linears(tree, torch.int8, replace=True)
    names = ("self_attn.qkv", "self_attn.q", "self_attn.o", "cross_attn.q", "ffn.first")
    for name in (*names, "ffn.second"):
        assert block.get_submodule(name).numbers == torch.int8, name
    for name, weight in zip(("self_attn.q", "ffn.second"), before.values(), strict=True):
        layer = block.get_submodule(name)
        widened = layer.weight.float() * layer.scale.t()
        assert (widened - weight).norm() / weight.norm() < 0.06  # rounded twice
