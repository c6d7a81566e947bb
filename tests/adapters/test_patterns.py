"""`Pattern` against Python's own `re`, and the patterns that `re` would never finish."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex.adapters.patterns import MAX_PATTERN, Pattern, PatternError, tail_matcher

ATOMS = ["q", "v", "_", "1", r"\.", ".", r"\d", r"\w", r"\W", r"\s", r"\S", r"\D", r"\b", r"\B"]
ATOMS += ["^", "$", r"\A", r"\Z", "[a-q]", "[^q.]", r"[\d_]", r"[^\w]"]
REPEATS = ["*", "+", "?", "*?", "+?", "??", "{2}", "{1,2}", "{0,3}?", "{2,}"]

patterns = st.recursive(
    st.sampled_from(ATOMS),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda p: f"(?:{p[0]}|{p[1]})"),
        st.tuples(inner, st.sampled_from(REPEATS)).map(lambda p: f"({p[0]}){p[1]}"),
    ),
    max_leaves=6,
)
texts = st.text("qv_.1a ", min_size=1, max_size=8)  # `\B` and "" differ between Python versions


@settings(max_examples=200, deadline=None)
@given(patterns, st.lists(texts, min_size=1, max_size=5))
def test_matches_what_re_matches(source: str, samples: list[str]) -> None:
    pattern = Pattern(source)
    for text in samples:
        assert pattern.matches(text) == (re.fullmatch(source, text) is not None), text


@pytest.mark.parametrize("source", ["q{2}", "q{1,3}", "q{0,2}", "q{2,}", "(qv?){2,3}", "q+?v*"])
def test_counted_repeats(source: str) -> None:
    for text in ("v", "q", "qq", "qqq", "qqqq", "qvq", "qvqvqv", "qvv"):
        assert Pattern(source).matches(text) == (re.fullmatch(source, text) is not None), text


@settings(max_examples=100, deadline=None)
@given(patterns, st.lists(texts, min_size=1, max_size=5))
def test_tail_matcher_is_pefts_look_up(source: str, samples: list[str]) -> None:
    hits = tail_matcher(source)
    for text in samples:
        assert hits(text) == (re.match(rf"(.*\.)?({source})$", text) is not None), text


@pytest.mark.parametrize("key", ["q_proj", "0.q_proj", "layers.0.self_attn.q_proj", "a|q_proj"])
@pytest.mark.parametrize("path", ["q_proj", "layers.0.self_attn.q_proj", "a", "ax", "xq_proj"])
def test_tail_matcher_on_names(key: str, path: str) -> None:
    assert tail_matcher(key)(path) == (re.match(rf"(.*\.)?({key})$", path) is not None)


def test_an_alternative_that_escapes_the_group() -> None:
    """PEFT pastes the key into a larger pattern, where it may close its group."""
    assert tail_matcher("a)|(q")("axx")
    assert not tail_matcher("a)|(q")("qxx")


@pytest.mark.parametrize(
    "source",
    [r"(a+)+b", r"(a|a)*b", r"(.*a){12}b", r"(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)b", r"((a*)*)*b"],
)
def test_what_re_would_never_finish(source: str) -> None:
    """Each takes `re` from hours to the age of the universe; here states x characters bound it."""
    assert not Pattern(source).matches("a" * 200)
    assert Pattern(source).matches("a" * 200 + "b")


@pytest.mark.parametrize(
    "source",
    [
        "(q_proj",
        "[z-a]",
        "*",
        r"(?=q)q",
        r"(?!lm_head).*",
        r"(?<=a)b",
        r"(a)\1",
        "(?i)q_proj",
        "(?i:q)_proj",
        "(?>a+)b",
        "a++b",
        "(a{1,200}){1,200}",
        "a{999999999999}",
        "(" * 5000,
        "(?:" * 300 + ")" * 300 + "x" * MAX_PATTERN,
    ],
)
def test_refused(source: str) -> None:
    with pytest.raises(PatternError):
        Pattern(source)


def test_nesting_cannot_overflow_the_stack() -> None:
    depth = MAX_PATTERN // 4 - 1
    try:
        assert Pattern("(?:" * depth + "[q]" + ")" * depth).matches("q")
    except PatternError:
        pass  # told, not crashed
