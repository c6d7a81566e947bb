"""The cutting of a step's rows into tiles."""

from __future__ import annotations

from collections import Counter

import torch
from hypothesis import given
from hypothesis import strategies as st

from loraplex.kernels.gpu.work import (
    LARGE_ROWS,
    NORM_ROWS,
    SMALL_ROWS,
    TILE_FIELDS,
    RowPlan,
    Run,
    Tiles,
    lora_work,
    plan_rows,
)

# (base rows before the run, its rows, its pages); a run's page entries follow the last one's.
GAPS = st.integers(0, 70)
PIECES = st.lists(st.tuples(GAPS, st.integers(1, 150), st.integers(1, 5)), max_size=6)


def runs_of(pieces: list[tuple[int, int, int]]) -> tuple[list[Run], int]:
    runs: list[Run] = []
    row = entry = 0
    for gap, rows, pages in pieces:
        runs.append((row + gap, rows, entry, pages))
        row, entry = row + gap + rows, entry + pages
    return runs, row


def rows_of(tiles: Tiles) -> list[int]:
    return [row for tile in tiles.tolist() for row in range(tile[0], tile[0] + tile[1])]


def entries_of(tiles: Tiles) -> dict[tuple[int, int], int]:
    """The T entry of each (row, page of the row)."""
    return {
        (first + row, page): start + row * pages + page
        for first, rows, _, pages, start, *_ in tiles.tolist()
        for row in range(rows)
        for page in range(pages)
    }


@given(PIECES, GAPS, st.booleans())
def test_every_row_is_in_one_tile(
    pieces: list[tuple[int, int, int]], tail: int, small_only: bool
) -> None:
    runs, rows = runs_of(pieces)
    plan = plan_rows(runs, rows + tail, small_only=small_only)
    assert Counter(rows_of(plan.small) + rows_of(plan.large)) == Counter(range(rows + tail))
    assert Counter(rows_of(plan.norm)) == Counter(rows_of(plan.small))
    assert not (small_only and len(plan.large))
    for tiles in (plan.small, plan.norm, plan.large):
        assert tiles.shape[1] == TILE_FIELDS


@given(PIECES, GAPS, st.booleans())
def test_a_tile_is_short_and_within_its_run(
    pieces: list[tuple[int, int, int]], tail: int, small_only: bool
) -> None:
    runs, rows = runs_of(pieces)
    plan = plan_rows(runs, rows + tail, small_only=small_only)
    pages_of = {row: run[2:] for run in runs for row in range(run[0], run[0] + run[1])}
    for tiles, most, most_base in (
        (plan.small, SMALL_ROWS, 1),
        (plan.norm, NORM_ROWS, 1),
        (plan.large, LARGE_ROWS, LARGE_ROWS),
    ):
        for first, count, entry, pages, *_ in tiles.tolist():
            assert 1 <= count <= (most if pages else most_base)
            for row in range(first, first + count):
                assert pages_of.get(row, (0, 0)) == (entry, pages)


@given(PIECES, GAPS, st.booleans())
def test_entries_of_t_are_disjoint_and_without_gaps(
    pieces: list[tuple[int, int, int]], tail: int, small_only: bool
) -> None:
    runs, rows = runs_of(pieces)
    plan: RowPlan = plan_rows(runs, rows + tail, small_only=small_only)
    small, large = entries_of(plan.small), entries_of(plan.large)
    assert sorted(small.values()) == list(range(plan.small_entries))
    assert sorted(large.values()) == list(range(plan.large_entries))
    assert entries_of(plan.norm) == small  # both read what one shrink wrote
    assert len(small) + len(large) == sum(run[1] * run[3] for run in runs)


def test_families_without_rows_are_none() -> None:
    cpu = torch.device("cpu")
    nothing = lora_work(None, 0, cpu)
    assert (nothing.small, nothing.norm, nothing.large) == (None, None, None)
    decode = lora_work(None, SMALL_ROWS, cpu)
    assert decode.small is not None
    assert decode.norm is not None
    assert decode.large is None
    assert int(decode.small.count) == decode.small.capacity == SMALL_ROWS
    prefill = lora_work(None, SMALL_ROWS + 1, cpu)
    assert prefill.small is None
    assert prefill.large is not None
