"""One request's tokens as text: detokenised as they come, cut at stop strings, ended exactly once.

Sits between the engine (tokens) and the response writers (bytes). Knows nothing of HTTP, JSON or
adapters' names.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from loraplex.engine.api import FinishReason, GenerationRequest, SequenceOutput, TokenLogprobs
from loraplex.engine.detokenizer import new_detokenizer
from loraplex.engine.errors import EngineError
from loraplex.engine.stop_strings import StopStrings
from loraplex.engine.tokenizer import Tokenizer
from loraplex.platform.engine_port import EnginePort


@dataclass(slots=True)
class Delta:
    """News of one choice. The last one of a choice has a `finish_reason`."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None


@dataclass(frozen=True, slots=True)
class TextOptions:
    stop: Sequence[str] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    keep_empty: bool = (
        False  # report tokens that complete no text yet (log-probabilities are wanted)
    )


class Choice:
    """One sequence: its request, and what has come of it so far."""

    def __init__(
        self,
        index: int,
        request: GenerationRequest,
        tokenizer: Tokenizer,
        options: TextOptions,
        eos_token_ids: Sequence[int] = (),
    ) -> None:
        self.index = index
        self.request = request
        self.num_prompt_tokens = len(request.prompt_token_ids)
        self.num_tokens = 0
        self.num_cached_tokens = 0
        self.queue_s = 0.0
        self.finish_reason: str | None = None
        self._options = options
        self._detokenizer = new_detokenizer(
            tokenizer,
            skip_special_tokens=options.skip_special_tokens,
            prompt_token_ids=request.prompt_token_ids,
        )
        self._stop = (
            StopStrings(options.stop, include=options.include_stop) if options.stop else None
        )
        self._min_tokens = request.sampling.min_tokens
        self._end_ids = frozenset((*eos_token_ids, *request.sampling.stop_token_ids))

    def push(self, output: SequenceOutput) -> Delta | None:
        """What this step's tokens add. Raises: EngineError when the sequence failed."""
        if output.error is not None:
            raise EngineError(output.error.message, code=output.error.code)
        token_ids = output.token_ids
        self.num_tokens += len(token_ids)
        if output.num_cached_tokens is not None:
            self.num_cached_tokens = output.num_cached_tokens
        if output.queue_s is not None:
            self.queue_s = output.queue_s
        finish = output.finish_reason
        shown = token_ids
        if finish is FinishReason.STOP and not self._options.include_stop:
            if shown and shown[-1] in self._end_ids:
                shown = shown[:-1]
        text = self._detokenizer.push(shown)
        if finish is not None:
            text += self._detokenizer.finish()
        stop_reason: str | int | None = output.stop_token_id
        if self._stop is not None and self.num_tokens >= self._min_tokens:
            text = self._stop.push(text)
            if self._stop.matched is not None:
                finish, stop_reason = FinishReason.STOP, self._stop.matched
            elif finish is not None:
                text += self._stop.finish()
        if finish is None and not text and not self._options.keep_empty:
            return None
        if finish is not None:
            self.finish_reason = str(finish)
        return Delta(
            self.index,
            text,
            token_ids,
            output.logprobs,
            output.prompt_logprobs,
            self.finish_reason,
            stop_reason,
        )


@dataclass(slots=True)
class Timing:
    """When things happened, in `time.perf_counter` seconds; intervals between tokens as (seconds,
    tokens).
    """

    started: float = field(default_factory=time.perf_counter)
    first_token: float | None = None
    last_token: float | None = None
    intervals: list[tuple[float, int]] = field(default_factory=list)

    def mark(self, num_tokens: int) -> None:
        now = time.perf_counter()
        if self.last_token is None:
            self.first_token = now
        elif num_tokens:
            self.intervals.append(((now - self.last_token) / num_tokens, num_tokens))
        self.last_token = now


class Generation:
    """All choices of one API request."""

    def __init__(self, engine: EnginePort, choices: Sequence[Choice]) -> None:
        self.choices = choices
        self.timing = Timing()
        self._engine = engine

    @property
    def num_prompt_tokens(self) -> int:
        return sum(
            {id(c.request.prompt_token_ids): c.num_prompt_tokens for c in self.choices}.values()
        )

    @property
    def num_cached_tokens(self) -> int:
        return sum(
            {id(c.request.prompt_token_ids): c.num_cached_tokens for c in self.choices}.values()
        )

    @property
    def num_tokens(self) -> int:
        return sum(choice.num_tokens for choice in self.choices)

    @property
    def queue_s(self) -> float:
        return max(choice.queue_s for choice in self.choices)

    def deltas(self) -> AsyncGenerator[Delta, None]:
        """News of all choices as they come. Closing it early cancels what still runs. Raises:
        EngineError.
        """
        return self._follow(self.choices[0]) if len(self.choices) == 1 else self._follow_all()

    async def _follow(self, choice: Choice) -> AsyncGenerator[Delta, None]:
        outputs = self._engine.generate(choice.request)
        async with aclosing(outputs):
            async for output in outputs:
                self.timing.mark(len(output.token_ids))
                delta = choice.push(output)
                if delta is not None:
                    yield delta
                    if delta.finish_reason is not None:
                        return

    async def _follow_all(self) -> AsyncGenerator[Delta, None]:
        queue: asyncio.Queue[Delta | BaseException | None] = asyncio.Queue()

        async def run(choice: Choice) -> None:
            try:
                async for delta in self._follow(choice):
                    queue.put_nowait(delta)
                queue.put_nowait(None)
            except EngineError as error:
                queue.put_nowait(error)

        tasks = [asyncio.create_task(run(choice)) for choice in self.choices]
        try:
            running = len(tasks)
            while running:
                news = await queue.get()
                if news is None:
                    running -= 1
                elif isinstance(news, BaseException):
                    raise news
                else:
                    yield news
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
