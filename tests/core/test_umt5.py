"""The UMT5 text encoder reads every published layout and gives what transformers gives."""

from __future__ import annotations

import builtins
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lightforcing.lightforcing_core.errors import UserError
from lightforcing.lightforcing_core.text.umt5 import UMT5Encoder, clean_prompt

transformers = pytest.importorskip("transformers", reason="the umt5 extra is not installed")
spm = pytest.importorskip("sentencepiece", reason="the umt5 extra is not installed")

PROMPT = "a red ball rolls over the green field"


@pytest.fixture(scope="module")
def expected(umt5_reference: torch.nn.Module, umt5_piece: bytes) -> Tensor:
    processor = spm.SentencePieceProcessor(model_proto=umt5_piece)
    ids = torch.tensor([[*processor.encode(PROMPT), 1]])
    padded = torch.zeros(1, 512, dtype=torch.long)
    padded[:, : ids.shape[1]] = ids
    mask = (torch.arange(512) < ids.shape[1]).long()[None]
    with torch.no_grad():
        rows = umt5_reference(input_ids=padded, attention_mask=mask).last_hidden_state
    return rows[:, : ids.shape[1]]


def single_file(path: Path, umt5_weights: dict[str, Tensor], umt5_piece: bytes) -> Path:
    spiece = torch.frombuffer(bytearray(umt5_piece), dtype=torch.uint8)
    save_file(umt5_weights | {"spiece_model": spiece}, path)
    return path


def test_the_single_file_gives_the_padded_and_masked_result_of_transformers(
    tmp_path: Path, umt5_weights: dict[str, Tensor], umt5_piece: bytes, expected: Tensor
) -> None:
    path = single_file(tmp_path / "umt5.safetensors", umt5_weights, umt5_piece)
    rows = UMT5Encoder.load(path, dtype=torch.float32).encode(PROMPT)
    assert rows.shape == expected.shape
    torch.testing.assert_close(rows, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", ["diffusers", "flat", "sharded", "bin"])
def test_folders_give_the_same(
    tmp_path: Path,
    umt5_weights: dict[str, Tensor],
    umt5_piece: bytes,
    expected: Tensor,
    layout: str,
) -> None:
    weights_at = tmp_path / "text_encoder" if layout == "diffusers" else tmp_path
    tokenizer_at = tmp_path / "tokenizer" if layout == "diffusers" else tmp_path
    for folder in (weights_at, tokenizer_at):
        folder.mkdir(exist_ok=True)
    (tokenizer_at / "spiece.model").write_bytes(umt5_piece)
    names = sorted(umt5_weights)
    if layout == "bin":
        # The whole encoder-decoder model, as google/umt5-xxl is published.
        extra = {"lm_head.weight": torch.zeros(2), "decoder.final_layer_norm.weight": torch.ones(2)}
        torch.save(umt5_weights | extra, weights_at / "pytorch_model.bin")
    elif layout == "sharded":
        for index, part in enumerate((names[:5], names[5:])):
            shard = {name: umt5_weights[name] for name in part}
            save_file(shard, weights_at / f"model-0000{index}-of-00002.safetensors")
    else:
        save_file(umt5_weights, weights_at / "model.safetensors")
    rows = UMT5Encoder.load(tmp_path, dtype=torch.float32).encode(PROMPT)
    torch.testing.assert_close(rows, expected, rtol=1e-4, atol=1e-5)


def test_wans_own_names_give_the_same(
    tmp_path: Path, umt5_weights: dict[str, Tensor], umt5_piece: bytes, expected: Tensor
) -> None:
    own = {
        "token_embedding.weight": umt5_weights["shared.weight"],
        "norm.weight": umt5_weights["encoder.final_layer_norm.weight"],
    }
    for block in range(2):
        theirs = f"encoder.block.{block}.layer"
        ours = f"blocks.{block}"
        for letter in "qkvo":
            own[f"{ours}.attn.{letter}.weight"] = umt5_weights[
                f"{theirs}.0.SelfAttention.{letter}.weight"
            ]
        own[f"{ours}.pos_embedding.embedding.weight"] = umt5_weights[
            f"{theirs}.0.SelfAttention.relative_attention_bias.weight"
        ]
        own[f"{ours}.norm1.weight"] = umt5_weights[f"{theirs}.0.layer_norm.weight"]
        own[f"{ours}.norm2.weight"] = umt5_weights[f"{theirs}.1.layer_norm.weight"]
        dense = f"{theirs}.1.DenseReluDense"
        # The gate has the activation: gelu(gate(x)) * fc1(x).
        own[f"{ours}.ffn.gate.0.weight"] = umt5_weights[f"{dense}.wi_0.weight"]
        own[f"{ours}.ffn.fc1.weight"] = umt5_weights[f"{dense}.wi_1.weight"]
        own[f"{ours}.ffn.fc2.weight"] = umt5_weights[f"{dense}.wo.weight"]
    path = tmp_path / "models_t5_umt5-xxl-enc-bf16.pth"
    torch.save(own, path)
    (tmp_path / "google" / "umt5-xxl").mkdir(parents=True)
    (tmp_path / "google" / "umt5-xxl" / "spiece.model").write_bytes(umt5_piece)
    for given in (path, tmp_path):
        rows = UMT5Encoder.load(given, dtype=torch.float32).encode(PROMPT)
        torch.testing.assert_close(rows, expected, rtol=1e-4, atol=1e-5)


def test_fp8_weights_are_multiplied_by_their_scales(
    tmp_path: Path, umt5_weights: dict[str, Tensor], umt5_piece: bytes
) -> None:
    scaled: dict[str, Tensor] = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    rounded = {}
    for name, tensor in umt5_weights.items():
        if tensor.ndim == 2 and name.startswith("encoder.block") and "bias" not in name:
            scale = tensor.abs().max() / 448
            fp8 = (tensor / scale).to(torch.float8_e4m3fn)
            scaled[name] = fp8
            scaled[name.removesuffix(".weight") + ".scale_weight"] = scale.clone()
            rounded[name] = fp8.float() * scale
        else:
            scaled[name] = rounded[name] = tensor
    results = []
    for label, tensors in (("scaled", scaled), ("rounded", rounded)):
        path = single_file(tmp_path / f"{label}.safetensors", tensors, umt5_piece)
        results.append(UMT5Encoder.load(path, dtype=torch.float32).encode(PROMPT))
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-6)


