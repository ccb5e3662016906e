"""Every published layout, built at small width with its real names, is the same model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lightforcing.lightforcing_core.checkpoints.checkpoint import open_checkpoint
from lightforcing.lightforcing_core.checkpoints.convert import convert_checkpoint
from lightforcing.lightforcing_core.checkpoints.formats import recognise
from lightforcing.lightforcing_core.checkpoints.load import load_model
from lightforcing.lightforcing_core.checkpoints.lora import load_lora
from lightforcing.lightforcing_core.errors import UserError
from lightforcing.lightforcing_core.noise import SeededNoise
from lightforcing.lightforcing_core.rollout import RolloutSettings, rollout
from lightforcing.lightforcing_core.wan.config import WanConfig
from lightforcing.lightforcing_core.wan.forward import prepare_text
from lightforcing.lightforcing_core.wan.modules import WanModel

CONFIG = WanConfig(dim=128, ffn_dim=64, num_heads=1, num_layers=2, text_dim=16, freq_dim=16)
CAUSAL = {"config": '{"transformer": {"causal_ar": true}}'}

# Written from diffusers' transformer_wan.py, not from the code under test.
DIFFUSERS_TOP = {
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.modulation": "scale_shift_table",
    "head.head": "proj_out",
}
DIFFUSERS_BLOCK = {
    "modulation": "scale_shift_table",
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
} | {
    f"{ours}.{a}": f"{theirs}.{b}"
    for ours, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2"))
    for a, b in (
        ("q", "to_q"),
        ("k", "to_k"),
        ("v", "to_v"),
        ("o", "to_out.0"),
        ("norm_q", "norm_q"),
        ("norm_k", "norm_k"),
    )
}

Weights = dict[str, Tensor]


def diffusers_name(name: str) -> str:
    before, table, rest = "", DIFFUSERS_TOP, name
    if name.startswith("blocks."):
        _, number, rest = name.split(".", 2)
        before, table = f"blocks.{number}.", DIFFUSERS_BLOCK
    for ours, theirs in table.items():
        if rest == ours or rest.startswith(f"{ours}."):
            return before + theirs + rest.removeprefix(ours)
    return name


def under(prefix: str, weights: Weights) -> Weights:
    return {prefix + name: tensor for name, tensor in weights.items()}


def noisy(weights: Weights) -> Weights:
    return {name: tensor + 1 for name, tensor in weights.items()}


def wrapped_everywhere(weights: Weights) -> Weights:
    """FSDP around the model and each block, checkpointing inside, as nested wrappers write it."""
    return {
        "model._fsdp_wrapped_module."
        + name.replace("blocks.0.", "blocks.0._fsdp_wrapped_module._checkpoint_wrapped_module."): t
        for name, t in weights.items()
    }


def torch_file(content: Callable[[Weights], dict]) -> Callable[[Weights, Path], Path]:
    def write(weights: Weights, folder: Path) -> Path:
        torch.save(content(weights), folder / "model.pt")
        return folder / "model.pt"

    return write


def safetensors_file(
    content: Callable[[Weights], Weights], metadata: dict[str, str] | None = None
) -> Callable[[Weights, Path], Path]:
    def write(weights: Weights, folder: Path) -> Path:
        save_file(content(weights), folder / "model.safetensors", metadata=metadata)
        return folder / "model.safetensors"

    return write


def diffusers_folder(weights: Weights, folder: Path, shards: int) -> Path:
    """A pipeline's folder with the transformer in it, in one file or in shards with an index."""
    inner = folder / "pipeline" / "transformer"
    inner.mkdir(parents=True)
    (inner / "config.json").write_text('{"_class_name": "WanTransformer3DModel"}')
    renamed = {diffusers_name(k): v for k, v in weights.items()}
    stem = "diffusion_pytorch_model"
    if shards == 1:
        save_file(renamed, inner / f"{stem}.safetensors")
        return folder / "pipeline"
    index = {}
    for number in range(shards):
        name = f"{stem}-{number + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(renamed.items())[number::shards])
        save_file(part, inner / name)
        index |= dict.fromkeys(part, name)
    content = {"metadata": {"total_size": 1}, "weight_map": index}
    (inner / f"{stem}.safetensors.index.json").write_text(json.dumps(content))
    return folder / "pipeline"


