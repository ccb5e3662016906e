"""A LoRA merges to the same weights whatever its naming; what does not fit ends in one line."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightforcing.lightforcing_core.checkpoints import lora_file
from lightforcing.lightforcing_core.checkpoints.lora import (
    Difference,
    Lora,
    Pair,
    check_loras,
    load_lora,
    merge,
    parse_strength,
    to_host_names,
)
from lightforcing.lightforcing_core.errors import UserError
from lightforcing.lightforcing_core.wan.config import WanConfig
from lightforcing.lightforcing_core.wan.modules import WanModel

CONFIG = WanConfig(dim=24, ffn_dim=20, num_heads=2, num_layers=2, text_dim=14, freq_dim=10)
RANK = 3
# Wan's name of a module, and diffusers' name of the same.
MODULES = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
    "blocks.0.self_attn.q": "blocks.0.attn1.to_q",
    "blocks.1.self_attn.o": "blocks.1.attn1.to_out.0",
    "blocks.1.cross_attn.k": "blocks.1.attn2.to_k",
    "blocks.0.ffn.0": "blocks.0.ffn.net.0.proj",
    "blocks.1.ffn.2": "blocks.1.ffn.net.2",
}
ATTENTION = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o")
LINEAR = (*ATTENTION, *(name.replace("self", "cross") for name in ATTENTION), "ffn.0", "ffn.2")
Factors = dict[str, tuple[Tensor, Tensor]]


def shapes_of(config: WanConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: p.shape for name, p in WanModel(config).named_parameters()}


SHAPES = shapes_of(CONFIG)


@pytest.fixture
def weights() -> dict[str, Tensor]:
    return {name: torch.randn(shape) for name, shape in SHAPES.items()}


@pytest.fixture
def factors() -> Factors:
    """(down, up) of some modules, by Wan's names."""
    made = {}
    for module in MODULES:
        out, *inside = SHAPES[f"{module}.weight"]
        up = torch.randn(out, RANK, *([1] * (len(inside) - 1)))
        made[module] = (torch.randn(RANK, *inside), up)
    return made


def named(
    factors: Factors, prefix: str, down: str, up: str, rename: Callable[[str], str] = str
) -> dict[str, Tensor]:
    tensors = {}
    for module, (a, b) in factors.items():
        tensors[f"{prefix}{rename(module)}{down}"] = a
        tensors[f"{prefix}{rename(module)}{up}"] = b
    return tensors


def peft(factors: Factors) -> dict[str, Tensor]:
    return named(factors, "base_model.model.", ".lora_A.weight", ".lora_B.weight")


def underscored(name: str) -> str:
    return name.replace(".", "_")


def diffusers(name: str) -> str:
    return MODULES[name]


DOWN, UP = ".lora_down.weight", ".lora_up.weight"
A, B = ".lora_A.weight", ".lora_B.weight"
NAMINGS: dict[str, Callable[[Factors], dict[str, Tensor]]] = {
    "bare": lambda f: named(f, "", A, B),
    "peft adapter": lambda f: named(
        f, "base_model.model.", ".lora_A.default.weight", ".lora_B.default.weight"
    ),
    "peft without weight": lambda f: named(f, "base_model.model.", ".lora_A", ".lora_B"),
    "peft in a wrapper": lambda f: named(f, "generator_lora.base_model.model.", A, B),
    "peft under fsdp": lambda f: named(
        f,
        "base_model.model._fsdp_wrapped_module.",
        "._checkpoint_wrapped_module.lora_A.default.weight",
        "._orig_mod.lora_B.default.weight",
    ),
    "model prefix": lambda f: named(f, "model.", A, B),
    "comfyui down and up": lambda f: named(f, "diffusion_model.", DOWN, UP),
    "comfyui A and B": lambda f: named(f, "diffusion_model.", A, B),
    "comfyui long prefix": lambda f: named(f, "model.diffusion_model.", DOWN, UP),
    "diffusers": lambda f: named(f, "transformer.", A, B, diffusers),
    "diffusers old": lambda f: named(
        f, "transformer.", ".lora.down.weight", ".lora.up.weight", diffusers
    ),
    "diffusers oldest": lambda f: named(
        f,
        "transformer.",
        ".lora_linear_layer.down.weight",
        ".lora_linear_layer.up.weight",
        diffusers,
    ),
    "diffusers bare": lambda f: named(f, "", A, B, diffusers),
    "diffusers attention processors": lambda f: {
        re.sub(r"\.(to_[qkv]|to_out)(?:\.0)?\.lora\.", r".processor.\1_lora.", key): value
        for key, value in named(
            f, "unet.", ".lora.down.weight", ".lora.up.weight", diffusers
        ).items()
    },
    "net": lambda f: named(f, "net.", A, B),
    "dit": lambda f: named(f, "dit.", DOWN, UP),
    "pipe.dit": lambda f: named(f, "pipe.dit.", A, B),
    "an average": lambda f: named(f, "generator_lora_ema.base_model.model.", A, B),
    "kohya": lambda f: named(f, "lora_unet_", DOWN, UP, underscored),
    "kohya two underscores": lambda f: named(f, "lora_unet__", DOWN, UP, underscored),
    "kohya over diffusers": lambda f: named(
        f, "lora_unet_", DOWN, UP, lambda name: underscored(diffusers(name))
    ),
}


