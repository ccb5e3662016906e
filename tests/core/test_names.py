"""Other people's names lead to Wan's own, for every parameter, and nothing else is touched."""

from __future__ import annotations

import time

import pytest
import torch

from lightforcing.lightforcing_core.checkpoints.names import (
    from_diffusers,
    from_kohya,
    is_diffusers,
    parameter_of,
    strip_noise,
    strip_outer,
)
from lightforcing.lightforcing_core.wan.config import WanConfig
from lightforcing.lightforcing_core.wan.modules import WanModel

# Replacements in this order, as diffusers' conversion script makes them.
TO_DIFFUSERS = {
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.modulation": "scale_shift_table",
    "head.head": "proj_out",
    "modulation": "scale_shift_table",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "norm3": "norm2",
    "self_attn.": "attn1.",
    "cross_attn.": "attn2.",
    ".q.": ".to_q.",
    ".k.": ".to_k.",
    ".v.": ".to_v.",
    ".o.": ".to_out.0.",
    ".k_img.": ".add_k_proj.",
    ".v_img.": ".add_v_proj.",
    ".norm_k_img.": ".norm_added_k.",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
}
IMAGE_TO_VIDEO = (
    "blocks.3.cross_attn.k_img.weight",
    "blocks.3.cross_attn.v_img.bias",
    "blocks.3.cross_attn.norm_k_img.weight",
    "img_emb.proj.0.weight",
    "img_emb.proj.1.bias",
    "img_emb.proj.3.weight",
    "img_emb.proj.4.weight",
    "img_emb.emb_pos",
)


def wan_names() -> list[str]:
    with torch.device("meta"):
        return [name for name, _ in WanModel(WanConfig()).named_parameters()]


ALL_NAMES = [*wan_names(), *IMAGE_TO_VIDEO]


def to_diffusers(name: str) -> str:
    for ours, theirs in TO_DIFFUSERS.items():
        name = name.replace(ours, theirs)
    return name


def test_every_diffusers_name_leads_back_to_its_own() -> None:
    theirs = [to_diffusers(name) for name in ALL_NAMES]
    assert len(set(theirs)) == len(ALL_NAMES)
    assert [from_diffusers(name) for name in theirs] == ALL_NAMES


def test_wans_own_names_pass_unchanged() -> None:
    assert [from_diffusers(name) for name in ALL_NAMES] == ALL_NAMES


@pytest.mark.parametrize(
    "name",
    [
        "vae.proj_out.weight",
        "transformer_blocks.0.attn1.to_q.weight",
        "blocks.0.attn3.to_q.weight",
        "blocks.x.attn1.to_q.weight",
        "blocks_0_attn1.to_q.weight",
        "proj_out_2.weight",
        "",
    ],
)
def test_names_of_other_models_pass_unchanged(name: str) -> None:
    assert from_diffusers(name) == name
    assert not is_diffusers([name])


def test_what_follows_the_module_stays() -> None:
    assert from_diffusers("blocks.12.attn2.to_out.0.lora_A.weight") == (
        "blocks.12.cross_attn.o.lora_A.weight"
    )
    assert from_diffusers("blocks.12.norm2.weight") == "blocks.12.norm3.weight"


def test_names_of_endless_segments_take_no_time() -> None:
    started = time.perf_counter()
    names = [f"blocks.{i}." + "a." * 480 for i in range(16_000)]
    assert not is_diffusers(names)
    assert time.perf_counter() - started < 5


def test_the_layout_is_told_from_the_names() -> None:
    assert is_diffusers(to_diffusers(name) for name in ALL_NAMES)
    assert not is_diffusers(ALL_NAMES)
    # Wan has a norm2 too: the name alone proves nothing.
    assert not is_diffusers(["blocks.0.norm2.weight", "patch_embedding.weight"])


@pytest.mark.parametrize(
    "name",
    [
        "model._fsdp_wrapped_module.blocks.0._checkpoint_wrapped_module.ffn.0.weight",
        "_orig_mod.model.blocks.0.ffn.0.weight",
        "module.model.blocks.0._orig_mod.ffn.0._fsdp_wrapped_module.weight",
        "model.blocks.0.ffn.0.weight",
    ],
)
def test_wrappers_of_torch_are_removed_wherever_they_stand(name: str) -> None:
    assert strip_noise(name) == "model.blocks.0.ffn.0.weight"


def test_only_whole_segments_are_noise() -> None:
    for name in ("submodule.weight", "module_2.weight", "my_orig_mod.weight"):
        assert strip_noise(name) == name


@pytest.mark.parametrize(
    "prefix",
    [
        "",
        "model.",
        "diffusion_model.",
        "model.diffusion_model.",
        "transformer.",
        "base_model.model.",
        "generator_lora.base_model.model.",
        "generator_ema.model.",
        "state_dict.generator.model.",
        "generator_lora_ema.",
        "net.",
        "dit.",
        "pipe.dit.",
        "unet.",
    ],
)
def test_what_stands_before_the_model_is_removed(prefix: str) -> None:
    assert strip_outer(f"{prefix}blocks.0.ffn.0.weight") == "blocks.0.ffn.0.weight"


def test_other_prefixes_stay() -> None:
    for name in (
        "critic_lora.blocks.0.ffn.0.weight",
        "text_encoder.model.weight",
        "model",
        "net.2.lora_A.weight",
    ):
        assert strip_outer(name) == name


@pytest.mark.parametrize("prefix", ["lora_unet_", "lora_unet__", "lycoris_", "lora_transformer_"])
@pytest.mark.parametrize("rename", [str, to_diffusers], ids=["wan", "diffusers"])
def test_every_underscored_module_leads_to_its_dotted_name(prefix: str, rename: object) -> None:
    assert callable(rename)
    for name in ALL_NAMES:
        module = name.removesuffix(".weight").removesuffix(".bias")
        if rename is to_diffusers and module.endswith("norm3"):
            continue  # 'norm2' is a name in both layouts, so kohya's rule leaves it alone
        theirs = rename(f"{module}.").removesuffix(".").replace(".", "_")
        assert from_kohya(prefix + theirs) == module


@pytest.mark.parametrize(
    "name",
    [
        "lora_unet_blocks_0_attn9_to_q",
        "lora_unet_blocks_0_norm2",
        "lora_unet_blocks_self_attn_q",
        "lora_unet_input_blocks_1_1_proj_in",
        "lora_te_text_model_encoder_layers_0_mlp_fc1",
        "blocks_0_self_attn_q",
        "lora_unet_",
        "",
    ],
)
def test_other_underscored_names_are_no_module(name: str) -> None:
    assert from_kohya(name) is None


def test_every_parameter_has_a_module_and_nothing_else_does() -> None:
    for name in ALL_NAMES:
        kind = "bias" if name.endswith(".bias") else "weight"
        module = name.removesuffix(f".{kind}")
        assert parameter_of(module, kind) == name
    assert parameter_of("blocks.0.modulation", "bias") is None
    for module in ("blocks.0.norm2", "blocks.0", "vace_blocks.0.ffn.0", "head", "blocks_0_ffn.0"):
        assert parameter_of(module) is None
