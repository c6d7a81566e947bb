"""Which row of the device's arrays belongs to which running sequence. Knows no tensors.

A sequence keeps its row from its first step until it leaves the running set: its last token, its
block table and its penalty counts lie there, so the host need not send them again.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable


class StateRows:
    """Rows 0 .. num_rows - 1. `trash` is one more, which rows use that only pad a step."""

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self.trash = num_rows
        self._free = list(range(num_rows))  # a heap: low numbers first
        self._row_of: dict[int, int] = {}

    def take(self, seq_id: int) -> tuple[int, bool]:
        """The sequence's row, and whether it is new to it."""
        row = self._row_of.get(seq_id)
        if row is not None:
            return row, False
        assert self._free, f"{self.num_rows} sequences hold state rows, sequence {seq_id} needs one"
        row = self._row_of[seq_id] = heapq.heappop(self._free)
        return row, True

    def release(self, seq_ids: Iterable[int]) -> list[int]:
        """Take back the rows of sequences that left; those that never ran have none."""
        rows = [self._row_of.pop(seq_id) for seq_id in seq_ids if seq_id in self._row_of]
        for row in rows:
            heapq.heappush(self._free, row)
        return rows

    def check_invariants(self) -> None:
        """Every row is free or has one owner."""
        assert sorted([*self._free, *self._row_of.values()]) == list(range(self.num_rows))
