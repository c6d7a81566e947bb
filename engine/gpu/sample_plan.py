"""What the rows of a step ask of the sampler, as the arrays that its kernels read.

A sequence's wishes are worked out once; the arrays are made and sent once for as long as the same
sequences stand in the same rows. Knows nothing of logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loraplex.engine.gpu.transfers import send
from loraplex.engine.sampling import Traits
from loraplex.engine.sequence import Sequence
from loraplex.kernels.gpu.sample_rows import EDIT, RECORD, WORDS

Edits = np.ndarray[tuple[int], np.dtype[np.void]]  # of dtype EDIT
_NO_EDIT = _NO_MASK = -1
SamplingItem = tuple[Sequence, int, int]  # sequence, its state row, position of the sampled token


@dataclass(frozen=True, slots=True, eq=False)
class RowWishes:
    """One sequence's. `early_edits` hold before position `first_end`, `edits` from there on."""

    seq_id: int
    draws: bool
    penalised: bool
    masked: bool  # by a grammar
    num_top: int | None  # log-probabilities, None = none
    first_end: int  # the first position whose token may end the sequence
    edits: Edits
    early_edits: Edits
    record_head: tuple[Any, ...]  # of RECORD, up to the state row
    record_tail: tuple[Any, ...]  # from `exclusive` on

    @classmethod
    def of(cls, seq: Sequence, state_row: int, vocab_size: int) -> RowWishes:
        p, traits = seq.sampling, Traits.of(seq.sampling)
        seed = seq.seed & 0xFFFFFFFFFFFFFFFF
        if traits.greedy:  # a draw at number 0 from all that is as likely as the likeliest
            head = (seed, 1.0, 1, 0, 1.0, 1.0, state_row)
        else:
            top_k = p.top_k if 0 < p.top_k < vocab_size else 0
            head = (seed, 1 / p.temperature, 0, top_k, p.top_p, p.min_p, state_row)
        exclusive = p.allowed_token_ids is not None
        penalties = (p.repetition_penalty, p.presence_penalty, p.frequency_penalty)
        edits = dict(p.logit_bias)
        if p.allowed_token_ids is not None:
            edits = {token: edits.get(token, 0.0) for token in p.allowed_token_ids}
        ending: frozenset[int] = frozenset()
        if p.min_tokens > 0 and not seq.has_grammar:  # whose mask says it
            ending = seq.eos_token_ids | frozenset(p.stop_token_ids)
        return cls(
            seq_id=seq.seq_id,
            draws=not traits.greedy,
            penalised=traits.penalties,
            masked=seq.has_grammar,
            num_top=p.logprobs,
            first_end=seq.num_prompt_tokens + p.min_tokens if ending else 0,
            edits=_array(edits),
            early_edits=_array({**edits, **dict.fromkeys(ending, -np.inf)}),
            record_head=head,
            record_tail=(exclusive, traits.penalties, *penalties),
        )


@dataclass(frozen=True, slots=True, eq=False)
class SamplePlan:
    rows: list[tuple[int, int]]  # (seq_id, state row) of each
    first_ends: list[tuple[int, int, bool]]  # row, `RowWishes.first_end`, the step is before it
    records: Tensor  # [R, WORDS] int32
    edit_rows: Tensor | None  # [E] int32; None = no logits are changed
    edits: Tensor  # [N, 2] int32
    draws: bool  # some row needs random numbers
    penalised: list[int]  # rows
    masked: list[int]  # rows whose grammar says each step anew what they may get
    mask_slots: Tensor | None  # [E] int32, by edit slot: which of `masked` it is, -1 = none
    logprobs: list[tuple[int, int]]  # rows that ask for them, and how many likeliest

    def serves(self, rows: list[tuple[int, int]], positions: list[int]) -> bool:
        """Whether a step of these rows is asked the same."""
        return self.rows == rows and all(
            (positions[i] < end) == early for i, end, early in self.first_ends
        )


def make_plan(
    rows: list[tuple[int, int]],
    wishes: list[RowWishes],
    positions: list[int],
    device: torch.device,
) -> SamplePlan:
    """rows: (seq_id, state row) of each. positions: of the tokens to be sampled."""
    records: list[tuple[Any, ...]] = []
    edit_rows: list[int] = []
    masked: list[int] = []
    mask_slots: list[int] = []
    edits: list[Edits] = [_array({})]
    num_edits = 0
    for i, (wish, position) in enumerate(zip(wishes, positions, strict=True)):
        slot, mine = _NO_EDIT, wish.early_edits if position < wish.first_end else wish.edits
        if wish.penalised or wish.masked or len(mine):
            slot = len(edit_rows)
            mask_slots.append(len(masked) if wish.masked else _NO_MASK)
            masked += [i] if wish.masked else []
            edit_rows.append(i)
            edits.append(mine)
        records.append((*wish.record_head, slot, num_edits, len(mine), *wish.record_tail))
        num_edits += len(mine)
    words = np.array(records, dtype=RECORD).view(np.int32).reshape(-1, WORDS)
    return SamplePlan(
        rows=rows,
        first_ends=[
            (i, wish.first_end, positions[i] < wish.first_end)
            for i, wish in enumerate(wishes)
            if wish.first_end
        ],
        records=send(words, device),
        edit_rows=send(np.array(edit_rows, dtype=np.int32), device) if edit_rows else None,
        edits=send(np.concatenate(edits).view(np.int32).reshape(-1, 2), device),
        draws=any(wish.draws for wish in wishes),
        penalised=[i for i, wish in enumerate(wishes) if wish.penalised],
        masked=masked,
        mask_slots=send(np.array(mask_slots, dtype=np.int32), device) if masked else None,
        logprobs=[(i, wish.num_top) for i, wish in enumerate(wishes) if wish.num_top is not None],
    )


def _array(edits: dict[int, float]) -> Edits:
    return np.array(list(edits.items()), dtype=EDIT)
