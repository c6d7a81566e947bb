"""Weighted assignment of keys: the right shares, the same answer every time, few keys moved."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import pytest

from loraplex.platform.split import choose

KEYS = [f"user-{i}" for i in range(4000)]


def assigned(weights: Mapping[int, int], name: str = "sql:prod") -> dict[str, int]:
    return {key: choose(name, weights, key) for key in KEYS}


@pytest.mark.parametrize(
    "weights",
    [{3: 90, 4: 10}, {1: 1, 2: 1}, {1: 70, 5: 20, 9: 10}, {1: 999_999, 2: 1}, {2: 5, 7: 0, 8: 5}],
)
def test_shares_are_the_weights(weights: dict[int, int]) -> None:
    """Fixed keys, so this is no game of chance: six sigma leave room for another hash."""
    counts = Counter(assigned(weights).values())
    total = sum(weights.values())
    for version, weight in weights.items():
        share = weight / total
        sigma = (len(KEYS) * share * (1 - share)) ** 0.5
        assert abs(counts[version] - len(KEYS) * share) <= 6 * sigma, counts


def test_a_share_that_is_off_would_be_noticed() -> None:
    """The companion: 80/20 does not pass for 90/10."""
    wrong = Counter(assigned({3: 80, 4: 20}).values())[4]
    assert abs(wrong - len(KEYS) * 0.1) > 6 * (len(KEYS) * 0.1 * 0.9) ** 0.5


def test_a_key_keeps_its_version_whatever_the_order() -> None:
    assert assigned({3: 90, 4: 10}) == assigned({4: 10, 3: 90})


def test_assignments_are_what_they_were_in_the_last_release() -> None:
    """A change here reshuffles every client's users: bump it knowingly, or not at all."""
    chosen = [choose("sql:prod", {1: 50, 2: 30, 3: 20}, f"user-{i}") for i in range(16)]
    assert chosen == PINNED


PINNED = [1, 2, 1, 1, 1, 1, 2, 2, 1, 1, 1, 3, 1, 1, 3, 1]


def test_more_weight_for_one_moves_keys_only_to_it() -> None:
    before, after = assigned({3: 90, 4: 10}), assigned({3: 70, 4: 30})
    moved = {(before[key], after[key]) for key in KEYS if before[key] != after[key]}
    assert moved == {(3, 4)}
    added = assigned({3: 90, 4: 10, 5: 50})
    assert {added[key] for key in KEYS if before[key] != added[key]} == {5}
    removed = assigned({3: 90, 5: 50})
    assert all(removed[key] == added[key] for key in KEYS if added[key] != 4)


def test_two_splits_assign_the_same_keys_independently() -> None:
    """The canary users of one alias shall not be the canary users of every other."""
    one, two = assigned({1: 50, 2: 50}), assigned({1: 50, 2: 50}, "json:prod")
    both = sum(one[key] == two[key] for key in KEYS)
    assert abs(both - len(KEYS) / 2) < 6 * (len(KEYS) / 4) ** 0.5


def test_weightless_versions_get_nothing() -> None:
    assert set(assigned({3: 0, 4: 1, 5: 0}).values()) == {4}


def test_any_text_is_a_key() -> None:
    for key in ("", "\0", "\ud800", "x" * 100_000, "ключ"):
        assert choose("sql:prod", {1: 1, 2: 1}, key) in (1, 2)
