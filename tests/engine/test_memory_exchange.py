"""One memory for KV blocks and adapters: who gets what, and that whatever happens every request
ends right.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from engine_fakes import BLOCK, Bench

from loraplex.adapters.errors import AdapterError
from loraplex.engine.api import MemoryInfo
from loraplex.engine.errors import AdapterUnavailable
from loraplex.engine.memory_exchange import HOLD_S, MemoryExchange
from loraplex.engine.superblocks import Division

BLOCKS = 2  # of a superblock
PROMPT = [1, 2, 3]


def division(kv: int = 4, adapters: int = 2, kv_floor: int = 2, **changes: Any) -> Division:
    """A superblock is 2 blocks (8 tokens) or 2 frames: adapter c, or a and b; d takes two."""
    return Division(
        **{
            "superblock_bytes": 20,
            "blocks_per_superblock": BLOCKS,
            "frames_per_superblock": 2,
            "kv_superblocks": kv,
            "adapter_superblocks": adapters,
            "kv_floor": kv_floor,
            "adapter_floor": 1,
            **changes,
        }
    )


class Shared(Bench):
    exchange: MemoryExchange

    def __init__(self, *counts: int, **options: Any) -> None:
        super().__init__(division=division(*counts), **options)

    @property
    def owners(self) -> tuple[int, int]:
        """Superblocks of the KV cache and of the adapters."""
        return len(self.blocks.unused.owned), self.slots.device_bytes_total // 20

    @property
    def trades(self) -> tuple[int, int]:
        return self.exchange.num_to_kv, self.exchange.num_to_adapters

    def use(self, *adapters: str) -> None:
        """A request on each, to its end."""
        for adapter in adapters:
            self.add(PROMPT, {adapter: 1.0}, max_tokens=1)
            self.run()

    def resident(self) -> set[str]:
        return set(self.loader.installed)


def test_short_contexts_lend_their_memory_to_adapters() -> None:
    bench = Shared(5, 1)
    bench.use("a", "b", "c", "d")
    assert bench.resident() == {"a", "b", "c", "d"}
    assert (bench.owners, bench.trades) == ((2, 4), (0, 3))
    bench.check_over()


def test_the_kv_cache_keeps_its_floor_and_adapters_evict_each_other_then() -> None:
    bench = Shared(4, 1, 3)
    bench.use("a", "b", "c", "d")
    assert bench.owners == (3, 2)
    assert bench.resident() == {"d"}


def test_long_contexts_take_the_memory_of_idle_adapters() -> None:
    bench = Shared(2, 4)
    bench.use("a", "b", "c")
    bench.now += 1
    names = [bench.add([i] * 12, max_tokens=4) for i in range(3)]  # 4 blocks each
    bench.step()
    assert len(bench.engine._scheduler.running) == 3
    assert bench.owners == (5, 1)
    assert bench.trades == (3, 0)
    bench.run()
    assert all(len(bench.tokens[name]) == 4 for name in names)
    bench.check_over()


def test_what_holds_nothing_is_taken_before_an_adapter_goes() -> None:
    bench = Shared(2, 3)
    bench.use("a")
    bench.now += 1
    bench.add([1] * 12, max_tokens=4)
    bench.add([2] * 12, max_tokens=4)
    bench.step()
    assert bench.owners == (4, 1)
    assert bench.resident() == {"a"}


@pytest.mark.parametrize("why", ["runs", "pinned", "used lately"])
def test_an_adapter_in_use_keeps_its_memory(why: str) -> None:
    bench = Shared(2, 2)
    bench.use("c", "a")
    bench.now += 0 if why == "used lately" else 1
    if why == "runs":
        bench.add([7] * 2, {"a": 1.0}, max_tokens=12)
        bench.step()
    if why == "pinned":
        bench.slots.pin("a")
        bench.slots.pin("c")
    bench.add([1] * 12, max_tokens=4)
    bench.add([2] * 12, max_tokens=4)
    bench.step()
    assert "a" in bench.resident()
    assert bench.owners == ((3, 1) if why == "runs" else (2, 2))
    bench.run()
    bench.check_over()


def test_a_preemption_is_avoided() -> None:
    bench = Shared(2, 3)
    for i in range(2):
        bench.add([i] * 7, max_tokens=8)
    bench.run()
    assert bench.engine.stats().num_preemptions == 0
    assert bench.trades[0] == 2
    bench.check_over()


def test_of_what_is_kept_the_longest_unused_goes() -> None:
    for is_cache_older in (True, False):
        bench = Shared(4, 1, 2)
        prompt = [5] * 24

        def cache(bench: Bench = bench, prompt: list[int] = prompt) -> None:
            for part in (prompt[:8], [6, *prompt[:8]], [7, *prompt[:8]]):
                bench.add(part, max_tokens=5)
            bench.run()

        if is_cache_older:
            cache()
        bench.now += 1
        bench.use("c")
        bench.now += 1
        if not is_cache_older:
            cache()
        bench.now += 1
        bench.use("a")
        assert ("c" in bench.resident()) == is_cache_older
        assert (bench.trades[1] > 0) == is_cache_older


def test_of_cached_prefixes_the_longest_unused_go() -> None:
    bench = Shared(5, 1, 2)
    prompts = [[number] * 8 for number in (3, 4, 5)]  # a superblock each
    for prompt in (*prompts, prompts[2], prompts[0]):  # the middle one is used no more
        bench.now += 1
        bench.add(prompt, max_tokens=1)
        bench.run()
    bench.now += 1
    bench.exchange.lend(60, bench.now)
    bench.exchange.enough()
    assert bench.blocks.unused.owned == {0, 2}, "the empty ones went, and the oldest"
    bench.check_over()


def lends_while_a_step_runs(*, waits: bool) -> Shared:
    """A request is cancelled while its step is in flight, and an adapter wants its memory."""
    bench = Shared(5, 1, 2, max_in_flight=1)
    bench.use("c")
    if not waits:
        bench.exchange.when_settled = lambda then: then()
    bench.add([4] * 13, max_tokens=3)
    cancelled = bench.add([3] * 13, max_tokens=3)
    bench.add(PROMPT, {"c": 1.0, "d": 1.0}, max_tokens=1)
    bench.step_until(lambda: bench.exchange._lacking, 3)
    assert bench.trades == (0, 0), "the KV cache has nothing to spare"
    lend, move = bench.exchange.lend, bench.mover.to_adapters

    def tell(name: str, call: Callable[..., None]) -> Callable[..., None]:
        def told(*arguments: Any) -> None:
            bench.runner.events.append(name)
            call(*arguments)

        return told

    bench.exchange.lend = tell("lend", lend)  # type: ignore[method-assign]
    bench.mover.to_adapters = tell("move", move)  # type: ignore[method-assign]
    bench.engine.cancel(cancelled)
    bench.run()
    bench.check_over()
    return bench


def test_a_step_in_flight_keeps_its_memory() -> None:
    events = lends_while_a_step_runs(waits=True).runner.events
    asked = events.index("lend")
    in_flight = [event for event in events[:asked] if event.startswith("launch")][-1]
    settled = events.index(in_flight.replace("launch", "collect"))
    assert asked < settled < events.index("move")


def test_without_waiting_for_it_the_step_would_write_to_nowhere() -> None:
    with pytest.raises(AssertionError, match="no memory is"):
        lends_while_a_step_runs(waits=False)


def test_one_that_needs_more_than_all_adapters_have_makes_the_kv_cache_empty_some() -> None:
    bench = Shared(4, 1, 2)
    for i in range(4):
        bench.add([i] * 7, max_tokens=9)
    bench.step()
    assert bench.engine._scheduler.waiting, "the KV cache is full"
    large = bench.add(PROMPT, {"d": 1.0}, max_tokens=1)
    for i in range(40):  # a stream of work that would always fill the KV cache
        bench.add([i] * 7, max_tokens=9)
    bench.step_until(lambda: large in bench.ends, 60)
    bench.run()
    bench.check_over()


def test_who_asks_no_more_gives_back_what_was_to_be_emptied() -> None:
    bench = Shared(4, 1, 2)
    for i in range(4):
        bench.add([i] * 7, max_tokens=9)
    bench.step()
    large = bench.add(PROMPT, {"d": 1.0}, max_tokens=1)
    bench.step_until(lambda: bench.blocks.unused.closed, 10)
    bench.engine.cancel(large)
    bench.step()
    bench.step()
    assert not bench.blocks.unused.closed
    bench.run()
    bench.check_over()


def test_pins_do_not_reach_into_the_floor_of_the_kv_cache() -> None:
    bench = Shared(4, 1, 3)
    bench.slots.pin("c")
    with pytest.raises(AdapterError, match="exceed the 40 bytes"):
        bench.slots.pin("d")
    bench.slots.pin("a")
    bench.use("c", "a")
    name = bench.add([1] * (bench.max_model_len - 1), max_tokens=1)
    bench.run()
    assert bench.tokens[name]
    assert bench.max_model_len == 3 * BLOCKS * BLOCK


def test_nothing_swings_to_and_fro() -> None:
    """Both sides want all of it, all the time."""
    bench = Shared(4, 3, 2, max_num_waiting=200)
    for i in range(60):
        bench.add([i % 40] * 8, max_tokens=6)
        bench.add([i % 40] * 2, {"abcd"[i % 4]: 1.0}, max_tokens=2)
    began = bench.now
    bench.run(2000)
    bench.check_over()
    assert sum(bench.trades) <= 7 + 2 * (bench.now - began) / HOLD_S


def test_memory_that_cannot_be_moved_ends_the_trade_and_nothing_else(
    caplog: pytest.LogCaptureFixture,
) -> None:
    bench = Shared(4, 1, 2)
    bench.mover.fails = True
    bench.use("a", "b", "c")
    assert bench.trades == (0, 0)
    with pytest.raises(AdapterUnavailable, match="more than the 20 bytes"):
        bench.add(PROMPT, {"d": 1.0})  # would have waited for what never comes
    assert "driver is on fire" in caplog.text
    bench.mover.fails = False
    bench.add([1] * 12, max_tokens=4)
    bench.run()
    assert bench.trades == (0, 0)
    assert bench.engine.memory().superblocks_lost == 1
    bench.check_over()


def test_the_books_are_told() -> None:
    bench = Shared(4, 2, 2)
    bench.use("a")
    bench.now += 1
    memory = bench.engine.memory()
    assert isinstance(memory, MemoryInfo)
    assert (memory.superblock_bytes, memory.shared_bytes) == (20, 120)
    assert (memory.kv_blocks_min, memory.kv_blocks_total, memory.kv_blocks_max) == (4, 8, 10)
    assert (memory.adapter_bytes_total, memory.adapter_bytes_max) == (40, 80)
    assert (memory.kv_blocks_obtainable, memory.adapter_bytes_obtainable) == (2, 40)
    bench.use("b", "c", "d")
    stats = bench.engine.stats()
    assert (stats.superblocks_to_kv, stats.superblocks_to_adapters) == bench.trades != (0, 0)