def trainer_file(weights: Weights) -> dict:
    return {
        "generator": under("model.", noisy(weights)),
        "critic": under("model.", noisy(weights)),
        "generator_ema": under("model.", weights),
        "step": 600,
    }


PUBLISHED: dict[str, tuple[str, Callable[[Weights, Path], Path]]] = {
    "Self Forcing dmd, sid": ("self_forcing", torch_file(trainer_file)),
    "Self Forcing ode_init": (
        "self_forcing",
        torch_file(lambda w: {"generator": under("model.", w)}),
    ),
    "Causal Forcing framewise": (
        "self_forcing",
        torch_file(lambda w: {"generator_ema": under("model._fsdp_wrapped_module.", w)}),
    ),
    "nested FSDP and checkpointing": (
        "self_forcing",
        torch_file(lambda w: {"generator_ema": wrapped_everywhere(w)}),
    ),
    "LongLive and MemFlow base": (
        "self_forcing",
        torch_file(
            lambda w: {"generator": under("model.", w), "critic": under("model.", noisy(w))}
        ),
    ),
    "LongLive under model": ("self_forcing", torch_file(lambda w: {"model": under("model.", w)})),
    "Reward Forcing": ("self_forcing", torch_file(lambda w: under("model.", w))),
    "StreamDiffusionV2": ("self_forcing", torch_file(lambda w: {"generator": dict(w)})),
    "StreamDiffusionV2 state_dict": ("self_forcing", torch_file(lambda w: {"state_dict": dict(w)})),
    "compiled": ("comfyui", torch_file(lambda w: under("_orig_mod.", w))),
    "DDP": ("self_forcing", torch_file(lambda w: {"state_dict": under("module.model.", w)})),
    "average beside plain names": (
        "self_forcing",
        torch_file(lambda w: {**noisy(w), "ema": dict(w)}),
    ),
    "Krea": ("self_forcing", safetensors_file(lambda w: under("model.", w))),
    "ComfyUI repackaged": ("comfyui", safetensors_file(dict, CAUSAL)),
    "ComfyUI without metadata": ("comfyui", safetensors_file(dict)),
    "ComfyUI checkpoint prefix": (
        "comfyui",
        safetensors_file(lambda w: under("model.diffusion_model.", w)),
    ),
    "diffusers": ("diffusers", lambda w, folder: diffusers_folder(w, folder, 1)),
    "diffusers, sharded": ("diffusers", lambda w, folder: diffusers_folder(w, folder, 3)),
    "our own": (
        "lightforcing",
        safetensors_file(dict, CAUSAL | {"lightforcing": '{"frames_per_chunk": 3}'}),
    ),
}


@pytest.fixture(scope="module")
def weights() -> Weights:
    torch.manual_seed(0)
    return {k: v.detach() for k, v in WanModel(CONFIG).named_parameters()}


def video(tree: WanModel) -> Tensor:
    """Latents of two chunks."""
    text = prepare_text(tree, torch.ones(1, 3, CONFIG.text_dim))
    noise = SeededNoise(3, (1, 16, 4, 4), torch.device("cpu"))
    settings = RolloutSettings(num_frames=4, frames_per_chunk=2)
    return torch.cat([chunk.latents for chunk in rollout(tree, settings, text, noise)], dim=2)


@pytest.fixture(scope="module")
def expected(weights: Weights) -> Tensor:
    tree = WanModel(CONFIG)
    tree.load_state_dict(weights)
    return video(tree.requires_grad_(False))


@pytest.mark.parametrize("layout", PUBLISHED)
def test_every_published_layout_makes_the_same_video(
    layout: str, weights: Weights, expected: Tensor, tmp_path: Path
) -> None:
    identifier, write = PUBLISHED[layout]
    loaded = load_model(write(weights, tmp_path))
    assert loaded.format == identifier
    assert loaded.config == CONFIG
    assert loaded.unexpected == ()
    assert torch.equal(video(loaded.tree), expected)


@pytest.mark.parametrize("layout", PUBLISHED)
def test_a_converted_file_is_plain_and_makes_the_same_video(
    layout: str, weights: Weights, expected: Tensor, tmp_path: Path
) -> None:
    from safetensors import safe_open

    path = PUBLISHED[layout][1](weights, tmp_path)
    out = tmp_path / "clean.safetensors"
    assert convert_checkpoint(path, out).tensors == len(weights)
    with safe_open(out, framework="pt") as file:
        assert set(file.keys()) == set(weights)
        assert json.loads(file.metadata()["config"]) == {"transformer": {"causal_ar": True}}
        assert json.loads(file.metadata()["lightforcing"])["num_heads"] == 1
    loaded = load_model(out)
    assert loaded.format == "lightforcing"
    assert torch.equal(video(loaded.tree), expected)


