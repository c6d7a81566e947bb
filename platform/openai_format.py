"""Answers in OpenAI's shapes: whole ones as dictionaries, streamed ones as ready bytes.

The streamed form is on the hot path (one call per token and client), so everything that stays equal
within a stream is serialised once; per chunk only the text is encoded. Knows nothing of HTTP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from loraplex.engine.api import FinishReason, TokenLogprobs
from loraplex.engine.stream import TextChunk
from loraplex.engine.tokenizer import Tokenizer
from loraplex.platform import errors
from loraplex.platform.chat.parsing import MessageParser, Parsing, whole_message
from loraplex.platform.generation import Choice, Generation
from loraplex.platform.openai_logprobs import LogprobWriter, prompt_logprobs

encode = msgspec.json.encode

DONE = b"data: [DONE]\n\n"

Kind = Literal["completion", "chat", "embedding"]


@dataclass(frozen=True, slots=True)
class Answer:
    """What all chunks of one answer share. `adapters`: its composition, in order."""

    kind: Kind
    id: str
    model: str
    created: int
    adapters: tuple[dict[str, Any], ...]
    tokenizer: Tokenizer
    include_usage: bool = False
    continuous_usage: bool = False
    with_token_ids: bool = False
    ids_as_tokens: bool = False  # tokens in log-probabilities as "token_id:123"
    echo: tuple[str, ...] = ()  # per choice the text to begin with; empty = no echo
    discard_output: bool = False  # echo with max_tokens=0: only the prompt is wanted
    with_logprobs: bool = False
    num_best: int | None = None  # of each prompt's choices only so many are shown, the likeliest
    parsing: Parsing | None = None  # chat: what to look for in the text

    def logprob_writer(self) -> LogprobWriter:
        return LogprobWriter(
            self.tokenizer, chat=self.kind == "chat", ids_as_tokens=self.ids_as_tokens
        )

    def adapter_fields(self) -> dict[str, Any]:
        """`adapter` for none (null) or one, `adapters` for a composition."""
        if len(self.adapters) > 1:
            return {"adapters": self.adapters}
        return {"adapter": self.adapters[0] if self.adapters else None}


def usage(generation: Generation, *, discard_output: bool = False) -> dict[str, Any]:
    prompt = generation.num_prompt_tokens
    output = 0 if discard_output else generation.num_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
        "prompt_tokens_details": {"cached_tokens": generation.num_cached_tokens},
    }


# --- whole answers --------------------------------------------------------------------------------


class Collected:
    """All chunks of one choice, put together."""

    def __init__(self, answer: Answer, choice: Choice) -> None:
        self._answer = answer
        self._choice = choice
        self._texts: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] | None = None
        self._prompt_logprobs: list[TokenLogprobs | None] | None = None
        self._last: TextChunk | None = None

    def add(self, chunk: TextChunk) -> None:
        if chunk.prompt_logprobs is not None:
            self._prompt_logprobs = chunk.prompt_logprobs
        if not self._answer.discard_output:
            self._texts.append(chunk.text)
            self._token_ids += chunk.token_ids
            if chunk.logprobs is not None:
                self._logprobs = [*(self._logprobs or ()), *chunk.logprobs]
        self._last = chunk

    @property
    def prompt_index(self) -> int:
        """Choices of one prompt have one list of token ids in common."""
        return id(self._choice.request.prompt_token_ids)

    @property
    def cumulative_logprob(self) -> float:
        return sum(entry.logprob for entry in self._logprobs or ())

    def prompt_fields(self) -> dict[str, Any]:
        """What was asked for about the prompt."""
        answer, request = self._answer, self._choice.request
        fields: dict[str, Any] = {}
        if request.sampling.prompt_logprobs is not None and not self._echoes_logprobs:
            fields["prompt_logprobs"] = prompt_logprobs(
                answer.tokenizer, self._prompt_logprobs or []
            )
        if answer.with_token_ids:
            fields["prompt_token_ids"] = request.prompt_token_ids
        return fields

    def write(self, index: int) -> dict[str, Any]:
        answer, last = self._answer, self._last
        assert last is not None, "a choice without an end"
        finish_reason: str | None = last.finish_reason
        written: dict[str, Any] = {"index": index}
        text = "".join(self._texts)
        echo = answer.echo[self._choice.index] if answer.echo else ""
        if answer.kind == "chat":
            message, calls = _message(answer, text, cut=finish_reason == FinishReason.LENGTH)
            if echo:
                message["content"] = echo + (message["content"] or "")
            written["message"] = message
            if calls and finish_reason == FinishReason.STOP:
                finish_reason = "tool_calls"
        else:
            written["text"] = echo + text
        written["logprobs"] = self._written_logprobs()
        written["finish_reason"] = "length" if answer.discard_output else finish_reason
        written["stop_reason"] = None if answer.discard_output else last.stop_reason
        if answer.kind == "completion":
            written |= self.prompt_fields()
        if answer.with_token_ids:
            written["token_ids"] = self._token_ids
        return written

    @property
    def _echoes_logprobs(self) -> bool:
        answer = self._answer
        return answer.kind == "completion" and bool(answer.echo) and answer.with_logprobs

    def _written_logprobs(self) -> dict[str, Any] | None:
        answer = self._answer
        if not answer.with_logprobs:
            return None
        writer = answer.logprob_writer()
        if not self._echoes_logprobs:
            return writer.write(self._logprobs or [])
        token_ids = self._choice.request.prompt_token_ids
        parts = [writer.prompt(token_ids, self._prompt_logprobs or [None] * len(token_ids))]
        parts.append(writer.write(self._logprobs or []))
        return {key: parts[0][key] + parts[1][key] for key in parts[0]}


def _message(answer: Answer, text: str, *, cut: bool) -> tuple[dict[str, Any], bool]:
    """(message, whether it calls tools)."""
    if answer.parsing is not None:
        return whole_message(answer.parsing, text, cut=cut)
    return {"role": "assistant", "content": text, "tool_calls": []}, False


def whole(answer: Answer, generation: Generation, collected: Sequence[Collected]) -> dict[str, Any]:
    """The answer to a request without streaming."""
    shown = collected if answer.num_best is None else _best(collected, answer.num_best)
    return {
        "id": answer.id,
        "object": "chat.completion" if answer.kind == "chat" else "text_completion",
        "created": answer.created,
        "model": answer.model,
        "choices": [choice.write(index) for index, choice in enumerate(shown)],
        "usage": usage(generation, discard_output=answer.discard_output),
        **(collected[0].prompt_fields() if answer.kind == "chat" else {}),
        **answer.adapter_fields(),
    }


def _best(collected: Sequence[Collected], count: int) -> list[Collected]:
    """Of each prompt's choices those with the highest log-probability, the likeliest first."""
    by_prompt: dict[int, list[Collected]] = {}
    for choice in collected:
        by_prompt.setdefault(choice.prompt_index, []).append(choice)
    return [
        choice
        for choices in by_prompt.values()
        for choice in sorted(choices, key=lambda c: c.cumulative_logprob, reverse=True)[:count]
    ]


