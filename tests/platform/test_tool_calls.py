"""Tool calls and reasoning out of a model's text: every format, any cut, anything malformed."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex.platform.chat.parsing import MessageParser, Parsing, whole_message
from loraplex.platform.chat.tool_formats import FORMATS, HERMES, JSON, LLAMA3, MISTRAL, find_format

NAMES = frozenset({"weather", "add"})
CALL = '{"name": "weather", "arguments": {"city": "Zürich \\"old\\" {town}", "days": [1, 2.5]}}'
ARGUMENTS = '{"city": "Zürich \\"old\\" {town}", "days": [1, 2.5]}'


def parsing(fmt: str, **fields: Any) -> Parsing:
    return Parsing(tool_format=FORMATS[fmt], tool_names=NAMES, **fields)  # type: ignore[index]


def read(fmt: str, text: str, *, cut: bool = False, **fields: Any) -> tuple[Any, list[Any]]:
    """(content, [(name, arguments)]) of a whole answer."""
    message, _ = whole_message(parsing(fmt, **fields), text, cut=cut)
    calls = [(c["function"]["name"], c["function"]["arguments"]) for c in message["tool_calls"]]
    return message["content"], calls


@pytest.mark.parametrize(
    ("fmt", "text", "content", "calls"),
    [
        ("hermes", f"<tool_call>\n{CALL}\n</tool_call>", None, [("weather", ARGUMENTS)]),
        (
            "hermes",
            f"I look.\n<tool_call>{CALL}</tool_call>\n"
            '<tool_call>{"arguments": {}, "name": "add"}</tool_call>',
            "I look.\n",
            [("weather", ARGUMENTS), ("add", "{}")],
        ),
        ("hermes", f"<tool_call>{CALL}</tool_call> done", "done", [("weather", ARGUMENTS)]),
        ("hermes", '<tool_call>{"name": "now"}</tool_call>', None, [("now", "{}")]),
        (
            "hermes",
            '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>',
            None,
            [("add", '{"a": 1}')],
        ),
        (
            "hermes",
            '<tool_call>{"arguments": {"code": "a\nb"}, "name": "add"}</tool_call>',
            None,
            [("add", '{"code": "a\\nb"}')],
        ),
        ("llama3", f"<|python_tag|>{CALL}", None, [("weather", ARGUMENTS)]),
        (
            "llama3",
            '{"name": "add", "parameters": {"a": 1}}; {"name": "add", "parameters": {"a": 2}}',
            None,
            [("add", '{"a": 1}'), ("add", '{"a": 2}')],
        ),
        ("mistral", f"[TOOL_CALLS] [{CALL}, {CALL}]", None, [("weather", ARGUMENTS)] * 2),
        (
            "mistral",
            'Sure.[TOOL_CALLS]add[ARGS]{"a": 1}[TOOL_CALLS]add{"a": 2}',
            "Sure.",
            [("add", '{"a": 1}'), ("add", '{"a": 2}')],
        ),
        ("mistral", '[TOOL_CALLS]add[CALL_ID]Abc123456[ARGS]{"a": 1}', None, [("add", '{"a": 1}')]),
        ("json", f" {CALL}", None, [("weather", ARGUMENTS)]),
        ("json", f"[{CALL}]", None, [("weather", ARGUMENTS)]),
    ],
)
def test_calls_of_every_format(fmt: str, text: str, content: str | None, calls: list[Any]) -> None:
    assert read(fmt, text) == (content, calls)


@pytest.mark.parametrize(
    ("fmt", "text"),
    [
        ("hermes", "no call at all <tool"),
        ("hermes", "<tool_call>not json</tool_call>"),
        ("hermes", '<tool_call>{"name": 5, "arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "", "arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"arguments": {"a": 1}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "add", "arguments": [1]}</tool_call>'),
        ("hermes", '<tool_call>{"name": "add", "arguments": "no object"}</tool_call>'),
        ("hermes", '<tool_call>{"name": "add", "arguments": {"a": 1,}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "add", "arguments": {"a": nope}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "add", "arguments": {"a": '),
        ("hermes", '<tool_call>{"name": "add", "arguments": {"a": "\\x"}}</tool_call>'),
        ("hermes", "<tool_call>" * 3),
        ("llama3", '<|python_tag|>brave_search.call(query="x")'),
        ("llama3", '{"name": "somebody", "parameters": {"age": 5}}'),
        ("mistral", "[TOOL_CALLS] []"),
        ("mistral", "[TOOL_CALLS] what? {"),
        ("json", '{"answer": 42}'),
        ("json", "[1, 2, 3]"),
        ("json", "  {"),
        ("json", "plain"),
    ],
)
def test_what_is_no_call_stays_content_whole(fmt: str, text: str) -> None:
    assert read(fmt, text) == (text, [])


def test_a_call_that_the_limit_cut_off_stays_a_call() -> None:
    text = '<tool_call>{"name": "add", "arguments": {"a": '
    assert read("hermes", text, cut=True) == (None, [("add", '{"a": ')])


def test_a_broken_call_does_not_hide_the_sound_ones() -> None:
    good = f"<tool_call>{CALL}</tool_call>"
    bad = '<tool_call>{"name": "add", "arguments": {,'
    content, calls = read("hermes", good + bad + good)
    assert calls == [("weather", ARGUMENTS)] * 2
    assert content == bad


def test_only_the_first_call_without_parallel_calls() -> None:
    text = f"<tool_call>{CALL}</tool_call>" * 2
    assert read("hermes", text, parallel=False) == (None, [("weather", ARGUMENTS)])


def test_ids_fit_the_family() -> None:
    message, _ = whole_message(parsing("mistral"), f"[TOOL_CALLS][{CALL}, {CALL}]", cut=False)
    ids = [call["id"] for call in message["tool_calls"]]
    assert len(set(ids)) == 2
    assert all(len(call_id) == 9 and call_id.isalnum() for call_id in ids)
    message, _ = whole_message(parsing("hermes"), f"<tool_call>{CALL}</tool_call>", cut=False)
    assert message["tool_calls"][0]["id"].startswith("call_")


@pytest.mark.parametrize(
    ("inside", "text", "thought", "content"),
    [
        (False, "<think>\nhm, 2 < 3\n</think>\n\nYes.", "hm, 2 < 3", "Yes."),
        (True, "hm\n\nso </think>Yes. </think>", "hm\n\nso", "Yes. </think>"),
        (False, "No thoughts <think>", None, "No thoughts <think>"),
        (False, " \n<think>cut of", "cut of", ""),
        (True, "cut of </thi", "cut of </thi", ""),
        (False, "<thi", None, "<thi"),
        (False, "<think></think>x", None, "x"),
    ],
)
def test_reasoning(inside: bool, text: str, thought: str | None, content: str) -> None:
    message, _ = whole_message(Parsing(reasoning=inside), text, cut=False)
    assert (message["reasoning_content"], message["content"]) == (thought, content)


def test_reasoning_can_be_left_out_and_calls_follow_it() -> None:
    text = f"<think>which tool?</think>\n\n<tool_call>{CALL}</tool_call>"
    message, called = whole_message(parsing("hermes", reasoning=False), text, cut=False)
    assert called
    assert (message["reasoning_content"], message["content"]) == ("which tool?", None)
    message, _ = whole_message(
        parsing("hermes", reasoning=False, show_reasoning=False), text, cut=False
    )
    assert "reasoning_content" not in message


def streamed(settings: Parsing, parts: list[str], *, cut: bool) -> Any:
    """What a client puts together from the deltas."""
    parser = MessageParser(settings)
    deltas = [delta for part in parts for delta in parser.push(part)] + parser.finish(cut=cut)
    calls: dict[int, list[str]] = {}
    for delta in deltas:
        for call in delta.get("tool_calls", ()):
            assert len(call) == (4 if "id" in call else 2)
            if "id" in call:
                assert call["index"] not in calls
                calls[call["index"]] = [call["function"]["name"], ""]
            calls[call["index"]][1] += call["function"]["arguments"]
    return (
        "".join(delta.get("content", "") for delta in deltas),
        "".join(delta.get("reasoning_content", "") for delta in deltas),
        calls,
        parser.broken,
        parser.called,
    )


PIECES = [
    *("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>"),
    *("<think>", "</think>", CALL, CALL[:40], CALL[20:], '{"name": "add", "parameters": {}}'),
    *('{"arguments": {"a": [{}, null]}, "name": "add"}', "add{", "}", "]", "[", ",", ";", '"'),
    *("\\", "\n", " ", "text", "<", "tool_call>", "true", "1e5", "é€"),
]


@given(
    st.lists(st.sampled_from(PIECES), max_size=8).map("".join),
    st.sampled_from(sorted(FORMATS)),
    st.sampled_from([None, False, True]),
    st.booleans(),
    st.data(),
)
def test_any_cut_of_the_text_gives_the_same_result(
    text: str, fmt: str, reasoning: bool | None, cut: bool, data: Any
) -> None:
    ends = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    parts = [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)], strict=True)]
    settings = parsing(fmt, reasoning=reasoning)
    whole = streamed(settings, [text], cut=cut)
    assert streamed(settings, parts, cut=cut) == whole
    assert streamed(settings, list(text), cut=cut) == whole
    _, _, calls, broken, _ = whole
    for index, (_, arguments) in calls.items():
        if index not in broken and not (cut and index == max(calls)):
            assert isinstance(json.loads(arguments), dict)


@given(st.lists(st.sampled_from(PIECES), max_size=8).map("".join), st.sampled_from(sorted(FORMATS)))
def test_no_text_is_lost(text: str, fmt: str) -> None:
    """Without a call every character is content."""
    content, _, calls, _, _ = streamed(parsing(fmt), [text], cut=False)
    if not calls:
        assert content == text


def test_the_format_comes_from_the_template_or_the_vocabulary_unless_chosen() -> None:
    def no(token: str) -> bool:
        return False

    assert find_format(None, "{{ '<tool_call>' }}", no) is HERMES
    assert find_format(None, "[TOOL_CALLS]", no) is MISTRAL
    assert find_format(None, "nothing", lambda token: token == "<|python_tag|>") is LLAMA3
    assert find_format(None, "nothing", no) is JSON
    assert find_format("mistral", "<tool_call>", no) is MISTRAL
