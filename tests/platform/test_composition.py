"""What may be scaled and combined, said with the names that the caller used."""

from __future__ import annotations

import pytest

from loraplex.platform.composition import check_whole
from loraplex.platform.errors import ApiError
from loraplex.platform.resolution import ResolvedAdapter


def adapter(name: str, *features: str) -> ResolvedAdapter:
    return ResolvedAdapter(name, "default", 2, 7, name * 64, 8, features)


PLAIN, LINEAR = adapter("a"), adapter("b", "lora_bias", "lm_head_lora", "fused_projections")
WHOLE = adapter("c", "dora", "full_norm", "lora_bias")


@pytest.mark.parametrize(
    "members",
    [
        [],
        [(PLAIN, 0.5), (LINEAR, -2.0)],
        [(WHOLE, 1.0)],
        [(WHOLE, 1.0), (PLAIN, 0.0)],
        [(WHOLE, 0.0), (PLAIN, 0.5)],
    ],
)
def test_what_has_a_meaning_is_taken(members: list[tuple[ResolvedAdapter, float]]) -> None:
    check_whole(members)


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ([(WHOLE, 0.5)], "adapter c@2 has weight 0.5, but it uses dora, full_norm"),
        ([(PLAIN, 1.0), (WHOLE, 1.0)], "adapter c@2 is combined with others"),
    ],
)
def test_what_has_none_is_named(members: list[tuple[ResolvedAdapter, float]], says: str) -> None:
    with pytest.raises(ApiError) as refused:
        check_whole(members)
    assert refused.value.code == "invalid_request"
    assert says in refused.value.message
    assert "alone with weight 1" in refused.value.message
