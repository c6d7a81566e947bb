"""One request's stream in the API process: outputs of the engine in, chunks of text out.

Text is made as outputs arrive, not when the consumer asks: a stop string must end the generation at
once, whoever is slow. What the consumer has not taken yet is one chunk that grows, so a slow
consumer costs its own tokens and nothing else. It knows nothing of sockets, processes or HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from loraplex.engine.api import FinishReason, GenerationRequest, SequenceOutput, TokenLogprobs
from loraplex.engine.detokenizer import new_detokenizer
from loraplex.engine.stop_strings import StopStrings
from loraplex.engine.tokenizer import Tokenizer


@dataclass(slots=True)
class TextChunk:
    """News of one request since the last chunk. The last chunk of a stream has a `finish_reason`.

    `text` may lag behind `token_ids` (half a character, the beginning of a stop string) and may be
    empty; it never has the text of the eos or stop token that ended the sequence, unless stops are
    to be included.
    """

    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None  # the stop string or stop token that ended it
    num_cached_tokens: int | None = None
    queue_s: float | None = None
    embedding: bytes | None = None  # float32, little endian

    def extend(self, later: TextChunk) -> None:
        self.text += later.text
        self.token_ids += later.token_ids
        if later.logprobs is not None:
            self.logprobs = (self.logprobs or []) + later.logprobs
        if later.prompt_logprobs is not None:
            self.prompt_logprobs = later.prompt_logprobs
        if later.num_cached_tokens is not None:
            self.num_cached_tokens = later.num_cached_tokens
        if later.queue_s is not None:
            self.queue_s = later.queue_s
        if later.embedding is not None:
            self.embedding = later.embedding
        self.finish_reason = later.finish_reason
        self.stop_reason = later.stop_reason


class Stream:
    """Made, fed and read on one event loop. `request` and `token_ids` are enough to resubmit."""

    __slots__ = (
        "_detokenizer",
        "_error",
        "_finder",
        "_include_stop",
        "_min_tokens",
        "_pending",
        "_waiter",
        "ended",
        "request",
        "token_ids",
    )

    def __init__(
        self,
        request: GenerationRequest,
        tokenizer: Tokenizer,
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
    ) -> None:
        self.request = request
        self.token_ids: list[int] = []
        self.ended = False  # nothing more is wanted from the engine
        self._detokenizer = new_detokenizer(
            tokenizer,
            skip_special_tokens=skip_special_tokens,
            prompt_token_ids=request.prompt_token_ids,
        )
        self._finder = StopStrings(stop, include=include_stop) if stop else None
        self._include_stop = include_stop
        self._min_tokens = request.sampling.min_tokens
        self._pending: TextChunk | None = None
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    def feed(self, output: SequenceOutput) -> None:
        """Take one output of the engine; then `ended` tells whether it was the last wanted."""
        finder = self._finder
        if finder is None:
            chunk = self._chunk(output)
        elif len(output.token_ids) <= 1:
            chunk = self._search(self._chunk(output), finder)
        else:
            chunk = self._token_by_token(output, finder)
        self.ended = chunk.finish_reason is not None
        if self._pending is None:
            self._pending = chunk
        else:
            self._pending.extend(chunk)
        self._wake()

    def fail(self, error: Exception) -> None:
        """End the stream with an error, after what has arrived already."""
        self.ended = True
        self._error = error
        self._wake()

    async def next(self) -> TextChunk:
        """All that has arrived since the last call; waits when that is nothing. Raises what `fail`
        got.
        """
        while self._pending is None:
            if self._error is not None:
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        chunk, self._pending = self._pending, None
        return chunk

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def _chunk(self, output: SequenceOutput) -> TextChunk:
        ids, reason = output.token_ids, output.finish_reason
        self.token_ids += ids
        if reason is None:
            text = self._detokenizer.push(ids)
        else:
            ends_in_stop = reason is FinishReason.STOP and not self._include_stop
            text = self._detokenizer.push(ids[:-1] if ends_in_stop else ids)
            text += self._detokenizer.finish()
        return TextChunk(
            text,
            ids,
            output.logprobs,
            output.prompt_logprobs,
            reason,
            output.stop_token_id,
            output.num_cached_tokens,
            output.queue_s,
            output.embedding,
        )

    def _search(self, chunk: TextChunk, finder: StopStrings) -> TextChunk:
        """The chunk without the text that is held back; ended where a stop string is complete."""
        if len(self.token_ids) <= self._min_tokens:
            return chunk  # too early for any stop
        chunk.text = finder.push(chunk.text)
        if finder.matched is not None:
            chunk.finish_reason, chunk.stop_reason = FinishReason.STOP, finder.matched
        elif chunk.finish_reason is not None:
            chunk.text += finder.finish()
        return chunk

    def _token_by_token(self, output: SequenceOutput, finder: StopStrings) -> TextChunk:
        """Several tokens at once: those after the one that completes a stop string do not count."""
        whole: TextChunk | None = None
        last = len(output.token_ids) - 1
        for i, token_id in enumerate(output.token_ids):
            part = SequenceOutput(
                request_id=output.request_id,
                token_ids=[token_id],
                logprobs=None if output.logprobs is None else output.logprobs[i : i + 1],
                prompt_logprobs=None if i else output.prompt_logprobs,
                finish_reason=output.finish_reason if i == last else None,
                stop_token_id=output.stop_token_id if i == last else None,
                num_cached_tokens=None if i else output.num_cached_tokens,
                queue_s=None if i else output.queue_s,
            )
            chunk = self._search(self._chunk(part), finder)
            if whole is None:
                whole = chunk
            else:
                whole.extend(chunk)
            if whole.finish_reason is not None:
                break
        assert whole is not None
        return whole
