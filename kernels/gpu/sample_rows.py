"""What the sampling kernels know of a row: one record of 64 bytes, and how its logits are read.

The host fills an array of `RECORD` and copies it only when the rows change; what changes every
step, the position, is an array of its own. Knows nothing of requests.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

RECORD = np.dtype(
    [
        ("seed", "<u8"),
        ("inverse_temperature", "<f4"),
        ("greedy", "<i4"),  # 1: the likeliest, the lowest of equals; the filters must say the same
        ("top_k", "<i4"),  # 0 = off; below the vocabulary's size
        ("top_p", "<f4"),  # 1 = off
        ("min_p", "<f4"),  # 0 = off
        ("state_row", "<i4"),  # of the arrays that outlive a step: last tokens, counts
        ("edit_slot", "<i4"),  # row of the edited logits, -1 = the raw ones are meant
        ("first_edit", "<i4"),  # of the row's span in the list of edits
        ("num_edits", "<i4"),
        ("exclusive", "<i4"),  # 1: only the tokens in the list of edits may be chosen
        ("penalised", "<i4"),  # 1: the three penalties below apply, and its tokens are counted
        ("repetition", "<f4"),
        ("presence", "<f4"),
        ("frequency", "<f4"),
    ]
)
WORDS = RECORD.itemsize // 4
EDIT = np.dtype([("token_id", "<i4"), ("bias", "<f4")])  # at most one of a token and row

LOGIT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _word(name: str) -> tl.constexpr:
    assert RECORD.fields is not None
    return tl.constexpr(RECORD.fields[name][1] // 4)


_WORDS = tl.constexpr(WORDS)
SEED = _word("seed")
INVERSE_TEMPERATURE = _word("inverse_temperature")
GREEDY = _word("greedy")
TOP_K = _word("top_k")
TOP_P = _word("top_p")
MIN_P = _word("min_p")
STATE_ROW = _word("state_row")
EDIT_SLOT = _word("edit_slot")
FIRST_EDIT = _word("first_edit")
NUM_EDITS = _word("num_edits")
EXCLUSIVE = _word("exclusive")
PENALISED = _word("penalised")
REPETITION = _word("repetition")
PRESENCE = _word("presence")
FREQUENCY = _word("frequency")

LOWEST = tl.constexpr(float("-inf"))
HIGHEST = tl.constexpr(3.4028234663852886e38)


@dataclass(frozen=True, slots=True, eq=False)
class SampleRows:
    """Logits to sample from, and what is asked of each row.

    edited: float32 logits of the rows whose record has an edit slot; None = no row has one.
    """

    logits: Tensor  # [R, V] model dtype
    records: Tensor  # [>= R, WORDS] int32, `RECORD` each
    edited: Tensor | None = None  # [num_edited, V] float32

    def __post_init__(self) -> None:
        check_logits(self.logits)
        if self.records.dtype != torch.int32 or self.records.shape[1:] != (WORDS,):
            raise ValueError(
                f"records must be [rows, {WORDS}] int32, got {list(self.records.shape)} "
                f"{self.records.dtype}; fill an array of sample_rows.RECORD and view it as int32"
            )
        if self.records.shape[0] < self.logits.shape[0]:
            raise ValueError(
                f"{self.logits.shape[0]} rows of logits but {self.records.shape[0]} records; "
                "every row needs one"
            )


def check_logits(logits: Tensor) -> None:
    if logits.dim() != 2 or logits.stride(1) != 1 or logits.dtype not in LOGIT_DTYPES:
        raise ValueError(
            f"logits must be [rows, vocab] float32, float16 or bfloat16 with neighbouring columns, "
            f"got {list(logits.shape)} {logits.dtype} with strides {logits.stride()}"
        )


@triton.jit
def load_int(records, row, FIELD: tl.constexpr):
    return tl.load(records + row * _WORDS + FIELD)


@triton.jit
def load_float(records, row, FIELD: tl.constexpr):
    return tl.load(records + row * _WORDS + FIELD).to(tl.float32, bitcast=True)


@triton.jit
def clean(x):
    """fp32 logits that compare and subtract as numbers: no nan (never chosen), no +inf."""
    return tl.where(x == x, tl.minimum(x, HIGHEST), LOWEST)


@triton.jit
def load_logits(logits, stride, edited, slot, row, at, mask, VOCAB: tl.constexpr):
    """Elements `at` of a row as clean fp32, -inf where masked out. slot: of `edited`, -1 = none."""
    if edited is None:
        x = tl.load(logits + row.to(tl.int64) * stride + at, mask=mask, other=LOWEST).to(tl.float32)
    else:
        if slot >= 0:
            x = tl.load(edited + slot.to(tl.int64) * VOCAB + at, mask=mask, other=LOWEST)
        else:
            x = tl.load(logits + row.to(tl.int64) * stride + at, mask=mask, other=LOWEST)
            x = x.to(tl.float32)
    return clean(x)


@triton.jit
def finish(records, row, token, token_ids, last_tokens, counts, VOCAB: tl.constexpr):
    """Publish a row's token: to the step, to the next step's input, to the row's counts."""
    state_row = load_int(records, row, STATE_ROW)
    tl.store(token_ids + row, token)
    if last_tokens is not None:
        tl.store(last_tokens + state_row, token)
    if counts is not None:
        if load_int(records, row, PENALISED) != 0:
            count = counts + state_row.to(tl.int64) * VOCAB + token
            tl.store(count, tl.load(count) + 1)
