"""Drawing a token under temperature, top-k, top-p and min-p without sorting the vocabulary.

One program a row. It inverts the distribution function in vocabulary order, group sums first, then
inside one group. Whether a token is in the nucleus can be asked of the token alone (how much mass
lies above it?), so top-p draws, asks, and if the answer is no draws again from what lies above; the
mass above a refused token by group is the very thing the next draw inverts, so a question and a
draw are one pass. top-k bisects for a bar that exactly k tokens reach, over the bits of the number.
No pass reads a group whose peak is below the bar.

The same random numbers and kept sets as `engine.sampling`, up to float rounding; a row's token
depends on nothing but the row. Knows nothing of requests.

Sources: the pivot rejection is the idea of FlashInfer's sorting-free sampling kernels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from loraplex.kernels.gpu.launch import launch
from loraplex.kernels.gpu.sample_peaks import LOG2E, Peaks
from loraplex.kernels.gpu.sample_rows import (
    EDIT_SLOT,
    GREEDY,
    INVERSE_TEMPERATURE,
    LOWEST,
    MIN_P,
    TOP_K,
    TOP_P,
    SampleRows,
    finish,
    load_float,
    load_int,
    load_logits,
)
from loraplex.kernels.gpu.sample_uniform import load_seed, uniform

NUM_WARPS = 8
# Low bits of a logit's fp32 form that say nothing, so that bisecting may skip them.
_SPARE_BITS = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}
# A draw leaves a uniform share of the mass above the last, so even a nucleus of one token of 128k
# is found in 12 attempts on average; past 64 (chance below 1e-25) the draw stands.
_MAX_ATTEMPTS = tl.constexpr(64)


def draw(
    rows: SampleRows,
    found: Peaks,
    positions: Tensor,
    token_ids: Tensor,
    last_tokens: Tensor | None,
    counts: Tensor | None,
) -> None:
    """Draw each row's token; rows that are `greedy` get the likeliest, the lowest of equals.

    found: with sums. positions: `[R]` int32, of the tokens being drawn. The rest as for
    `sample_peaks.take_likeliest`.
    """
    if found.sums is None:
        raise ValueError("draw needs the groups' sums; ask find_peaks(..., sums=True) for them")
    num_rows, vocab = rows.logits.shape
    groups, device = found.groups, rows.logits.device
    listed = torch.empty((num_rows, groups.count), dtype=torch.int32, device=device)
    launch(
        _draw_kernel,
        (num_rows,),
        rows.logits,
        rows.logits.stride(0),
        rows.edited,
        rows.records,
        positions,
        found.peaks,
        found.sums,
        listed,
        token_ids,
        last_tokens,
        counts,
        VOCAB=vocab,
        GROUP=groups.size,
        NUM_GROUPS=groups.count,
        PADDED=groups.padded,
        TILE=groups.per_tile,
        SPARE=_SPARE_BITS[rows.logits.dtype] if rows.edited is None else 0,
        num_warps=NUM_WARPS,
    )


@triton.jit
def _draw_kernel(
    logits, stride, edited, records, positions, peaks, sums, listed,
    token_ids, last_tokens, counts,
    VOCAB: tl.constexpr, GROUP: tl.constexpr, NUM_GROUPS: tl.constexpr, PADDED: tl.constexpr,
    TILE: tl.constexpr, SPARE: tl.constexpr,
):  # fmt: skip
    """With w = exp((l - max l) / T), K = {the top_k largest} and u(i) the row's i-th number:

    token = first v with sum_{j <= v} w_j [j in C] > u(i) * sum_j w_j [j in C], where
    C = K, w >= min_p and, after refusals, l above the last refused; refused while
    sum w [l > l_token] >= top_p * sum w [K].

    Grid (rows). fp32 sums, the target in fp64. `sums` and `listed` are overwritten: `listed` holds
    the groups a pass looks at, ascending.
    """
    row = tl.program_id(0)
    place = row.to(tl.int64) * NUM_GROUPS
    sums += place
    listed += place
    slot = load_int(records, row, EDIT_SLOT)
    scale = load_float(records, row, INVERSE_TEMPERATURE) * LOG2E
    top_k = load_int(records, row, TOP_K)
    top_p = load_float(records, row, TOP_P)
    min_p = load_float(records, row, MIN_P)
    seed = load_seed(records, row)
    position = tl.load(positions + row)
    group = tl.arange(0, PADDED)
    real = group < NUM_GROUPS
    top = tl.load(peaks + place + group, mask=real, other=LOWEST)
    peak = tl.max(top, 0)
    base = tl.where(peak > LOWEST, peak, 0.0)

    # The groups' shares of the mass: of all tokens, or of those that top-k and min-p keep.
    weight = tl.exp2((top - base) * scale)
    mass = tl.load(sums + group, mask=real, other=0.0) * weight
    total = tl.sum(mass, 0)
    bar = tl.full((), LOWEST, tl.float32)
    if (top_k > 0) | (min_p > 0):
        holds = real
        if top_k > 0:
            bar = _bar_of_peaks(top, real, peak, top_k, SPARE)
            num_listed = _list_groups(real & (top >= bar), group, listed)
            bar = _bar_of_tokens(
                logits, stride, edited, slot, row, listed, num_listed, bar, peak, top_k,
                VOCAB, GROUP, TILE, SPARE,
            )  # fmt: skip
            holds = real & (top >= bar)
        else:
            holds = real & (weight >= min_p)
        kept, mass = _mass_by_group(
            logits, stride, edited, slot, row, holds, group, listed, sums, base, scale,
            bar, min_p, LOWEST, VOCAB, GROUP, TILE,
        )  # fmt: skip
        if top_k > 0:
            total = kept
    number = uniform(seed, position, 0)
    number = tl.where(load_int(records, row, GREEDY) != 0, 0.0, number)
    token, drawn = _invert(
        logits, stride, edited, slot, row, mass, group, number, base, scale, bar, min_p, LOWEST,
        VOCAB, GROUP, PADDED,
    )  # fmt: skip

    attempt = 0
    asking = top_p < 1.0
    while asking:
        attempt += 1
        holds = real & (top > drawn)
        _, mass = _mass_by_group(
            logits, stride, edited, slot, row, holds, group, listed, sums, base, scale,
            bar, min_p, drawn, VOCAB, GROUP, TILE,
        )  # fmt: skip
        above = tl.sum(mass, 0)
        asking = (above >= top_p * total) & (above > 0.0) & (attempt < _MAX_ATTEMPTS)
        if asking:
            number = uniform(seed, position, attempt)
            token, drawn = _invert(
                logits, stride, edited, slot, row, mass, group, number, base, scale,
                bar, min_p, drawn, VOCAB, GROUP, PADDED,
            )  # fmt: skip
    finish(records, row, token, token_ids, last_tokens, counts, VOCAB)


@triton.jit
def _list_groups(holds, group, listed):
    """Write the groups that hold, ascending, where all threads see them; how many there are."""
    tl.debug_barrier()  # the last pass has read its list
    wanted = holds.to(tl.int32)
    tl.store(listed + tl.cumsum(wanted, 0) - 1, group, mask=holds)
    tl.debug_barrier()
    return tl.sum(wanted, 0)


@triton.jit
def _load_listed(
    logits, stride, edited, slot, row, listed, first, num_listed,
    VOCAB: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """(group ids `[TILE]`, which are real, logits `[TILE, GROUP]`) of a piece of the list."""
    index = first + tl.arange(0, TILE)
    real = index < num_listed
    ids = tl.load(listed + index, mask=real, other=0)
    at = ids[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    mask = real[:, None] & (at < VOCAB)
    return ids, real, load_logits(logits, stride, edited, slot, row, at, mask, VOCAB)


@triton.jit
def _mass_by_group(
    logits, stride, edited, slot, row, holds, group, listed, sums, base, scale, bar, min_p, pivot,
    VOCAB: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """(mass of l >= bar in the groups that hold, mass by group of what is kept there)."""
    num_listed = _list_groups(holds, group, listed)
    total = tl.zeros((TILE,), tl.float32)
    for first in range(0, num_listed, TILE):
        ids, real, x = _load_listed(
            logits, stride, edited, slot, row, listed, first, num_listed, VOCAB, GROUP, TILE
        )
        w = tl.exp2((x - base) * scale)
        total += tl.sum(tl.where(x >= bar, w, 0.0), 1)
        kept = tl.where((x >= bar) & (w >= min_p) & (x > pivot), w, 0.0)
        tl.store(sums + ids, tl.sum(kept, 1), mask=real)
    tl.debug_barrier()
    return tl.sum(total, 0), tl.load(sums + group, mask=holds, other=0.0)


@triton.jit
def _invert(
    logits, stride, edited, slot, row, mass, group, number, base, scale, bar, min_p, pivot,
    VOCAB: tl.constexpr, GROUP: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """(token, its logit) at `number` of the kept mass; the last token with any, if rounding puts
    the target past it; token 0 if there is no mass at all.
    """
    running = tl.cumsum(mass, 0)
    target = (number * tl.sum(mass, 0).to(tl.float64)).to(tl.float32)
    some = mass > 0.0
    chosen = tl.min(tl.where(some & (running > target), group, PADDED), 0)
    last = tl.max(tl.where(some, group, 0), 0)
    chosen = tl.where(chosen < PADDED, chosen, last)
    before = tl.sum(tl.where(group == chosen - 1, running, 0.0), 0)

    at = chosen * GROUP + tl.arange(0, GROUP)
    x = load_logits(logits, stride, edited, slot, row, at, at < VOCAB, VOCAB)
    w = tl.exp2((x - base) * scale)
    w = tl.where((x >= bar) & (w >= min_p) & (x > pivot), w, 0.0)
    some = w > 0.0
    token = tl.min(tl.where(some & (before + tl.cumsum(w, 0) > target), at, VOCAB), 0)
    last = tl.max(tl.where(some, at, 0), 0)
    token = tl.where(token < VOCAB, token, last)
    return token, tl.sum(tl.where(at == token, x, 0.0), 0)


@triton.jit
def _bar_of_peaks(top, real, peak, top_k, SPARE: tl.constexpr):
    """A bar that at least `top_k` groups reach, so at least as many tokens; -inf if there are not
    so many groups. As high as can be.
    """
    low = _order(tl.full((), LOWEST, tl.float32), SPARE)
    high = _order(peak, SPARE)
    while low < high:
        middle = _between(low, high)
        count = tl.sum((real & (top >= _value(middle, SPARE))).to(tl.int32), 0)
        low = tl.where(count >= top_k, middle, low)
        high = tl.where(count > top_k, high, tl.where(count < top_k, middle - 1, middle))
    return _value(low, SPARE)


@triton.jit
def _bar_of_tokens(
    logits, stride, edited, slot, row, listed, num_listed, bar, peak, top_k,
    VOCAB: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr, SPARE: tl.constexpr,
):  # fmt: skip
    """The bar that `top_k` tokens reach, and those equal to the last of them.

    bar: one that at least `top_k` tokens reach, all in listed groups.
    """
    low = _order(bar, SPARE)
    high = _order(peak, SPARE)
    while low < high:
        middle = _between(low, high)
        pivot = _value(middle, SPARE)
        count = tl.zeros((TILE,), tl.int32)
        for first in range(0, num_listed, TILE):
            _, _, x = _load_listed(
                logits, stride, edited, slot, row, listed, first, num_listed, VOCAB, GROUP, TILE
            )
            count += tl.sum((x >= pivot).to(tl.int32), 1)
        reached = tl.sum(count, 0)
        low = tl.where(reached >= top_k, middle, low)
        high = tl.where(reached > top_k, high, tl.where(reached < top_k, middle - 1, middle))
    return _value(low, SPARE)


@triton.jit
def _order(x, SPARE: tl.constexpr):
    """fp32 -> int32 of the same order, without the spare bits."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SPARE


@triton.jit
def _value(order, SPARE: tl.constexpr):
    """The least fp32 of this order; for -inf's, whose spare bits make nans, -inf."""
    bits = order << SPARE
    x = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    return tl.where(x == x, x, LOWEST)


@triton.jit
def _between(low, high):
    """The middle, rounded up, without overflow."""
    return (low | high) - ((low ^ high) >> 1)
