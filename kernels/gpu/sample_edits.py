"""Changes to a row's logits before a token is drawn: bias, allowed or suppressed, masks, penalties.

Only the rows that ask for any are copied, as fp32; the model's logits stay as they are. Penalties
need to know which tokens a sequence holds: a word per state row and token counts the token's
occurrences in the output and remembers if the prompt has it. `sample_rows.finish` counts each token
as it is drawn, so a token that the host does not know yet is counted, too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from loraplex.kernels.gpu.launch import launch
from loraplex.kernels.gpu.sample_rows import (
    EXCLUSIVE,
    FIRST_EDIT,
    FREQUENCY,
    LOWEST,
    NUM_EDITS,
    PENALISED,
    PRESENCE,
    REPETITION,
    STATE_ROW,
    SampleRows,
    load_float,
    load_int,
)

BLOCK = 4096  # tokens of a program
EDITS_BLOCK = 256  # edits read at once
COUNT_BLOCK = 2048
SPAN_FIELDS = 4  # of `count_tokens`: state row, first token, prompt tokens, tokens
_SPAN_FIELDS = tl.constexpr(SPAN_FIELDS)
_PROMPT = tl.constexpr(1 << 30)  # the bit of a count's word that says: the prompt has the token


@dataclass(frozen=True, slots=True, eq=False)
class TokenMasks:
    """Which tokens rows may get, a bit each: bit i of word w stands for token 32 w + i."""

    slots: Tensor  # [num_edited] int32, the mask of each edit slot; -1 = none
    words: Tensor  # [masks, ceil(V / 32)] int32


def edit_logits(
    logits: Tensor,
    records: Tensor,
    edit_rows: Tensor,
    edits: Tensor,
    counts: Tensor | None,
    masks: TokenMasks | None = None,
) -> SampleRows:
    """The rows with their edits applied, and -inf for what their masks exclude.

    logits, records: as in `SampleRows`. edit_rows: `[num_edited]` int32, the row of each edit slot.
    edits: `[N, 2]` int32, `EDIT` each. counts: `[state rows, V]` int32; None = no row is penalised.
    """
    vocab = logits.shape[1]
    if masks is not None:
        num_words = triton.cdiv(vocab, 32)
        if masks.words.shape[1:] != (num_words,) or masks.slots.shape != edit_rows.shape:
            raise ValueError(
                f"masks must be {num_words} words each with a slot for each of "
                f"{edit_rows.shape[0]} rows, got {list(masks.words.shape)} words and "
                f"{list(masks.slots.shape)} slots"
            )
    edited = torch.empty((edit_rows.shape[0], vocab), dtype=torch.float32, device=logits.device)
    rows = SampleRows(logits, records, edited)
    launch(
        _edit_kernel,
        (edit_rows.shape[0], triton.cdiv(vocab, BLOCK)),
        logits,
        logits.stride(0),
        records,
        edit_rows,
        edits,
        counts,
        None if masks is None else masks.slots,
        None if masks is None else masks.words,
        edited,
        VOCAB=vocab,
        BLOCK=min(BLOCK, triton.next_power_of_2(vocab)),
        EDITS=EDITS_BLOCK,
    )
    return rows


def count_tokens(counts: Tensor, spans: Tensor, token_ids: Tensor) -> None:
    """Start the counts of sequences afresh.

    counts: `[state rows, V]` int32, written. spans: `[sequences, SPAN_FIELDS]` int32: state row,
    first of `token_ids`, tokens of the prompt, tokens. token_ids: int32.
    """
    if spans.dim() != 2 or spans.shape[1] != SPAN_FIELDS:
        raise ValueError(f"spans must be [sequences, {SPAN_FIELDS}], got {list(spans.shape)}")
    vocab = counts.shape[1]
    launch(
        _count_kernel,
        (spans.shape[0],),
        counts,
        spans,
        token_ids,
        VOCAB=vocab,
        BLOCK=min(COUNT_BLOCK, triton.next_power_of_2(vocab)),
    )


@triton.jit
def _edit_kernel(
    logits, stride, records, edit_rows, edits, counts, mask_slots, mask_words, edited,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr, EDITS: tl.constexpr,
):  # fmt: skip
    """`edited[slot] = penalise(l + bias)`; -inf for what the row's mask excludes, and in an
    exclusive row for all that is in no edit.

    Grid (edited rows, blocks of tokens): a program writes its block without the biases and then its
    share of the row's edits over it. fp32.
    """
    slot = tl.program_id(0)
    block = tl.program_id(1) * BLOCK
    row = tl.load(edit_rows + slot)
    source = logits + row.to(tl.int64) * stride
    target = edited + slot.to(tl.int64) * VOCAB
    at = block + tl.arange(0, BLOCK)
    x = tl.load(source + at, mask=at < VOCAB, other=LOWEST).to(tl.float32)
    if load_int(records, row, EXCLUSIVE) != 0:
        x = tl.full((BLOCK,), LOWEST, tl.float32)
    x = _penalise(x, records, row, counts, at, at < VOCAB, VOCAB)
    x = _exclude(x, mask_slots, mask_words, slot, at, at < VOCAB, VOCAB)
    tl.store(target + at, x, mask=at < VOCAB)
    tl.debug_barrier()

    first = load_int(records, row, FIRST_EDIT)
    num_edits = load_int(records, row, NUM_EDITS)
    for start in range(0, num_edits, EDITS):
        index = start + tl.arange(0, EDITS)
        edit = edits + (first + index) * 2
        token = tl.load(edit, mask=index < num_edits, other=-1)
        mine = (token >= block) & (token < block + BLOCK)
        bias = tl.load(edit + 1, mask=mine, other=0).to(tl.float32, bitcast=True)
        y = tl.load(source + token, mask=mine, other=LOWEST).to(tl.float32) + bias
        y = _penalise(y, records, row, counts, token, mine, VOCAB)
        y = _exclude(y, mask_slots, mask_words, slot, token, mine, VOCAB)
        tl.store(target + token, y, mask=mine)


@triton.jit
def _penalise(x, records, row, counts, at, mask, VOCAB: tl.constexpr):
    """CTRL's repetition penalty over prompt and output; OpenAI's two over the output."""
    if counts is not None:
        if load_int(records, row, PENALISED) != 0:
            state_row = load_int(records, row, STATE_ROW)
            word = tl.load(counts + state_row.to(tl.int64) * VOCAB + at, mask=mask, other=0)
            repetition = load_float(records, row, REPETITION)
            weakened = tl.where(x > 0, x / repetition, x * repetition)
            x = tl.where(word != 0, weakened, x)
            count = word & (_PROMPT - 1)
            x -= count.to(tl.float32) * load_float(records, row, FREQUENCY)
            x -= tl.where(count > 0, load_float(records, row, PRESENCE), 0.0)
    return x


@triton.jit
def _exclude(x, mask_slots, mask_words, slot, at, valid, VOCAB: tl.constexpr):
    """-inf for tokens whose bit is 0."""
    if mask_words is not None:
        mask = tl.load(mask_slots + slot)
        if mask >= 0:
            num_words: tl.constexpr = (VOCAB + 31) // 32
            words = mask_words + mask.to(tl.int64) * num_words
            word = tl.load(words + at // 32, mask=valid, other=0)
            x = tl.where((word >> (at % 32)) & 1 != 0, x, LOWEST)
    return x


@triton.jit
def _count_kernel(
    counts, spans, token_ids,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (sequences): clear the state row, mark the prompt's tokens, add up the output's."""
    span = spans + tl.program_id(0) * _SPAN_FIELDS
    row = counts + tl.load(span).to(tl.int64) * VOCAB
    first = tl.load(span + 1)
    num_prompt = tl.load(span + 2)
    num_tokens = tl.load(span + 3)
    for start in range(0, VOCAB, BLOCK):
        at = start + tl.arange(0, BLOCK)
        tl.store(row + at, tl.zeros((BLOCK,), tl.int32), mask=at < VOCAB)
    tl.debug_barrier()
    for start in range(0, num_prompt, BLOCK):
        at = start + tl.arange(0, BLOCK)
        token = tl.load(token_ids + first + at, mask=at < num_prompt, other=0)
        tl.store(row + token, tl.full((BLOCK,), _PROMPT, tl.int32), mask=at < num_prompt)
    tl.debug_barrier()
    for start in range(num_prompt, num_tokens, BLOCK):
        at = start + tl.arange(0, BLOCK)
        token = tl.load(token_ids + first + at, mask=at < num_tokens, other=0)
        tl.atomic_add(row + token, 1, mask=at < num_tokens)  # integers: in any order the same
