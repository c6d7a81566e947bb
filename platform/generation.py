"""All sequences of one API request as one stream of news, with what has come of each so far.

The engine client makes the text; this module merges, counts and times. Knows nothing of HTTP, JSON
or adapters' names.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from loraplex.engine.api import GenerationRequest
from loraplex.engine.stream import TextChunk
from loraplex.platform.engine_port import EnginePort


@dataclass(frozen=True, slots=True)
class TextOptions:
    stop: Sequence[str] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    keep_empty: bool = False  # report tokens that complete no text yet: more than text is wanted


MAX_QUEUED = 64

Delta = tuple[int, TextChunk]  # news of choice i; its last has a `finish_reason`


@dataclass(slots=True)
class Choice:
    """One sequence: its request, and what has come of it so far."""

    index: int
    request: GenerationRequest
    options: TextOptions
    num_tokens: int = 0
    num_cached_tokens: int = 0
    queue_s: float = 0.0
    finish_reason: str | None = None

    def count(self, chunk: TextChunk) -> None:
        self.num_tokens += len(chunk.token_ids)
        if chunk.num_cached_tokens is not None:
            self.num_cached_tokens = chunk.num_cached_tokens
        if chunk.queue_s is not None:
            self.queue_s = chunk.queue_s
        if chunk.finish_reason is not None:
            self.finish_reason = chunk.finish_reason.value


@dataclass(slots=True)
class Timing:
    """When things happened, in `time.perf_counter` seconds.

    `intervals`: time between tokens of a sequence, as (seconds, tokens).
    """

    started: float = field(default_factory=time.perf_counter)
    first_token: float | None = None
    last_token: float | None = None
    intervals: list[tuple[float, int]] = field(default_factory=list)

    def mark(self, previous: float | None, num_tokens: int) -> float:
        """Tokens of a sequence came, whose `previous` ones came then. Returns now."""
        now = time.perf_counter()
        if self.first_token is None and num_tokens:
            self.first_token = now
        if previous is not None and num_tokens:
            self.intervals.append(((now - previous) / num_tokens, num_tokens))
        self.last_token = now
        return now


class Generation:
    """`choices[i].index == i`; choices of the same prompt share its list of token ids.

    max_parallel: so many are given to the engine at once; the others wait here, not in its queue.
    """

    def __init__(
        self, engine: EnginePort, choices: Sequence[Choice], max_parallel: int | None = None
    ) -> None:
        self.choices = choices
        self._places = asyncio.Semaphore(max_parallel or len(choices))
        self.timing = Timing()
        self.on_tokens: Callable[[int], None] | None = None  # hears of tokens as they come
        self._engine = engine

    @property
    def num_prompt_tokens(self) -> int:
        """Every prompt counts once, however many choices it has."""
        return sum(len(choice.request.prompt_token_ids) for choice in self._firsts())

    @property
    def num_cached_tokens(self) -> int:
        return sum(choice.num_cached_tokens for choice in self._firsts())

    @property
    def num_tokens(self) -> int:
        return sum(choice.num_tokens for choice in self.choices)

    @property
    def queue_s(self) -> float:
        return max(choice.queue_s for choice in self.choices)

    def deltas(self) -> AsyncGenerator[Delta, None]:
        """News of all choices as they come. Closing it early cancels what still runs.

        Raises: EngineError.
        """
        return self._follow(self.choices[0]) if len(self.choices) == 1 else self._follow_all()

    def _firsts(self) -> Sequence[Choice]:
        """One choice of each prompt."""
        return list({id(c.request.prompt_token_ids): c for c in reversed(self.choices)}.values())

    async def _follow(self, choice: Choice) -> AsyncGenerator[Delta, None]:
        options, previous = choice.options, None
        chunks = self._engine.generate(
            choice.request,
            stop=options.stop,
            include_stop=options.include_stop,
            skip_special_tokens=options.skip_special_tokens,
        )
        async with aclosing(chunks):
            async for chunk in chunks:
                previous = self.timing.mark(previous, len(chunk.token_ids))
                choice.count(chunk)
                if self.on_tokens is not None:
                    self.on_tokens(len(chunk.token_ids))
                if chunk.text or options.keep_empty or chunk.finish_reason is not None:
                    yield choice.index, chunk

    async def _follow_all(self) -> AsyncGenerator[Delta, None]:
        # Bounded: whoever reads slowly finds each sequence's news gathered, not queued up.
        queue: asyncio.Queue[Delta | Exception | None] = asyncio.Queue(MAX_QUEUED)

        async def run(choice: Choice) -> None:
            try:
                async with self._places:
                    async for delta in self._follow(choice):
                        await queue.put(delta)
                await queue.put(None)
            except Exception as error:
                await queue.put(error)

        tasks = [asyncio.create_task(run(choice)) for choice in self.choices]
        try:
            running = len(tasks)
            while running:
                news = await queue.get()
                if news is None:
                    running -= 1
                elif isinstance(news, Exception):
                    raise news
                else:
                    yield news
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
