"""The client against a fake engine in a real process: streams, cancels, crashes, the end."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import msgspec
import psutil
import pytest

from loraplex.engine.api import (
    AdapterEvent,
    AdapterState,
    AdapterUse,
    FinishReason,
    GenerationRequest,
    SamplingParams,
    SequenceOutput,
    TokenLogprobs,
)
from loraplex.engine.client import EngineClient
from loraplex.engine.config import EngineConfig
from loraplex.engine.errors import (
    AdapterUnavailable,
    EngineDead,
    EngineError,
    InvalidRequest,
    ModelError,
    QueueFull,
)
from loraplex.engine.stream import Stream, TextChunk
from loraplex.engine.tokenizer import Tokenizer

HERE = Path(__file__).parent
EOS = 256


@pytest.fixture(autouse=True)
def importable_fake(monkeypatch: pytest.MonkeyPatch) -> None:
    """The child process finds fake_engine.py by name."""
    path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    monkeypatch.setenv("PYTHONPATH", path)


def new_client(model: str = "fake", **options: object) -> EngineClient:
    config = EngineConfig(model=model, adapter_dir=Path("/nowhere"))
    options = {"factory": "fake_engine:build", "on_log": lambda _: None, **options}
    return EngineClient(config, **options)  # type: ignore[arg-type]


@asynccontextmanager
async def running(model: str = "fake", **options: object) -> AsyncIterator[EngineClient]:
    client = new_client(model, **options)
    await client.start()
    try:
        yield client
    finally:
        await client.stop()


def request(
    name: str = "r", text: str = "abc", salt: str = "", **sampling: object
) -> GenerationRequest:
    return GenerationRequest(
        request_id=name,
        prompt_token_ids=list(text.encode()),
        sampling=SamplingParams(**{"max_tokens": 10, **sampling}),  # type: ignore[arg-type]
        cache_salt=salt,
    )


async def collect(client: EngineClient, req: GenerationRequest, **options: object) -> TextChunk:
    """The whole stream as one chunk; checks that exactly the last chunk has the finish reason."""
    chunks = [chunk async for chunk in client.generate(req, **options)]  # type: ignore[arg-type]
    assert all(chunk.finish_reason is None for chunk in chunks[:-1])
    assert chunks[-1].finish_reason is not None
    for chunk in chunks[1:]:
        chunks[0].extend(chunk)
    return chunks[0]


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Ask again until it is so; the test's own time limit ends it otherwise."""
    while not await condition():
        await asyncio.sleep(0.01)


# --- streams -------------------------------------------------------------------------------------


async def test_a_stream_from_start_to_end():
    progress: list[tuple[str, int, int]] = []
    lines: list[str] = []
    async with running(
        on_progress=lambda *news: progress.append(news), on_log=lines.append
    ) as client:
        assert client.ready
        assert client.info is not None
        assert client.info.architecture == "FakeForCausalLM"
        assert client.startup_memory == await client.memory()
        assert progress == [("weights", 1, 2), ("weights", 2, 2)]
        chunk = await collect(client, request(text="héé ", max_tokens=12, logprobs=0))
        assert chunk.text == "héé héé "
        assert chunk.token_ids == list("héé héé ".encode())
        assert chunk.finish_reason is FinishReason.LENGTH
        assert chunk.stop_reason is None
        assert chunk.num_cached_tokens == 0
        assert chunk.queue_s == 0.25
        assert chunk.logprobs is not None
        assert [entry.token_id for entry in chunk.logprobs] == chunk.token_ids
    assert lines == ["fake engine is up"]


async def test_how_sequences_end():
    async with running() as client:
        by_eos = request(text="ab")
        by_eos.prompt_token_ids.append(EOS)
        chunk = await collect(client, by_eos)
        assert (chunk.text, chunk.finish_reason) == ("ab", FinishReason.STOP)
        assert chunk.token_ids == [97, 98, EOS]
        shown = await collect(client, by_eos, skip_special_tokens=False, include_stop=True)
        assert shown.text == "ab</s>"
        by_token = request(stop_token_ids=(ord("c"),))
        chunk = await collect(client, by_token)
        assert (chunk.text, chunk.stop_reason) == ("ab", ord("c"))
        assert (await collect(client, by_token, include_stop=True)).text == "abc"
        half = await collect(client, request(text="a😀", max_tokens=3))
        assert half.text == "a\ufffd"


