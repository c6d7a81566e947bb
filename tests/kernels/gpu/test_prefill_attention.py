"""Paged prefill attention in the interpreter: chunks, prefixes, mixed steps, batch invariance."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attention_cases import TOLERANCE, Case

from loraplex.kernels.gpu.attention import attention
from loraplex.kernels.ops import AttentionBatch


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(5)


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 6, 7, 8, 20])
def test_groups_and_chunks(group: int) -> None:
    """A first chunk, then one that starts inside a tile and a block."""
    case = Case(group=group, num_kv_heads=1)
    case.step([(0, 37)])
    case.step([(0, 30)])


@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [
        *((head_dim, torch.float32) for head_dim in (10, 24, 80, 96, 256)),
        *((head_dim, torch.float16) for head_dim in (10, 64, 128)),
        *((head_dim, torch.bfloat16) for head_dim in (80, 128, 256)),
    ],
)
def test_head_dims_and_dtypes(head_dim: int, dtype: torch.dtype) -> None:
    case = Case(head_dim=head_dim, dtype=dtype, num_kv_heads=1)
    case.write([(0, 21)])
    case.step([(0, 45)])


@pytest.mark.parametrize("block_size", [1, 8, 32, 256])
def test_block_sizes(block_size: int) -> None:
    case = Case(block_size=block_size, num_blocks=max(4, 512 // block_size))
    case.step([(0, 33), (1, 70)])


@pytest.mark.parametrize("window", [1, 31, 37, 63, 1000])
def test_windows(window: int) -> None:
    """31 and 63 leave just the first key of a block behind the last query of a tile."""
    case = Case(window=window, num_kv_heads=1)
    case.write([(0, 30)])
    case.step([(0, 150)])


def test_windows_skip_the_blocks_before_them() -> None:
    case = Case(window=20, num_blocks=64)
    case.write([(0, 300)])
    batch, q = case.write([(0, 40)])
    batch.block_tables[:, :14] = 1 << 20  # the first query sees 281 .. 300; blocks begin at 256
    case.close(case.attend(batch, q), batch, q)


@pytest.mark.parametrize("window", [None, 30])
def test_softcap(window: int | None) -> None:
    case = Case(softcap=0.8, window=window, num_kv_heads=1)
    case.write([(0, 9)])
    case.step([(0, 60)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_mixed_steps(dtype: torch.dtype) -> None:
    """Decodes, a first chunk, a later one, a short run, a single token that is no decode."""
    case = Case(dtype=dtype)
    case.step([(2, 1), (0, 20), (1, 50)])
    batch, q = case.write([(0, 1), (2, 1), (3, 41), (1, 17), (4, 5), (5, 1)])
    batch.num_decodes = 2  # the last run of one token goes on with its prompt
    case.close(case.attend(batch, q, num_splits=2), batch, q)


def test_padding_tiles_do_nothing() -> None:
    """As in a captured graph: more programs than tiles."""
    case = Case()
    batch, q = case.write([(0, 20), (1, 30)])
    work = case.work(batch)
    assert work.prefill_tiles is not None
    rubbish = torch.full((3, 4), 1 << 20, dtype=torch.int32)
    padded = replace(
        work,
        prefill_tiles=torch.cat((work.prefill_tiles, rubbish)),
        prefill_count=torch.tensor([len(work.prefill_tiles)], dtype=torch.int32),
        prefill_capacity=len(work.prefill_tiles) + 3,
    )
    case.close(attention(q, case.kv, 0, batch, padded, case.scale, None), batch, q)


def test_runs_without_tokens_are_skipped() -> None:
    case = Case()
    batch, q = case.write([(0, 20), (1, 0), (2, 5)])
    case.sequences.keys[0, 1] = case.sequences.values[0, 1] = torch.zeros(0, 2, 16)
    case.close(case.attend(batch, q), batch, q)


def test_a_wrong_block_table_fails() -> None:
    case = Case()
    batch, q = case.write([(0, 40), (1, 40)])
    right = case.expected(batch, q)
    batch.block_tables = batch.block_tables.flip(0)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(case.attend(batch, q), right, **TOLERANCE[case.dtype])


def test_a_future_key_fails() -> None:
    """Had the causal mask been one token loose, the comparison would have seen it."""
    case = Case()
    batch, q = case.write([(0, 40)])
    got = case.attend(batch, q)
    batch.positions = torch.clamp(batch.positions + 1, max=39)
    with pytest.raises(AssertionError):
        case.close(got, batch, q)


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_invariant_rows_do_not_depend_on_mates_or_chunks(
    window: int | None, dtype: torch.dtype
) -> None:
    """One prompt alone in one piece; the same in odd pieces, the last a decode, among others."""
    length, cuts = 150, (3, 70, 76, 1)  # sum 150
    assert sum(cuts) == length
    case = Case(
        group=3, head_dim=32, dtype=dtype, window=window, batch_invariant=True, num_blocks=64
    )
    whole, q = case.write([(0, length)])
    alone = case.attend(whole, q)
    case.close(alone, whole, q)

    kv = case.kv
    done = 0
    for i, cut in enumerate(cuts):
        mates = [(10 + i, 1), (20 + i, 35)] if i % 2 else []
        mixed, other_q = case.write([*mates[:1], (1, cut), *mates[1:]])
        row = mixed.host_query_start[1 if mates else 0]
        for pages in (kv.keys[0], kv.values[0]):  # the same tokens
            for position in range(done, done + cut):
                pages[_place(case, mixed, 1 if mates else 0, position)] = pages[
                    _place(case, whole, 0, position)
                ]
        other_q[row : row + cut] = q[done : done + cut]
        out = case.attend(mixed, other_q)
        assert torch.equal(out[row : row + cut], alone[done : done + cut]), f"piece {i}"
        done += cut


def _place(
    case: Case, batch: AttentionBatch, sequence: int, position: int
) -> tuple[int, slice, int]:
    block = batch.host_block_tables[sequence][position // case.block_size]
    return block, slice(None), position % case.block_size
