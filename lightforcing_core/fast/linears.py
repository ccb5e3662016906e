"""Linear layers with eight-bit products: weights in fp8, activations rounded on the way in.

Weights are e4m3 with a scale for each output channel; activations get a scale for each token, found
where they are made (torch.compile joins the rounding to the norm or GELU before it). Sums are
float32. Only the large layers of the blocks are exchanged: text, time, patches and head stay.

Needs compute capability 8.9 (RTX 40, H100) or newer.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ..errors import UserError

_LARGEST = torch.finfo(torch.float8_e4m3fn).max
_LEAST_CAPABILITY = (8, 9)


def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [N, K] as e4m3 numbers and one float32 scale for each row, [N, 1]."""
    largest = x.abs().amax(dim=1, keepdim=True).float()
    scale = largest.clamp(min=1e-12) / _LARGEST
    return (x.float() / scale).to(torch.float8_e4m3fn), scale


class EightBitLinear(nn.Module):
    """`nn.Linear` whose product is of e4m3 numbers; input and output in bfloat16.

    Reference: `torch._scaled_mm` with row-wise scales.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight, scale = round_rows(linear.weight.detach())
        self.register_buffer("weight", weight, persistent=False)  # [out, in]
        self.register_buffer("scale", scale.t().contiguous(), persistent=False)  # [1, out]
        bias = None if linear.bias is None else linear.bias.detach().bfloat16()
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.multiply(*round_rows(x.flatten(0, -2)))
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
        # torch.compile would read the wide activations twice and take three times as long. Marked
        # here and not where it is defined: the mark alone imports half of torch.
        self._round = torch.compiler.disable(_gelu_round)

    def forward(self, x: Tensor) -> Tensor:
        rounded, scale = self._round(self.first(x).flatten(0, -2))
        return self.second.multiply(rounded, scale).unflatten(0, x.shape[:-1])


def _gelu_round(x: Tensor) -> tuple[Tensor, Tensor]:
    from ...kernels.ops import gelu_round_rows_triton

    return gelu_round_rows_triton(x)


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
        attention._modules = dict(attention._modules)
        for linear in ("q", "k", "v", "o"):
            # Keys and values of the text are made once a prompt.
            if name == "self_attn" or linear in ("q", "o"):
                attention._modules[linear] = EightBitLinear(attention._modules[linear])
        fast._modules[name] = attention
    first, _, second = fast._modules["ffn"]
    fast._modules["ffn"] = EightBitFeedForward(first, second)
    return fast