async def test_stop_strings_end_the_sequence_in_the_engine_too():
    async with running() as client:
        endless = request(text="abcdef", max_tokens=None)
        chunk = await collect(client, endless, stop=["xyz", "fab"])
        assert (chunk.text, chunk.finish_reason, chunk.stop_reason) == ("abcde", "stop", "fab")
        chunk = await collect(client, endless, stop=["fab"], include_stop=True)
        assert chunk.text == "abcdefab"
        late = await collect(client, request(text="ab", min_tokens=5, max_tokens=50), stop=["a"])
        assert (late.text, late.stop_reason) == ("ababab", "a")
        held = await collect(client, request(text="abcd", max_tokens=4), stop=["cdX"])
        assert (held.text, held.finish_reason) == ("abcd", "length")

        async def engine_is_free() -> bool:
            return await client.requests() == []

        await until(engine_is_free)


async def test_a_hundred_streams_at_once():
    async with running() as client:
        texts = [f"request {i} " for i in range(100)]
        chunks = await asyncio.gather(
            *(
                collect(client, request(f"r{i}", text, max_tokens=50))
                for i, text in enumerate(texts)
            )
        )
        for text, chunk in zip(texts, chunks, strict=True):
            assert chunk.text == (text * 50)[:50]
        assert not client._recovery.live


async def test_errors_keep_their_class_and_code():
    async with running() as client:
        with pytest.raises(QueueFull, match="no room"):
            await collect(client, request(salt="refuse"))
        half = client.generate(request(salt="break"))
        text = ""
        while len(text) < 3:
            text += (await anext(half)).text
        assert text == "abc"
        with pytest.raises(AdapterUnavailable, match="bad file") as caught:
            await anext(half)
        assert caught.value.code == "adapter_corrupt"
        assert not client._recovery.live


async def test_what_cannot_be_sent_is_refused_and_keeps_nobody_from_going_on():
    """All that is live is submitted to the next engine at once."""
    async with running() as client:
        for number in (2**64, -(2**63) - 1):
            with pytest.raises(InvalidRequest, match="too large"):
                await collect(client, request(max_tokens=number))
        stream = asyncio.create_task(collect(client, request(text="abcd", max_tokens=300)))
        await until(lambda: _has_tokens(client, "r"))
        assert client._child is not None
        os.kill(client._child.pid, signal.SIGKILL)
        assert (await stream).text == "abcd" * 75
        assert not client._recovery.live


async def test_requests_with_equal_ids_do_not_mix():
    """Late news of a request that its stop string has ended must not reach its successor."""
    async with running() as client:
        for _ in range(20):
            endless = request("same", "abcdef", max_tokens=None)
            assert (await collect(client, endless, stop=["fab"])).text == "abcde"
            successor = request("same", "xyz", max_tokens=3)
            both = await asyncio.gather(*(collect(client, successor) for _ in range(2)))
            assert [chunk.text for chunk in both] == ["xyz", "xyz"]


# --- cancels and slow consumers ------------------------------------------------------------------


async def test_leaving_a_stream_cancels_it():
    """However it is left: closed, its task cancelled (a client that hangs up), or just dropped."""
    async with running() as client:

        async def read_for_ever(name: str) -> None:
            async for _ in client.generate(request(name, max_tokens=None)):
                started[name].set()

        async def read_one(name: str) -> None:
            async for _ in client.generate(request(name, max_tokens=None)):
                break

        started = {"cancelled": asyncio.Event()}
        task = asyncio.create_task(read_for_ever("cancelled"))
        await started["cancelled"].wait()
        waiting = asyncio.create_task(collect(client, request("stalled", salt="stall")))
        closed = client.generate(request("closed", max_tokens=None))
        await anext(closed)
        await read_one("dropped")
        gc.collect()

        async def all_alive() -> bool:
            alive = {info.request_id for info in await client.requests()}
            return alive >= {"cancelled", "stalled", "closed"}

        await until(all_alive)
        task.cancel()
        waiting.cancel()
        await closed.aclose()

        async def engine_is_free() -> bool:
            return await client.requests() == []

        await until(engine_is_free)
        assert not client._recovery.live
        assert (await collect(client, request("again"))).text == "abcabcabca"


