"""Answers in OpenAI's shapes: whole ones as dictionaries, streamed ones as ready bytes.

The streamed form is on the hot path (one call per token and client), so everything that stays equal
within a stream is serialised once; per chunk only the text is encoded. Knows nothing of HTTP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from loraplex.engine.api import TokenLogprobs
from loraplex.engine.stream import TextChunk
from loraplex.engine.tokenizer import Tokenizer
from loraplex.platform.generation import Choice, Generation

encode = msgspec.json.encode

DONE = b"data: [DONE]\n\n"

Kind = Literal["completion", "chat"]


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


# --- log-probabilities ----------------------------------------------------------------------------


class LogprobWriter:
    """Log-probabilities of one choice in the shape of its route; remembers the text offset
    (completions only).
    """

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._offset = 0

    def write(self, entries: Sequence[TokenLogprobs | None]) -> dict[str, Any]:
        return self._chat(entries) if self._answer.kind == "chat" else self._completion(entries)

    def prompt(self, token_ids: Sequence[int], entries: Sequence[TokenLogprobs | None]) -> Any:
        """The prompt's part of an echoed completion: its first token has no probability."""
        tokens = [self._token(token_id) for token_id in token_ids]
        written = self._completion(entries, tokens)
        return written

    def _token(self, token_id: int) -> str:
        if self._answer.ids_as_tokens:
            return f"token_id:{token_id}"
        return self._answer.tokenizer.token_text(token_id)

    def _chat(self, entries: Sequence[TokenLogprobs | None]) -> dict[str, Any]:
        return {
            "content": [
                {
                    **self._chat_token(entry.token_id, entry.logprob),
                    "top_logprobs": [
                        self._chat_token(token_id, logprob)
                        for token_id, logprob in zip(entry.top_ids, entry.top_logprobs, strict=True)
                    ],
                }
                for entry in entries
                if entry is not None
            ],
            "refusal": None,
        }

    def _chat_token(self, token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self._token(token_id),
            "logprob": logprob,
            "bytes": list(self._answer.tokenizer.token_bytes(token_id)),
        }

    def _completion(
        self, entries: Sequence[TokenLogprobs | None], tokens: Sequence[str] | None = None
    ) -> dict[str, Any]:
        if tokens is None:
            tokens = [self._token(entry.token_id) for entry in entries if entry is not None]
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(token)
        tops: list[dict[str, float] | None] = []
        for entry in entries:
            if entry is None:
                tops.append(None)
                continue
            top = {
                self._token(i): p for i, p in zip(entry.top_ids, entry.top_logprobs, strict=True)
            }
            top.setdefault(self._token(entry.token_id), entry.logprob)
            tops.append(top)
        return {
            "text_offset": offsets,
            "token_logprobs": [None if entry is None else entry.logprob for entry in entries],
            "tokens": list(tokens),
            "top_logprobs": tops,
        }


def prompt_logprobs(
    answer: Answer, entries: Sequence[TokenLogprobs | None]
) -> list[dict[str, Any] | None]:
    """vLLM's form: per prompt token the candidates by id."""
    written: list[dict[str, Any] | None] = []
    for entry in entries:
        if entry is None:
            written.append(None)
            continue
        found = dict(zip(entry.top_ids, entry.top_logprobs, strict=True))
        ranks = {token_id: rank for rank, token_id in enumerate(entry.top_ids, start=1)}
        found.setdefault(entry.token_id, entry.logprob)
        ranks[entry.token_id] = entry.rank
        written.append(
            {
                str(token_id): {
                    "logprob": logprob,
                    "rank": ranks[token_id],
                    "decoded_token": answer.tokenizer.token_text(token_id),
                }
                for token_id, logprob in found.items()
            }
        )
    return written


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

    def write(self) -> dict[str, Any]:
        answer, last = self._answer, self._last
        assert last is not None, "a choice without an end"
        index = self._choice.index
        written: dict[str, Any] = {"index": index}
        text = "".join(self._texts)
        if answer.kind == "chat":
            echo = answer.echo[index] if answer.echo else ""
            written["message"] = {"role": "assistant", "content": echo + text, "tool_calls": []}
        else:
            written["text"] = (answer.echo[index] if answer.echo else "") + text
        written["logprobs"] = self._written_logprobs()
        written["finish_reason"] = "length" if answer.discard_output else last.finish_reason
        written["stop_reason"] = None if answer.discard_output else last.stop_reason
        if self._choice.request.sampling.prompt_logprobs is not None and not answer.echo:
            written["prompt_logprobs"] = prompt_logprobs(answer, self._prompt_logprobs or [])
        if answer.with_token_ids:
            written["token_ids"] = self._token_ids
            written["prompt_token_ids"] = self._choice.request.prompt_token_ids
        return written

    def _written_logprobs(self) -> dict[str, Any] | None:
        answer, sampling = self._answer, self._choice.request.sampling
        if sampling.logprobs is None:
            return None
        writer = LogprobWriter(answer)
        if not answer.echo or answer.kind == "chat":
            return writer.write(self._logprobs or [])
        token_ids = self._choice.request.prompt_token_ids
        parts = [writer.prompt(token_ids, self._prompt_logprobs or [None] * len(token_ids))]
        parts.append(writer.write(self._logprobs or []))
        return {key: parts[0][key] + parts[1][key] for key in parts[0]}


