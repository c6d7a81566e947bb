"""The pieces that decode and prefill attention share: paged addresses, scores, the running softmax.

Scores are kept raw and turned into log2 units by one multiply-add inside `exp2` (FlashAttention-2,
Dao 2023): `p = exp2(score * unit - m)`, m being the row's largest `score * unit` so far. A soft cap
replaces the score by tanh, so only `unit` and `gain` change.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from loraplex.kernels.gpu.common import dot

# Where a row has seen no key yet. Finite, so that exp2(m - m) is 1 and never NaN.
NOTHING_SEEN = tl.constexpr(-1e30)
NO_WINDOW = 1 << 30  # longer than any context


def score_units(scale: float, softcap: float | None) -> tuple[float, float]:
    """(unit, gain): a score is `q.k` worth `unit = scale * log2(e)`, or, with a cap c,
    `tanh(q.k * scale / c)` worth `c * log2(e)`, where `gain` brings q.k to `2 x log2(e)`.

    Raises: ValueError for a scale or a cap that is not positive.
    """
    if not scale > 0:
        raise ValueError(f"scale={scale}: attention scores need a positive scale")
    if softcap is None:
        return scale * math.log2(math.e), 0.0
    if not softcap > 0:
        raise ValueError(f"softcap={softcap}: must be positive, or None for no cap")
    return softcap * math.log2(math.e), 2 * math.log2(math.e) * scale / softcap


@triton.jit
def load_blocks(table, start, end, n, BLOCK_SIZE: tl.constexpr):
    """The blocks of tokens `start + n`, `[BN]` int32; 0 for those from `end` on.

    n: `arange(0, BN)`; start: a multiple of BN. Both sizes being powers of two, a token's block and
    its place there are sums of a part that moves with `start`, the same for all, and a fixed one.
    """
    at = start // BLOCK_SIZE + n // BLOCK_SIZE
    return tl.load(table + at, mask=n < end - start, other=0)


@triton.jit
def page_offsets(head, n, d, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """The fixed part of one head's element offsets, `[BN, DIM]`."""
    return ((head * BLOCK_SIZE + n % BLOCK_SIZE) * HEAD_DIM)[:, None] + d[None, :]


@triton.jit
def load_pages(
    pages, fixed, blocks, start, end, n, d,
    NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """Keys or values of tokens `start + n`, `[BN, DIM]`; zero from `end` on.

    The mask matters: what lies behind a context is another request's rubbish, and 0 * NaN is NaN.
    """
    moving = blocks.to(tl.int64) * (NUM_KV_HEADS * BLOCK_SIZE * HEAD_DIM)
    moving += start % BLOCK_SIZE * HEAD_DIM
    mask = (n < end - start)[:, None]
    if d.shape[0] != HEAD_DIM:
        mask = mask & (d < HEAD_DIM)[None, :]
    return tl.load(pages + fixed + moving[:, None], mask=mask, other=0.0)


@triton.jit
def scores(q, k, gain, SOFT_CAP: tl.constexpr):
    """`[ROWS, DIM] x [BN, DIM] -> [ROWS, BN]` fp32, in units of `score_units`."""
    s = dot(q, tl.trans(k), tl.zeros([q.shape[0], k.shape[0]], tl.float32))
    if SOFT_CAP:
        s = 1.0 - 2.0 / (tl.exp2(s * gain) + 1.0)  # tanh
    return s


@triton.jit
def accumulate(s, v, unit, m, total, acc):
    """Add one block of keys to the running softmax. Scores of -inf take no part.

    s: `[ROWS, BN]`, v: `[BN, DIM]`; m, total: `[ROWS]`, acc: `[ROWS, DIM]`, fp32, updated.
    """
    new_m = tl.maximum(m, tl.max(s, 1) * unit)
    p = tl.exp2(s * unit - new_m[:, None])
    shrunk = tl.exp2(m - new_m)
    total = total * shrunk + tl.sum(p, 1)
    acc = dot(p.to(v.dtype), v, acc * shrunk[:, None])
    return new_m, total, acc
