"""What a step takes from memory that stays on the device between steps.

The host sends what is new: appended blocks, and the ids of tokens it knows. The rest is here: every
running sequence has a *state row* with its block table and its last token, which the sampler leaves
there. So step n + 1 can start before the host has seen the tokens of step n.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from loraplex.kernels.gpu.launch import launch

TOKEN_BLOCK = 128
TABLE_BLOCK = 512
RUN_FIELDS = 4  # int32 fields of a run: state row, first column, first value, values


@triton.jit
def _append_blocks_kernel(
    runs, values, tables, table_stride, RUN_FIELDS: tl.constexpr, BLOCK: tl.constexpr
):
    """`tables[row, column + i] = values[first + i]` for `i < count`.

    Grid: (runs, column blocks of the widest table); a program past its run's count does nothing.
    """
    run = runs + tl.program_id(0) * RUN_FIELDS
    row = tl.load(run).to(tl.int64)
    column = tl.load(run + 1)
    first = tl.load(run + 2)
    count = tl.load(run + 3)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    blocks = tl.load(values + first + at, mask=mask, other=0)
    tl.store(tables + row * table_stride + column + at, blocks, mask=mask)


@triton.jit(do_not_specialize=["num_tokens", "token_programs"])
def _take_inputs_kernel(
    sent_ids,
    state_rows,
    context_lens,
    last_tokens,
    tables,
    token_ids,
    block_tables,
    num_tokens,
    table_stride,
    token_programs,
    column_blocks,
    BLOCK_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """`token_ids[i] = sent_ids[i] if >= 0 else last_tokens[state_rows[i]]`, and for each sequence
    the blocks its context needs, `block_tables[s] = tables[state_rows[s]]`.

    Grid: token_programs + sequences * column_blocks. A row that feeds back is a decode, and decodes
    come first, one row each: row i is sequence i.
    """
    program = tl.program_id(0)
    if program < token_programs:
        at = program * TOKENS + tl.arange(0, TOKENS)
        mask = at < num_tokens
        sent = tl.load(sent_ids + at, mask=mask, other=0)
        fed_back = mask & (sent < 0)
        row = tl.load(state_rows + at, mask=fed_back, other=0)
        last = tl.load(last_tokens + row, mask=fed_back, other=0)
        tl.store(token_ids + at, tl.where(fed_back, last, sent.to(tl.int64)), mask=mask)
    else:
        piece = program - token_programs
        sequence = piece // column_blocks
        first = (piece % column_blocks) * COLUMNS
        needed = (tl.load(context_lens + sequence) + BLOCK_SIZE - 1) // BLOCK_SIZE
        if first < needed:
            column = first + tl.arange(0, COLUMNS)
            mask = column < needed
            row = tl.load(state_rows + sequence).to(tl.int64)
            blocks = tl.load(tables + row * table_stride + column, mask=mask, other=0)
            target = block_tables + sequence.to(tl.int64) * table_stride + column
            tl.store(target, blocks, mask=mask)


def append_blocks(runs: Tensor, values: Tensor, tables: Tensor) -> None:
    """Write what was appended to block tables. Changes `tables`.

    runs: `[N, 4]` int32: state row, first column, first of `values`, number of values.
    values: `[K]` int32 block ids. tables: `[state rows, max_blocks]` int32.
    """
    width = tables.shape[1]
    launch(
        _append_blocks_kernel,
        (runs.shape[0], triton.cdiv(min(width, values.shape[0]), TABLE_BLOCK)),
        runs,
        values,
        tables,
        width,
        RUN_FIELDS=RUN_FIELDS,
        BLOCK=TABLE_BLOCK,
        num_warps=4,
    )


def take_inputs(
    sent_ids: Tensor,
    state_rows: Tensor,
    context_lens: Tensor,
    last_tokens: Tensor,
    tables: Tensor,
    token_ids: Tensor,
    block_tables: Tensor,
    block_size: int,
) -> None:
    """Fill `token_ids` and `block_tables` of a step from what was sent and what the device holds.

    sent_ids: `[T]` int32, -1 = the last token of the row's sequence. state_rows, context_lens:
    `[S]` int32. last_tokens: `[state rows]` int64. tables: `[state rows, max_blocks]` int32.
    token_ids: `[T]` int64. block_tables: `[S, max_blocks]` int32; columns past a context keep what
    they held.

    Raises: ValueError for tables of different widths.
    """
    if block_tables.stride(0) != tables.stride(0):
        raise ValueError(
            f"block_tables of row stride {block_tables.stride(0)} cannot be filled from tables of "
            f"row stride {tables.stride(0)}: give both max_blocks columns"
        )
    num_tokens, num_seqs = sent_ids.shape[0], state_rows.shape[0]
    token_programs = triton.cdiv(num_tokens, TOKEN_BLOCK)
    column_blocks = triton.cdiv(tables.shape[1], TABLE_BLOCK)
    launch(
        _take_inputs_kernel,
        (token_programs + num_seqs * column_blocks,),
        sent_ids,
        state_rows,
        context_lens,
        last_tokens,
        tables,
        token_ids,
        block_tables,
        num_tokens,
        tables.stride(0),
        token_programs,
        column_blocks,
        BLOCK_SIZE=block_size,
        TOKENS=TOKEN_BLOCK,
        COLUMNS=TABLE_BLOCK,
        num_warps=4,
    )
