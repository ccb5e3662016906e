"""Linear layers with eight-bit products: weights in fp8, activations rounded on the way in.

Weights are e4m3 with a scale for each output channel; activations get a scale for each token, found
where they are made (`stack` joins the rounding to the norm or GELU before it). Sums are float32.
Only the large layers of the blocks are exchanged: text, time, patches and head stay.

Needs compute capability 8.9 (RTX 40, H100) or newer.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ...kernels.reference_rows import round_rows
from ..errors import UserError
from .operations import fused_operations

_LEAST_CAPABILITY = (8, 9)


class EightBitLinear(nn.Module):
    """`nn.Linear` whose product is of e4m3 numbers; input and output in bfloat16.

    Reference: `torch._scaled_mm` with row-wise scales.
    """

    def __init__(self, *linears: nn.Linear) -> None:
        """Several layers of the same input are one, with their outputs side by side."""
        super().__init__()
        rounded = [round_rows(linear.weight.detach()) for linear in linears]
        weight = torch.cat([numbers.view(torch.uint8) for numbers, _ in rounded])
        scale = torch.cat([scale for _, scale in rounded]).t().contiguous()
        biases = [linear.bias.detach().bfloat16() for linear in linears if linear.bias is not None]
        bias = torch.cat(biases) if len(biases) == len(linears) else None
        self._hold(weight.view(torch.float8_e4m3fn), scale, bias)

    def _hold(self, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        self.register_buffer("weight", weight, persistent=False)  # [out, in]
        self.register_buffer("scale", scale, persistent=False)  # [1, out]
        self.register_buffer("bias", bias, persistent=False)

    def part(self, start: int, stop: int) -> EightBitLinear:
        """The layer of some outputs alone, in the same memory."""
        part = EightBitLinear.__new__(EightBitLinear)
        nn.Module.__init__(part)
        rows = slice(start, stop)
        part._hold(
            self.weight[rows], self.scale[:, rows], None if self.bias is None else self.bias[rows]
        )
        return part

    def forward(self, x: Tensor) -> Tensor:
        out = self.multiply(*fused_operations(x.device).round_rows(x.flatten(0, -2)))
        return out.unflatten(0, x.shape[:-1])

    def multiply(self, rounded: Tensor, scale: Tensor) -> Tensor:
        """bfloat16 [N, out] from e4m3 numbers [N, in] and their scales [N, 1]."""
        return torch._scaled_mm(
            rounded,
            self.weight.t(),
            scale_a=scale,
            scale_b=self.scale,
            bias=self.bias,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )


class EightBitFeedForward(nn.Module):
    """Linear, GELU (tanh form), linear; what lies between is one kernel."""

    def __init__(self, first: nn.Linear, second: nn.Linear) -> None:
        super().__init__()
        self.first, self.second = EightBitLinear(first), EightBitLinear(second)

    def forward(self, x: Tensor) -> Tensor:
        wide = self.first(x).flatten(0, -2)
        rounded = fused_operations(x.device).round_rows(wide, gelu=True)
        return self.second.multiply(*rounded).unflatten(0, x.shape[:-1])


def eight_bit_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a model of this type on this device cannot have eight-bit linear layers; None: it can."""
    if device.type != "cuda":
        return f"they need a CUDA device, this run is on {device}"
    capability = torch.cuda.get_device_capability(device)
    if capability < _LEAST_CAPABILITY:
        return (
            "they need compute capability 8.9 or higher, "
            f"{device} has {capability[0]}.{capability[1]}"
        )
    if dtype != torch.bfloat16:
        return f"they need bfloat16 weights, these are {str(dtype).removeprefix('torch.')}"
    return None


def with_eight_bit_linears(tree: nn.Module) -> nn.Module:
    """The same tree with the linear layers of its blocks in eight bits; the tree given stays.

    All else is shared with it, so both cost the memory of the blocks one and a half times.

    Raises:
        UserError: the device or the type cannot.
    """
    weight = tree.blocks[0].self_attn.q.weight
    if obstacle := eight_bit_obstacle(weight.device, weight.dtype):
        raise UserError(f"eight-bit linear layers cannot be used: {obstacle}")
    fast = copy.copy(tree)
    fast._modules = dict(tree._modules)
    fast.blocks = nn.ModuleList(_block(block) for block in tree.blocks)
    return fast


def _block(block: nn.Module) -> nn.Module:
    fast = copy.copy(block)
    fast._modules = dict(block._modules)
    for name in ("self_attn", "cross_attn"):
        attention = copy.copy(fast._modules[name])
        attention._modules = modules = dict(attention._modules)
        if name == "self_attn":
            joined = EightBitLinear(*(modules[linear] for linear in "qkv"))
            width = len(joined.weight) // 3
            modules["qkv"] = joined
            for i, linear in enumerate("qkv"):
                modules[linear] = joined.part(i * width, (i + 1) * width)
        else:  # keys and values of the text are made once a prompt
            modules["q"] = EightBitLinear(modules["q"])
        modules["o"] = EightBitLinear(modules["o"])
        fast._modules[name] = attention
    first, _, second = fast._modules["ffn"]
    fast._modules["ffn"] = EightBitFeedForward(first, second)
    return fast
