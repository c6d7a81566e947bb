"""The engine process dies under open streams of a real server: nobody is cut off, no text differs.

The bounded form of `python -m loraplex.platform.bench.faults`; what the engine stops or hangs of is
tested with a fake engine in tests/engine/test_client.py.
"""

from __future__ import annotations

import pytest

from loraplex.platform.bench.faults import FaultRun, measure

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def test_streams_go_on_when_the_engine_is_killed() -> None:
    result = measure(kinds=["kill"], faults=2, streams=8, max_tokens=100, seed=3)
    assert result["problems"] == 0, result
    assert result["completed"] >= 8, result
    assert result["completed_through_faults"] >= 8, result
    assert result["recovery_s"]["kill"]["count"] == 2


def test_the_run_finds_texts_that_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    undisturbed = FaultRun._undisturbed

    async def planted(self: FaultRun, case: object) -> str:
        return await undisturbed(self, case) + "?"  # type: ignore[arg-type]

    monkeypatch.setattr(FaultRun, "_undisturbed", planted)
    result = measure(kinds=["kill"], faults=0, streams=2, max_tokens=5, seed=3)
    assert result["problems"] == result["completed"] == 2
    assert result["problem_kinds"] == {"the text differs": 2}