async def test_a_slow_consumer_gets_all_in_one_chunk_and_slows_nobody():
    async with running() as client:
        slow = client.generate(request("slow", max_tokens=200, logprobs=0))
        first = await anext(slow)
        assert (await collect(client, request("quick", max_tokens=400))).token_ids
        rest = await anext(slow)
        assert rest.finish_reason is FinishReason.LENGTH
        assert len(first.token_ids) + len(rest.token_ids) == 200
        assert len(rest.logprobs or ()) == len(rest.token_ids)
        assert first.text + rest.text == ("abc" * 100)[:200]
        with pytest.raises(StopAsyncIteration):
            await anext(slow)


# --- calls and events ----------------------------------------------------------------------------


async def test_calls_and_events():
    async with running() as client:
        events: list[object] = []

        def failing(event: object) -> None:
            events.append(event)

        client.on_event(failing)
        assert (await client.load("d1")).state is AdapterState.DEVICE
        assert (await client.unpin("d1")).digest == "d1"
        assert (await client.evict("d1", tier="host")).host_bytes == 4
        assert (await client.forget("d1")).host_bytes == 3
        assert await client.adapters() == []
        assert await client.reset_prefix_cache() is True
        assert (await client.stats()).num_running == 0
        with pytest.raises(AdapterUnavailable, match="no adapter d2") as caught:
            await client.pin("d2")
        assert caught.value.code == "adapter_not_found"
        many = await asyncio.gather(*(client.evict("x", tier="t" * i) for i in range(20)))
        assert [freed.host_bytes for freed in many] == list(range(20))
        assert [e.digest for e in events if isinstance(e, AdapterEvent)] == ["d1"] * 3


async def test_stats_come_by_themselves_while_there_is_work():
    async with running() as client:
        await collect(client, request(max_tokens=5))

        async def idle_again() -> bool:
            return client.last_stats is not None and client.last_stats.num_running == 0

        await until(idle_again)


# --- deaths --------------------------------------------------------------------------------------


async def test_after_a_kill_streams_go_on_in_the_next_engine():
    lines: list[str] = []
    async with running(on_log=lines.append) as client:
        assert client._child is not None
        first_pid = client._child.pid
        texts = {f"r{i}": f"request {i} " for i in range(20)}
        streams = [
            asyncio.create_task(
                collect(client, request(name, text, max_tokens=300, logprobs=0), stop=["never"])
            )
            for name, text in texts.items()
        ]
        await until(lambda: _has_tokens(client, "r7"))
        asked = asyncio.create_task(client.memory())
        os.kill(first_pid, signal.SIGSTOP)  # so that the question is not answered first
        await asyncio.sleep(0.01)
        os.kill(first_pid, signal.SIGKILL)
        for (name, text), stream in zip(texts.items(), streams, strict=True):
            chunk = await stream
            assert chunk.text == (text * 300)[:300], name
            assert len(chunk.logprobs or ()) == len(chunk.token_ids) == 300
            assert chunk.finish_reason is FinishReason.LENGTH
        with suppress(EngineDead):  # it may have been quick enough
            await asked
        assert client._child.pid != first_pid
        assert client.num_restarts == 1
        assert client.supervision.resumed > 0
        assert any("requests go on then" in line for line in lines)
        assert not client._recovery.live


async def test_while_the_engine_restarts_new_requests_are_told_so():
    async with running("fake:slowly_again", restart_delay_s=0.05) as client:
        live = client.generate(request("live", max_tokens=500))
        text = (await anext(live)).text
        assert client._child is not None
        os.kill(client._child.pid, signal.SIGKILL)
        await until(lambda: _is(lambda: not client.ready))
        with pytest.raises(EngineDead, match="try again"):
            await collect(client, request())
        with pytest.raises(EngineDead):
            await client.memory()
        async for chunk in live:
            text += chunk.text
        assert text == ("abc" * 500)[:500]


async def test_an_unseeded_request_keeps_the_seed_it_was_given():
    """Sampling goes on as it would have, also where nobody chose a seed."""
    async with running() as client:
        live = client.generate(request("live", max_tokens=None))
        await anext(live)
        (one,) = client._recovery.live.values()
        assert one.request.sampling.seed is not None
        assert one.resumed().sampling.seed == one.request.sampling.seed
        await live.aclose()


