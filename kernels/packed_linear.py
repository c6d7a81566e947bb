"""Base-model linears: oneDNN-prepacked weights where torch offers them, plain `F.linear` elsewhere.

Packing is worth 20-35 % of a decode step on CPU (the packed weight streams at the memory roof) and
costs no memory, since the dense weight is dropped. The packing operators are private to torch, so
one numeric probe per dtype decides whether they may be used. Knows nothing about adapters.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

logger = logging.getLogger(__name__)

_ROWS_AT_ONCE = 64
PACK_ROWS = 32  # the batch size hint of the packing; one packing serves every batch size (measured)


class DenseLinear:
    """`F.linear` on the weight as given. weight: `[out, in]`, bias: `[out]`."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight = weight
        self.bias = bias
        self.out_features, self.in_features = weight.shape
        self.nbytes = weight.nbytes + (bias.nbytes if bias is not None else 0)

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def product(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)

    def row_squares(self) -> Tensor:
        return row_squares(self.weight)


class PackedLinear:
    """The same on an opaque oneDNN copy of the weight; the dense weight is not kept, so what may be
    asked about it later is worked out first.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.out_features, self.in_features = weight.shape
        self.nbytes = weight.nbytes + (bias.nbytes if bias is not None else 0)
        self.bias = bias
        self._row_squares = row_squares(weight)
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), PACK_ROWS)
        self._run: Any = torch.ops.mkldnn._linear_pointwise.default
        self._scalars: list[float] = []

    def __call__(self, x: Tensor) -> Tensor:
        return self._multiply(x, self.bias)

    def product(self, x: Tensor) -> Tensor:
        return self._multiply(x, None)

    def row_squares(self) -> Tensor:
        return self._row_squares

    def _multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if x.shape[0] == 0:
            return x.new_empty(0, self.out_features)
        y: Tensor = self._run(x, self._packed, bias, "none", self._scalars, "")
        return y


def row_squares(weight: Tensor) -> Tensor:
    """`[out, in] -> [out]` fp32."""
    # A few rows at a time stay in the cache: half the time of `vector_norm` in bf16 on a CPU, and
    # less than the packing takes.
    return torch.cat([rows.float().square().sum(1) for rows in torch.split(weight, _ROWS_AT_ONCE)])


def make_linear(weight: Tensor, bias: Tensor | None = None) -> DenseLinear | PackedLinear:
    """The fastest linear for this weight. weight: `[out, in]`, any float dtype and device."""
    if weight.device.type == "cpu" and packing_works(weight.dtype):
        return PackedLinear(weight, bias)
    return DenseLinear(weight, bias)


@lru_cache(maxsize=8)
def packing_works(dtype: torch.dtype) -> bool:
    """True if torch's private packing operators exist and are right for this dtype."""
    if dtype not in (torch.float32, torch.bfloat16) or not torch._C._has_mkldnn:
        return False
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 40, generator=generator).to(dtype)
    bias = torch.randn(48, generator=generator).to(dtype)
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    try:
        for rows in (1, 5, 33):
            x = torch.randn(rows, 40, generator=generator).to(dtype)
            expected = F.linear(x.float(), weight.float(), bias.float())
            got = PackedLinear(weight, bias)(x).float()
            torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    except (AttributeError, RuntimeError, AssertionError) as error:
        logger.info("packed linears unavailable for %s, using F.linear: %s", dtype, error)
        return False
    return True
