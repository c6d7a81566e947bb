"""Stop strings are found wherever the text is cut, and no more text is held back than must be."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex.engine.stop_strings import StopStrings

# Few letters, so that stop strings overlap, contain one another and nearly match all the time.
letters = st.text("ab\n", max_size=12)
stops_of_letters = st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=4)


def expected(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """By definition: the smallest end of any match; the longest stop string that ends there."""
    for end in range(len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


def may_become_a_stop(text: str, stops: list[str]) -> str:
    """The longest end of `text` that begins a stop string: all that has to be held back."""
    return next(
        (text[i:] for i in range(len(text)) if any(s.startswith(text[i:]) for s in stops)), ""
    )


@given(pieces=st.lists(letters, max_size=6), stops=stops_of_letters, include=st.booleans())
def test_matches_the_definition_however_the_text_is_cut(
    pieces: list[str], stops: list[str], include: bool
):
    finder = StopStrings(stops, include=include)
    shown = ""
    for i, piece in enumerate(pieces):
        shown += finder.push(piece)
        if finder.matched is not None:
            break
        so_far = "".join(pieces[: i + 1])
        assert so_far.removeprefix(shown) == may_become_a_stop(so_far, stops)
    shown += finder.finish()
    assert (shown, finder.matched) == expected("".join(pieces), stops, include)


def test_a_stop_string_over_three_pieces():
    finder = StopStrings(["\n\nHuman:"])
    assert [finder.push(text) for text in ("Yes.\n", "\nHum", "an: and")] == ["Yes.", "", ""]
    assert finder.matched == "\n\nHuman:"


def test_held_text_is_given_back_when_it_was_no_stop():
    finder = StopStrings(["</s>"])
    assert finder.push("a </") == "a "
    assert finder.push("b>") == "</b>"
    assert finder.finish() == ""


def test_many_long_stop_strings_share_one_pass():
    stops = ["x" * 500 + str(i) for i in range(100)]
    finder = StopStrings(stops, include=True)
    assert finder.push("x" * 600) == "x" * 100
    assert finder.push("42") == "x" * 500 + "4"
    assert finder.matched == "x" * 500 + "4"


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="must not be empty"):
        StopStrings(["a", ""])
