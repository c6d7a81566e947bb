"""Log-probabilities of tokens, their ranks and the likeliest tokens, for the rows that ask.

All from the raw logits. The likeliest come out of the groups' peaks: take the best peak, look up
its token, put the group's next best in its place.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from loraplex.kernels.gpu.launch import launch
from loraplex.kernels.gpu.sample_peaks import LOG2E, Groups
from loraplex.kernels.gpu.sample_rows import HIGHEST, LOWEST, check_logits

ASK_FIELDS = 2  # of `find_logprobs`: row of the logits, how many of the likeliest
HEAD_FIELDS = 2  # of its results: rank, log-probability
_ASK_FIELDS = tl.constexpr(ASK_FIELDS)
_HEAD_FIELDS = tl.constexpr(HEAD_FIELDS)
_LN2 = tl.constexpr(0.6931471805599453)


def find_logprobs(logits: Tensor, token_ids: Tensor, asked: Tensor, width: int) -> Tensor:
    """`[num_asked, HEAD_FIELDS + 2 * width]` int32: rank, log-probability, the ids of the likeliest
    tokens and their log-probabilities, both float32 by their bits. What nobody asked for is left
    unwritten.

    logits: `[R, V]` model dtype. token_ids: `[R]` int64. asked: `[num_asked, ASK_FIELDS]` int32:
    row, number of likeliest tokens, at most min(width, V).
    """
    check_logits(logits)
    if asked.dim() != 2 or asked.shape[1] != ASK_FIELDS:
        raise ValueError(f"asked must be [rows, {ASK_FIELDS}], got {list(asked.shape)}")
    vocab, num_asked, device = logits.shape[1], asked.shape[0], logits.device
    groups = Groups.of(vocab)
    sizes = {"VOCAB": vocab, "GROUP": groups.size, "NUM_GROUPS": groups.count}
    shape = (num_asked, groups.count)
    peaks = torch.empty(shape, dtype=torch.float32, device=device)
    sums = torch.empty(shape, dtype=torch.float32, device=device)
    above = torch.empty(shape, dtype=torch.int32, device=device)
    shared = (logits, logits.stride(0), token_ids, asked, peaks, sums, above)
    grid = (num_asked, triton.cdiv(groups.count, groups.per_tile))
    launch(_survey_kernel, grid, *shared, **sizes, TILE=groups.per_tile)
    out = torch.empty((num_asked, HEAD_FIELDS + 2 * width), dtype=torch.int32, device=device)
    launch(_logprobs_kernel, (num_asked,), *shared, out, width, **sizes, PADDED=groups.padded)
    return out


@triton.jit
def _load_finite(logits, stride, row, at, mask):
    """fp32 logits without nan and infinities, so that -inf can stand for "no token"."""
    x = tl.load(logits + row.to(tl.int64) * stride + at, mask=mask, other=0.0).to(tl.float32)
    x = tl.where(x == x, tl.minimum(tl.maximum(x, -HIGHEST), HIGHEST), -HIGHEST)
    return tl.where(mask, x, LOWEST)


@triton.jit
def _survey_kernel(
    logits, stride, token_ids, asked, peaks, sums, above,
    VOCAB: tl.constexpr, GROUP: tl.constexpr, NUM_GROUPS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Of each group: `max l`, `sum exp(l - max l)` and how many logits exceed the token's. fp32.

    Grid (asking rows, tiles of TILE groups).
    """
    ask = tl.program_id(0)
    row = tl.load(asked + ask * _ASK_FIELDS)
    token = tl.load(token_ids + row).to(tl.int32)
    chosen = _load_finite(logits, stride, row, token, token < VOCAB)
    group = tl.program_id(1) * TILE + tl.arange(0, TILE)
    at = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    x = _load_finite(logits, stride, row, at, at < VOCAB)
    peak = tl.max(x, 1)
    out = ask.to(tl.int64) * NUM_GROUPS + group
    real = group < NUM_GROUPS
    tl.store(peaks + out, peak, mask=real)
    base = tl.where(real, peak, 0.0)
    tl.store(sums + out, tl.sum(tl.exp2((x - base[:, None]) * LOG2E), 1), mask=real)
    tl.store(above + out, tl.sum((x > chosen).to(tl.int32), 1), mask=real)


@triton.jit(do_not_specialize=["width"])
def _logprobs_kernel(
    logits, stride, token_ids, asked, peaks, sums, above, out, width,
    VOCAB: tl.constexpr, GROUP: tl.constexpr, NUM_GROUPS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """`l - log sum exp l` of the token and of the likeliest, in order, of equals the lower id.

    Grid (asking rows). fp32.
    """
    ask = tl.program_id(0)
    row = tl.load(asked + ask * _ASK_FIELDS)
    num_top = tl.load(asked + ask * _ASK_FIELDS + 1)
    token = tl.load(token_ids + row).to(tl.int32)
    out += ask.to(tl.int64) * (_HEAD_FIELDS + 2 * width)
    group = tl.arange(0, PADDED)
    real = group < NUM_GROUPS
    place = ask.to(tl.int64) * NUM_GROUPS + group
    top = tl.load(peaks + place, mask=real, other=LOWEST)
    peak = tl.max(top, 0)
    mass = tl.load(sums + place, mask=real, other=0.0) * tl.exp2((top - peak) * LOG2E)
    log_total = tl.log2(tl.sum(mass, 0)) * _LN2
    chosen = _load_finite(logits, stride, row, token, token < VOCAB)
    tl.store(out, tl.sum(tl.load(above + place, mask=real, other=0), 0) + 1)
    tl.store(out + 1, _bits(chosen, peak, log_total))

    # The first of a group's tokens, by offset, that equals its peak and was not taken.
    unused = tl.zeros((PADDED,), tl.int32)
    offset = tl.arange(0, GROUP)
    for i in range(num_top):
        best = tl.max(top, 0)
        here = group == tl.min(tl.where(top == best, group, PADDED), 0)
        first = tl.min(tl.where(here, group, PADDED), 0) * GROUP
        x = _load_finite(logits, stride, row, first + offset, first + offset < VOCAB)
        start = tl.sum(tl.where(here, unused, 0), 0)
        taken = tl.min(tl.where((x == best) & (offset >= start), offset, GROUP), 0)
        tl.store(out + _HEAD_FIELDS + i, first + taken)
        tl.store(out + _HEAD_FIELDS + width + i, _bits(best, peak, log_total))
        left = tl.where((x < best) | ((x == best) & (offset > taken)), x, LOWEST)
        following = tl.max(left, 0)
        unused = tl.where(here, tl.where(following == best, taken + 1, 0), unused)
        top = tl.where(here, following, top)


@triton.jit
def _bits(x, peak, log_total):
    """The log-probability as it is stored."""
    value = tl.where(x > -HIGHEST, (x - peak) - log_total, LOWEST)
    return value.to(tl.int32, bitcast=True)