@pytest.mark.parametrize("size", ["1.3B", "14B"])
@pytest.mark.parametrize("rename", [lambda n: f"generator_ema.model.{n}", str, diffusers_name])
def test_the_published_sizes_are_recognised_by_their_tensors(
    size: str, rename: Callable[[str], str]
) -> None:
    config = {
        "1.3B": WanConfig(),
        "14B": WanConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40),
    }[size]
    with torch.device("meta"):
        tensors = {rename(k): v.detach() for k, v in WanModel(config).named_parameters()}
    assert len(tensors) == (825 if size == "1.3B" else 27 * 40 + 15)
    found = recognise(tensors, {})
    assert WanConfig.from_tensors(found.weights.tensors) == config
    with torch.device("meta"):
        wanted = {k: v.shape for k, v in WanModel(config).named_parameters()}
    assert {k: v.shape for k, v in found.weights.tensors.items()} == wanted


# --- eight bits -----------------------------------------------------------------------------

PRODUCTS = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "cross_attn.q",
            "cross_attn.k", "cross_attn.v", "cross_attn.o", "ffn.0", "ffn.2")  # fmt: skip


def products(weights: Weights) -> list[str]:
    return [f"blocks.{i}.{p}" for i in range(CONFIG.num_layers) for p in PRODUCTS]


def lightx2v_fp8(weights: Weights) -> Weights:
    """As LightX2V's converter: one scale per output channel, largest value 448."""
    result = under("model.", weights)
    for name in products(weights):
        weight = weights[f"{name}.weight"]
        scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-5) / 448
        result[f"model.{name}.weight"] = (weight / scale).to(torch.float8_e4m3fn)
        result[f"model.{name}.weight_scale"] = scale
    return result


def lightx2v_int8(weights: Weights) -> Weights:
    result = under("model.", weights)
    for name in products(weights):
        weight = weights[f"{name}.weight"]
        scale = weight.abs().amax(1, keepdim=True) / 127
        result[f"model.{name}.weight"] = (weight / scale).round().to(torch.int8)
        result[f"model.{name}.weight_scale"] = scale
    return result


def comfyui_fp8(weights: Weights, *, old: bool) -> Weights:
    """As ComfyUI's scaled files: one scale per tensor."""
    result = dict(weights)
    for name in products(weights):
        weight = weights[f"{name}.weight"]
        scale = weight.abs().max() / 448
        result[f"{name}.weight"] = (weight / scale).to(torch.float8_e4m3fn)
        result[f"{name}.{'scale_weight' if old else 'weight_scale'}"] = scale
        result[f"{name}.{'scale_input' if old else 'input_scale'}"] = torch.tensor(1.0)
        if not old:
            note = json.dumps({"format": "float8_e4m3fn"}).encode()
            result[f"{name}.comfy_quant"] = torch.tensor(list(note), dtype=torch.uint8)
    if old:
        result["scaled_fp8"] = torch.zeros(2).to(torch.float8_e4m3fn)
    return result


EIGHT_BIT: dict[str, tuple[str, Callable[[Weights], Weights]]] = {
    "LightX2V fp8": ("lightx2v_fp8", lightx2v_fp8),
    "LightX2V int8": ("lightx2v_int8", lightx2v_int8),
    "ComfyUI scaled fp8": ("comfyui_fp8", lambda w: comfyui_fp8(w, old=True)),
    "ComfyUI fp8, newer": ("comfyui_fp8", lambda w: comfyui_fp8(w, old=False)),
}