async def test_a_stream_that_was_left_is_not_resumed():
    async with running() as client:
        live = client.generate(request("left", max_tokens=None))
        await anext(live)
        assert client._child is not None
        os.kill(client._child.pid, signal.SIGKILL)
        await until(lambda: _is(lambda: not client.ready))
        await live.aclose()
        await until(lambda: _is(lambda: client.ready))
        assert await client.requests() == []


@pytest.mark.parametrize(
    ("salt", "how"),
    [("crash", "SIGKILL"), ("exception", "exit code 1"), ("kill@0", "SIGKILL"), ("kill@4", "died")],
)
async def test_a_request_that_kills_the_engine_is_told_so_and_others_go_on(salt: str, how: str):
    lines: list[str] = []
    async with running(restart_delay_s=0.02, on_log=lines.append) as client:
        others = [
            asyncio.create_task(collect(client, request(f"o{i}", f"o{i} ", max_tokens=2000)))
            for i in range(5)
        ]
        await until(lambda: _has_tokens(client, "o0"))
        with pytest.raises(EngineError, match=how) as caught:
            await collect(client, request(salt=salt))
        assert caught.value.code == "request_kills_engine"
        for i, other in enumerate(others):
            assert (await other).text == (f"o{i} " * 2000)[:2000]
        assert client.num_restarts == 3
        if salt == "exception":
            assert any("a bug in the engine" in line for line in lines)


async def test_an_adapter_that_kills_engines_is_quarantined():
    use = (AdapterUse("d" * 64),)
    async with running(restart_delay_s=0.02) as client:
        bad = [
            msgspec.structs.replace(request(f"bad{i}", salt="kill@1"), adapters=use)
            for i in range(2)
        ]
        for killer in bad:
            with pytest.raises(EngineError, match="died 3 times"):
                await collect(client, killer)
            await until(lambda: _is(lambda: client.ready))
        assert list(client.supervision.quarantined) == ["d" * 64]
        with pytest.raises(AdapterUnavailable, match="quarantine") as caught:
            await collect(client, msgspec.structs.replace(request("good"), adapters=use))
        assert caught.value.code == "adapter_quarantined"
        assert (await collect(client, request("base"))).text == "abcabcabca"
        await client.load("d" * 64)  # an operator wants to see it again
        good = msgspec.structs.replace(request("good"), adapters=use)
        assert (await collect(client, good)).text == "abcabcabca"


async def test_pins_outlive_the_engine():
    async with running("fake:pins", restart_delay_s=0.02) as client:
        await client.pin("p1")
        await client.pin("p2")
        await client.unpin("p2")
        assert client._child is not None
        os.kill(client._child.pid, signal.SIGKILL)

        async def pinned_again() -> bool:
            if client.num_restarts == 0 or not client.ready:
                return False
            return [info.digest for info in await client.adapters()] == ["p1"]

        await until(pinned_again)


async def test_an_engine_whose_turn_does_not_end_is_killed():
    async with running(restart_delay_s=0.02, hang_timeout_s=1.0) as client:
        with pytest.raises(EngineError, match="died 3 times"):
            await collect(client, request(salt="hang"))


async def test_a_stopped_engine_is_replaced():
    async with running(silence_timeout_s=2.0) as client:
        stream = asyncio.create_task(collect(client, request("r", max_tokens=3000)))
        await until(lambda: _has_tokens(client, "r"))
        assert client._child is not None
        os.kill(client._child.pid, signal.SIGSTOP)
        assert (await stream).text == "abc" * 1000
        assert client.num_restarts == 1


async def test_engines_that_did_something_are_replaced_for_ever():
    """Only engines that come to nothing count as failures in a row."""
    async with running(restart_delay_s=1000) as client:
        stream = client.generate(request("r", max_tokens=None))
        for _ in range(8):
            while not (await anext(stream)).text or not client.ready:
                pass
            assert client._child is not None
            os.kill(client._child.pid, signal.SIGKILL)
            await until(lambda: _is(lambda: not client.ready))
        await anext(stream)
        assert client.num_restarts == 8
        await stream.aclose()


async def test_gives_up_after_failures_in_a_row(tmp_path: Path):
    async with running(f"fake:once={tmp_path / 'started'}", restart_delay_s=0.001) as client:
        assert client._child is not None
        os.kill(client._child.pid, signal.SIGKILL)

        async def given_up() -> bool:
            return client.failure is not None

        await until(given_up)
        assert client.failure == "5 failures in a row; the last: the disk is gone"
        with pytest.raises(EngineDead, match="down for good: 5 failures"):
            await collect(client, request())


