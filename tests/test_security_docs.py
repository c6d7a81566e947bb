"""docs/security.md names tests: those that are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NAMED = sorted(
    set(
        re.findall(
            r"`((?:tests/\w+/)?test_\w+\.py(?:::\w+)?)`", (ROOT / "docs/security.md").read_text()
        )
    )
)


def test_there_are_some() -> None:
    assert len(NAMED) > 15


@pytest.mark.parametrize("name", NAMED)
def test_named_tests_exist(name: str) -> None:
    path, _, function = name.partition("::")
    found = list((ROOT / "tests").rglob(Path(path).name))
    assert found, name
    assert not function or any(f"def {function}(" in file.read_text() for file in found), name