@pytest.mark.parametrize("layout", EIGHT_BIT)
def test_eight_bit_weights_are_number_times_scale(
    layout: str, weights: Weights, expected: Tensor, tmp_path: Path
) -> None:
    identifier, quantise = EIGHT_BIT[layout]
    stored = {k: v.clone() for k, v in quantise(weights).items()}
    path = tmp_path / "model.safetensors"
    save_file(stored, path)
    loaded = load_model(path, dtype=torch.float32)
    assert loaded.format == identifier
    assert loaded.unexpected == ()
    prefix = "model." if "LightX2V" in layout else ""
    for name in products(weights):
        scale = stored.get(f"{prefix}{name}.weight_scale", stored.get(f"{name}.scale_weight"))
        exact = stored[f"{prefix}{name}.weight"].double() * scale.double()
        loaded_weight = loaded.tree.get_parameter(f"{name}.weight")
        assert torch.equal(loaded_weight, exact.float()), name
    # E4M3 keeps three bits after the first: a weight is off by at most 1/16 of itself (or of the
    # smallest normal number), and what the model makes of that stays within a few percent.
    error = (video(loaded.tree) - expected).norm() / expected.norm()
    assert error < 0.05


def test_eight_bit_weights_become_bfloat16_unless_asked(weights: Weights, tmp_path: Path) -> None:
    save_file(lightx2v_fp8(weights), tmp_path / "model.safetensors")
    tree = load_model(tmp_path / "model.safetensors").tree
    assert tree.blocks[0].self_attn.q.weight.dtype == torch.bfloat16
    assert tree.blocks[0].self_attn.q.bias.dtype == torch.float32


def test_a_plain_cast_to_fp8_loads(weights: Weights, tmp_path: Path) -> None:
    cast = {k: v.to(torch.float8_e4m3fn) if v.ndim == 2 else v for k, v in weights.items()}
    save_file(cast, tmp_path / "model.safetensors")
    loaded = load_model(tmp_path / "model.safetensors", dtype=torch.float32)
    assert loaded.format == "comfyui"
    assert torch.equal(
        loaded.tree.head.head.weight, weights["head.head.weight"].to(torch.float8_e4m3fn).float()
    )


NAME = "blocks.0.ffn.0"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(f"{NAME}.scale_weight"), "scale is missing"),
        (lambda w: w.pop(f"{NAME}.weight"), "scale without its weight"),
        (lambda w: w.update({f"{NAME}.scale_weight": torch.ones(3)}), "one per output channel"),
        (lambda w: w.update({f"{NAME}.scale_weight": torch.tensor(float("nan"))}), "NaN"),
        (
            lambda w: w.update({f"{NAME}.weight": torch.zeros(64, 64, dtype=torch.uint8)}),
            "NVFP4",
        ),
        (
            lambda w: w.update(
                {f"{NAME}.comfy_quant": torch.tensor(list(b'{"format":"nvfp4"}')).byte()}
            ),
            "nvfp4",
        ),
        (
            lambda w: w.update({f"{NAME}.comfy_quant": torch.tensor([1, 2, 3]).byte()}),
            "not readable",
        ),
    ],
    ids=["no scale", "no weight", "shape", "nan", "nvfp4 weight", "nvfp4 note", "note"],
)
def test_eight_bit_files_that_do_not_fit_together_are_refused(
    change: Callable[[Weights], object], message: str, weights: Weights, tmp_path: Path
) -> None:
    tensors = comfyui_fp8(weights, old=True)
    change(tensors)
    path = tmp_path / "model.safetensors"
    save_file({k: v.clone() for k, v in tensors.items()}, path)
    with pytest.raises(UserError, match=message) as caught:
        load_model(path)
    assert "\n" not in str(caught.value)


def test_a_rotated_quantisation_named_in_the_metadata_is_refused(
    weights: Weights, tmp_path: Path
) -> None:
    note = {"layers": {NAME: {"format": "int8_tensorwise", "convrot": True}}}
    path = tmp_path / "model.safetensors"
    save_file(weights, path, metadata={"_quantization_metadata": json.dumps(note)})
    with pytest.raises(UserError, match="int8_tensorwise"):
        load_model(path)


# --- LoRA -----------------------------------------------------------------------------------


def longlive_lora(rank: int = 4) -> Weights:
    """As LongLive publishes it: PEFT names under 'generator_lora'."""
    generator = torch.Generator().manual_seed(1)
    result = {}
    for i in range(CONFIG.num_layers):
        for product in PRODUCTS:
            wide_in = CONFIG.ffn_dim if product == "ffn.2" else CONFIG.dim
            wide_out = CONFIG.ffn_dim if product == "ffn.0" else CONFIG.dim
            name = f"base_model.model.blocks.{i}.{product}"
            result[f"{name}.lora_A.weight"] = torch.randn(rank, wide_in, generator=generator) * 0.1
            result[f"{name}.lora_B.weight"] = torch.randn(wide_out, rank, generator=generator) * 0.1
    return result


