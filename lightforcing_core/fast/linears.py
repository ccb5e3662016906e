"""Linear layers with eight-bit products: weights in fp8 or int8, activations rounded on the way in.

Weights have a scale for each output channel; activations get a scale for each token, found where
they are made (`stack` joins the rounding to the norm or GELU before it). Products of e4m3 numbers
are summed in float32, of int8 ones exactly, in int32. Only the large layers of the blocks are
exchanged: text, time, patches and head stay.

fp8 needs compute capability 8.9 (RTX 40, H100) or newer, int8 8.0 (A100, RTX 30); plain torch does
both on the CPU, slowly.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels.eight_bit import Rounded, Scaling
from ...kernels.reference_rows import round_rows
from ..errors import UserError
from .operations import fused_operations

EIGHT_BIT_SPEEDS = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
"""Speeds of the engine whose linear layers are in eight bits, and what their numbers are."""
EIGHT_BIT_LAYERS = (
    "self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o",
    "cross_attn.q", "cross_attn.o", "ffn.0", "ffn.2",
)  # fmt: skip
"""Of a block. Keys and values of the text are made once a prompt, and stay."""

_LEAST_CAPABILITY = {torch.float8_e4m3fn: (8, 9), torch.int8: (8, 0)}
_WIDTH_FACTOR = {torch.float8_e4m3fn: 16, torch.int8: 8}
_DTYPES = {
    torch.float8_e4m3fn: (torch.bfloat16,),
    torch.int8: (torch.bfloat16, torch.float16, torch.float32),
}
_MOST_COLUMNS = 16384  # of the kernel
_LEAST_INT8_ROWS = 17  # of torch._int_mm on CUDA


class EightBitLinear(nn.Module):
    """`nn.Linear` whose product is of eight-bit numbers.

    Reference: `torch._scaled_mm` with row-wise scales; `torch._int_mm`.
    """

    def __init__(
        self,
        *linears: nn.Linear | EightBitLinear,
        numbers: torch.dtype = torch.float8_e4m3fn,
        rounded: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Several layers of the same input are one, with their outputs side by side.

        A layer that is in such numbers already gives them as they are.

        Args:
            rounded: weight [out, in] and scale [1, out] where they have been made; None: make them.
        """
        super().__init__()
        if rounded is not None:
            weight, scale = rounded
        elif not any(_is_in(x, numbers) for x in linears):
            weight, scale = _rounded(_joined([_weight(x) for x in linears]), numbers)
        else:
            parts = [
                (x.weight, x.scale) if _is_in(x, numbers) else _rounded(_weight(x), numbers)
                for x in linears
            ]
            # Not every type of eight bits can be joined.
            weight = _joined([part.view(torch.uint8) for part, _ in parts]).view(numbers)
            scale = _joined([part for _, part in parts], dim=1)
        biases = [x.bias for x in linears if x.bias is not None]
        is_whole = len(biases) == len(linears)
        bias = _joined([x.detach() for x in biases]) if is_whole else None
        first = linears[0]
        dtype = first.dtype if isinstance(first, EightBitLinear) else first.weight.dtype
        self._hold(weight, scale, bias if bias is None else bias.to(dtype), dtype)

    @classmethod
    def of(
        cls, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> EightBitLinear:
        """A layer of given numbers, weight = number x scale.

        Args:
            weight: e4m3 or int8 [out, in], held as it is.
            scale: one number, or one for each output.
            bias: [out] or None.
            dtype: of the output.
        """
        linear = cls.__new__(cls)
        nn.Module.__init__(linear)
        scale = scale.detach().to(weight.device, torch.float32).reshape(1, -1)
        scale = scale.expand(1, len(weight)).contiguous()
        bias = bias if bias is None else bias.detach().to(dtype)
        linear._hold(weight.detach(), scale, bias, dtype)
        return linear

    def _hold(
        self,
        weight: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        one: Tensor | None = None,
    ) -> None:
        self.dtype = dtype
        self.register_buffer("weight", weight, persistent=False)  # [out, in]
        self.register_buffer("scale", scale, persistent=False)  # [1, out]
        self.register_buffer("bias", bias, persistent=False)
        if one is None:
            one = torch.ones((), dtype=torch.float32, device=weight.device)
        self.register_buffer("one", one, persistent=False)

    @property
    def numbers(self) -> torch.dtype:
        """Type of the weight, and of what it is multiplied with."""
        return self.weight.dtype

    def part(self, start: int, stop: int) -> EightBitLinear:
        """The layer of some outputs alone, in the same memory."""
        rows = slice(start, stop)
        part = EightBitLinear.__new__(EightBitLinear)
        nn.Module.__init__(part)
        bias = None if self.bias is None else self.bias[rows]
        part._hold(self.weight[rows], self.scale[:, rows], bias, self.dtype, self.one)
        return part

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(*self.round(x.flatten(0, -2))).unflatten(0, x.shape[:-1])

    def round(self, x: Tensor, *, gelu: bool = False, scaling: Scaling | None = None) -> Rounded:
        """Rows [N, in], or their GELU, in the numbers that the weight is in."""
        return fused_operations(x.device).round_rows(x, self.numbers, gelu=gelu, scaling=scaling)

    def multiply(self, rounded: Tensor, scale: Tensor) -> Tensor:
        """[N, out] from rounded numbers [N, in] and their scales [N, 1]."""
        if self.numbers == torch.int8:
            scaled = fused_operations(rounded.device).scale_sums
            sums = _int8_product(rounded, self.weight)
            return scaled(sums, scale, self.scale.contiguous(), self.bias, self.dtype)
        return torch._scaled_mm(
            rounded,
            self.weight.t(),
            scale_a=scale,
            scale_b=self.scale,
            bias=self.bias,
            out_dtype=self.dtype,
            use_fast_accum=True,
        )

    def product(self, rounded: Tensor, scale: Tensor) -> tuple[Tensor, Scaling]:
        """`multiply` without its last step, for a kernel that scales what it reads.

        On Hopper a product with scales for rows clears a workspace before each call, and is itself
        slower than one without; sums of int8 need not be read and written once more.

        Returns:
            [N, out], of the output's type or int32, and what it is short of.
        """
        scaling = Scaling(scale, self.scale, self.bias)
        if self.numbers == torch.int8:
            return _int8_product(rounded, self.weight), scaling
        product = torch._scaled_mm(
            rounded,
            self.weight.t(),
            scale_a=self.one,
            scale_b=self.one,
            out_dtype=self.dtype,
            use_fast_accum=True,
        )
        return product, scaling


def _joined(tensors: list[Tensor], dim: int = 0) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


def _is_in(linear: nn.Linear | EightBitLinear, numbers: torch.dtype) -> bool:
    return isinstance(linear, EightBitLinear) and linear.numbers == numbers


def _weight(linear: nn.Linear | EightBitLinear) -> Tensor:
    if isinstance(linear, EightBitLinear):
        return (linear.weight.float() * linear.scale.t()).to(linear.dtype)
    return linear.weight.detach()


def _rounded(weight: Tensor, numbers: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weight and scale [1, out]."""
    # By the kernel where there is one: by the twin a model takes 60 ms on an H200, and a host that
    # lends its weights has them rounded for every video.
    is_quick = weight.device.type == "cuda" and weight.shape[1] <= _MOST_COLUMNS
    rounds = fused_operations(weight.device).round_rows if is_quick else round_rows
    rounded, scale = rounds(weight, numbers)
    return rounded, scale.t().contiguous()


def _int8_product(a: Tensor, weight: Tensor) -> Tensor:
    """int32 [N, out]."""
    missing = _LEAST_INT8_ROWS - len(a)
    if missing <= 0:
        return torch._int_mm(a, weight.t())
    return torch._int_mm(F.pad(a, (0, 0, 0, missing)), weight.t())[: len(a)]


class EightBitFeedForward(nn.Module):
    """Linear, GELU (tanh form), linear; what lies between is one kernel."""

    def __init__(self, first: EightBitLinear, second: EightBitLinear) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        wide = self.first(x).flatten(0, -2)
        return self.second.multiply(*self.second.round(wide, gelu=True)).unflatten(0, x.shape[:-1])


def eight_bit_obstacle(
    device: torch.device,
    dtype: torch.dtype,
    numbers: torch.dtype = torch.float8_e4m3fn,
    widths: Iterable[int] = (),
) -> str | None:
    """Why a model on this device cannot have eight-bit linear layers; None: it can.

    Args:
        device: where it is.
        dtype: of its weights and activations.
        numbers: what its products are to be of, one of EIGHT_BIT_SPEEDS.
        widths: of inputs and outputs of its layers.
    """
    if device.type == "cuda":
        capability, least = torch.cuda.get_device_capability(device), _LEAST_CAPABILITY[numbers]
        if capability < least:
            return (
                f"they need compute capability {least[0]}.{least[1]} or higher, "
                f"{device} has {capability[0]}.{capability[1]}"
            )
    elif numbers == torch.float8_e4m3fn:
        return f"they need a CUDA device, this run is on {device}"
    if dtype not in _DTYPES[numbers]:
        names = " or ".join(str(x).removeprefix("torch.") for x in _DTYPES[numbers])
        return f"they need {names} weights, these are {str(dtype).removeprefix('torch.')}"
    factor = _WIDTH_FACTOR[numbers]
    if unfit := sorted({width for width in widths if width % factor}):
        return f"they need widths that are multiples of {factor}, not {', '.join(map(str, unfit))}"
    return None


def eight_bit_speed(device: torch.device) -> str:
    """Which of EIGHT_BIT_SPEEDS suits a device: fp8 where it is multiplied by the hardware."""
    if device.type != "cuda":
        return "int8"
    is_new = torch.cuda.get_device_capability(device) >= _LEAST_CAPABILITY[torch.float8_e4m3fn]
    return "fp8" if is_new else "int8"


def with_eight_bit_linears(
    tree: nn.Module, numbers: torch.dtype = torch.float8_e4m3fn, *, replace: bool = False
) -> nn.Module:
    """The same tree with the linear layers of its blocks in eight bits.

    Args:
        tree: Wan-shaped module tree; layers that are in such numbers already are taken as they are.
        numbers: one of EIGHT_BIT_SPEEDS.
        replace: exchange the layers of the tree given, block by block, so that at no time more
            than one block is there twice. Else the tree given stays, all other layers are shared
            with it, and both cost the memory of the blocks one and a half times.

    Raises:
        UserError: the device, the type or a width cannot.
    """
    device = tree.blocks[0].self_attn.q.weight.device
    widths = {n for block in tree.blocks for n in _widths(block)}
    if obstacle := eight_bit_obstacle(device, block_dtype(tree), numbers, widths):
        raise UserError(f"eight-bit linear layers cannot be used: {obstacle}")
    if replace:
        for block in tree.blocks:
            _exchange(block, numbers)
        return tree
    fast = copy.copy(tree)
    fast._modules = dict(tree._modules)
    fast.blocks = nn.ModuleList(_shallow(block) for block in tree.blocks)
    for block in fast.blocks:
        _exchange(block, numbers)
    return fast


def block_dtype(tree: nn.Module) -> torch.dtype:
    """What the blocks of a tree compute in, apart from eight-bit products."""
    layer = tree.blocks[0].self_attn.q
    return layer.dtype if isinstance(layer, EightBitLinear) else layer.weight.dtype


def product_dtype(tree: nn.Module, dtype: torch.dtype) -> torch.dtype | None:
    """What `EightBitLinear.product` leaves for a forward's dtype; None: no layers in eight bits."""
    layer = tree.blocks[0].self_attn.q
    if not isinstance(layer, EightBitLinear):
        return None
    return torch.int32 if layer.numbers == torch.int8 else dtype


def _widths(block: nn.Module) -> set[int]:
    feed_forward = block.ffn
    if isinstance(feed_forward, EightBitFeedForward):
        return set(feed_forward.first.weight.shape)
    return {n for layer in (feed_forward[0], block.self_attn.q) for n in layer.weight.shape}


def _shallow(block: nn.Module) -> nn.Module:
    """A block whose own layers can be exchanged."""
    shallow = copy.copy(block)
    shallow._modules = dict(block._modules)
    for name in ("self_attn", "cross_attn"):
        attention = copy.copy(shallow._modules[name])
        attention._modules = dict(attention._modules)
        shallow._modules[name] = attention
    return shallow


def _exchange(block: nn.Module, numbers: torch.dtype) -> None:
    """Once more into other numbers too, from what the layers hold."""
    ffn = block.ffn
    is_eight_bit = isinstance(ffn, EightBitFeedForward)
    if is_eight_bit and ffn.first.numbers == numbers:
        return
    own, cross = block.self_attn._modules, block.cross_attn._modules
    first, second = (ffn.first, ffn.second) if is_eight_bit else (ffn[0], ffn[2])
    singles = ([x] for x in (own["o"], cross["q"], cross["o"], first, second))
    made = _exchanged([[own["q"], own["k"], own["v"]], *singles], numbers)
    own["qkv"], own["o"], cross["q"], cross["o"], first, second = made
    width = len(own["qkv"].weight) // 3
    for i, name in enumerate("qkv"):
        own[name] = own["qkv"].part(i * width, (i + 1) * width)
    block._modules["ffn"] = EightBitFeedForward(first, second)


def _exchanged(
    groups: Sequence[Sequence[nn.Linear | EightBitLinear]], numbers: torch.dtype
) -> list[EightBitLinear]:
    """Of each group one layer. Weights of one width are rounded in one launch, for a host that
    lends its weights has them rounded for every video."""
    by_width: dict[int, list[int]] = {}
    for place, group in enumerate(groups):
        if not any(_is_in(x, numbers) for x in group):
            by_width.setdefault(group[0].weight.shape[1], []).append(place)
    rounded: dict[int, tuple[Tensor, Tensor]] = {}
    for places in by_width.values():
        weights = [[_weight(x) for x in groups[place]] for place in places]
        sizes = [sum(map(len, group)) for group in weights]
        whole, scale = _rounded(_joined([x for group in weights for x in group]), numbers)
        parts = zip(whole.split(sizes), scale.split(sizes, 1), strict=True)
        rounded |= zip(places, parts, strict=True)
    return [
        EightBitLinear(*group, numbers=numbers, rounded=rounded.get(place))
        for place, group in enumerate(groups)
    ]
