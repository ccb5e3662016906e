"""Every supported layout loads to the same model; everything else ends in one clear line."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lightforcing.lightforcing_core.checkpoints.load import load_model
from lightforcing.lightforcing_core.errors import UserError
from lightforcing.lightforcing_core.wan.config import WanConfig
from lightforcing.lightforcing_core.wan.modules import WanModel

CONFIG = WanConfig(dim=128, ffn_dim=32, num_heads=1, num_layers=2, text_dim=16, freq_dim=16)


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {k: v.detach() for k, v in WanModel(CONFIG).named_parameters()}


def prefixed(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + k: v for k, v in tensors.items()}


def other(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v + 1 for k, v in tensors.items()}


LAYOUTS: dict[str, tuple[str, Callable[[dict[str, Tensor]], dict]]] = {
    "ema over generator": (
        "self_forcing",
        lambda w: {
            "generator": prefixed(other(w), "model."),
            "critic": prefixed(other(w), "model."),
            "generator_ema": prefixed(w, "model."),
            "step": 600,
        },
    ),
    "generator only": ("self_forcing", lambda w: {"generator": prefixed(w, "model.")}),
    "flat with model prefix": ("self_forcing", lambda w: prefixed(w, "model.")),
    "plain names": ("comfyui", dict),
    "comfyui prefix": ("comfyui", lambda w: prefixed(w, "model.diffusion_model.")),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_torch_files_load(layout: str, weights: dict[str, Tensor], tmp_path: Path) -> None:
    name, wrap = LAYOUTS[layout]
    path = tmp_path / "model.pt"
    torch.save(wrap(weights), path)
    loaded = load_model(path)
    assert loaded.format == name
    assert loaded.config == CONFIG
    for key, parameter in loaded.tree.named_parameters():
        assert torch.equal(parameter, weights[key]), key


@pytest.mark.parametrize("prefix", ["", "model.", "diffusion_model.", "model.diffusion_model."])
def test_safetensors_load(prefix: str, weights: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(prefixed(weights, prefix), path)
    loaded = load_model(path, dtype=torch.bfloat16)
    for key, parameter in loaded.tree.named_parameters():
        assert torch.equal(parameter, weights[key].bfloat16()), key


def test_our_metadata_sets_heads_and_preset(weights: dict[str, Tensor], tmp_path: Path) -> None:
    facts = {
        "num_heads": 4,
        "frames_per_chunk": 1,
        "steps": [1000, 500],
        "window_frames": 12,
        "sink_frames": 3,
        "width": 256,
        "height": 128,
        "frames": 33,
    }
    path = tmp_path / "model.safetensors"
    save_file(weights, path, metadata={"lightforcing": json.dumps(facts)})
    loaded = load_model(path)
    assert loaded.config.num_heads == 4
    assert (loaded.preset.frames_per_chunk, loaded.preset.steps) == (1, (1000.0, 500.0))
    assert (loaded.preset.window_frames, loaded.preset.sink_frames) == (12, 3)
    assert (loaded.preset.width, loaded.preset.height, loaded.preset.frames) == (256, 128, 33)


def test_sizes_of_1_3b_and_14b_come_from_the_tensors() -> None:
    for config in (WanConfig(), WanConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)):
        with torch.device("meta"):
            tensors = dict(WanModel(config).named_parameters())
        assert WanConfig.from_tensors(tensors) == config
    assert len(dict(tensors)) == 27 * 40 + 15


def test_the_1_3b_tree_has_the_published_tensors() -> None:
    with torch.device("meta"):
        tensors = dict(WanModel(WanConfig()).named_parameters())
    assert len(tensors) == 825
    assert sum(t.numel() for t in tensors.values()) == 1_418_996_800


def test_unknown_tensors_are_named_not_swallowed(
    weights: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    save_file({**weights, "surprise.weight": torch.zeros(1)}, path)
    loaded = load_model(path)
    assert loaded.unexpected == ("surprise.weight",)
    assert "surprise.weight" in loaded.notes[0]


def _channels(tensors: dict[str, Tensor], channels_in: int, channels_out: int) -> None:
    tensors["patch_embedding.weight"] = torch.zeros(128, channels_in, 1, 2, 2)
    tensors["head.head.weight"] = torch.zeros(4 * channels_out, 128)
    tensors["head.head.bias"] = torch.zeros(4 * channels_out)


def rejected(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_model(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("blocks.1.ffn.0.bias"), r"missing \(blocks\.1\.ffn\.0\.bias\)"),
        (lambda w: w.update({"head.head.bias": torch.zeros(7)}), "head.head.bias is \\[7\\]"),
        (lambda w: [w.pop(k) for k in list(w) if k.startswith("blocks.0.")], "blocks are missing"),
        (lambda w: w["head.head.bias"].fill_(float("nan")), "NaN"),
        (lambda w: w.update({"img_emb.proj.0.weight": torch.zeros(1)}), "image-to-video"),
        (lambda w: _channels(w, 36, 16), "image-to-video"),
        (lambda w: _channels(w, 48, 48), "48 latent channels, expected 16"),
        (
            lambda w: w.update({"blocks.0.ffn.0.scale_weight": torch.ones(1)}),
            "quantised.*not supported",
        ),
        (lambda w: w.update({"text_embedding.0.weight": torch.zeros(5)}), "expected 2 dimensions"),
    ],
    ids=[
        "missing",
        "wrong shape",
        "missing block",
        "nan",
        "image to video",
        "36 channels",
        "48 channels",
        "scales",
        "rank",
    ],
)
def test_a_model_that_does_not_fit_is_refused(
    change: Callable[[dict[str, Tensor]], object],
    message: str,
    weights: dict[str, Tensor],
    tmp_path: Path,
) -> None:
    tensors = {k: v.clone() for k, v in weights.items()}
    change(tensors)
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    import re

    assert re.search(message, rejected(path))


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("decoder.upsamples.0.residual.0.gamma", "a Wan VAE"),
        ("decoder.22.bias", "a TAEHV autoencoder"),
        ("blocks.0.self_attn.q.lora_A.weight", "a LoRA"),
        ("encoder.block.0.layer.0.SelfAttention.q.weight", "a T5 text encoder"),
        ("something.else", "unknown kind"),
    ],
)
def test_other_kinds_of_files_are_called_by_their_name(
    name: str, what: str, tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    save_file({name: torch.zeros(2, 2)}, path)
    assert what in rejected(path)


@pytest.mark.parametrize(
    "facts",
    [
        {"num_heads": 0},
        {"num_heads": "1"},
        {"frames_per_chunk": "3"},
        {"frames_per_chunk": 0},
        {"steps": 5},
        {"steps": [1, 2]},
        {"width": 256.5},
        {"text_len": "a"},
        {"window_frames": -2},
        [1],
    ],
    ids=str,
)
def test_nonsense_in_the_metadata_is_refused(
    facts: object, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    save_file(weights, path, metadata={"lightforcing": json.dumps(facts)})
    rejected(path)


@pytest.mark.filterwarnings("ignore")  # torch warns of what it meets in a damaged pickle
@pytest.mark.parametrize("legacy", [False, True])
def test_damaged_torch_files_end_in_one_line(
    legacy: bool, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "model.pt"
    torch.save(weights, path, _use_new_zipfile_serialization=not legacy)
    whole = bytearray(path.read_bytes())
    chance = random.Random(7)
    for _ in range(60):
        damaged = bytearray(whole)
        # The pickle stands at the start of either layout; the rest is numbers.
        for _ in range(chance.randint(1, 8)):
            damaged[chance.randrange(3000)] = chance.randrange(256)
        path.write_bytes(damaged[: chance.choice([len(damaged), chance.randrange(len(damaged))])])
        with contextlib.suppress(UserError):  # some changes do no harm
            load_model(path)