def load(tensors: dict[str, Tensor], path: Path, **metadata: str) -> Lora:
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata=metadata or None)
    return load_lora(path)


def refused(tensors: dict[str, Tensor], path: Path, **metadata: str) -> str:
    with pytest.raises(UserError) as caught:
        load(tensors, path, **metadata)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_near(merged: Tensor, yardstick: Tensor) -> None:
    """Within the rounding of a float32 sum of RANK products and the weight."""
    assert merged.dtype == torch.float32
    torch.testing.assert_close(merged.double(), yardstick, rtol=2e-6, atol=2e-5)


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("container", ["safetensors", "pt"])
def test_every_naming_merges_to_the_same_bits_as_peft(
    naming: str, container: str, factors: Factors, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / f"lora.{container}"
    tensors = NAMINGS[naming](factors)
    if container == "pt":
        torch.save(tensors, path)
        other = load_lora(path)
    else:
        other = load(tensors, path)
    lora = load(peft(factors), tmp_path / "peft.safetensors")
    assert set(lora.updates) == {f"{module}.weight" for module in MODULES}
    assert check_loras([lora, other], SHAPES) == ()
    for name, weight in weights.items():
        assert torch.equal(merge(name, weight, [(other, 0.7)]), merge(name, weight, [(lora, 0.7)]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_merged_weights_are_those_of_float64(
    dtype: torch.dtype, factors: Factors, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    low = {module: (a.to(dtype), b.to(dtype)) for module, (a, b) in factors.items()}
    tensors = peft(low) | {
        f"base_model.model.{module}.alpha": torch.tensor(1.5) for module in MODULES
    }
    lora = load(tensors, tmp_path / "lora.safetensors")
    assert lora.ranks == (RANK,)
    for module, (a, b) in low.items():
        weight = weights[f"{module}.weight"].to(dtype)
        update = (b.double().flatten(1) @ a.double().flatten(1)).reshape(weight.shape)
        merged = merge(f"{module}.weight", weight, [(lora, -0.8)])
        assert_near(merged, weight.double() - 0.8 * 1.5 / RANK * update)


def test_two_loras_add_up_in_any_order(
    factors: Factors, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    first = load(peft(factors), tmp_path / "1.safetensors")
    other = {module: (a.flip(0) + 1, b - 1) for module, (a, b) in factors.items()}
    second = load(NAMINGS["kohya"](other), tmp_path / "2.safetensors")
    for module in MODULES:
        name = f"{module}.weight"
        weight = weights[name]
        total = weight.double()
        for strength, made in ((0.5, factors), (-1.25, other)):
            a, b = made[module]
            update = b.double().flatten(1) @ a.double().flatten(1)
            total = total + strength * update.reshape(weight.shape)
        assert_near(merge(name, weight, [(first, 0.5), (second, -1.25)]), total)
        assert_near(merge(name, weight, [(second, -1.25), (first, 0.5)]), total)


def test_alpha_over_rank_is_the_scale_of_its_module_only(factors: Factors, tmp_path: Path) -> None:
    tensors = NAMINGS["comfyui down and up"](factors)
    tensors["diffusion_model.head.head.alpha"] = torch.tensor(6, dtype=torch.int64)
    lora = load(tensors, tmp_path / "lora.safetensors")
    scales = {name: pair.scale for name, (pair,) in lora.updates.items()}
    assert scales.pop("head.head.weight") == 6 / RANK
    assert set(scales.values()) == {1.0}
    assert lora.unmatched == ()


def test_a_flattened_convolution_is_the_same_convolution(
    factors: Factors, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    name = "patch_embedding.weight"
    a, b = factors["patch_embedding"]
    flat = {"patch_embedding": (a.flatten(1), b.flatten(1))}
    one = load(peft(flat), tmp_path / "flat.safetensors")
    other = load(peft({"patch_embedding": (a, b)}), tmp_path / "whole.safetensors")
    check_loras([one, other], SHAPES)
    assert torch.equal(
        merge(name, weights[name], [(one, 1.0)]), merge(name, weights[name], [(other, 1.0)])
    )


def test_whole_differences_are_added(weights: dict[str, Tensor], tmp_path: Path) -> None:
    wanted = {
        "blocks.0.norm3.weight": "diffusion_model.blocks.0.norm3.diff",
        "blocks.0.norm3.bias": "diffusion_model.blocks.0.norm3.diff_b",
        "blocks.1.self_attn.norm_k.weight": "diffusion_model.blocks.1.self_attn.norm_k.diff",
        "blocks.1.modulation": "diffusion_model.blocks.1.diff_m",
        "head.modulation": "diffusion_model.head.modulation.diff",
        "patch_embedding.weight": "diffusion_model.patch_embedding.diff",
        "head.head.bias": "diffusion_model.head.head.diff_b",
    }
    differences = {name: torch.randn(SHAPES[name]).bfloat16() for name in wanted}
    tensors = {key: differences[name] for name, key in wanted.items()}
    lora = load(tensors, tmp_path / "lora.safetensors")
    assert check_loras([lora], SHAPES) == ()
    assert set(lora.updates) == set(wanted)
    assert lora.ranks == ()
    for name, value in differences.items():
        merged = merge(name, weights[name], [(lora, 0.5)])
        assert_near(merged, weights[name].double() + 0.5 * value.double())


def test_a_bias_beside_a_pair_has_the_scale_of_the_pair(
    factors: Factors, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    bias = torch.randn(24)
    tensors = peft({"blocks.0.self_attn.q": factors["blocks.0.self_attn.q"]})
    tensors["base_model.model.blocks.0.self_attn.q.lora_B.bias"] = bias
    tensors["base_model.model.blocks.0.self_attn.q.alpha"] = torch.tensor(12.0)
    lora = load(tensors, tmp_path / "lora.safetensors")
    name = "blocks.0.self_attn.q.bias"
    assert_near(merge(name, weights[name], [(lora, 1.0)]), weights[name].double() + 4 * bias)


def test_what_is_not_touched_is_the_same_tensor(
    factors: Factors, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    lora = load(peft(factors), tmp_path / "lora.safetensors")
    touched, other = "head.head.weight", "blocks.0.norm3.weight"
    half = weights[touched].bfloat16()
    before = weights[touched].clone()
    assert merge(touched, half, [(lora, 0.0)]) is half
    assert merge(other, weights[other], [(lora, 1.0)]) is weights[other]
    assert merge(touched, half, []) is half
    assert not torch.equal(merge(touched, weights[touched], [(lora, 1.0)]), before)
    assert torch.equal(weights[touched], before)


class Allocations(TorchDispatchMode):
    """Counts new tensors of a given size; views and results in place are none."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel = numel
        self.seen: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        before = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.numel() == self.numel:
            self.seen |= {out.untyped_storage().data_ptr()} - before
        return out


def test_merging_holds_a_parameter_twice_at_most() -> None:
    weight = torch.randn(64, 48).bfloat16()
    pair = Pair(torch.randn(64, 4).bfloat16(), torch.randn(4, 48).bfloat16(), 1.0)
    whole = Difference(torch.randn(64, 48).bfloat16())
    for parts, most in (((pair,), 1), ((whole,), 2), ((pair, whole), 2)):
        lora = Lora("x", {"w": parts}, (), ())
        with Allocations(weight.numel()) as allocations:
            merge("w", weight, [(lora, 1.0)])
        assert len(allocations.seen) == most


@pytest.mark.parametrize("strength", [float("nan"), float("inf"), 1e300, -1e38, 1000.5])
def test_a_strength_must_be_finite(
    strength: float, factors: Factors, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    lora = load(peft(factors), tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match="finite"):
        merge("head.head.weight", weights["head.head.weight"], [(lora, strength)])


def test_the_average_of_a_lora_comes_before_the_lora(
    factors: Factors, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "lightforcing")
    live = {
        f"generator_lora.{key}": torch.zeros_like(value) for key, value in peft(factors).items()
    }
    average = {f"generator_lora_ema.{key}": value for key, value in peft(factors).items()}
    lora = load(live | average, tmp_path / "lora.safetensors")
    assert all(bool(pair.up.any()) for (pair,) in lora.updates.values())
    assert lora.unmatched == ()
    assert "took the averaged LoRA, 'generator_lora_ema.', passed over 'generator_lora.'" in (
        caplog.text
    )


def test_the_longlive_layout_is_matched_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    config = WanConfig()
    shapes = shapes_of(config)
    # One number stands for a whole factor: 300 real ones are 1.4 GB.
    tensors = {}
    for block in range(config.num_layers):
        for module in LINEAR:
            out, inside = shapes[f"blocks.{block}.{module}.weight"]
            prefix = f"generator_lora.base_model.model.blocks.{block}.{module}"
            tensors[f"{prefix}.lora_A.weight"] = torch.ones(1).expand(256, inside)
            tensors[f"{prefix}.lora_B.weight"] = torch.ones(1).expand(out, 256)
    tensors |= {k.replace("generator", "critic"): v * float("nan") for k, v in tensors.items()}
    monkeypatch.setattr(lora_file, "read_state_dict", lambda path: (tensors, {}))
    lora = load_lora("lora.pt")
    assert len(lora.updates) == 300
    assert lora.ranks == (256,)
    assert {pair.scale for (pair,) in lora.updates.values()} == {1.0}  # alpha 256
    assert check_loras([lora], shapes) == ()


def test_what_no_parameter_takes_is_listed(
    factors: Factors, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    strange = {
        "base_model.model.vace_blocks.0.ffn.0.lora_A.weight": torch.zeros(RANK, 4),
        "base_model.model.blocks.0.self_attn.q.something": torch.zeros(1),
        "base_model.model.blocks.0.norm3.alpha": torch.ones(1),
    }
    image = {f"base_model.model.blocks.0.cross_attn.k_img.lora_{s}.weight" for s in "AB"}
    tensors = peft(factors) | strange | {key: torch.zeros(RANK, RANK) for key in image}
    deeper = peft({"blocks.7.ffn.0": tuple(t.clone() for t in factors["blocks.0.ffn.0"])})
    lora = load(tensors | deeper, tmp_path / "lora.safetensors")
    assert lora.unmatched == tuple(sorted(strange))
    caplog.clear()
    absent = ["blocks.0.cross_attn.k_img.weight", "blocks.7.ffn.0.weight"]
    unused = check_loras([lora], SHAPES)
    assert set(unused) == {*strange, *absent}
    # Asked before, while and after loading: saying it is the loader's, once.
    assert caplog.records == []


def test_norms_of_diffusers_are_renamed_only_there(tmp_path: Path) -> None:
    norm = {"transformer.blocks.0.norm2.diff": torch.zeros(24)}
    proof = {"transformer.blocks.0.attn1.to_q.diff": torch.zeros(24, 24)}
    lora = load(norm | proof, tmp_path / "diffusers.safetensors")
    assert set(lora.updates) == {"blocks.0.norm3.weight", "blocks.0.self_attn.q.weight"}
    wan = {"transformer.blocks.0.self_attn.q.diff": torch.zeros(24, 24)}
    lora = load(norm | wan, tmp_path / "wan.safetensors")
    assert lora.unmatched == tuple(norm)


DIFFUSERS_METADATA = json.dumps(
    {
        "transformer.r": RANK,
        "transformer.lora_alpha": 6,
        "transformer.alpha_pattern": {"blocks.0.attn1.to_q": 12},
    }
)


def test_alpha_may_stand_in_the_metadata(
    factors: Factors, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "lightforcing")
    path = tmp_path / "lora.safetensors"
    tensors = NAMINGS["diffusers"](factors)
    tensors["transformer.proj_out.alpha"] = torch.tensor(9.0)
    lora = load(tensors, path, lora_adapter_metadata=DIFFUSERS_METADATA)
    scales = {name: pair.scale for name, (pair,) in lora.updates.items()}
    assert scales.pop("head.head.weight") == 3  # a tensor comes before the metadata
    assert scales.pop("blocks.0.self_attn.q.weight") == 4
    assert set(scales.values()) == {2}
    assert "alpha 6 is from its metadata" in caplog.text
    lora = load(peft(factors), path, lora_alpha="4.5")
    assert {pair.scale for (pair,) in lora.updates.values()} == {1.5}


def test_alpha_may_stand_in_the_file_that_peft_writes_beside(
    factors: Factors, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "lightforcing")
    path, beside = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    for facts, scale in (
        ({"lora_alpha": 6}, 2.0),
        ({"lora_alpha": 6, "use_rslora": True}, 6 / RANK**0.5),
        ({"r": RANK}, 1.0),
    ):
        beside.write_text(json.dumps(facts))
        lora = load(peft(factors), path)
        assert {pair.scale for (pair,) in lora.updates.values()} == {scale}
    assert "adapter_config.json" in caplog.text
    # A file of another trainer in the same folder is not PEFT's business.
    beside.write_text(json.dumps({"lora_alpha": 6}))
    other = load(NAMINGS["comfyui down and up"](factors), tmp_path / "other.safetensors")
    assert {pair.scale for (pair,) in other.updates.values()} == {1.0}


def test_alpha_of_a_peft_folder_stands_in_the_folder(
    factors: Factors, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "lightforcing")
    folder = tmp_path / "lora"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"lora_alpha": 6}))
    # Of another LoRA, beside the folder.
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 3}))
    load(peft(factors), folder / "adapter_model.safetensors")
    assert {pair.scale for (pair,) in load_lora(folder).updates.values()} == {2.0}
    assert "alpha 6 is from adapter_config.json in it" in caplog.text


def test_alpha_of_an_attention_processor_is_its_own(factors: Factors, tmp_path: Path) -> None:
    tensors = NAMINGS["diffusers attention processors"](factors)
    tensors["unet.blocks.1.attn1.processor.to_out_lora.alpha"] = torch.tensor(9.0)
    lora = load(tensors, tmp_path / "lora.safetensors")
    assert [pair.scale for pair in lora.updates["blocks.1.self_attn.o.weight"]] == [3.0]
    assert lora.unmatched == ()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1]",
        "{",
        "[" * 100_000,
        '{"lora_alpha": []}',
        '{"lora_alpha": NaN}',
        '{"lora_alpha": 1, "alpha_pattern": {"a": "b"}}',
        '{"lora_alpha": 1, "alpha_pattern": 3}',
        '{"lora_alpha": 1' + "0" * 400 + "}",
        '{"lora_alpha": 1' + "0" * 5000 + "}",
        '{"lora_alpha": 1e300}',
        '{"lora_alpha": 1, "alpha_pattern": {"a": -1e300}}',
    ],
    ids=range(12),
)
def test_nonsense_for_alpha_is_refused(text: str, factors: Factors, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(text)
    assert "alpha" in refused(peft(factors), tmp_path / "lora.safetensors")
    assert "alpha" in refused(
        peft(factors), tmp_path / "lora.safetensors", lora_adapter_metadata=text
    )


Q = "diffusion_model.blocks.0.self_attn.q"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{Q}.dora_scale": torch.ones(24)}, "DoRA"),
        ({f"{Q}.lora_magnitude_vector.default.weight": torch.ones(24)}, "DoRA"),
        ({f"{Q}.hada_w1_a": torch.ones(2, 2)}, "LoHa"),
        ({f"{Q}.lokr_w1": torch.ones(2, 2)}, "LoKr"),
        ({f"{Q}.oft_blocks": torch.ones(2, 2, 2)}, "OFT"),
        ({f"{Q}.oft_R.weight": torch.ones(2, 2)}, "OFT"),
        ({f"{Q}.boft_R": torch.ones(2, 2)}, "BOFT"),
        ({f"{Q}.lora_mid.weight": torch.ones(2, 2)}, "lora_mid"),
        ({"diffusion_model.blocks.1.ffn.0.lora_up.weight": torch.ones(2, 2)}, "no 'down'"),
        ({"diffusion_model.blocks.1.ffn.0.lora_A.weight": torch.ones(2, 2)}, "no 'up'"),
        ({"diffusion_model.blocks.1.ffn.0.lora_B.bias": torch.ones(2)}, "no 'down'"),
        ({f"{Q}.lora_up.weight": torch.ones(24, 5)}, r"\[24, 5\].*\[3, 24\].*one rank"),
        ({f"{Q}.lora_up.weight": torch.ones(24)}, "one rank"),
        ({f"{Q}.lora_down.weight": torch.tensor(1.0)}, "one rank"),
        ({f"{Q}.lora_up.weight": torch.full((24, 3), torch.nan)}, "NaN"),
        ({f"{Q}.diff_b": torch.full((24,), torch.inf)}, "infinite"),
        ({f"{Q}.lora_up.weight": torch.ones(24, 3, dtype=torch.int8)}, "int8"),
        ({f"{Q}.alpha": torch.tensor(torch.nan)}, "alpha.*finite"),
        ({f"{Q}.alpha": torch.ones(2)}, "alpha.*one finite"),
        ({f"{Q}.alpha": torch.tensor(1e300, dtype=torch.float64)}, "alpha.*at most 1e"),
        ({"blocks.0.self_attn.q.lora_up.weight": torch.ones(24, 3)}, "are one update"),
        ({f"{Q}.lora_A.other.weight": torch.ones(3, 24)}, "are one update"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_what_cannot_be_merged_is_refused(
    change: dict[str, Tensor], message: str, factors: Factors, tmp_path: Path
) -> None:
    tensors = NAMINGS["comfyui down and up"](factors) | change
    assert re.search(message, refused(tensors, tmp_path / "lora.safetensors"))


@pytest.mark.parametrize(
    ("down", "up", "message"),
    [
        (torch.ones(0, 24), torch.ones(24, 0), "one rank"),
        (torch.ones(3, 24).to_sparse(), torch.ones(24, 3), "sparse"),
        (torch.ones(3, 24), torch.ones(24, 3, dtype=torch.complex64), "complex"),
    ],
    ids=["rank 0", "sparse", "complex"],
)
def test_tensors_of_other_kinds_in_torch_files_are_refused(
    down: Tensor, up: Tensor, message: str, tmp_path: Path
) -> None:
    torch.save({f"{Q}.lora_A": down, f"{Q}.lora_B": up}, tmp_path / "lora.pt")
    with pytest.raises(UserError, match=message):
        load_lora(tmp_path / "lora.pt")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["decoder.middle.0.residual.0.gamma"], "a Wan VAE"),
        (["patch_embedding.weight"], "a Wan denoiser"),
        (["lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"], "not for Wan 2.1"),
        (["unet.down_blocks.0.attn1.to_q.lora_A.weight"], "not for Wan 2.1"),
        (["lora_A.weight"], "give a LoRA file"),
        (["critic_lora.blocks.0.ffn.0.lora_A.weight"], "not for Wan 2.1"),
    ],
)
def test_files_that_are_no_lora_for_wan_are_called_by_their_name(
    names: list[str], message: str, tmp_path: Path
) -> None:
    tensors = {name: torch.zeros(2, 2) for name in names}
    assert message in refused(tensors, tmp_path / "lora.safetensors")


def test_a_lora_for_a_wider_model_says_so() -> None:
    pair = Pair(torch.ones(1).expand(5120, 4), torch.ones(1).expand(4, 5120), 1.0)
    lora = Lora("x.safetensors", {"blocks.0.self_attn.q.weight": (pair,)}, (), (4,))
    small = shapes_of(WanConfig(num_layers=1))
    with pytest.raises(UserError) as caught:
        check_loras([lora], small)
    assert str(caught.value) == (
        "x.safetensors: 'blocks.0.self_attn.q.weight' is [5120, 5120], expected [1536, 1536]; "
        "made for another width: this LoRA is for a 14B model (5120), the checkpoint is 1536 wide"
    )
    # The tensor that tells the width is found wherever it stands.
    other = Pair(torch.ones(1).expand(13824, 4), torch.ones(1).expand(4, 5120), 1.0)
    updates = {"blocks.0.ffn.0.weight": (other,), **lora.updates}
    with pytest.raises(UserError, match="another width"):
        check_loras([replace(lora, updates=updates)], small)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("blocks.0.ffn.0.weight", Pair(torch.ones(20, 3), torch.ones(3, 25), 1.0)),
        ("blocks.0.norm3.weight", Pair(torch.ones(24, 3), torch.ones(3, 1), 1.0)),
        ("blocks.0.norm3.bias", Difference(torch.ones(1, 24))),
        ("head.head.weight", Difference(torch.tensor(1.0))),
        ("blocks.0.ffn.2.weight", Difference(torch.tensor(1.0))),
        ("patch_embedding.weight", Pair(torch.ones(24, 3), torch.ones(3, 16, 2, 2, 1), 1.0)),
        ("patch_embedding.weight", Pair(torch.ones(24, 3), torch.ones(3, 36, 1, 2, 2), 1.0)),
    ],
)
def test_an_update_of_another_shape_is_refused(name: str, part: Pair | Difference) -> None:
    lora = Lora("x.safetensors", {name: (part,)}, (), ())
    with pytest.raises(UserError, match=rf"x\.safetensors: '{name}' is .* expected \["):
        check_loras([lora], SHAPES)


def test_a_lora_of_which_nothing_matches_is_refused(factors: Factors, tmp_path: Path) -> None:
    good = load(peft(factors), tmp_path / "good.safetensors")
    deep = peft({"blocks.9.self_attn.q": factors["blocks.0.self_attn.q"]})
    lora = load(deep, tmp_path / "deep.safetensors")
    with pytest.raises(UserError, match=r"deep\.safetensors: none of its 1 parameters"):
        check_loras([good, lora], SHAPES)


def test_the_hosts_names_lead_to_the_same_weights(
    factors: Factors, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    tensors = NAMINGS["diffusers"](factors) | {
        "transformer.blocks.0.attn1.to_q.alpha": torch.tensor(5.0),
        "transformer.blocks.0.attn1.to_q.diff_b": torch.randn(24),
        "transformer.blocks.0.norm2.diff": torch.randn(24),
        "transformer.blocks.1.scale_shift_table.diff": torch.randn(1, 6, 24),
        "transformer.proj_out.diff": torch.randn(SHAPES["head.head.weight"]),
        "transformer.blocks.0.ffn.net.0.proj.lora_B.bias": torch.randn(20),
    }
    lora = load(tensors, tmp_path / "lora.safetensors", lora_alpha="6")
    host = to_host_names(lora)
    assert all(key.startswith("diffusion_model.") for key in host)
    again = load(host, tmp_path / "host.safetensors")
    assert set(again.updates) == set(lora.updates)
    # ComfyUI keeps one part for a parameter, so there must not be two.
    assert {len(parts) for parts in again.updates.values()} == {1}
    for name, weight in weights.items():
        merged, other = (merge(name, weight, [(each, 0.9)]) for each in (lora, again))
        torch.testing.assert_close(other, merged, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(
    ("text", "path", "strength"),
    [
        ("x.safetensors", "x.safetensors", 1.0),
        ("x.safetensors:0.8", "x.safetensors", 0.8),
        ("x.safetensors:-1", "x.safetensors", -1.0),
        (r"C:\loras\x.safetensors", r"C:\loras\x.safetensors", 1.0),
        (r"C:\loras\x.safetensors:0.5", r"C:\loras\x.safetensors", 0.5),
        ("C:/loras/x.safetensors", "C:/loras/x.safetensors", 1.0),
        ("C:x.safetensors:2", "C:x.safetensors", 2.0),
        ("C:x.safetensors", "C:x.safetensors", 1.0),
        ("a:b/x.pt", "a:b/x.pt", 1.0),
        ("a:b.pt:1e-1", "a:b.pt", 0.1),
        ("x.pt:-1000", "x.pt", -1000.0),
        ("x" * 253 + ":0.5", "x" * 253, 0.5),  # with the strength no name that a file can have
    ],
)
def test_a_strength_follows_the_last_colon(text: str, path: str, strength: float) -> None:
    assert parse_strength(text) == (Path(path), strength)


def test_a_file_that_exists_is_taken_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("style:2").touch()
    assert parse_strength("style:2") == (Path("style:2"), 1.0)
    assert parse_strength("style:2:0.5") == (Path("style:2"), 0.5)


@pytest.mark.parametrize(
    "text",
    ["x.pt:", "x.pt:nan", "x.pt:inf", "x.pt:strong", ":1", "x.pt:1e300", "x.pt:1e38", "x.pt:-1001"],
)
def test_other_strengths_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="FILE:STRENGTH"):
        parse_strength(text)


def test_a_path_that_no_file_can_have_is_one_line() -> None:
    with pytest.raises(UserError, match=r"cannot be looked up.*check the path"):
        parse_strength("x" * 300 + ":0.5")
    path, _ = parse_strength("x" * 300)
    with pytest.raises(UserError, match=r"cannot read.*check the path"):
        load_lora(path)
