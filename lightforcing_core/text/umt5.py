"""Wan's text encoder, UMT5-XXL, from any of the three layouts it is published in.

The network is the one in transformers, an optional extra; tensors are read by this project's own
safe reader and nothing is ever downloaded. Layouts: Hugging Face names (a folder or ComfyUI's
single file, which carries its tokenizer and may be fp8 with scales) and Wan's own names (a .pth
file with a tokenizer folder beside it).

Reference: UMT5 (arXiv:2304.09151); text cleaning and zero padding as in the published Wan 2.1
code. Deviation: mojibake repair (ftfy) is left out; plain text is unchanged by it.
"""

from __future__ import annotations

import html
import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..checkpoints.archive import one_line
from ..checkpoints.files import read_state_dict
from ..checkpoints.formats import describe
from ..checkpoints.quantised import check_plain, take_scales
from ..errors import UserError

if TYPE_CHECKING:
    from transformers import UMT5EncoderModel

_LOG = logging.getLogger("lightforcing")
MAX_TOKENS = 512

_INSTALL = "pip install 'lightforcing[umt5]' (or: pip install transformers sentencepiece)"
_SPIECE = "spiece_model"

# Tensors that the sizes are read from.
_TABLE = "shared.weight"
_QUERY = "encoder.block.0.layer.0.SelfAttention.q.weight"
_BIAS = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
_GATE = "encoder.block.0.layer.1.DenseReluDense.wi_0.weight"
_BLOCK = re.compile(r"encoder\.block\.([0-9]+)\.")
# Of every size that a file can claim; UMT5-XXL has 256384 rows, 10240 wide, in 24 blocks.
_MAX_SIZE = 2**20
_MAX_BLOCKS = 100
# Relative positions are counted in a quarter of the buckets, up to 128 in steps of growing size.
_BUCKETS = (4, 256)

# Wan's own names -> Hugging Face names; N is the block index.
_WAN_BLOCK_NAMES = {
    "norm1.weight": "layer.0.layer_norm.weight",
    "attn.q.weight": "layer.0.SelfAttention.q.weight",
    "attn.k.weight": "layer.0.SelfAttention.k.weight",
    "attn.v.weight": "layer.0.SelfAttention.v.weight",
    "attn.o.weight": "layer.0.SelfAttention.o.weight",
    "pos_embedding.embedding.weight": "layer.0.SelfAttention.relative_attention_bias.weight",
    "norm2.weight": "layer.1.layer_norm.weight",
    "ffn.gate.0.weight": "layer.1.DenseReluDense.wi_0.weight",
    "ffn.fc1.weight": "layer.1.DenseReluDense.wi_1.weight",
    "ffn.fc2.weight": "layer.1.DenseReluDense.wo.weight",
}
_WAN_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")

Tokenizer = Callable[[str], list[int]]


def clean_prompt(prompt: str) -> str:
    """Unescape HTML entities, twice as the published code does, and collapse white space."""
    return " ".join(html.unescape(html.unescape(prompt)).split())


def _from_wan_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a state dict of Wan's own names; others pass unchanged."""
    if "token_embedding.weight" not in tensors:
        return dict(tensors)
    fixed = {
        "token_embedding.weight": "shared.weight",
        "norm.weight": "encoder.final_layer_norm.weight",
    }
    renamed = {}
    for name, tensor in tensors.items():
        match = _WAN_BLOCK.fullmatch(name)
        if match and match[2] in _WAN_BLOCK_NAMES:
            renamed[f"encoder.block.{match[1]}.{_WAN_BLOCK_NAMES[match[2]]}"] = tensor
        else:
            renamed[fixed.get(name, name)] = tensor
    return renamed


def _widened(
    tensors: Mapping[str, Tensor], device: torch.device | str, dtype: torch.dtype
) -> dict[str, Tensor]:
    """All tensors in one dtype on a device, eight-bit ones multiplied by their scales there."""
    unscaled = take_scales(tensors)
    check_plain(unscaled.tensors, unscaled.scales)
    return {
        name: unscaled.widened(name, tensor.to(device), dtype)
        for name, tensor in unscaled.tensors.items()
    }


