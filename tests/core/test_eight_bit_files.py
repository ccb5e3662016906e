"""Files in eight bits whose numbers the blocks multiply as they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lightforcing.lightforcing_core.checkpoints.checkpoint import open_checkpoint
from lightforcing.lightforcing_core.checkpoints.load import LoadedModel, load_checkpoint
from lightforcing.lightforcing_core.checkpoints.lora import load_lora
from lightforcing.lightforcing_core.errors import UserError
from lightforcing.lightforcing_core.fast import linears
from lightforcing.lightforcing_core.fast.linears import (
    EIGHT_BIT_LAYERS,
    EightBitLinear,
    eight_bit_obstacle,
)
from lightforcing.lightforcing_core.noise import SeededNoise
from lightforcing.lightforcing_core.rollout import RolloutSettings, rollout
from lightforcing.lightforcing_core.wan.config import WanConfig
from lightforcing.lightforcing_core.wan.forward import prepare_text
from lightforcing.lightforcing_core.wan.modules import WanModel

CONFIG = WanConfig(dim=128, ffn_dim=64, num_heads=1, num_layers=2, text_dim=16, freq_dim=16)
# Where a layer's weights end up: module of a block, and which outputs.
PLACES = {
    "self_attn.q": "self_attn.q",
    "self_attn.k": "self_attn.k",
    "self_attn.v": "self_attn.v",
    "self_attn.o": "self_attn.o",
    "cross_attn.q": "cross_attn.q",
    "cross_attn.o": "cross_attn.o",
    "ffn.0": "ffn.first",
    "ffn.2": "ffn.second",
}
LAYOUTS = {
    "LightX2V fp8": (torch.float8_e4m3fn, True, ".weight_scale"),
    "LightX2V int8": (torch.int8, True, ".weight_scale"),
    "ComfyUI scaled fp8": (torch.float8_e4m3fn, False, ".scale_weight"),
    "plain cast to fp8": (torch.float8_e4m3fn, False, ""),
}


def device_of(numbers: torch.dtype) -> torch.device:
    """Where they are multiplied: e4m3 on a GPU if one can, for not every torch has scales by row
    on the CPU (2.11 has one for a whole tensor)."""
    gpu = torch.device("cuda")
    can = torch.cuda.is_available() and eight_bit_obstacle(gpu, torch.bfloat16, numbers) is None
    return gpu if can and numbers == torch.float8_e4m3fn else torch.device("cpu")


@pytest.fixture(autouse=True)
def any_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch multiplies e4m3 numbers on the CPU too, which is refused for being slow."""
    monkeypatch.setattr(linears, "eight_bit_obstacle", lambda *_: None)


def write(path: Path, layout: str) -> tuple[dict[str, Tensor], torch.dtype]:
    """A file in a layout, with all products of the blocks in eight bits."""
    numbers, per_channel, suffix = LAYOUTS[layout]
    torch.manual_seed(0)
    tensors = {k: v.detach() for k, v in WanModel(CONFIG).named_parameters()}
    largest = 127 if numbers == torch.int8 else 448
    for name in [k for k in tensors if k.startswith("blocks.") and tensors[k].ndim == 2]:
        weight = tensors[name]
        scale = weight.abs().amax(1, keepdim=True) if per_channel else weight.abs().max()
        scale = scale / largest if suffix else torch.tensor(1.0)
        number = weight / scale
        tensors[name] = (number.round() if numbers == torch.int8 else number).to(numbers)
        if suffix:
            tensors[name.removesuffix(".weight") + suffix] = scale
    if suffix == ".scale_weight":
        tensors["scaled_fp8"] = torch.zeros(2).to(torch.float8_e4m3fn)
    save_file(tensors, path)
    return tensors, numbers


def load(path: Path, numbers: torch.dtype | None, **more: object) -> LoadedModel:
    return load_checkpoint(open_checkpoint(path), dtype=torch.bfloat16, eight_bit=numbers, **more)