def test_blockwise_scales_are_refused_with_the_file_to_use(
    tmp_path: Path, umt5_weights: dict[str, Tensor], umt5_piece: bytes
) -> None:
    name = "encoder.block.0.layer.0.SelfAttention.q"
    odd = umt5_weights | {f"{name}.weight_scale": torch.ones(4)}
    path = single_file(tmp_path / "odd.safetensors", odd, umt5_piece)
    with pytest.raises(UserError, match=r"not supported.*fp16"):
        UMT5Encoder.load(path)


def test_a_long_prompt_is_cut_to_512_tokens_and_keeps_its_end_token(
    tmp_path: Path,
    umt5_weights: dict[str, Tensor],
    umt5_piece: bytes,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = single_file(tmp_path / "umt5.safetensors", umt5_weights, umt5_piece)
    rows = UMT5Encoder.load(path, dtype=torch.float32).encode("ball " * 1000)
    assert rows.shape == (1, 512, 32)
    assert "its end is cut" in caplog.text


def test_an_empty_prompt_is_its_end_token(
    tmp_path: Path, umt5_weights: dict[str, Tensor], umt5_piece: bytes
) -> None:
    path = single_file(tmp_path / "umt5.safetensors", umt5_weights, umt5_piece)
    assert UMT5Encoder.load(path).encode("  ").shape == (1, 1, 32)


def test_the_prompt_is_cleaned_as_published() -> None:
    assert clean_prompt("  a\n\tred &amp;amp; blue   ball ") == "a red & blue ball"


def test_errors_name_the_thing_and_what_to_do(
    tmp_path: Path, umt5_weights: dict[str, Tensor], umt5_piece: bytes
) -> None:
    with pytest.raises(UserError, match="no UMT5 weights in"):
        UMT5Encoder.load(tmp_path)
    alone = tmp_path / "alone.safetensors"
    save_file(umt5_weights, alone)
    with pytest.raises(UserError, match=r"no tokenizer for .*spiece\.model"):
        UMT5Encoder.load(alone)
    wrong = tmp_path / "vae.safetensors"
    save_file({"decoder.middle.0.residual.0.gamma": torch.ones(2)}, wrong)
    with pytest.raises(UserError, match="this is a Wan VAE, not UMT5-XXL"):
        UMT5Encoder.load(wrong)
    torn = {k: v for k, v in umt5_weights.items() if k != "encoder.final_layer_norm.weight"}
    path = single_file(tmp_path / "torn.safetensors", torn, umt5_piece)
    with pytest.raises(UserError, match=r"missing encoder\.final_layer_norm\.weight"):
        UMT5Encoder.load(path)
    misfit = umt5_weights | {"encoder.final_layer_norm.weight": torch.ones(7)}
    path = single_file(tmp_path / "misfit.safetensors", misfit, umt5_piece)
    with pytest.raises(UserError, match="UMT5 weights do not fit"):
        UMT5Encoder.load(path)
    path = single_file(tmp_path / "bad_piece.safetensors", umt5_weights, b"nonsense")
    with pytest.raises(UserError, match="damaged tokenizer"):
        UMT5Encoder.load(path)
    nan = umt5_weights | {"encoder.final_layer_norm.weight": torch.full((32,), float("nan"))}
    path = single_file(tmp_path / "nan.safetensors", nan, umt5_piece)
    with pytest.raises(UserError, match="NaN"):
        UMT5Encoder.load(path).encode(PROMPT)


QUERY = "encoder.block.0.layer.0.SelfAttention.q.weight"
BIAS = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
GATE = "encoder.block.0.layer.1.DenseReluDense.wi_0.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"a.block.b": torch.zeros(1)}, r"unexpected a\.block\.b"),
        ({"a.block.9999999.x": torch.zeros(1)}, "unexpected"),
        ({"encoder.block.9999999.x": torch.zeros(1)}, "of a block that UMT5-XXL has not"),
        ({f"encoder.block.{'9' * 900}.x": torch.zeros(1)}, "of a block that UMT5-XXL has not"),
        ({"encoder.block.x.y": torch.zeros(1)}, "unexpected"),
        ({"shared.weight": torch.zeros(4)}, r"'shared\.weight' has shape \[4\]"),
        ({"shared.weight": torch.zeros(2**40, 0)}, r"'shared\.weight' has shape"),
        ({BIAS: torch.zeros(8, 0)}, "has shape"),
        ({BIAS: torch.zeros(8, 64)}, "32 rows, expected a multiple of its 64 heads"),
        ({BIAS: torch.zeros(1, 4)}, "1 rows, expected 4 to 256"),
        ({QUERY: torch.tensor(1.0)}, "has shape"),
        ({GATE: torch.zeros(0, 2**60)}, "has shape"),
        ({"spiece_model": torch.zeros(4).bfloat16()}, "'spiece_model' is bfloat16"),
    ],
    ids=range(13),
)
def test_sizes_that_no_encoder_has_are_one_line(
    change: dict[str, Tensor],
    said: str,
    tmp_path: Path,
    umt5_weights: dict[str, Tensor],
    umt5_piece: bytes,
) -> None:
    path = tmp_path / "umt5.safetensors"
    piece = {"spiece_model": torch.tensor(list(umt5_piece), dtype=torch.uint8)}
    save_file(umt5_weights | piece | change, path)
    started = time.perf_counter()
    with pytest.raises(UserError, match=said) as caught:
        UMT5Encoder.load(path)
    assert time.perf_counter() - started < 10
    assert str(caught.value).isprintable()
    assert str(path) in str(caught.value)


