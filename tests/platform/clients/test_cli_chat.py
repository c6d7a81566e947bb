"""`loraplex chat`: pipes and the conversation, against a stub that streams."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest

from loraplex.platform.cli import chat as chat_module

MODELS = {"data": [{"id": "sql", "parent": "base"}, {"id": "base", "parent": None}]}


def stream(*pieces: str) -> list[bytes]:
    deltas: list[dict[str, str]] = [{"role": "assistant", "content": ""}]
    deltas += [{"content": piece} for piece in pieces]
    events = [{"choices": [{"index": 0, "delta": delta}]} for delta in deltas]
    return [f"data: {json.dumps(e)}\n\n".encode() for e in events] + [b"data: [DONE]\n\n"]


@pytest.fixture
def server(stub: Any) -> Any:
    stub.routes["GET /v1/models"] = (200, MODELS)
    stub.routes["POST /v1/chat/completions"] = lambda asked: (
        200,
        stream(*asked.json["messages"][-1]["content"].upper()),
    )
    return stub


def bodies(stub: Any) -> list[Any]:
    return [a.json for a in stub.asked if a.method == "POST"]


def test_a_pipe_gets_an_answer_per_line(cli: Any, server: Any) -> None:
    done = cli("chat", "--adapter", "sql", "--url", server.url, stdin="hi\n\nthere\n")
    assert done.stdout == "HI\nTHERE\n"
    first, second = bodies(server)
    assert first["model"] == "base"
    assert first["adapter_id"] == "sql"
    assert first["stream"] is True
    assert second["messages"] == [{"role": "user", "content": "there"}]


def test_keep_remembers_the_lines_before(cli: Any, server: Any) -> None:
    cli("chat", "--keep", "--url", server.url, "--max-tokens", 5, stdin="a\nb\n")
    second = bodies(server)[1]
    assert [m["content"] for m in second["messages"]] == ["a", "A", "b"]
    assert second["max_tokens"] == 5
    assert "adapter_id" not in second


@pytest.mark.parametrize("invoked", [True, False, None])
def test_an_adapter_that_was_not_invoked_is_told(cli: Any, server: Any, invoked: Any) -> None:
    adapter = {"id": "check", "version": 1} | ({} if invoked is None else {"invoked": invoked})
    end = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], "adapter": adapter}
    events = stream("yes")
    events.insert(-1, f"data: {json.dumps(end)}\n\n".encode())
    server.routes["POST /v1/chat/completions"] = (200, events)
    for more in ((), ("--json",)):
        done = cli("chat", "--adapter", "check", *more, "--url", server.url, stdin="hi\n")
        assert "yes" in done.stdout
        assert "note" not in done.stdout
        assert ("check was not invoked" in done.stderr) == (invoked is False)


def test_json(cli: Any, server: Any) -> None:
    done = cli("chat", "--json", "--url", server.url, stdin="hi\n")
    assert done.json == {"input": "hi", "adapter": None, "output": "HI"}


def test_unknown_adapter_ends_a_pipe_with_status_1(cli: Any, server: Any) -> None:
    server.routes["POST /v1/chat/completions"] = (404, {"error": {"message": "no adapter x"}})
    done = cli("chat", "--adapter", "x", "--url", server.url, stdin="hi\n")
    assert (done.exit_code, done.stderr) == (1, "error: no adapter x\n")


def test_an_error_in_the_stream_is_an_error(cli: Any, server: Any) -> None:
    server.routes["POST /v1/chat/completions"] = (
        200,
        [*stream("a")[:2], b'data: {"error": {"message": "engine died"}}\n\n'],
    )
    done = cli("chat", "--url", server.url, stdin="hi\n")
    assert (done.exit_code, done.stderr) == (1, "error: engine died\n")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_conversation_and_its_commands(
    server: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    adapter_object: Any,
) -> None:
    server.routes["GET /v1/adapters"] = (200, {"data": [adapter_object("sql")], "has_more": False})
    lines = iter(
        [
            "one",
            "two",
            "/adapter sql",
            "three",
            "/reset",
            "four",
            "/adapter",
            "/what",
            "/base",
            "five",
            "/quit",
        ]
    )
    prompts: list[str] = []

    def typed(prompt: str) -> str:
        prompts.append(prompt)
        return next(lines)

    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr("builtins.input", typed)
    chat_module.chat(url=server.url)
    sent = bodies(server)
    assert [[m["content"] for m in body["messages"]] for body in sent] == [
        ["one"], ["one", "ONE", "two"], ["three"], ["four"], ["five"],
    ]  # fmt: skip
    assert [body.get("adapter_id") for body in sent] == [None, None, "sql", "sql", None]
    assert prompts[0] == "base> "
    assert "sql> " in prompts
    shown = capsys.readouterr().out
    assert "TWO" in shown
    assert shown.count(chat_module.HELP) == 2  # the greeting, and the answer to /what


def test_an_error_does_not_end_the_conversation_and_is_not_remembered(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    replies = iter([(503, {"error": {"message": "restarting"}}), (200, stream("ok"))])
    server.routes["POST /v1/chat/completions"] = lambda asked: next(replies)
    lines = iter(["lost", "again"])

    def typed(prompt: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr("builtins.input", typed)
    chat_module.chat(url=server.url)
    assert [m["content"] for m in bodies(server)[1]["messages"]] == ["again"]
