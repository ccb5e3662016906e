"""A file that claims impossible sizes, or lacks pieces, ends in one line, at once."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lightforcing.lightforcing_core.checkpoints.checkpoint import open_checkpoint
from lightforcing.lightforcing_core.checkpoints.formats import recognise
from lightforcing.lightforcing_core.checkpoints.metadata import (
    OUR_KEY,
    is_marked_causal,
    read_facts,
    whole_number,
)
from lightforcing.lightforcing_core.errors import UserError
from lightforcing.lightforcing_core.wan.config import WanConfig
from lightforcing.lightforcing_core.wan.modules import WanModel

CONFIG = WanConfig(dim=128, ffn_dim=32, num_heads=1, num_layers=3, text_dim=16, freq_dim=16)
Weights = dict[str, Tensor]


@pytest.fixture
def weights() -> Weights:
    return {k: torch.zeros(v.shape) for k, v in meta(CONFIG).items()}


def meta(config: WanConfig) -> Weights:
    with torch.device("meta"):
        return {name: p.detach() for name, p in WanModel(config).named_parameters()}


def refused(weights: Weights, folder: Path, **metadata: str) -> str:
    """The one line with which a file is refused, soon."""
    path = folder / "model.safetensors"
    save_file(weights, path, metadata=metadata or None)
    started = time.perf_counter()
    with pytest.raises(UserError) as caught:
        open_checkpoint(path)
    assert time.perf_counter() - started < 10
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 600
    return message


def without(weights: Weights, part: str) -> Weights:
    return {name: tensor for name, tensor in weights.items() if part not in name}


# ---- sizes ----


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("patch_embedding.weight", (128, 16, 1, 2, 0)),
        ("patch_embedding.weight", (0, 16, 1, 2, 2)),
        ("patch_embedding.weight", (128, 0, 1, 2, 2)),
        ("blocks.0.ffn.0.weight", (2**60, 0)),
        ("blocks.0.ffn.0.weight", (2**17 + 1, 1)),
        ("time_embedding.0.weight", (0, 2**60)),
        ("text_embedding.0.weight", (128, 0)),
        ("head.head.weight", (0, 128)),
    ],
)
def test_sizes_of_nothing_or_without_end_are_refused(
    name: str, shape: tuple[int, ...], weights: Weights, tmp_path: Path
) -> None:
    weights[name] = torch.zeros(shape)
    message = refused(weights, tmp_path)
    assert f"'{name}' has shape {list(shape)}" in message
    assert "expected sizes from 1 to 131072" in message


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dim": 0}, "dim must be"),
        ({"ffn_dim": 2**17 + 1}, "ffn_dim must be"),
        ({"out_dim": 0}, "out_dim must be"),
        ({"num_layers": 201}, "num_layers must be"),
        ({"text_len": 10**13}, "text_len must be"),
        ({"text_len": 2**16 + 1}, "text_len must be"),
        ({"text_len": 10**5000}, "text_len must be.* got a number of more than 300 digits"),
        ({"num_heads": 0}, "num_heads must be from 1"),
        ({"num_heads": 256}, "num_heads must be from 1 to the width 128"),
        ({"patch_size": (1, 2, 0)}, "patch_size must be"),
        ({"freq_dim": 15}, "freq_dim must be even"),
    ],
)
def test_a_config_out_of_bounds_is_refused(change: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        WanConfig(**{"dim": 128, "num_heads": 1} | change)


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ('{"num_heads": 1' + "0" * 5000 + "}", "is not JSON"),
        ('{"num_heads": 1' + "0" * 4000 + "}", "'num_heads' must be a whole number from 1 to"),
        ('{"text_len": 10000000000000}', "'text_len' must be|text_len must be"),
        ('{"text_len": 65537}', "text_len must be from 1 to 65536"),
        ('{"num_heads": 0}', "'num_heads' must be"),
        ('["a\\u0000\\n"]', "must be a JSON object"),
    ],
    ids=range(6),
)
def test_metadata_out_of_bounds_is_refused(
    facts: str, said: str, weights: Weights, tmp_path: Path
) -> None:
    assert re.search(said, refused(weights, tmp_path, **{OUR_KEY: facts}))


def test_numbers_of_a_thousand_digits_are_no_facts() -> None:
    with pytest.raises(UserError, match="is not JSON"):
        read_facts({OUR_KEY: "1" * 5000}, Path("x"))
    assert not is_marked_causal({"config": "1" * 5000})
    assert whole_number({"a": 2**20}, "a", 1) == 2**20
    assert whole_number({"a": 4}, "a", 1, 4) == 4
    for value, most in ((2**20 + 1, None), (5, 4), (True, None), (1.0, None)):
        with pytest.raises(UserError, match="'a' must be a whole number from 1 to"):
            whole_number({"a": value}, "a", 1, *([most] if most else []))


# ---- names ----


@pytest.mark.parametrize("number", ["99999999999", "200", "9" * 900])
def test_a_block_that_no_model_has_is_refused(
    number: str, weights: Weights, tmp_path: Path
) -> None:
    message = refused(weights | {f"blocks.{number}.x": torch.zeros(1)}, tmp_path)
    assert "a block that no Wan model has" in message
    assert "at most 200" in message


def test_sixty_thousand_blocks_are_refused_at_once(weights: Weights, tmp_path: Path) -> None:
    many = {f"blocks.{number}.x": torch.zeros(0) for number in range(60_000)}
    assert "at most 200" in refused(weights | many, tmp_path)


def test_thirty_thousand_denoisers_are_refused_at_once(tmp_path: Path) -> None:
    many = {f"a{number}.patch_embedding.weight": torch.zeros(0) for number in range(30_000)}
    message = refused(many, tmp_path)
    assert "30000 tensors '...patch_embedding.weight', expected at most 64" in message


def test_sixty_four_denoisers_among_many_names_are_found_soon() -> None:
    empty = torch.zeros(0)
    names = {f"{'a' * (n + 1)}.patch_embedding.weight": empty for n in range(64)}
    names |= {f"z.{number}": empty for number in range(99_000)}
    started = time.perf_counter()
    assert recognise(names, {}).root == "a."
    assert time.perf_counter() - started < 10


# ---- missing pieces ----


@pytest.mark.parametrize(("width", "layers"), [(1536, 30), (5120, 40)])
def test_a_published_width_has_its_published_depth(width: int, layers: int) -> None:
    config = WanConfig(dim=width, num_heads=width // 128, num_layers=layers)
    whole = meta(config)
    assert WanConfig.from_tensors(whole) == config
    assert WanConfig.from_tensors(whole, num_layers=layers) == config
    last = without(whole, f"blocks.{layers - 1}.")
    with pytest.raises(UserError, match=rf"blocks are missing.*\[{layers - 1}\] of {layers}"):
        WanConfig.from_tensors(last)
    with pytest.raises(UserError, match=f"says {layers - 1} layers.*has {layers}"):
        WanConfig.from_tensors(last, num_layers=layers - 1)
    more = whole | {f"blocks.{layers}.ffn.0.weight": torch.zeros(1)}
    with pytest.raises(UserError, match=f"has {layers + 1} blocks, expected {layers}"):
        WanConfig.from_tensors(more)


def test_of_other_widths_the_metadata_or_the_tensors_say_the_depth(weights: Weights) -> None:
    assert WanConfig.from_tensors(weights) == CONFIG
    assert WanConfig.from_tensors(weights, num_layers=3) == CONFIG
    last = without(weights, "blocks.2.")
    assert WanConfig.from_tensors(last).num_layers == 2
    with pytest.raises(UserError, match=r"blocks are missing.*\[2\] of 3"):
        WanConfig.from_tensors(last, num_layers=3)
    with pytest.raises(UserError, match=r"3 blocks, expected 2 .its metadata"):
        WanConfig.from_tensors(weights, num_layers=2)
    with pytest.raises(UserError, match=r"blocks are missing.*\[1\] of 3"):
        WanConfig.from_tensors(without(weights, "blocks.1."))
    with pytest.raises(UserError, match=r"blocks are missing.*: all of"):
        WanConfig.from_tensors(without(weights, "blocks."))
    for number in (0, 201, 10**12):
        with pytest.raises(UserError, match="num_layers must be"):
            WanConfig.from_tensors(weights, num_layers=number)


def test_the_first_blocks_norm_is_missed_and_not_taken_for_another_model(
    weights: Weights, tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    save_file(without(weights, "blocks.0.norm3.weight"), path)
    checkpoint = open_checkpoint(path)
    assert checkpoint.config == CONFIG
    assert checkpoint.missing == ("blocks.0.norm3.weight",)
    save_file(without(weights, ".norm3."), path)
    checkpoint = open_checkpoint(path)
    assert not checkpoint.config.cross_attn_norm
    assert checkpoint.missing == ()


# ---- which of several ----


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("averaged_model", "model"),
        ("model.EMA", "model"),
        ("generator.EMA", "generator"),
        ("average", "net"),
        ("model_avg", "model"),
        ("swa_model", "generator"),
    ],
)
def test_averages_of_every_name_come_first(one: str, other: str, weights: Weights) -> None:
    for order in ((one, other), (other, one)):
        tensors = {f"{root}.{k}": v for root in order for k, v in weights.items()}
        found = recognise(tensors, {})
        assert found.root == f"{one}."
        assert found.is_average
        assert found.passed_over == (f"{other}.",)
        assert set(found.weights.tensors) == set(weights)


def test_of_two_alike_neither_is_taken(weights: Weights) -> None:
    tensors = {f"{root}.{k}": v for root in ("net_b", "net_a") for k, v in weights.items()}
    with pytest.raises(UserError, match=r"'net_a\.' and 'net_b\.'.*cannot be known") as caught:
        recognise(tensors, {})
    assert str(caught.value).isprintable()
    # What is passed over anyway may be alike.
    tensors |= {f"generator.{k}": v for k, v in weights.items()}
    assert recognise(tensors, {}).root == "generator."


def test_facts_are_read_whole(weights: Weights, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    facts = json.dumps({"num_heads": 2, "text_len": 65536})
    save_file(weights, path, metadata={OUR_KEY: facts})
    config = open_checkpoint(path).config
    assert (config.num_heads, config.text_len) == (2, 65536)
