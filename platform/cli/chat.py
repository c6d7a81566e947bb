"""`loraplex chat`: talk to a running server, token by token; a pipe gets plain answers."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.markup import escape

from loraplex.platform.cli import output
from loraplex.platform.cli.output import CliError
from loraplex.platform.cli.server_api import DEFAULT_URL, ApiKey, AsJson, ServerApi, Url

HELP = "/adapter ID  switch   /base  no adapter   /reset  forget the talk   /quit  leave"


class Conversation:
    """The talk so far with one server. Knows nothing of terminals."""

    def __init__(
        self,
        api: ServerApi,
        model: str,
        adapter: str | None,
        max_tokens: int | None,
        temperature: float | None,
    ) -> None:
        self.api = api
        self.model = model
        self.adapter = adapter
        self.messages: list[dict[str, str]] = []
        self.invoked = True  # False: an activated LoRA whose tokens the last prompt lacked
        self._sampling = {
            k: v
            for k, v in {"max_tokens": max_tokens, "temperature": temperature}.items()
            if v is not None
        }

    def say(self, text: str) -> Iterator[str]:
        """Send one message and yield the answer's pieces. Raises: CliError; the message is then
        forgotten.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        body: dict[str, Any] = {
            "model": self.model,
            "messages": messages,
            "stream": True,
            **self._sampling,
        }
        if self.adapter:
            body["adapter_id"] = self.adapter
        answer = ""
        self.invoked = True
        with self.api.stream("POST", "/v1/chat/completions", json=body) as response:
            for line in response.iter_lines():
                event = _event(line)
                if (event.get("adapter") or {}).get("invoked") is False:
                    self.invoked = False
                piece = _piece(event)
                if piece:
                    answer += piece
                    yield piece
        self.messages = [*messages, {"role": "assistant", "content": answer}]

    def switch(self, adapter: str | None) -> None:
        """Another adapter starts afresh: it should not go on in its predecessor's words."""
        self.adapter = adapter
        self.messages = []


def chat(
    adapter: Annotated[str | None, typer.Option(help="Adapter to talk to; default: none.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Model name to send; default: the server's base model.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longest answer, in tokens.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 = always the likeliest.")] = None,
    keep: Annotated[
        bool, typer.Option("--keep", help="In a pipe, too, remember the lines before.")
    ] = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Talk to the model or to one of its adapters.

    On a terminal, a conversation. In a pipe, each line is a question of its own and each answer a
    line.
    """
    with ServerApi(url, api_key) as api:
        conversation = Conversation(
            api, model or api.base_model(), adapter, max_tokens, temperature
        )
        if sys.stdin.isatty():
            _talk(conversation)
        else:
            _answer_lines(conversation, as_json=as_json, keep=keep)


def _answer_lines(conversation: Conversation, *, as_json: bool, keep: bool) -> None:
    for line in sys.stdin:
        text = line.rstrip("\r\n")
        if not text:
            continue
        if not keep:
            conversation.messages = []
        if as_json:
            answer = "".join(conversation.say(text))
            output.print_json({"input": text, "adapter": conversation.adapter, "output": answer})
            _tell_if_not_invoked(conversation)
            continue
        for piece in conversation.say(text):
            sys.stdout.write(piece)
            sys.stdout.flush()
        sys.stdout.write("\n")
        _tell_if_not_invoked(conversation)


def _talk(conversation: Conversation) -> None:
    try:
        import readline  # noqa: F401  gives input() line editing and history
    except ImportError:
        pass
    console = output.stdout()
    console.print(f"[dim]{conversation.model}[/]\n[dim]{HELP}[/]", soft_wrap=True)
    while True:
        try:
            text = input(f"{conversation.adapter or 'base'}> ").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if text.startswith("/"):
            if not _command(conversation, text):
                return
        elif text:
            _print_answer(conversation, text)


def _command(conversation: Conversation, text: str) -> bool:
    """Obey a /command; False means leave."""
    word, _, argument = text.partition(" ")
    console = output.stdout()
    if word in ("/quit", "/exit", "/q"):
        return False
    if word == "/base":
        conversation.switch(None)
    elif word == "/adapter" and argument.strip():
        conversation.switch(argument.strip())
    elif word == "/adapter":
        names = ", ".join(a["id"] for a in conversation.api.adapters())
        console.print(f"[dim]{escape(names) or 'no adapters'}[/]")
    elif word == "/reset":
        conversation.messages = []
    else:
        console.print(f"[dim]{HELP}[/]")
    return True


def _print_answer(conversation: Conversation, text: str) -> None:
    console = output.stdout()
    try:
        for piece in conversation.say(text):
            console.print(piece, end="", markup=False, soft_wrap=True)
        console.print()
        _tell_if_not_invoked(conversation)
    except KeyboardInterrupt:
        console.print("[dim] (stopped)[/]")
    except CliError as error:
        error.print()


def _tell_if_not_invoked(conversation: Conversation) -> None:
    if not conversation.invoked:
        output.stderr().print(
            f"[yellow]note:[/] {escape(str(conversation.adapter))} was not invoked: its invocation "
            "tokens are not in the prompt, so this is the base model's answer",
            soft_wrap=True,
        )


def _event(line: str) -> dict[str, Any]:
    """One line of the event stream. Raises: CliError for an error event."""
    payload = line.removeprefix("data:").strip()
    if not line.startswith("data:") or payload == "[DONE]":
        return {}
    event: dict[str, Any] = json.loads(payload)
    if "error" in event:
        raise CliError(str(event["error"].get("message", event["error"])))
    return event


def _piece(event: dict[str, Any]) -> str:
    """The text in an event."""
    choices = event.get("choices") or [{}]
    return str(choices[0].get("delta", {}).get("content") or "")