def test_a_base_with_its_lora_is_the_merged_model(
    weights: Weights, expected: Tensor, tmp_path: Path
) -> None:
    base, lora = tmp_path / "longlive_base.pt", tmp_path / "lora.pt"
    low = longlive_lora()
    torch.save({"generator": under("model.", weights)}, base)
    torch.save({"generator_lora": low}, lora)
    by_hand = WanModel(CONFIG)
    merged = {k: v.double() for k, v in weights.items()}
    for name in products(weights):
        a, b = (low[f"base_model.model.{name}.lora_{x}.weight"].double() for x in "AB")
        merged[f"{name}.weight"] = merged[f"{name}.weight"] + 0.5 * b @ a
    by_hand.load_state_dict({k: v.float() for k, v in merged.items()})
    wanted = video(by_hand.requires_grad_(False))
    loaded = load_model(base, loras=[(load_lora(lora), 0.5)])
    made = video(loaded.tree)
    assert (made - wanted).norm() / wanted.norm() < 1e-5
    assert (made - expected).norm() / expected.norm() > 1e-3
    assert not any("give the LoRA" in note for note in loaded.notes)
    assert any("give the LoRA" in note for note in load_model(base).notes)


def test_a_lora_merges_into_eight_bit_weights(weights: Weights, tmp_path: Path) -> None:
    path, lora = tmp_path / "model.safetensors", tmp_path / "lora.safetensors"
    save_file(lightx2v_fp8(weights), path)
    save_file(longlive_lora(), lora)
    plain = load_model(path, dtype=torch.float32).tree
    merged = load_model(path, dtype=torch.float32, loras=[(load_lora(lora), 1.0)]).tree
    low = longlive_lora()
    name = "blocks.1.ffn.2"
    a, b = (low[f"base_model.model.{name}.lora_{x}.weight"].double() for x in "AB")
    wanted = plain.get_parameter(f"{name}.weight").double() + b @ a
    assert torch.allclose(merged.get_parameter(f"{name}.weight").double(), wanted, atol=1e-6)


# --- families -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "family", "chunk", "steps", "window", "sink"),
    [
        ("self_forcing_dmd.pt", "self_forcing", 3, 4, -1, 0),
        ("chunkwise/causal_forcing.pt", "causal_forcing", 3, 4, -1, 0),
        # The file's own name goes before its folder's, and whole words count.
        ("Causal-Forcing/longlive_base.pt", "longlive", 3, 4, 12, 3),
        ("comfyui-longlive-models/rewardforcing.pt", "reward_forcing", 3, 4, 9, 3),
        ("framewise-12steps.pt", "causal_forcing_framewise", 1, 4, -1, 0),
        ("models--org--RollingForcing/snapshots/abc/model.pt", "rolling_forcing", 3, 5, 21, 3),
        ("chunkwise/longvideo.pt", "causal_forcing_long", 3, 4, 21, 3),
        ("framewise/causal_forcing.pt", "causal_forcing_framewise", 1, 4, -1, 0),
        ("causal-forcing++/framewise-2step.pt", "causal_forcing_2step", 1, 2, -1, 0),
        ("causal-forcing++/framewise-1step.pt", "causal_forcing_1step", 1, 1, -1, 0),
        ("causal_forcing-framewise.safetensors", "causal_forcing_framewise", 1, 4, -1, 0),
        ("models/longlive_base.pt", "longlive", 3, 4, 12, 3),
        ("MemFlow/base.pt", "memflow", 3, 4, 12, 3),
        ("rolling_forcing_dmd.pt", "rolling_forcing", 3, 5, 21, 3),
        ("rewardforcing.pt", "reward_forcing", 3, 4, 9, 3),
        ("wan_causal_dmd_v2v/model.pt", "streamdiffusion_v2", 1, 4, 6, 3),
        ("krea-realtime-video-14b.safetensors", "krea", 3, 4, 6, 0),
        ("short_video_gen.pt", "light_forcing", 3, 4, -1, 0),
        ("long_video_gen.pt", "light_forcing_long", 3, 4, 12, 1),
    ],
)
def test_published_files_get_their_settings(
    name: str, family: str, chunk: int, steps: int, window: int, sink: int,
    weights: Weights, tmp_path: Path,
) -> None:  # fmt: skip
    path = tmp_path / "x" / "y" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".pt":
        torch.save({"generator_ema": under("model.", weights)}, path)
    else:
        save_file(weights, path)
    found = open_checkpoint(path).identification
    assert found.family is not None
    assert found.family.name == family
    assert "name" in found.reason
    preset = found.preset
    got = (preset.frames_per_chunk, len(preset.steps), preset.window_frames, preset.sink_frames)
    assert got == (chunk, steps, window, sink)
    # The one- and two-step models take four steps in the first chunk.
    assert (preset.first_chunk_steps is not None) == (steps < 4)
    # What is suggested can run.
    RolloutSettings(
        num_frames=21,
        frames_per_chunk=chunk,
        steps=preset.steps,
        first_chunk_steps=preset.first_chunk_steps,
        window_frames=window,
        sink_frames=sink,
    )


