"""A tiny UMT5 for the tests of the encoder and of the whole pipeline."""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor

UMT5_WIDTH = 32


@pytest.fixture(scope="module")
def umt5_piece() -> bytes:
    """A tiny sentencepiece model with UMT5's special tokens (pad 0, end 1, unknown 2)."""
    spm = pytest.importorskip("sentencepiece", reason="the umt5 extra is not installed")
    stream = io.BytesIO()
    lines = [
        "a red ball rolls over the green field",
        "a blue cube falls slowly",
        "the camera pans left over stones",
    ] * 20
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=stream,
        vocab_size=34,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return stream.getvalue()


@pytest.fixture(scope="module")
def umt5_reference() -> torch.nn.Module:
    """The transformers module, made by its own constructor, with random weights."""
    transformers = pytest.importorskip("transformers", reason="the umt5 extra is not installed")
    torch.manual_seed(5)
    config = transformers.UMT5Config(
        vocab_size=60,
        d_model=UMT5_WIDTH,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=8,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    model = transformers.UMT5EncoderModel(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def umt5_weights(umt5_reference: torch.nn.Module) -> dict[str, Tensor]:
    """Its state dict, the second name of the shared table left out as in the published files."""
    return {
        name: tensor.clone()
        for name, tensor in umt5_reference.state_dict().items()
        if name != "encoder.embed_tokens.weight"
    }