def whole(answer: Answer, generation: Generation, collected: Sequence[Collected]) -> dict[str, Any]:
    """The answer to a request without streaming."""
    return {
        "id": answer.id,
        "object": "chat.completion" if answer.kind == "chat" else "text_completion",
        "created": answer.created,
        "model": answer.model,
        "choices": [choice.write() for choice in collected],
        "usage": usage(generation, discard_output=answer.discard_output),
        **answer.adapter_fields(),
    }


# --- streamed answers -----------------------------------------------------------------------------


class StreamWriter:
    """Server-sent events of one answer. `chunk` is the hot path: one bytes concatenation and one
    JSON string.
    """

    def __init__(self, answer: Answer, generation: Generation) -> None:
        self._answer = answer
        self._generation = generation
        chat = answer.kind == "chat"
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
            self._head + b',"choices":[{"index":%d,' % choice.index + text_key
            for choice in generation.choices
        ]
        self._between = after_text
        self._plain_end = after_text + b'null,"finish_reason":null'
        if not chat:
            self._plain_end += b',"stop_reason":null'
        self._plain_end += b"}]"
        self._simple = not (answer.continuous_usage or answer.with_token_ids)
        self._simple_end = self._plain_end + (
            b',"usage":null}\n\n' if answer.include_usage else b"}\n\n"
        )
        self._logprobs = [LogprobWriter(answer) for _ in generation.choices]
        self._begun = [False] * len(generation.choices)

    def chunk(self, index: int, chunk: TextChunk) -> bytes:
        """The events of a choice's next chunk; its first also opens it, its last closes it."""
        opening = b""
        if not self._begun[index]:
            self._begun[index] = True
            opening = self._opening(index, chunk)
        if chunk.finish_reason is None and chunk.logprobs is None and self._simple:
            return opening + self._before[index] + encode(chunk.text) + self._simple_end
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
        if answer.kind == "completion" and request.sampling.logprobs is not None:
            ids = request.prompt_token_ids
            entries = chunk.prompt_logprobs or [None] * len(ids)
            logprobs = self._logprobs[index].prompt(ids, entries)
        return self._event(index, {**fields, "logprobs": logprobs, "finish_reason": None})

    def _full(self, index: int, chunk: TextChunk) -> bytes:
        answer = self._answer
        text = "" if answer.discard_output else chunk.text
        fields: dict[str, Any]
        if answer.kind == "chat":
            # OpenAI's last delta is empty; text that came with the end goes into it all the same.
            fields = {"delta": {"content": text} if text or not chunk.finish_reason else {}}
        else:
            fields = {"text": text}
        wanted = chunk.logprobs is not None and not answer.discard_output
        fields["logprobs"] = self._logprobs[index].write(chunk.logprobs or []) if wanted else None
        fields["finish_reason"] = chunk.finish_reason
        fields["stop_reason"] = chunk.stop_reason
        if answer.discard_output:
            fields |= {"finish_reason": "length", "stop_reason": None}
        if answer.with_token_ids:
            fields["token_ids"] = chunk.token_ids
        return self._event(index, fields, end=chunk.finish_reason is not None)

    def _event(self, index: int, fields: dict[str, Any], *, end: bool = False) -> bytes:
        event: dict[str, Any] = {"choices": [{"index": index, **fields}]}
        if self._answer.continuous_usage:
            event["usage"] = usage(self._generation)
        elif self._answer.include_usage:
            event["usage"] = None
        if end:
            event |= self._answer.adapter_fields()
        return self._head + b"," + encode(event)[1:] + b"\n\n"