def _read_folder(folder: Path) -> dict[str, Tensor]:
    """All encoder weights of a folder, whichever of the known layouts it has."""
    for place in (folder / "text_encoder", folder):
        for pattern in ("model*.safetensors", "pytorch_model*.bin", "models_t5_umt5*.pth"):
            files = sorted(place.glob(pattern))
            if files:
                tensors: dict[str, Tensor] = {}
                for file in files:
                    tensors.update(read_state_dict(file)[0])
                return tensors
    raise UserError(
        f"no UMT5 weights in {folder}: expected model*.safetensors, pytorch_model*.bin or "
        "models_t5_umt5*.pth there or in text_encoder/"
    )


def _sentencepiece_tokenizer(*, file: Path | None = None, data: bytes | None = None) -> Tokenizer:
    try:
        import sentencepiece
    except ImportError as error:
        raise UserError(f"the UMT5 text encoder needs sentencepiece: {_INSTALL}") from error
    processor = sentencepiece.SentencePieceProcessor()
    try:
        if data is not None:
            processor.LoadFromSerializedProto(data)
        else:
            processor.Load(str(file))
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"damaged tokenizer {file or _SPIECE!s} ({error}); fetch the text encoder again"
        ) from error
    end = processor.eos_id()
    return lambda text: [*processor.EncodeAsIds(text), end]


def _json_tokenizer(file: Path) -> Tokenizer:
    try:
        from tokenizers import Tokenizer as JsonTokenizer
    except ImportError as error:
        raise UserError(f"the UMT5 text encoder needs tokenizers: {_INSTALL}") from error
    try:
        tokenizer = JsonTokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise UserError(
            f"damaged tokenizer {file} ({one_line(error)}); fetch the text encoder again"
        ) from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return lambda text: tokenizer.encode(text).ids