def test_a_damaged_json_tokenizer_is_one_line(
    tmp_path: Path, umt5_weights: dict[str, Tensor]
) -> None:
    pytest.importorskip("tokenizers")
    (tmp_path / "tokenizer.json").write_text('{"model": 1}')
    save_file(umt5_weights, tmp_path / "umt5.safetensors")
    with pytest.raises(UserError, match=r"damaged tokenizer .*tokenizer\.json") as caught:
        UMT5Encoder.load(tmp_path / "umt5.safetensors")
    assert str(caught.value).isprintable()


def test_a_json_tokenizer_serves_where_there_is_no_sentencepiece_file(
    tmp_path: Path, umt5_weights: dict[str, Tensor], umt5_piece: bytes, expected: Tensor
) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    processor = spm.SentencePieceProcessor(model_proto=umt5_piece)
    pieces = [(processor.id_to_piece(i), processor.get_score(i)) for i in range(len(processor))]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    # Files in the wild carry padding settings; they must not reach the encoder.
    tokenizer.enable_padding(length=64)
    (tmp_path / "tokenizer").mkdir()
    tokenizer.save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    path = tmp_path / "model.safetensors"
    save_file(umt5_weights, path)
    rows = UMT5Encoder.load(path, dtype=torch.float32).encode(PROMPT)
    torch.testing.assert_close(rows, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("package", ["transformers", "sentencepiece"])
def test_a_missing_package_is_named_with_the_pip_command(
    tmp_path: Path,
    umt5_weights: dict[str, Tensor],
    umt5_piece: bytes,
    monkeypatch: pytest.MonkeyPatch,
    package: str,
) -> None:
    path = single_file(tmp_path / "umt5.safetensors", umt5_weights, umt5_piece)
    real = builtins.__import__

    def without(name: str, *args: object, **kwargs: object) -> object:
        if name.split(".")[0] == package:
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=rf"needs {package}: pip install 'lightforcing\[umt5\]'"):
        UMT5Encoder.load(path)


def test_loading_never_asks_the_network(
    tmp_path: Path,
    umt5_weights: dict[str, Tensor],
    umt5_piece: bytes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a connection was asked for")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.create_connection", refuse)
    path = single_file(tmp_path / "umt5.safetensors", umt5_weights, umt5_piece)
    UMT5Encoder.load(path).encode(PROMPT)
