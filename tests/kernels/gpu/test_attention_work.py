"""The division of attention: every query in exactly one tile, placed by position; split counts."""

from __future__ import annotations

import pytest
import torch
from attention_cases import CPU, Case
from hypothesis import given
from hypothesis import strategies as st

from loraplex.kernels.gpu.attention_work import (
    MAX_SPLITS,
    max_prefill_tiles,
    num_sms,
    num_splits,
    plan_prefill_tiles,
    tile_queries,
)
from loraplex.kernels.gpu.kv_cache import SPLIT_COUNTERS

RUNS = st.lists(st.tuples(st.integers(0, 200), st.integers(0, 90)), max_size=6)  # past, tokens


@given(runs=RUNS, num_decodes=st.integers(0, 3), queries=st.integers(1, 64))
def test_tiles_cover_every_query_once(
    runs: list[tuple[int, int]], num_decodes: int, queries: int
) -> None:
    runs = [(7, 1)] * num_decodes + runs
    starts = [0]
    for _, tokens in runs:
        starts.append(starts[-1] + tokens)
    contexts = [past + tokens for past, tokens in runs]
    tiles = plan_prefill_tiles(starts, contexts, num_decodes, queries)
    assert tiles.dtype.name == "int32"
    seen = []
    for row, count, position, seq in tiles.tolist():
        assert 0 < count <= queries
        assert position // queries == (position + count - 1) // queries, "cut by position"
        assert position - contexts[seq] == row - starts[seq + 1], "row and position go together"
        assert starts[seq] <= row
        assert row + count <= starts[seq + 1]
        seen += range(row, row + count)
    assert sorted(seen) == list(range(num_decodes, starts[-1]))
    ends = (tiles[:, 2] + tiles[:, 1]).tolist()
    assert ends == sorted(ends, reverse=True), "longest first"
    assert len(tiles) <= max_prefill_tiles(
        starts[-1] - num_decodes, len(runs) - num_decodes, queries
    )


def test_a_batch_of_decodes_has_no_tiles() -> None:
    case = Case()
    case.write([(0, 9)])
    batch, _ = case.write([(0, 1), (1, 1)])
    work = case.work(batch)
    assert (work.num_decodes, work.prefill_tiles, work.prefill_capacity) == (2, None, 0)


def test_invariant_work_has_tiles_only() -> None:
    case = Case(batch_invariant=True)
    batch, _ = case.write([(0, 1), (1, 1), (2, 90)])
    work = case.work(batch)
    assert (work.num_decodes, work.tile_queries) == (0, 32)
    assert work.prefill_capacity == 2 + 3


@pytest.mark.parametrize(
    ("group", "head_dim", "dtype", "longest", "invariant", "queries"),
    [
        (4, 128, torch.bfloat16, 2048, False, 32),
        (7, 64, torch.bfloat16, 2048, False, 18),  # 126 rows of 128
        (4, 128, torch.bfloat16, 16, False, 16),  # short runs do not fill a wide tile
        (4, 128, torch.bfloat16, 2048, True, 16),
        (4, 256, torch.bfloat16, 2048, False, 16),
        (4, 128, torch.float32, 2048, False, 16),
        (200, 64, torch.bfloat16, 2048, False, 1),
    ],
)
def test_tile_queries(
    group: int, head_dim: int, dtype: torch.dtype, longest: int, invariant: bool, queries: int
) -> None:
    assert tile_queries(group, head_dim, dtype, longest, invariant) == queries


@pytest.mark.parametrize(
    ("num_seqs", "num_kv_heads", "max_context", "splits"),
    [
        (1, 8, 1 << 17, 33),  # two programs per multiprocessor
        (1, 8, 1024, 8),  # no split shorter than 128 tokens
        (1, 1, 1 << 17, MAX_SPLITS),
        (8, 8, 8192, 4),
        (16, 8, 8192, 2),
        (17, 8, 8192, 6),  # two rounds of three
        (64, 8, 8192, 2),
        (256, 8, 8192, 1),
        (SPLIT_COUNTERS, 2, 8192, 1),
        (0, 8, 0, 1),
        (4, 8, 0, 1),
    ],
)
def test_splits_fill_an_h200(
    num_seqs: int, num_kv_heads: int, max_context: int, splits: int
) -> None:
    assert num_splits(num_seqs, num_kv_heads, max_context, num_sms=132) == splits


def test_a_cpu_counts_as_one_multiprocessor() -> None:
    assert num_sms(CPU) == 1
