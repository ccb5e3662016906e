"""What stands for numbers in eight bits and for products of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

Rounded = tuple[Tensor, Tensor]
"""Eight-bit numbers [N, C] and one float32 scale a row, [N, 1]; number x scale is the value."""

LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
"""Types that rows are rounded to, and what the largest number of a row becomes."""


class Scaling(NamedTuple):
    """What a product of such numbers is short of: product x rows x columns + bias.

    Attributes:
        rows: float32 [N, 1], scales of the rows multiplied.
        columns: float32 [1, C], scales of the weight's outputs.
        bias: [C] or None.
    """

    rows: Tensor
    columns: Tensor
    bias: Tensor | None

    def of(self, product: Tensor) -> Tensor:
        """What a product [N, C] stands for; float32, or wider if it is."""
        value = product.to(torch.promote_types(product.dtype, torch.float32))
        value = value * self.rows * self.columns
        return value if self.bias is None else value + self.bias
