"""An engine of fakes: a device that runs steps late, a loader that obeys, and a bench that checks
all.

The fake device keeps a KV memory. A step writes what each scheduled token is (token, position,
composition), reads back the whole context of each sequence through its block table, and derives
the next token from what it *read*. So a block shared by mistake, lost or overwritten shows as a
wrong token. With a depth above 0 it runs each step as late as it may, when it is collected, on what
`launch` copied: whatever the engine has changed too early by then shows as well.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from grammar_fakes import FakeCompiler, HandDriven, allowed_tokens

from loraplex.adapters.errors import AdapterNotFound
from loraplex.adapters.frames import Frames
from loraplex.adapters.residency import AdapterSize, LoadDone, Stage
from loraplex.adapters.slots import AdapterSlots
from loraplex.engine import api
from loraplex.engine.activation import Span
from loraplex.engine.api import AdapterUse, FinishReason, GenerationRequest, SamplingParams
from loraplex.engine.block_manager import BlockManager
from loraplex.engine.config import EngineConfig
from loraplex.engine.constraints import Constraints
from loraplex.engine.engine import Engine
from loraplex.engine.memory_exchange import MemoryExchange
from loraplex.engine.seams import Schedule, ScheduledSequence, StepSample
from loraplex.engine.superblocks import Division

VOCAB = 50
EOS = 49
BLOCK = 4
SIZES = {"a": 10, "b": 10, "c": 20, "d": 40, "huge": 1000}  # device bytes
SIZES |= {"x": 10, "y": 10}  # activated LoRAs
INVOCATIONS = {"x": (3, 4), "y": (5,)}
DEVICE_BYTES = 40
FRAME_BYTES = 10
NO_MEMORY = "no memory behind it"


# --- what the fake model says -------------------------------------------------------------------

Composition = tuple[tuple[str, float], ...]
Model = Callable[[list[int], list[Composition]], int]


def next_token(tokens: list[int], applied: list[Composition]) -> int:
    """What the fake model says after these tokens, to each of which these adapters were applied.
    Never eos, so lengths are the test's choice.
    """
    return zlib.crc32(repr((tokens, applied)).encode()) % EOS


def composition_at(request: GenerationRequest, position: int) -> Composition:
    prompt = request.prompt_token_ids

    def applies(digest: str) -> bool:
        wanted = list(INVOCATIONS.get(digest, ()))
        places = [i for i in range(len(prompt)) if prompt[i : i + len(wanted)] == wanted]
        return not wanted or (bool(places) and places[-1] <= position)

    uses = request.adapters
    return tuple(sorted((u.digest, u.weight) for u in uses if u.weight and applies(u.digest)))


def choose(token: int, suppressed: Collection[int]) -> int:
    while token in suppressed:
        token = (token + 1) % VOCAB
    return token


def expected(
    request: GenerationRequest, max_model_len: int, model: Model = next_token
) -> tuple[list[int], FinishReason]:
    """The output tokens of a request that is left alone, and why it ends."""
    params, tokens = request.sampling, list(request.prompt_token_ids)
    if params.grammar is not None:
        return expected_in_grammar(request, max_model_len, model)
    stops = {*params.stop_token_ids, *(() if params.ignore_eos else (EOS,))}
    max_tokens = max_model_len if params.max_tokens is None else params.max_tokens
    output: list[int] = []
    while True:
        is_early = len(output) < params.min_tokens
        applied = [composition_at(request, i) for i in range(len(tokens))]
        token = choose(model(tokens, applied), stops if is_early else ())
        tokens.append(token)
        output.append(token)
        if token in stops and not is_early:
            return output, FinishReason.STOP
        if len(tokens) >= max_model_len or len(output) >= max_tokens:
            return output, FinishReason.LENGTH


def expected_in_grammar(
    request: GenerationRequest, max_model_len: int, model: Model
) -> tuple[list[int], FinishReason]:
    """The same with a grammar, whose end may be put off but not its last one."""
    params, tokens = request.sampling, list(request.prompt_token_ids)
    assert params.grammar is not None
    max_tokens = max_model_len if params.max_tokens is None else params.max_tokens
    output: list[int] = []
    while True:
        allowed = allowed_tokens(params.grammar, output, VOCAB, EOS)
        is_early = len(output) < params.min_tokens
        ends = {EOS} if is_early or params.ignore_eos else set()
        ends |= set(params.stop_token_ids) if is_early else set()
        allowed = allowed - ends or allowed
        applied = [composition_at(request, i) for i in range(len(tokens))]
        token = choose(model(tokens, applied), set(range(VOCAB)) - allowed)
        tokens.append(token)
        output.append(token)
        if token == EOS or (token in params.stop_token_ids and not is_early):
            return output, FinishReason.STOP
        if len(tokens) >= max_model_len or len(output) >= max_tokens:
            return output, FinishReason.LENGTH


# --- the device ---------------------------------------------------------------------------------


class OnFire(RuntimeError):
    """A failure that a test asked for."""


@dataclass
class Row:
    """What `launch` copies of a scheduled sequence."""

    seq_id: int
    start: int
    tokens: list[int] | None  # None: what this sequence sampled last
    table: list[int]
    loads: dict[str, int]  # which load of each adapter
    spans: tuple[Span, ...]
    samples: bool
    suppressed: frozenset[int]
    prompt_logprobs: list[api.TokenLogprobs] | None

    def slot(self, position: int) -> int:
        return self.table[position // BLOCK] * BLOCK + position % BLOCK

    def applied(self, position: int) -> Composition:
        uses = next(uses for first, uses in reversed(self.spans) if first <= position)
        return tuple((use.digest, use.weight) for use in uses)


@dataclass(eq=False)
class Step:
    number: int
    rows: list[Row]
    released: list[int]
    fails: bool
    samples: list[StepSample] | None = None  # when it has run


class FakeRunner:
    """max_in_flight = 0 runs a step when it is launched.

    `events` tells the calls in order. `bugs` are breaches of the contract found inside a call,
    where the engine would take them for a failure of the device.
    """

    def __init__(self, num_blocks: int, loader: FakeLoader, max_in_flight: int = 0) -> None:
        self.max_in_flight = max_in_flight
        self.kv: list[Any] = [None] * (num_blocks * BLOCK)
        self.last: dict[int, int] = {}  # sampled last, by seq_id
        self.model: Model = next_token
        self.fail_next = False  # to launch
        self.fail_next_run = False  # on the device
        self.batches: list[Schedule] = []
        self.events: list[str] = []
        self.bugs: list[Exception] = []
        self._loader = loader
        self._queue: deque[Step] = deque()  # launched, not collected

    def launch(self, schedule: Schedule) -> Step:
        try:
            return self._launch(schedule)
        except Exception as error:
            self._note(error)
            raise

    def collect(self, handle: Step) -> list[StepSample]:
        try:
            return self._collect(handle)
        except Exception as error:
            self._note(error)
            raise

    def _note(self, error: Exception) -> None:
        if not isinstance(error, OnFire):
            self.bugs.append(error)

    def _launch(self, schedule: Schedule) -> Step:
        self.events.append(f"launch {len(self.batches)}")
        assert schedule.scheduled, "an empty step is launched"
        assert len(self._queue) <= self.max_in_flight, "too many steps in flight"
        step = Step(
            number=len(self.batches),
            rows=[self._copy(item) for item in schedule.scheduled],
            released=list(schedule.released_seq_ids),
            fails=self.fail_next_run,
        )
        self.batches.append(schedule)
        self.fail_next_run = False
        if self.fail_next:
            self.fail_next = False
            raise OnFire("device on fire")
        self._queue.append(step)
        if self.max_in_flight == 0:
            self._run(step)
        return step

    def _copy(self, item: ScheduledSequence) -> Row:
        seq, end = item.seq, item.start + item.num_tokens
        if item.feeds_back:
            assert seq.num_pending > 0, "nothing is pending"
            assert item.start == seq.num_tokens - 1, "only the last pending token can be run"
            assert item.is_decode
        else:
            assert seq.num_pending == 0, "a pending token is passed over"
            assert end <= len(seq.token_ids), "an unknown token is to run"
        assert end < seq.max_num_tokens, "nobody asks what follows the last token"
        assert item.samples == (end == seq.num_tokens)
        is_early = seq.num_output_tokens < seq.sampling.min_tokens
        has_ends = bool(seq.eos_token_ids or seq.sampling.stop_token_ids)
        assert bool(seq.suppressed_token_ids) == (is_early and has_ends and not seq.has_grammar)
        suppressed = seq.suppressed_token_ids
        if seq.has_grammar:
            assert not seq.lacks_mask, "it runs without knowing what its grammar allows"
            assert seq.mask is not None
            suppressed = frozenset(
                token for token in range(VOCAB) if not seq.mask[token // 32] >> token % 32 & 1
            )
        prompt_logprobs = [
            api.TokenLogprobs(seq.token_ids[i], 0.0, 1, [], [])
            for i in range(item.start + 1, item.start + 1 + item.num_prompt_logprobs)
        ]
        return Row(
            seq_id=seq.seq_id,
            start=item.start,
            tokens=None if item.feeds_back else seq.token_ids[item.start : end],
            table=list(seq.block_table),
            loads={digest: self._loader.installed[digest] for digest in seq.digests},
            spans=seq.spans,
            samples=item.samples,
            suppressed=suppressed,
            prompt_logprobs=prompt_logprobs or None,
        )

    def _collect(self, step: Step) -> list[StepSample]:
        self.events.append(f"collect {step.number}")
        assert step is self._queue.popleft(), "collected out of order"
        if step.samples is None and not step.fails:
            self._run(step)
        if step.fails:
            for later in self._queue:  # they build on it, and nobody knows what they do
                later.samples = [StepSample(0 if row.samples else None) for row in later.rows]
            raise OnFire("device on fire")
        assert step.samples is not None
        return step.samples

    def _run(self, step: Step) -> None:
        if step.fails:
            return
        for seq_id in step.released:
            self.last.pop(seq_id, None)
        written: set[int] = set()
        for row in step.rows:
            for digest, load in row.loads.items():
                found = self._loader.installed.get(digest)
                assert found == load, f"adapter {digest} was overwritten under a step"
            tokens = [self.last[row.seq_id]] if row.tokens is None else row.tokens
            for position, token in enumerate(tokens, row.start):
                slot = row.slot(position)
                assert slot not in written, "two tokens write one slot"
                written.add(slot)
                assert self.kv[slot] is not NO_MEMORY, "written where no memory is"
                self.kv[slot] = (token, position, row.applied(position))
        step.samples = [self._sample(row) for row in step.rows]

    def _sample(self, row: Row) -> StepSample:
        if not row.samples:
            return StepSample(None, prompt_logprobs=row.prompt_logprobs)
        end = row.start + (1 if row.tokens is None else len(row.tokens))
        read = [self.kv[row.slot(i)] for i in range(end)]
        assert [position for _, position, _ in read] == list(range(end))
        applied = [composition for _, _, composition in read]
        assert applied == [row.applied(position) for position in range(end)]
        token = choose(self.model([token for token, _, _ in read], applied), row.suppressed)
        self.last[row.seq_id] = token
        return StepSample(token, prompt_logprobs=row.prompt_logprobs)


class FakeLoader:
    """Ends loads when told to, or at once."""

    def __init__(self, *, at_once: bool, frames: Frames | None = None) -> None:
        self.frames = frames  # where memory is shared; all of an adapter's size
        self._held: dict[str, list[int]] = {}
        self.at_once = at_once
        self.under_way: list[tuple[str, Stage]] = []
        self.installed: dict[str, int] = {}  # on the device, with the number of the load
        self._num_loads = 0
        self._done: list[LoadDone] = []

    def describe(self, digest: str) -> AdapterSize:
        if digest not in SIZES:
            raise AdapterNotFound(f"no adapter {digest} in the store")
        size = SIZES[digest]
        return AdapterSize(16, 1, size, size, INVOCATIONS.get(digest, ()))

    def begin_host_load(self, digest: str) -> None:
        self._begin(digest, Stage.HOST)

    def begin_device_load(self, digest: str) -> None:
        if self.frames is not None:
            num_frames = SIZES[digest] // FRAME_BYTES
            assert num_frames <= self.frames.num_free, "no room for it"
            self._held[digest] = self.frames.take(digest, num_frames)
        self._begin(digest, Stage.DEVICE)

    def _begin(self, digest: str, stage: Stage) -> None:
        self.under_way.append((digest, stage))
        if self.at_once:
            self.finish(0)

    def finish(self, index: int, *, ok: bool = True) -> None:
        digest, stage = self.under_way.pop(index)
        self._done.append(LoadDone(digest, stage, ok, 0.1, "" if ok else "disk on fire"))

    def succeed_from_now_on(self) -> None:
        self.at_once = True
        while self.under_way:
            self.finish(0)

    def drop_device(self, digest: str) -> int:
        del self.installed[digest]
        self._give_back(digest)
        return SIZES[digest]

    def _give_back(self, digest: str) -> None:
        if self.frames is not None:
            self.frames.give_back(digest, self._held.pop(digest))

    def drop_host(self, digest: str) -> int:
        return SIZES[digest]

    def forget(self, digest: str) -> None:
        assert digest not in self.installed

    def poll(self) -> list[LoadDone]:
        done, self._done = self._done, []
        for load in done:
            if load.stage is Stage.DEVICE and load.ok:
                self._num_loads += 1
                self.installed[load.digest] = self._num_loads
            elif load.stage is Stage.DEVICE:
                self._give_back(load.digest)
        return done

    def check_invariants(self) -> None:
        if self.frames is not None:
            self.frames.check_invariants(self._held)


# --- memory that is shared ----------------------------------------------------------------------


class FakePool:
    frame_bytes = FRAME_BYTES

    def __init__(self, division: Division) -> None:
        self.frames = Frames(
            division.max_adapter_superblocks,
            division.frames_per_superblock,
            division.adapter_superblocks,
        )

    def is_quiet(self, superblock: int) -> bool:
        return True


class FakeMover:
    """Takes the memory away at once: a step in flight that still reads it is found out."""

    def __init__(self, division: Division, runner: FakeRunner, pool: FakePool) -> None:
        self.size = division.blocks_per_superblock * BLOCK
        self.runner = runner
        self.pool = pool
        self.fails = False
        for superblock in range(division.kv_superblocks, division.max_kv_superblocks):
            self._fill(superblock, NO_MEMORY)

    def _fill(self, superblock: int, content: object) -> None:
        first = superblock * self.size
        self.runner.kv[first : first + self.size] = [content] * self.size

    def to_adapters(self, kv_superblock: int, adapter_superblock: int) -> None:
        assert self.runner.kv[kv_superblock * self.size] is not NO_MEMORY
        assert adapter_superblock not in self.pool.frames.owned
        self._fill(kv_superblock, NO_MEMORY)
        if self.fails:
            raise RuntimeError("the driver is on fire")

    def to_kv(self, adapter_superblock: int, kv_superblock: int) -> None:
        assert self.runner.kv[kv_superblock * self.size] is NO_MEMORY
        assert adapter_superblock not in self.pool.frames.owned
        if self.fails:
            raise RuntimeError("the driver is on fire")
        self._fill(kv_superblock, None)


# --- the bench ----------------------------------------------------------------------------------

MODEL = api.ModelInfo(
    name="fake", architecture="Fake", dtype="float32", device="cpu", backend="torch",
    vocab_size=VOCAB, max_model_len=64, num_layers=1, eos_token_ids=[EOS], bos_token_id=None,
    tokenizer_json="", chat_template=None, special_tokens={}, generation_defaults={}, modules=[],
    num_parameters=1,
)  # fmt: skip
MEMORY = api.MemoryInfo(
    weights_bytes=1, kv_cache_bytes=1, kv_block_bytes=1, kv_blocks_total=0, kv_blocks_used=0,
    kv_blocks_cached=0, block_size=0, adapter_bytes_total=0, adapter_bytes_used=0,
    adapter_page_bytes=1, host_adapter_bytes_total=0, host_adapter_bytes_used=0,
    workspace_bytes=0, device_bytes_total=9, device_bytes_free=8,
)  # fmt: skip


class Bench:
    """An engine of fakes with a clock driven by hand; every output is collected and checked."""

    def __init__(
        self,
        *,
        max_in_flight: int = 0,
        num_blocks: int = 64,
        max_num_seqs: int = 8,
        max_num_batched_tokens: int = 32,
        max_num_waiting: int = 100,
        at_once: bool = True,
        host_bytes: int = 60,
        prefix_cache: bool = True,
        masks_at_once: bool = True,
        division: Division | None = None,
    ) -> None:
        """division: of memory shared by blocks and adapters, instead of `num_blocks` and
        `DEVICE_BYTES`.
        """
        self.now = 100.0
        pool = None if division is None else FakePool(division)
        min_blocks = max_blocks = num_blocks
        device_bytes = device_bytes_max = DEVICE_BYTES
        if division is not None:
            size = division.blocks_per_superblock
            num_blocks = division.kv_superblocks * size
            min_blocks, max_blocks = division.kv_floor * size, division.max_kv_superblocks * size
            frame_bytes = division.frames_per_superblock * FRAME_BYTES
            device_bytes = division.adapter_superblocks * frame_bytes
            device_bytes_max = division.max_adapter_superblocks * frame_bytes
        self.max_model_len = min(MODEL.max_model_len, min_blocks * BLOCK)
        self.loader = FakeLoader(at_once=at_once, frames=pool.frames if pool else None)
        self.runner = FakeRunner(max_blocks, self.loader, max_in_flight)
        self.slots = AdapterSlots(
            self.loader,
            device_bytes_total=device_bytes,
            device_bytes_max=device_bytes_max,
            host_bytes_total=host_bytes,
            clock=lambda: self.now,
        )
        self.blocks = BlockManager(
            num_blocks,
            BLOCK,
            enable_prefix_cache=prefix_cache,
            max_blocks=max_blocks,
            blocks_per_superblock=division.blocks_per_superblock if division else None,
            clock=lambda: self.now,
        )
        self.exchange: MemoryExchange | None = None
        if division is not None and pool is not None:
            self.mover = FakeMover(division, self.runner, pool)
            self.exchange = MemoryExchange(
                division, self.blocks, self.slots, pool, self.mover, lambda: self.now
            )
        self.compiler = FakeCompiler(VOCAB, EOS)
        self.compile_jobs = HandDriven(at_once=masks_at_once)
        self.mask_jobs = HandDriven(at_once=masks_at_once)
        self.num_calls = 0
        self.answers: dict[int, api.Answer] = {}
        self.events: list[api.AdapterEvent] = []
        self.engine = Engine(
            EngineConfig(
                model="fake",
                adapter_dir=Path("unused"),
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max_num_batched_tokens,
                max_num_waiting=max_num_waiting,
            ),
            MODEL,
            self.runner,
            self.slots,
            self.blocks,
            lambda: MEMORY,
            constraints=Constraints(
                self.compiler,
                vocab_size=VOCAB,
                eos_token_ids=frozenset([EOS]),
                compile_workers=self.compile_jobs,
                mask_workers=self.mask_jobs,
            ),
            exchange=self.exchange,
            on_news=self._hear,
            clock=lambda: self.now,
        )
        self.requests: dict[str, GenerationRequest] = {}
        self.tokens: dict[str, list[int]] = {}
        self.ends: dict[str, api.SequenceOutput] = {}
        self.firsts: dict[str, api.SequenceOutput] = {}

    def _hear(self, news: api.Answer | api.AdapterEvent) -> None:
        if isinstance(news, api.AdapterEvent):
            self.events.append(news)
        else:
            assert news.call_id not in self.answers, "two answers to one call"
            self.answers[news.call_id] = news

    def add(
        self,
        prompt: list[int],
        adapters: dict[str, float] | None = None,
        *,
        priority: int = 0,
        salt: str = "",
        **sampling: Any,
    ) -> str:
        request = GenerationRequest(
            request_id=f"r{len(self.requests)}",
            prompt_token_ids=prompt,
            sampling=SamplingParams(**{"max_tokens": 4, **sampling}),
            adapters=tuple(AdapterUse(d, w) for d, w in (adapters or {}).items()),
            priority=priority,
            cache_salt=salt,
        )
        self.engine.add(request)
        self.requests[request.request_id] = request
        self.tokens[request.request_id] = []
        return request.request_id

    def step(self) -> None:
        self.now += 0.125
        for output in self.engine.step():
            name = output.request_id
            assert name not in self.ends, "news after the end"
            if output.token_ids and not self.tokens[name]:
                self.firsts[name] = output
            self.tokens[name] += output.token_ids
            if output.finish_reason is not None:
                self.ends[name] = output
                assert (output.error is not None) == (output.finish_reason is FinishReason.ERROR)
        for bug in self.runner.bugs:
            raise bug
        self.engine.check_invariants()
        self.loader.check_invariants()

    def step_until(self, done: Callable[[], object], limit: int = 500) -> None:
        for _ in range(limit):
            if done():
                return
            self.step()
        raise AssertionError(f"not so after {limit} steps")

    def run(self, limit: int = 500) -> None:
        self.step_until(lambda: not self.engine.has_work(), limit)

    def call(self, method: str, **fields: Any) -> int:
        self.num_calls += 1
        call_id = 1000 + self.num_calls
        self.engine.call(api.Call(call_id, method, **fields))
        return call_id

    def result(self, call_id: int, kind: type[Any]) -> Any:
        answer = self.answers[call_id]
        assert answer.error is None, answer.error
        return msgspec.msgpack.decode(answer.result, type=kind)

    def check_tokens(self, name: str) -> None:
        """All that came is what the model says, and if the request was left alone, all of it."""
        tokens, reason = expected(self.requests[name], self.max_model_len, self.runner.model)
        got = self.tokens[name]
        assert got == tokens[: len(got)]
        end = self.ends.get(name)
        if end is not None and end.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
            assert (got, end.finish_reason) == (tokens, reason)

    def check_over(self) -> None:
        """Every request has ended once, and nothing is held any more."""
        assert self.ends.keys() == self.requests.keys()
        for name in self.requests:
            self.check_tokens(name)
        assert self.blocks.num_used_blocks == 0
        assert all(r.running == 0 and not r.wants for r in self.slots.residents())
