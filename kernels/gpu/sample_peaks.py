"""The first pass over the logits: what the best of every 64 or so neighbouring tokens is.

These *peaks* are an index into a row. Whatever asks for the tokens above some bar (the nucleus, the
k likeliest, all that a refused draw leaves over) need only look into the groups whose peak is above
it, usually a few hundred tokens of a vocabulary of 128k.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from loraplex.kernels.gpu.launch import launch
from loraplex.kernels.gpu.sample_rows import (
    EDIT_SLOT,
    INVERSE_TEMPERATURE,
    LOWEST,
    SampleRows,
    finish,
    load_float,
    load_int,
    load_logits,
)

MIN_GROUP = 64  # tokens: 128 bytes of bf16, the smallest piece worth a transaction of its own
MAX_GROUPS = 2048  # the peaks that a program can hold in registers beside its other work
TILE = 4096  # tokens that a program looks at together
LOG2E = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True, slots=True, eq=False)
class Peaks:
    """peaks: `[R, num_groups]` float32. sums: the same shape, sums of exp((l - peak) / temperature)
    of each group; None if not asked for.
    """

    peaks: Tensor
    sums: Tensor | None
    groups: Groups


@dataclass(frozen=True, slots=True)
class Groups:
    """How a vocabulary is cut."""

    size: int  # tokens of a group, a power of two; the last may be shorter
    count: int
    padded: int  # `count`, rounded up to a power of two
    per_tile: int  # groups that a program looks at together

    @classmethod
    def of(cls, vocab: int) -> Groups:
        size = max(MIN_GROUP, triton.next_power_of_2(triton.cdiv(vocab, MAX_GROUPS)))
        count = triton.cdiv(vocab, size)
        padded = triton.next_power_of_2(count)
        return cls(size, count, padded, min(max(TILE // size, 1), padded))


def find_peaks(rows: SampleRows, *, sums: bool) -> Peaks:
    num_rows, vocab = rows.logits.shape
    groups = Groups.of(vocab)

    def results() -> Tensor:  # each its own: a slice's alignment would change with the rows
        shape = (num_rows, groups.count)
        return torch.empty(shape, dtype=torch.float32, device=rows.logits.device)

    found = Peaks(results(), results() if sums else None, groups)
    launch(
        _peaks_kernel,
        (num_rows, triton.cdiv(groups.count, groups.per_tile)),
        rows.logits,
        rows.logits.stride(0),
        rows.edited,
        rows.records,
        found.peaks,
        found.sums,
        VOCAB=vocab,
        GROUP=groups.size,
        NUM_GROUPS=groups.count,
        TILE=groups.per_tile,
    )
    return found


def take_likeliest(
    rows: SampleRows,
    found: Peaks,
    token_ids: Tensor,
    last_tokens: Tensor | None,
    counts: Tensor | None,
) -> None:
    """Each row's most likely token, the lowest of equals.

    token_ids: `[R]` int64, written. last_tokens: `[state rows]`, written at each row's state row.
    counts: `[state rows, V]` int32, one added for the rows that are penalised.
    """
    num_rows, vocab = rows.logits.shape
    launch(
        _likeliest_kernel,
        (num_rows,),
        rows.logits,
        rows.logits.stride(0),
        rows.edited,
        rows.records,
        found.peaks,
        token_ids,
        last_tokens,
        counts,
        VOCAB=vocab,
        GROUP=found.groups.size,
        NUM_GROUPS=found.groups.count,
        PADDED=found.groups.padded,
    )


@triton.jit
def _peaks_kernel(
    logits, stride, edited, records, peaks, sums,
    VOCAB: tl.constexpr, GROUP: tl.constexpr, NUM_GROUPS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """`peak = max l` and `sum exp((l - peak) / temperature)` of each group of GROUP tokens, fp32.

    Grid (rows, tiles of TILE groups).
    """
    row = tl.program_id(0)
    group = tl.program_id(1) * TILE + tl.arange(0, TILE)
    at = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    slot = load_int(records, row, EDIT_SLOT)
    x = load_logits(logits, stride, edited, slot, row, at, at < VOCAB, VOCAB)
    peak = tl.max(x, 1)
    out = row.to(tl.int64) * NUM_GROUPS + group
    tl.store(peaks + out, peak, mask=group < NUM_GROUPS)
    if sums is not None:
        scale = load_float(records, row, INVERSE_TEMPERATURE) * LOG2E
        base = tl.where(peak > LOWEST, peak, 0.0)  # a group of nothing but -inf sums to 0
        tl.store(sums + out, tl.sum(tl.exp2((x - base[:, None]) * scale), 1), group < NUM_GROUPS)


@triton.jit
def _likeliest_kernel(
    logits, stride, edited, records, peaks, token_ids, last_tokens, counts,
    VOCAB: tl.constexpr, GROUP: tl.constexpr, NUM_GROUPS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """`argmax l`: the first group that reaches the row's peak, then its first token that does.

    Grid (rows). A row of nothing but nan or -inf gives token 0.
    """
    row = tl.program_id(0)
    group = tl.arange(0, PADDED)
    top = tl.load(
        peaks + row.to(tl.int64) * NUM_GROUPS + group, mask=group < NUM_GROUPS, other=LOWEST
    )
    peak = tl.max(top, 0)
    first = tl.min(tl.where(top == peak, group, PADDED), 0)
    at = first * GROUP + tl.arange(0, GROUP)
    slot = load_int(records, row, EDIT_SLOT)
    x = load_logits(logits, stride, edited, slot, row, at, at < VOCAB, VOCAB)
    token = tl.min(tl.where(x == peak, at, VOCAB), 0)
    finish(records, row, token, token_ids, last_tokens, counts, VOCAB)