def video(tree: WanModel) -> Tensor:
    with torch.no_grad():
        device = tree.head.head.weight.device
        text = prepare_text(tree, torch.ones(1, 3, CONFIG.text_dim, device=device).bfloat16())
        noise = SeededNoise(3, (1, 16, 4, 4), device)
        settings = RolloutSettings(num_frames=4, frames_per_chunk=2)
        return torch.cat([chunk.latents for chunk in rollout(tree, settings, text, noise)], dim=2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_numbers_of_the_file_are_the_numbers_of_the_layers(layout: str, tmp_path: Path) -> None:
    """Bit for bit, and with the file's scale: nothing is rounded a second time."""
    path = tmp_path / "model.safetensors"
    tensors, numbers = write(path, layout)
    suffix = LAYOUTS[layout][2]
    tree = load(path, numbers).tree
    assert set(PLACES) == set(EIGHT_BIT_LAYERS)
    for i, block in enumerate(tree.blocks):
        for name, place in PLACES.items():
            layer = block.get_submodule(place)
            assert isinstance(layer, EightBitLinear) and layer.numbers == numbers
            stored = tensors[f"blocks.{i}.{name}.weight"]
            assert torch.equal(layer.weight.view(torch.uint8), stored.view(torch.uint8))
            scale = tensors[f"blocks.{i}.{name}{suffix}"] if suffix else torch.ones(())
            assert torch.equal(layer.scale.t(), scale.expand(len(stored), 1))
        # What has no product in eight bits is as it would be otherwise.
        assert block.cross_attn.k.weight.dtype == torch.bfloat16
    assert tree.head.head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layer_multiplies_with_the_files_dequantised_weights(layout: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    tensors, numbers = write(path, layout)
    suffix = LAYOUTS[layout][2]
    device = device_of(numbers)
    layer = load(path, numbers, device=device).tree.blocks[1].ffn.second
    rounded, scale = layer.round(torch.randn(20, 64, device=device).bfloat16())
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    weight = tensors["blocks.1.ffn.2.weight"].double()
    weight = weight * (tensors[f"blocks.1.ffn.2{suffix}"].double() if suffix else 1)
    exact = rounded.double() * scale.double() @ weight.t()
    exact = exact + tensors["blocks.1.ffn.2.bias"].double()
    error = (layer.multiply(rounded, scale).double() - exact).abs()
    assert (error <= 2**-8 * exact.abs() + 2e-3 * exact.abs().max()).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_video_is_near_that_of_the_widened_file(layout: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    _, numbers = write(path, layout)
    device = device_of(numbers)
    expected = video(load(path, None, device=device).tree)
    got = video(load(path, numbers, device=device).tree)
    assert 0 < (got - expected).norm() / expected.norm() < 0.05


def test_a_file_of_other_numbers_is_rounded_anew(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write(path, "LightX2V fp8")
    wide = load(path, None).tree.blocks[0].ffn[0].weight
    layer = load(path, torch.int8).tree.blocks[0].ffn.first
    assert layer.numbers == torch.int8
    error = (layer.weight.double() * layer.scale.double().t() - wide.double()).abs()
    assert (error <= layer.scale.double().t() * 0.51).all()


def test_a_layer_with_a_lora_is_widened_merged_and_rounded(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    tensors, numbers = write(path, "LightX2V fp8")
    name = "blocks.0.ffn.0"
    low = {f"{name}.lora_A.weight": torch.randn(2, 128), f"{name}.lora_B.weight": torch.ones(64, 2)}
    save_file(low, tmp_path / "lora.safetensors")
    loras = [(load_lora(tmp_path / "lora.safetensors"), 0.5)]
    tree = load(path, numbers, loras=loras).tree
    merged = load(path, None, loras=loras).tree.blocks[0].ffn[0].weight.double()
    first, second = tree.blocks[0].ffn.first, tree.blocks[0].ffn.second
    value = first.weight.double() * first.scale.double().t()
    assert ((value - merged).abs() <= merged.abs() / 16 + first.scale.double().t() * 2**-9).all()
    assert torch.equal(
        second.weight.view(torch.uint8), tensors["blocks.0.ffn.2.weight"].view(torch.uint8)
    )


@pytest.mark.parametrize("where", ["weight", "weight_scale"])
def test_nan_in_numbers_or_scales_is_refused(where: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    tensors, numbers = write(path, "LightX2V fp8")
    spoilt = tensors[f"blocks.1.ffn.0.{where}"].float()
    spoilt[3, 0] = float("nan")
    tensors[f"blocks.1.ffn.0.{where}"] = spoilt.to(tensors[f"blocks.1.ffn.0.{where}"].dtype)
    save_file(tensors, path)
    with pytest.raises(UserError, match=r"'blocks\.1\.ffn\.0\.weight' holds NaN"):
        load(path, numbers)