def _find_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in or beside a folder or file of weights."""
    base = path if path.is_dir() else path.parent
    places = [base / "tokenizer", base, base / "google" / "umt5-xxl", base / "umt5-xxl"]
    places.append(base.parent / "tokenizer")
    for place in places:
        if (place / "spiece.model").is_file():
            return _sentencepiece_tokenizer(file=place / "spiece.model")
        if (place / "tokenizer.json").is_file():
            return _json_tokenizer(place / "tokenizer.json")
    raise UserError(
        f"no tokenizer for {path}: put spiece.model of google/umt5-xxl in {base / 'tokenizer'}, or "
        "give ComfyUI's umt5_xxl file, which has it inside"
    )


def _sizes(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """The sizes of a state dict of Hugging Face names, as UMT5Config calls them.

    Raises:
        UserError: they are those of no network, or of one that nobody has.
    """
    for name in (_TABLE, _QUERY, _BIAS, _GATE):
        shape = list(tensors[name].shape)
        if len(shape) != 2 or not all(1 <= size <= _MAX_SIZE for size in shape):
            raise UserError(
                f"'{name}' has shape {shape}, expected two sizes from 1 to {_MAX_SIZE}; the file "
                "is damaged: fetch the text encoder again"
            )
    vocabulary, width = tensors[_TABLE].shape
    buckets, heads = tensors[_BIAS].shape
    rows = tensors[_QUERY].shape[0]
    if rows % heads:
        raise UserError(
            f"'{_QUERY}' has {rows} rows, expected a multiple of its {heads} heads; fetch the text "
            "encoder again"
        )
    if not _BUCKETS[0] <= buckets <= _BUCKETS[1]:
        raise UserError(
            f"'{_BIAS}' has {buckets} rows, expected {_BUCKETS[0]} to {_BUCKETS[1]}; fetch the "
            "text encoder again"
        )
    last = 0
    for name in tensors:
        match = _BLOCK.match(name)
        if match is None:
            continue
        # Before it is made a number: there may be a thousand digits.
        if len(match[1]) > len(str(_MAX_BLOCKS)) or int(match[1]) >= _MAX_BLOCKS:
            raise UserError(
                f"'{one_line(name, 80)}' is of a block that UMT5-XXL has not, expected at most "
                f"{_MAX_BLOCKS}; fetch the text encoder again"
            )
        last = max(last, int(match[1]))
    return {
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": rows // heads,
        "d_ff": tensors[_GATE].shape[0],
        "num_layers": 1 + last,
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
    }


def _build(tensors: dict[str, Tensor]) -> UMT5EncoderModel:
    """The transformers module for a state dict of Hugging Face names, weights taken as they are."""
    try:
        from transformers import UMT5Config, UMT5EncoderModel
    except ImportError as error:
        raise UserError(f"the UMT5 text encoder needs transformers: {_INSTALL}") from error
    config = UMT5Config(**_sizes(tensors), feed_forward_proj="gated-gelu", dropout_rate=0.0)
    with torch.device("meta"):
        model = UMT5EncoderModel(config)
    # One table under two names; loading by assignment would make two of them.
    model.encoder.embed_tokens = model.shared
    tensors = tensors | {"encoder.embed_tokens.weight": tensors[_TABLE]}
    try:
        missing, unexpected = model.load_state_dict(tensors, strict=False, assign=True)
    except RuntimeError as error:
        raise UserError(
            f"UMT5 weights do not fit: {str(error).splitlines()[-1].strip()}"
        ) from error
    if missing or unexpected:
        names = [f"missing {n}" for n in missing] + [f"unexpected {n}" for n in unexpected]
        raise UserError(
            f"UMT5 weights do not fit: {'; '.join(names[:4])} ({len(names)} in all); fetch the "
            "text encoder again"
        )
    model.encoder.embed_tokens = model.shared
    return model.eval().requires_grad_(False)


class UMT5Encoder:
    """Prompt to embedding rows; build it with `load`.

    Args:
        model: the transformers module.
        tokenizer: text to token ids, end token included.
    """

    def __init__(self, model: UMT5EncoderModel, tokenizer: Tokenizer) -> None:
        self._model = model
        self._tokenizer = tokenizer

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
    ) -> UMT5Encoder:
        """Read weights and tokenizer.

        Args:
            path: a Hugging Face or diffusers folder, ComfyUI's single file, or Wan's .pth file.
            device: where the weights go; about 11 GiB in 16 bit.
            dtype: what they become. bfloat16 is what Wan was trained with.

        Raises:
            UserError: no such file, another model, an unsupported quantisation, no tokenizer, or
                a package is missing.
        """
        path = Path(path)
        tensors = _read_folder(path) if path.is_dir() else read_state_dict(path)[0]
        piece = tensors.pop(_SPIECE, None)
        encoder_only = {
            name: tensor
            for name, tensor in _from_wan_names(tensors).items()
            if not name.startswith(("decoder.", "lm_head."))
        }
        # Before the tokenizer: for a file of another kind, its absence would mislead.
        absent = [name for name in (_TABLE, _QUERY, _BIAS, _GATE) if name not in encoder_only]
        if absent:
            raise UserError(
                f"{path}: this is {describe(tensors)}, not UMT5-XXL (no {absent[0]}); give Wan's "
                "text encoder, such as umt5_xxl_fp16.safetensors"
            )
        try:
            _sizes(encoder_only)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        if piece is None:
            tokenizer = _find_tokenizer(path)
        elif piece.dtype not in (torch.uint8, torch.int8):
            raise UserError(
                f"{path}: its tokenizer '{_SPIECE}' is {str(piece.dtype).removeprefix('torch.')}, "
                "expected bytes; fetch the text encoder again"
            )
        else:
            tokenizer = _sentencepiece_tokenizer(data=piece.numpy().tobytes())
        try:
            model = _build(_widened(encoder_only, device, dtype))
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        return cls(model, tokenizer)

    @torch.no_grad()
    def encode(self, prompt: str) -> Tensor:
        """Encode one prompt.

        Args:
            prompt: any text; past 512 tokens it is cut, with a warning.

        Returns:
            [1, L, width], L <= 512 the tokens of the text and its end token, on the encoder's
            device and in its dtype. The Wan forward pads with zero rows to 512, which is what the
            published code does with the rows after the text.

        Raises:
            UserError: the result holds NaN or infinity.
        """
        ids = self._tokenizer(clean_prompt(prompt))
        if len(ids) > MAX_TOKENS:
            _LOG.warning(
                "the prompt has %d tokens, the model reads %d; its end is cut", len(ids), MAX_TOKENS
            )
            ids = [*ids[: MAX_TOKENS - 1], ids[-1]]
        device = self._model.shared.weight.device
        # The prompt is encoded without padding, so no token needs masking.
        rows = self._model(input_ids=torch.tensor([ids], device=device)).last_hidden_state
        if not torch.isfinite(rows).all():
            raise UserError(
                f"the text encoder made NaN or infinity in {rows.dtype}; load it in bfloat16 or "
                "fetch its file again"
            )
        return rows
