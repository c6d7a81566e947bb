"""State rows: one owner each, given back, never handed out twice."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex.engine.gpu.state_rows import StateRows


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 12)), max_size=80))
def test_never_shared(actions: list[tuple[bool, int]]) -> None:
    states, held = StateRows(4), {}
    for takes, seq_id in actions:
        if takes and (seq_id in held or len(held) < 4):
            row, is_new = states.take(seq_id)
            assert is_new == (seq_id not in held)
            assert held.setdefault(seq_id, row) == row
        else:
            expected = [held.pop(seq_id)] if seq_id in held else []
            assert states.release([seq_id]) == expected
        assert len(set(held.values())) == len(held), "two sequences on a row"
        assert states.trash not in held.values()
        states.check_invariants()


def test_too_many_sequences_are_our_bug() -> None:
    states = StateRows(1)
    states.take(1)
    with pytest.raises(AssertionError, match="1 sequences hold state rows"):
        states.take(2)
