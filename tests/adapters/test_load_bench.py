"""The bench runs and measures what it says; on tiny pages its figures mean nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from loraplex.adapters import load_bench


def test_every_figure_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_bench, "LAYERS", 2)
    monkeypatch.setattr(load_bench, "SHAPES", ((64, 64),) * 7)
    found = load_bench.measure(tmp_path, rank=20)
    assert found.pop("mb") == 2 * 2 * 7 * 2 * 16 * 64 * 2 / 1e6  # layers, pages, modules, A and B
    assert set(found) == {
        f"{what}_mb_s" for what in ("cold_read", "warm_read", "cold_pages", "warm_pages", "copy")
    }
    assert all(rate > 0 for rate in found.values())