def test_a_file_that_says_nothing_gets_the_candidates_named(
    weights: Weights, tmp_path: Path
) -> None:
    path = tmp_path / "model.pt"
    torch.save({"generator_ema": under("model.", weights)}, path)
    loaded = load_model(path)
    assert loaded.preset.frames_per_chunk == 3
    note = next(note for note in loaded.notes if "--family" in note)
    assert all(name in note for name in ("self_forcing", "longlive", "rolling_forcing"))
    chosen = load_model(path, family="causal_forcing_framewise")
    assert chosen.preset.frames_per_chunk == 1
    assert not any("--family" in note for note in chosen.notes)
    with pytest.raises(UserError, match=r"unknown family 'nonsense'.*self_forcing"):
        load_model(path, family="nonsense")


def test_the_users_choice_wins_over_the_files_name_and_survives_conversion(
    weights: Weights, tmp_path: Path
) -> None:
    path = tmp_path / "self_forcing_dmd.pt"
    torch.save({"generator_ema": under("model.", weights)}, path)
    out = tmp_path / "mine.safetensors"
    assert convert_checkpoint(path, out, family="rolling_forcing").family == "rolling_forcing"
    found = open_checkpoint(out).identification
    assert found.family is not None
    assert found.family.name == "rolling_forcing"
    assert len(found.preset.steps) == 5
    assert any("rolling denoising" in note for note in load_model(out).notes)


def test_where_a_published_sampler_does_more_the_notes_name_it(
    weights: Weights, tmp_path: Path
) -> None:
    path = tmp_path / "model.pt"
    torch.save(under("model.", weights), path)
    for family, behaviour in (
        ("reward_forcing", "sink averaged"),
        ("rolling_forcing", "rolling denoising"),
        ("krea", "encoded again"),
        ("light_forcing_long", "positions applied when keys are read"),
        ("memflow", "memory bank"),
    ):
        assert any(behaviour in note for note in load_model(path, family=family).notes), family


def test_a_link_in_a_download_cache_keeps_its_telling_name(
    weights: Weights, tmp_path: Path
) -> None:
    blob = tmp_path / "blobs" / "0a1b2c3d"
    link = tmp_path / "snapshots" / "f00d" / "checkpoints" / "rolling_forcing_dmd.pt"
    blob.parent.mkdir()
    link.parent.mkdir(parents=True)
    torch.save({"generator_ema": under("model.", weights)}, blob)
    link.symlink_to(blob)
    family = open_checkpoint(link).identification.family
    assert family is not None
    assert family.name == "rolling_forcing"


@pytest.mark.parametrize("name", ["kreations/model.pt", "node_initial/m.pt", "x/y.pt"])
def test_parts_of_words_say_nothing(name: str, weights: Weights, tmp_path: Path) -> None:
    path = tmp_path / "z" / name
    path.parent.mkdir(parents=True)
    torch.save(under("model.", weights), path)
    found = open_checkpoint(path).identification
    assert found.family is None
    assert len(found.candidates) > 10


def test_one_name_of_two_families_is_asked_about(weights: Weights, tmp_path: Path) -> None:
    path = tmp_path / "causal_forcing.pt"
    torch.save(under("model.", weights), path)
    loaded = load_model(path)
    assert "causal_forcing, causal_forcing_framewise" in loaded.notes[-1]