@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        ("unsupported", ModelError, "needs 3 GiB more"),
        ("bug", ModelError, "FileNotFoundError: config.json"),
        ("die", EngineDead, r"signal 6 \(SIGABRT\).*\n.*about to fall over"),
    ],
)
async def test_a_start_that_fails_says_why(how: str, kind: type[Exception], message: str):
    client = new_client(f"fake:{how}")
    with pytest.raises(kind, match=f"(?s){message}"):
        await client.start()
    assert not client.ready
    await client.stop()


async def test_a_factory_that_does_not_exist_is_a_failed_start():
    client = new_client(factory="fake_engine:missing")
    with pytest.raises(ModelError, match="missing"):
        await client.start()


# --- the end -------------------------------------------------------------------------------------


async def test_stop_ends_streams_calls_and_the_process():
    client = new_client()
    await client.start()
    assert client._child is not None
    pid = client._child.pid
    live = asyncio.create_task(collect(client, request(max_tokens=None)))
    await until(lambda: _has_tokens(client, "r"))
    await client.stop()
    with pytest.raises(EngineDead, match="shutting down"):
        await live
    assert not psutil.pid_exists(pid)
    await client.stop()  # twice does no harm


async def _has_tokens(client: EngineClient, name: str) -> bool:
    streams = [live.stream for live in client._recovery.live.values()]
    return any(s.request.request_id == name and s.token_ids for s in streams)


async def _is(condition: Callable[[], bool]) -> bool:
    return condition()


async def test_stop_kills_an_engine_that_does_not_answer():
    client = new_client()
    await client.start()
    assert client._child is not None
    pid = client._child.pid
    hanging = asyncio.create_task(collect(client, request(salt="hang")))
    await asyncio.sleep(0)
    await client.stop(deadline_s=0.2)
    assert not psutil.pid_exists(pid)
    with pytest.raises(EngineDead):
        await hanging


async def test_a_start_can_be_cancelled():
    client = new_client("fake:slow")
    start = asyncio.create_task(client.start())

    async def launched() -> bool:
        return client._child is not None

    await until(launched)
    assert client._child is not None
    pid = client._child.pid
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    assert not psutil.pid_exists(pid)


def test_no_orphan_when_the_parent_is_killed():
    """kill -9 of the API process must not leave an engine that holds the device."""
    code = (
        "import asyncio, pathlib\n"
        "from loraplex.engine.client import EngineClient\n"
        "from loraplex.engine.config import EngineConfig\n"
        "async def main():\n"
        "    config = EngineConfig(model='fake', adapter_dir=pathlib.Path('x'))\n"
        "    client = EngineClient(config, factory='fake_engine:build')\n"
        "    await client.start()\n"
        "    print(client._child.pid, flush=True)\n"
        "    await asyncio.sleep(1000)\n"
        "asyncio.run(main())\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as parent:
        assert parent.stdout is not None
        engine = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
        parent.wait()
        gone, alive = psutil.wait_procs([engine], timeout=10)
    assert gone
    assert not alive


# --- one stream by itself ------------------------------------------------------------------------


def fed(*outputs: SequenceOutput, stop: tuple[str, ...], min_tokens: int = 0) -> TextChunk:
    from fake_engine import byte_tokenizer

    stream = Stream(
        request(min_tokens=min_tokens), Tokenizer(byte_tokenizer().to_str(), {}), stop=stop
    )
    for output in outputs:
        stream.feed(output)
    assert stream._pending is not None
    assert stream.ended is (stream._pending.finish_reason is not None)
    return stream._pending


@pytest.fixture
def fake_engine_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(HERE))


@pytest.mark.usefixtures("fake_engine_here")
def test_tokens_after_a_stop_string_do_not_count():
    """An engine that sends several tokens at once may have gone past the end."""
    ids = list(b"abcdef")
    chunk = fed(
        SequenceOutput(
            request_id="r",
            token_ids=ids,
            logprobs=[TokenLogprobs(i, 0.0, 1, [], []) for i in ids],
            finish_reason=FinishReason.LENGTH,
        ),
        stop=("cd",),
    )
    assert (chunk.text, chunk.stop_reason, chunk.finish_reason) == ("ab", "cd", "stop")
    assert chunk.token_ids == ids[:4]
    assert len(chunk.logprobs or ()) == 4