# --- streamed answers -----------------------------------------------------------------------------


class StreamWriter:
    """Server-sent events of one answer. `chunk` is the hot path: one bytes concatenation and one
    JSON string.
    """

    def __init__(self, answer: Answer, generation: Generation) -> None:
        self._answer = answer
        self._generation = generation
        chat = answer.kind == "chat"
        choices = generation.choices
        head = {
            "id": answer.id,
            "object": "chat.completion.chunk" if chat else "text_completion",
            "created": answer.created,
            "model": answer.model,
        }
        self._head = b"data: " + encode(head)[:-1]
        text_key = b'"delta":{"content":' if chat else b'"text":'
        after_text = b'},"logprobs":' if chat else b',"logprobs":'
        self._before = [
            self._head + b',"choices":[{"index":%d,' % choice.index + text_key for choice in choices
        ]
        self._plain_end = after_text + b'null,"finish_reason":null'
        if not chat:
            self._plain_end += b',"stop_reason":null'
        self._plain_end += b"}]"
        self._parsers = (
            None if answer.parsing is None else [MessageParser(answer.parsing) for _ in choices]
        )
        self._simple = not (
            answer.continuous_usage or answer.with_token_ids or answer.parsing is not None
        )
        self._simple_end = self._plain_end + (
            b',"usage":null}\n\n' if answer.include_usage else b"}\n\n"
        )
        self._logprobs = [answer.logprob_writer() for _ in choices]
        self._begun = [False] * len(choices)
        self._told_prompt = [False] * len(choices)

    def chunk(self, index: int, chunk: TextChunk) -> bytes:
        """The events of a choice's next chunk; its first also opens it, its last closes it."""
        opening = b""
        if not self._begun[index]:
            self._begun[index] = True
            opening = self._opening(index, chunk)
        if chunk.finish_reason is None and chunk.logprobs is None and self._simple:
            return opening + self._before[index] + encode(chunk.text) + self._simple_end
        if self._parsers is not None:
            return opening + self._parsed(index, chunk, self._parsers[index])
        return opening + self._full(index, chunk)

    def last(self) -> bytes:
        """What follows the last choice's end."""
        if not self._answer.include_usage:
            return DONE
        fields = {
            "choices": [],
            "usage": usage(self._generation, discard_output=self._answer.discard_output),
            **self._answer.adapter_fields(),
        }
        return self._head + b"," + encode(fields)[1:] + b"\n\n" + DONE

    def error(self, status: int, code: str, message: str) -> bytes:
        """Instead of all that would follow."""
        return b"data: " + encode(errors.body(status, code, message)) + b"\n\n"

    def _opening(self, index: int, chunk: TextChunk) -> bytes:
        answer = self._answer
        echo = answer.echo[index] if answer.echo else ""
        if answer.kind == "chat":
            fields: dict[str, Any] = {"delta": {"role": "assistant", "content": echo}}
        elif answer.echo:
            fields = {"text": echo}
        else:
            return b""
        logprobs = None
        request = self._generation.choices[index].request
        if answer.kind == "completion" and answer.echo and answer.with_logprobs:
            ids = request.prompt_token_ids
            entries = chunk.prompt_logprobs or [None] * len(ids)
            logprobs = self._logprobs[index].prompt(ids, entries)
        return self._event(index, {**fields, "logprobs": logprobs, "finish_reason": None})

    def _full(self, index: int, chunk: TextChunk) -> bytes:
        text = "" if self._answer.discard_output else chunk.text
        fields: dict[str, Any]
        if self._answer.kind == "chat":
            # OpenAI's last delta is empty; text that came with the end goes into it all the same.
            fields = {"delta": {"content": text} if text or not chunk.finish_reason else {}}
        else:
            fields = {"text": text}
        return self._event(index, fields | self._chunk_fields(index, chunk, chunk.finish_reason))

    def _parsed(self, index: int, chunk: TextChunk, parser: MessageParser) -> bytes:
        """One event for each part of the message that the chunk adds to."""
        deltas = parser.push(chunk.text)
        reason: str | None = chunk.finish_reason
        if reason is not None:
            deltas += parser.finish(cut=reason == FinishReason.LENGTH)
            if parser.called and reason == FinishReason.STOP:
                reason = "tool_calls"
        if not deltas:
            if reason is None and not chunk.logprobs and not self._answer.with_token_ids:
                return b""
            deltas = [{}]
        plain = {"logprobs": None, "finish_reason": None, "stop_reason": None}
        events = [self._event(index, {"delta": delta, **plain}) for delta in deltas[:-1]]
        last = {"delta": deltas[-1], **self._chunk_fields(index, chunk, reason)}
        return b"".join(events) + self._event(index, last)

    def _chunk_fields(self, index: int, chunk: TextChunk, reason: str | None) -> dict[str, Any]:
        answer = self._answer
        shown = chunk.logprobs is not None and answer.with_logprobs and not answer.discard_output
        fields: dict[str, Any] = {
            "logprobs": self._logprobs[index].write(chunk.logprobs or []) if shown else None,
            "finish_reason": reason,
            "stop_reason": chunk.stop_reason,
        }
        if answer.discard_output:
            fields |= {"finish_reason": "length", "stop_reason": None}
        if answer.with_token_ids:
            fields["token_ids"] = [] if answer.discard_output else chunk.token_ids
            if not self._told_prompt[index]:
                self._told_prompt[index] = True
                request = self._generation.choices[index].request
                fields["prompt_token_ids"] = request.prompt_token_ids
        return fields

    def _event(self, index: int, fields: dict[str, Any]) -> bytes:
        event: dict[str, Any] = {"choices": [{"index": index, **fields}]}
        if self._answer.continuous_usage:
            event["usage"] = usage(self._generation, discard_output=self._answer.discard_output)
        elif self._answer.include_usage:
            event["usage"] = None
        if fields["finish_reason"] is not None:
            event |= self._answer.adapter_fields()
        return self._head + b"," + encode(event)[1:] + b"\n\n"
