"""Eight-bit weights with scales, back to plain numbers.

Layouts, told apart by the names and shapes of the scales:

- LightX2V (`fp8-vllm`, `int8-vllm`): `X.weight` float8 or int8 [out, in] and `X.weight_scale`
  float32 [out, 1], one per output channel. Reference: LightX2V `tools/convert`.
- ComfyUI scaled fp8: `X.weight` float8 and `X.scale_weight`, one number, with a tensor `scaled_fp8`
  as a mark; newer files say `X.weight_scale` and hold a JSON text in `X.comfy_quant` or in their
  metadata. Scales of inputs are for fp8 products and of no use here. Reference: ComfyUI
  `comfy/ops.py`.

In all of them weight = number * scale, computed here in float32.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UserError

_EIGHT_BIT = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)
_PLAIN = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_SCALES = (".weight_scale", ".scale_weight")
_UNUSED = (".scale_input", ".input_scale")
_MARK = "scaled_fp8"
_HOST_NOTE = ".comfy_quant"
_PART_NUMBERS = 1 << 16
_HOST_METADATA = "_quantization_metadata"
_KNOWN_NOTES = ("float8_e4m3fn", "float8_e5m2")


@dataclass(frozen=True)
class Unscaled:
    """A state dict with its scales taken out.

    Attributes:
        tensors: everything else, by name; quantised weights as stored.
        scales: scale of each quantised weight, by the weight's name.
        layout: 'lightx2v_fp8', 'lightx2v_int8', 'comfyui_fp8', or None when nothing is scaled.
    """

    tensors: dict[str, Tensor]
    scales: dict[str, Tensor]
    layout: str | None

    def widened(self, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """A tensor of this state dict, wherever it lies now, as plain numbers of a dtype."""
        scale = self.scales.get(name)
        if scale is None:
            return tensor.to(dtype)
        if not tensor.ndim or not tensor.numel():
            return (tensor.float() * scale.to(tensor.device).float().sum()).to(dtype)
        column = scale.to(tensor.device).float().reshape(-1, *[1] * (tensor.ndim - 1))
        result = torch.empty(tensor.shape, dtype=dtype, device=tensor.device)
        # In parts on the CPU: large float32 temporaries between results leave holes in the heap
        # that double what a load takes.
        rows = tensor.shape[0]
        if tensor.device.type == "cpu":
            rows = max(1, _PART_NUMBERS * rows // tensor.numel())
        for first in range(0, tensor.shape[0], rows):
            part = slice(first, first + rows)
            result[part] = tensor[part].float() * (column[part] if len(column) > 1 else column)
        return result


def take_scales(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> Unscaled:
    """Separate weights from scales and check that they belong together.

    Args:
        tensors: a state dict.
        metadata: of its file, where ComfyUI may name the quantisation instead.

    Raises:
        UserError: a scale without its weight or of a shape that does not fit it, or a
            quantisation that is none of the known ones.
    """
    _check_host_metadata(metadata or {})
    plain: dict[str, Tensor] = {}
    scales: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        suffix = next((s for s in _SCALES if name.endswith(s)), None)
        if suffix:
            scales[f"{name.removesuffix(suffix)}.weight"] = tensor
        elif name.endswith(_HOST_NOTE):
            _check_note(name, _json(name, bytes(tensor.flatten().tolist()[:1000])))
        elif name != _MARK and not name.endswith(_UNUSED):
            plain[name] = tensor
    per_channel = False
    for name, scale in scales.items():
        per_channel |= _check_scale(name, plain.get(name), scale)
    for name, tensor in plain.items():
        # Float8 alone is a plain cast (LightX2V leaves norms so), but not where others are scaled.
        product = name.startswith("blocks.") and tensor.ndim == 2 and bool(scales)
        if name not in scales and (
            tensor.dtype == torch.int8 or (product and tensor.dtype in _EIGHT_BIT)
        ):
            raise UserError(f"'{name}' is quantised but its scale is missing; download it again")
    if not scales:
        return Unscaled(plain, {}, None)
    integers = any(plain[name].dtype == torch.int8 for name in scales)
    lightx2v = "lightx2v_int8" if integers else "lightx2v_fp8"
    return Unscaled(plain, scales, lightx2v if per_channel or integers else "comfyui_fp8")


def check_plain(tensors: Mapping[str, Tensor], scales: Mapping[str, Tensor]) -> None:
    """Raise when a tensor without a scale is not of a floating-point type that holds weights.

    Float8 without scales is a plain cast and is taken.

    Raises:
        UserError: names the tensor and its type.
    """
    for name, tensor in tensors.items():
        floats = (*_PLAIN, *_EIGHT_BIT[:2])
        if name not in scales and tensor.dtype not in floats:
            raise UserError(
                f"'{name}' is {str(tensor.dtype).removeprefix('torch.')}, a quantisation that is "
                "not supported; use the bf16, fp16, float32 or fp8 file"
            )


def is_eight_bit(tensor: Tensor) -> bool:
    """Whether a tensor must become something wider before anything can be computed with it."""
    return tensor.dtype in _EIGHT_BIT


def _check_scale(name: str, weight: Tensor | None, scale: Tensor) -> bool:
    """Whether a scale is one per output channel; raises when it does not fit its weight."""
    if weight is None:
        raise UserError(f"a scale without its weight: '{name}' is missing; download it again")
    if weight.dtype not in _EIGHT_BIT or scale.dtype not in _PLAIN:
        raise UserError(
            f"'{name}' is quantised in a way that is not supported "
            f"({str(weight.dtype).removeprefix('torch.')} with scales "
            f"{str(scale.dtype).removeprefix('torch.')} {list(scale.shape)}, such as NVFP4); use "
            "the bf16, fp16 or fp8 file"
        )
    channels = weight.shape[0] if weight.ndim else 1
    if scale.numel() == 1:
        return False
    if scale.numel() != channels or scale.shape[0] != channels:
        raise UserError(
            f"the scale of '{name}' has shape {list(scale.shape)}, expected one number or "
            f"[{channels}, 1], one per output channel"
        )
    return True


def _check_host_metadata(metadata: Mapping[str, str]) -> None:
    """ComfyUI's other place for the same description: one text for all layers."""
    text = metadata.get(_HOST_METADATA)
    if text is None:
        return
    content = _json(f"metadata {_HOST_METADATA}", text.encode())
    layers = content.get("layers", {})
    if not isinstance(layers, dict):
        raise UserError(f"metadata '{_HOST_METADATA}' is not readable; the file is damaged")
    for name, note in layers.items():
        _check_note(name, note)


def _json(name: str, text: bytes) -> dict[str, object]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"'{name}' is not readable ({error}); the file is damaged") from error
    if not isinstance(content, dict):
        raise UserError(f"'{name}' is not a JSON object; the file is damaged")
    return content


def _check_note(name: str, note: object) -> None:
    """What ComfyUI says of a quantised layer: its format, and whether weights were rotated."""
    kind = note.get("format") if isinstance(note, dict) else None
    rotated = isinstance(note, dict) and bool(note.get("convrot"))
    if kind not in _KNOWN_NOTES or rotated:
        raise UserError(
            f"'{name[:100]}' says quantisation '{str(kind)[:40]}'{' with rotation' * rotated}, "
            f"which is not supported ({', '.join(_KNOWN_NOTES)} are); use the bf16, fp16 or fp8 "
            "file"
        )