def test_a_size_rules_families_out() -> None:
    from lightforcing.lightforcing_core.checkpoints.families import identify

    names = [f.name for f in identify(5120, {}, Path("model.pt")).candidates]
    assert names == ["streamdiffusion_v2", "krea"]
    assert identify(1536, {}, Path("krea.pt")).family is None


def test_the_users_family_replaces_the_settings_in_the_file(
    weights: Weights, tmp_path: Path
) -> None:
    path, out = tmp_path / "self_forcing_dmd.pt", tmp_path / "mine.safetensors"
    torch.save(under("model.", weights), path)
    convert_checkpoint(path, out)
    chosen = load_model(out, family="rolling_forcing").preset
    assert (len(chosen.steps), chosen.window_frames, chosen.sink_frames) == (5, 21, 3)
    # Its own family keeps what the file says beyond the family's preset.
    settings = {"family": "self_forcing", "window_frames": 12, "sink_frames": 1}
    save_file(weights, out, metadata={"lightforcing": json.dumps(settings)})
    assert load_model(out, family="self_forcing").preset.window_frames == 12


@pytest.mark.parametrize("family", ["self_forcing", "rolling_forcing", "causal_forcing_2step"])
def test_a_conversion_keeps_every_digit_of_the_settings(
    family: str, weights: Weights, tmp_path: Path
) -> None:
    path, out = tmp_path / "model.pt", tmp_path / "mine.safetensors"
    torch.save(under("model.", weights), path)
    convert_checkpoint(path, out, family=family)
    assert load_model(out).preset == load_model(path, family=family).preset


def test_a_merged_lora_is_remembered(weights: Weights, tmp_path: Path) -> None:
    base, lora = tmp_path / "longlive_base.pt", tmp_path / "lora.safetensors"
    once, twice = tmp_path / "once.safetensors", tmp_path / "twice.safetensors"
    torch.save({"generator": under("model.", weights)}, base)
    save_file(longlive_lora(), lora)
    convert_checkpoint(base, once, loras=[(load_lora(lora), 0.5)])
    assert not any("give the LoRA" in note for note in load_model(once).notes)
    again = load_model(once, loras=[(load_lora(lora), 1.0)])
    assert any("lora.safetensors:0.5" in note for note in again.notes)
    convert_checkpoint(once, twice, loras=[(load_lora(lora), 1.0)])
    assert open_checkpoint(twice).merged_loras == ("lora.safetensors:0.5", "lora.safetensors:1")


def test_tied_weights_convert(weights: Weights, tmp_path: Path) -> None:
    path, out = tmp_path / "model.pt", tmp_path / "out.safetensors"
    tied = dict(weights)
    tied["blocks.1.self_attn.norm_q.weight"] = tied["blocks.0.self_attn.norm_q.weight"]
    torch.save(tied, path)
    convert_checkpoint(path, out)
    assert load_model(out).tree.blocks[1].self_attn.norm_q.weight.shape == (128,)


def test_what_is_passed_over_is_said(weights: Weights, tmp_path: Path) -> None:
    path = tmp_path / "self_forcing_dmd.pt"
    torch.save(trainer_file(weights), path)
    note = load_model(path).notes[0]
    assert "averaged weights under 'generator_ema.model.'" in note
    assert "'generator.model.'" in note
    assert "'critic.model.'" in note


def test_the_expected_parameters_are_those_of_the_model_in_its_order() -> None:
    from lightforcing.lightforcing_core.checkpoints.checkpoint import parameter_shapes

    for config in (CONFIG, WanConfig(), WanConfig(dim=128, num_heads=1, cross_attn_norm=False)):
        with torch.device("meta"):
            wanted = [(k, p.shape) for k, p in WanModel(config).named_parameters()]
        assert list(parameter_shapes(config).items()) == wanted


def test_lora_keys_without_a_place_are_one_note(
    weights: Weights, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, file = tmp_path / "self_forcing_dmd.pt", tmp_path / "lora.safetensors"
    torch.save(under("model.", weights), path)
    odd = {f"base_model.model.nowhere.{i}.lora_A.weight": torch.ones(2, 2) for i in range(5)}
    save_file(longlive_lora() | odd, file)
    lora = load_lora(file)
    caplog.clear()
    (note,) = load_model(path, loras=[(lora, 1.0)]).notes
    assert "ignored 5 entries of LoRA files" in note
    assert sum(key in note for key in odd) == 3
    assert not any("ignored" in record.getMessage() for record in caplog.records)
