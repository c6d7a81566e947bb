"""The engine: takes requests in, runs steps, hands outputs back. Synchronous, one thread, no
torch.

    step:  take in loads, masks -> orders -> schedule -> launch -> settle -> outputs

What `settle` waits for is this step on a CPU and the one before it on a GPU, which so runs on
while the next step is prepared (`in_flight.py`).

It is put together from ready parts (`engine/build.py`), so it runs the same in a process of its
own, in a notebook and in a test with fakes. It knows tokens, never text. Every accepted request
ends in exactly one terminal output, whatever happens to the step, the adapter or the caller.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable

import msgspec

from loraplex.adapters.books import Rank
from loraplex.adapters.errors import AdapterError
from loraplex.adapters.residency import AdapterState, Transition
from loraplex.adapters.slots import AdapterSlots
from loraplex.engine import api
from loraplex.engine.api import ErrorInfo, FinishReason, SequenceOutput
from loraplex.engine.block_manager import BlockManager
from loraplex.engine.config import EngineConfig
from loraplex.engine.constraints import Constraints
from loraplex.engine.errors import AdapterUnavailable, EngineError, InvalidRequest
from loraplex.engine.fair_order import FairOrder, Place
from loraplex.engine.in_flight import InFlight, StepInFlight
from loraplex.engine.memory_exchange import MemoryExchange
from loraplex.engine.orders import Orders, engine_error, error_info, residency_info
from loraplex.engine.scheduler import Scheduler
from loraplex.engine.seams import Prober, Runner, Schedule, StepSample
from loraplex.engine.sequence import Sequence, canonical_composition
from loraplex.engine.validation import check_composition, validate_request

logger = logging.getLogger(__name__)

News = api.Answer | api.AdapterEvent

# How long a step may wait for the grammar masks of running sequences. One takes 0.05 ms as a rule,
# and whoever has none by then sits the step out.
MASK_WAIT_S = 0.002
_MAX_FAILED_IN_A_ROW = 2  # steps
_MAX_FAILED_STEPS = 3  # of one sequence, without a token between


class Engine:
    """All methods but `wake` and `idle_wait` belong to one thread.

    `memory` gives the bytes that do not change, and those of the machine; the engine fills in
    what is used. `on_news` is called, during `call` and `step`, with answers to calls and changes
    of residency.
    """

    def __init__(
        self,
        config: EngineConfig,
        model: api.ModelInfo,
        runner: Runner,
        slots: AdapterSlots,
        blocks: BlockManager,
        memory: Callable[[], api.MemoryInfo],
        *,
        exchange: MemoryExchange | None = None,
        prober: Prober | None = None,
        constraints: Constraints | None = None,
        order: FairOrder | None = None,
        on_news: Callable[[News], None] = lambda news: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.model = model
        self.on_news = on_news
        self.on_wake: Callable[[], None] = lambda: None  # called by `wake`, in its thread
        # Called with the ids of all requests that a launched step computes, or the next will.
        self.on_run: Callable[[list[str]], None] = lambda request_ids: None
        self._runner = runner
        self._slots = slots
        self._blocks = blocks
        self._memory = memory
        self._exchange = exchange
        self._prober = prober
        self._constraints = constraints
        self._clock = clock
        self._wake = threading.Event()
        self._in_flight = InFlight(slots.release)
        if exchange is not None:
            exchange.when_settled = self._in_flight.when_settled
        max_num_seqs, max_num_batched_tokens = config.step_sizes
        self._scheduler = Scheduler(
            blocks,
            slots,
            self._in_flight,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_num_waiting=config.max_num_waiting,
        )
        self._max_model_len = min(model.max_model_len, blocks.min_blocks * blocks.block_size)
        self._eos_token_ids = frozenset(model.eos_token_ids)
        self._sequences: dict[str, Sequence] = {}  # every live one by request id
        self._by_rank: dict[Rank, Sequence] = {}
        self._outputs: list[SequenceOutput] = []
        self._num_ranks = 0
        self._fair = order or FairOrder()
        self.is_broken = False  # steps fail for good: what it holds is not to be trusted
        self._num_failed_in_a_row = 0
        self._ran = False  # the last step had something to run
        self._num_steps = 0
        self._num_step_tokens = 0
        self._step_token_counts = [0] * (len(api.STEP_TOKEN_BOUNDS) + 1)
        self._num_prompt_tokens = 0
        self._num_generation_tokens = 0
        self._orders = Orders(self, slots, self._tell, clock)
        slots.on_transition = self._on_transition

    # --- requests -------------------------------------------------------------------------------

    def add(self, request: api.GenerationRequest) -> None:
        """Accept a request: from now on it ends in exactly one terminal output.

        Raises: InvalidRequest, AdapterUnavailable, QueueFull; then nothing has changed.
        """
        if request.request_id in self._sequences:
            raise InvalidRequest(f"request_id {request.request_id!r} is in use by a live request")
        validate_request(request, self.model, self._max_model_len)
        if request.sampling.grammar is not None and self._constraints is None:
            raise InvalidRequest(
                "this engine does not follow grammars", code="unsupported_parameter"
            )
        self._scheduler.check(len(request.prompt_token_ids))
        digests = [use.digest for use in canonical_composition(request.adapters)]
        try:
            self._slots.check(digests)
        except AdapterError as error:
            raise engine_error(error) from error
        check_composition(request.adapters, self._slots.needing_weight_one(digests))
        seed = request.sampling.seed
        seq = Sequence.from_request(
            request,
            seq_id=self._num_ranks,
            arrival_time=self._clock(),
            max_model_len=self._max_model_len,
            eos_token_ids=self._eos_token_ids,
            seed=secrets.randbits(63) if seed is None else seed,
            invocations=self._slots.invocations(digests),
            place=self._place(request, tuple(digests)),
        )
        self._num_ranks += 1
        self._sequences[seq.request_id] = self._by_rank[seq.order] = seq
        self._scheduler.add(seq)
        if self._constraints is not None and seq.has_grammar:
            self._constraints.begin(seq)

    def _place(self, request: api.GenerationRequest, digests: tuple[str, ...]) -> Place:
        prompt, sampling = len(request.prompt_token_ids), request.sampling
        room = self._max_model_len - prompt
        return self._fair.come(
            (request.tenant, digests),
            self._num_ranks,
            num_prompt_tokens=prompt,
            max_output_tokens=0 if request.pooling else min(sampling.max_tokens or room, room),
            pages_to_load=self._slots.pages_to_load(digests),
            priority=request.priority,
            share=request.share,
        )

    def cancel(self, request_id: str) -> bool:
        """End a request; what it held is given back (`in_flight.py`), its last output comes with
        the next step.

        False when there is no such live request (it may just have ended).
        """
        seq = self._sequences.get(request_id)
        if seq is None:
            return False
        self._end(seq, SequenceOutput(request_id=request_id, finish_reason=FinishReason.ABORT))
        return True

    @property
    def ran_last_step(self) -> bool:
        """The last step had something to run or to settle, so the next one may have, too."""
        return self._ran

    def has_work(self) -> bool:
        """There is a reason to call `step`."""
        return bool(
            self._sequences
            or self._in_flight
            or self._outputs
            or len(self._orders)
            or self._slots.is_loading
        )

    # --- the step -------------------------------------------------------------------------------

    def step(self) -> list[SequenceOutput]:
        """Run one step and return its news. Never waits for a load: without anything to run it
        returns at once.
        """
        self._wake.clear()
        self._take_in_loads()
        self._take_in_masks()
        self._orders.poll()
        schedule = self._scheduler.schedule()
        self._ran = bool(schedule.scheduled or self._in_flight)
        if schedule.scheduled:
            self._launch(schedule)
        stay_in_flight = self._runner.max_in_flight if schedule.scheduled else 0
        while len(self._in_flight) > stay_in_flight:
            self._settle_oldest()
        if self._ran:
            self._tell_who_runs()
        outputs, self._outputs = self._outputs, []
        return outputs

    def idle_wait(self, timeout_s: float) -> None:
        """After a step that had nothing to run: sleep until `wake`, at most `timeout_s`. Else
        return at once.
        """
        if not self._ran and not self._outputs:
            self._wake.wait(timeout_s)

    def wake(self) -> None:
        """End an `idle_wait`, now or to come before the next step: something arrived. From any
        thread.
        """
        self._wake.set()
        self.on_wake()

    def _take_in_loads(self) -> None:
        if self._exchange is not None:
            self._exchange.poll()
        for failed in self._slots.advance():
            seq = self._by_rank.get(failed.rank)
            if seq is None:
                self._orders.want_failed(failed)
                continue
            self._fail(seq, error_info(AdapterUnavailable(failed.message, code=failed.code)))

    def _take_in_masks(self) -> None:
        if self._constraints is not None:
            for seq, error in self._constraints.poll(self._scheduler.running, MASK_WAIT_S):
                self._fail(seq, error_info(error))

    def _launch(self, schedule: Schedule) -> None:
        self._note_first_scheduled(schedule)
        self._tell_who_runs(schedule)
        try:
            handle = self._runner.launch(schedule)
        except Exception as error:
            self._fail_step([item.seq for item in schedule.scheduled], error)
        else:
            self._in_flight.add(schedule, handle)
            self._scheduler.advance(schedule)

    def _tell_who_runs(self, schedule: Schedule | None = None) -> None:
        running = [seq.request_id for seq in self._in_flight.sequences]
        if schedule is not None:
            running += [item.seq.request_id for item in schedule.scheduled]
        self.on_run(running)

    def _settle_oldest(self) -> None:
        step = self._in_flight.oldest
        try:
            samples = self._runner.collect(step.handle)
            assert len(samples) == len(step.schedule.scheduled), "one sample per sequence"
        except Exception as error:
            # The steps launched after it build on it; they are collected, too, but for nobody.
            self._fail_step(self._in_flight.sequences, error)
            self._in_flight.settle_oldest()
        else:
            self._in_flight.settle_oldest()
            self._update(step, samples)

    def _note_first_scheduled(self, schedule: Schedule) -> None:
        for item in schedule.scheduled:
            seq = item.seq
            if seq.first_scheduled_time is None:
                seq.first_scheduled_time = self._clock()
                seq.num_cached_tokens = item.start
                self._fair.serve(seq.place)
                self._num_prompt_tokens += seq.num_prompt_tokens

    def _update(self, step: StepInFlight, samples: list[StepSample]) -> None:
        self._num_steps += 1
        self._num_step_tokens += step.schedule.num_tokens
        self._step_token_counts[bisect_left(api.STEP_TOKEN_BOUNDS, step.schedule.num_tokens)] += 1
        for item, sample in zip(step.schedule.scheduled, samples, strict=True):
            seq = item.seq
            if seq in step.dropped:
                continue
            self._num_failed_in_a_row = 0
            if sample.prompt_logprobs is not None:
                seq.prompt_logprobs.extend(sample.prompt_logprobs)
            if sample.embedding is not None:
                self._end_pooled(seq, sample.embedding)
            if item.samples:
                assert sample.token_id is not None, f"sequence {seq.seq_id} got no token"
                self._append(seq, sample.token_id, sample)

    def _append(self, seq: Sequence, token_id: int, sample: StepSample) -> None:
        is_first = len(seq.token_ids) == seq.num_prompt_tokens
        prompt_logprobs = None
        if seq.wants_prompt_logprobs:
            prompt_logprobs = [None, *seq.prompt_logprobs]
            seq.prompt_logprobs.clear()
        reason, stop_token_id = _finish(seq, token_id)
        self._scheduler.settle(seq, token_id)
        seq.num_failed_steps = 0
        self._num_generation_tokens += 1
        assert seq.first_scheduled_time is not None
        output = SequenceOutput(
            request_id=seq.request_id,
            token_ids=[token_id],
            logprobs=None if sample.logprobs is None else [sample.logprobs],
            prompt_logprobs=prompt_logprobs,
            finish_reason=reason,
            stop_token_id=stop_token_id,
            num_cached_tokens=seq.num_cached_tokens if is_first else None,
            not_invoked=seq.not_invoked if is_first else [],
            queue_s=seq.first_scheduled_time - seq.arrival_time if is_first else None,
        )
        if reason is not None:
            self._end(seq, output)
            return
        self._outputs.append(output)
        if self._constraints is not None and seq.has_grammar:
            self._constraints.advance(seq)

    def _end_pooled(self, seq: Sequence, embedding: bytes) -> None:
        assert seq.first_scheduled_time is not None
        self._end(
            seq,
            SequenceOutput(
                request_id=seq.request_id,
                finish_reason=FinishReason.STOP,
                num_cached_tokens=seq.num_cached_tokens,
                not_invoked=seq.not_invoked,
                queue_s=seq.first_scheduled_time - seq.arrival_time,
                embedding=embedding,
            ),
        )

    def _fail_step(self, sequences: list[Sequence], error: Exception) -> None:
        """What the step would have computed is unknown now: those who build on it are computed
        anew, and nobody may find what it left.

        A second failure in a row, or a third for one sequence without a token between, is no
        accident: then they end, and whoever hosts the engine should put another in its place.
        """
        logger.error("step_failed sequences=%d", len(sequences), exc_info=error)
        self._num_failed_in_a_row += 1
        for seq in sequences:
            seq.num_failed_steps += 1
        is_accident = self._num_failed_in_a_row < _MAX_FAILED_IN_A_ROW and all(
            seq.num_failed_steps < _MAX_FAILED_STEPS for seq in sequences
        )
        if is_accident:
            for seq in sequences:
                self._scheduler.requeue(seq)
        else:
            self.is_broken = True
            self._fail_as_step(sequences, error)
        self._blocks.reset_prefix_cache()

    def _fail_as_step(self, sequences: list[Sequence], error: Exception) -> None:
        info = ErrorInfo(
            "step_failed",
            f"the model run of this request failed: {type(error).__name__}: {error}",
            EngineError.code,
        )
        for seq in sequences:
            self._fail(seq, info)

    def _fail(self, seq: Sequence, error: ErrorInfo) -> None:
        self._end(
            seq,
            SequenceOutput(
                request_id=seq.request_id, finish_reason=FinishReason.ERROR, error=error
            ),
        )

    def _end(self, seq: Sequence, output: SequenceOutput) -> None:
        """The only way out of the engine."""
        self._scheduler.remove(seq)
        if self._constraints is not None:
            self._constraints.forget(seq)
        del self._sequences[seq.request_id]
        del self._by_rank[seq.order]
        has_run = seq.first_scheduled_time is not None
        self._fair.leave(
            seq.place,
            num_run_tokens=seq.num_prompt_tokens - seq.num_cached_tokens if has_run else 0,
            num_output_tokens=len(seq.token_ids) - seq.num_prompt_tokens,
        )
        seq.finish_reason = output.finish_reason
        self._outputs.append(output)

    # --- questions and orders -------------------------------------------------------------------

    def call(self, call: api.Call) -> None:
        """Take a question or an order; its `Answer` goes to `on_news`, at once or between later
        steps.
        """
        self._orders.take(call)

    def adapters(self) -> list[api.AdapterResidencyInfo]:
        return [residency_info(self._slots, r) for r in self._slots.residents()]

    def requests(self) -> list[api.RequestInfo]:
        now = self._clock()
        return [
            api.RequestInfo(
                request_id=seq.request_id,
                state=seq.status.value,
                waiting_reason=self._scheduler.waiting_reason(seq),
                digests=list(seq.digests),
                prompt_tokens=seq.num_prompt_tokens,
                output_tokens=len(seq.token_ids) - seq.num_prompt_tokens,
                age_s=now - seq.arrival_time,
            )
            for seq in self._sequences.values()
        ]

    def memory(self) -> api.MemoryInfo:
        blocks, slots, still = self._blocks, self._slots, self._memory()
        info = msgspec.structs.replace(
            still,
            kv_cache_bytes=blocks.num_blocks * still.kv_block_bytes,
            kv_blocks_total=blocks.num_blocks,
            kv_blocks_used=blocks.num_used_blocks,
            kv_blocks_cached=blocks.num_cached_blocks,
            kv_blocks_min=blocks.num_blocks,
            kv_blocks_max=blocks.num_blocks,
            block_size=blocks.block_size,
            adapter_bytes_total=slots.device_bytes_total,
            adapter_bytes_used=slots.device_bytes_used,
            adapter_bytes_max=slots.device_bytes_max,
            host_adapter_bytes_total=slots.host_bytes_total,
            host_adapter_bytes_used=slots.host_bytes_used,
        )
        return info if self._exchange is None else self._exchange.add_to(info)

    def stats(self) -> api.EngineStats:
        scheduler, slots, exchange = self._scheduler, self._slots, self._exchange
        reasons = Counter(
            reason.value
            for seq in scheduler.waiting
            if (reason := scheduler.waiting_reason(seq)) is not None
        )
        residents = slots.residents()
        on_device = (AdapterState.DEVICE, AdapterState.DRAINING)
        return api.EngineStats(
            time=time.time(),
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            waiting_by_reason=dict(reasons),
            running_digests=sorted({d for seq in scheduler.running for d in seq.digests}),
            waiting_digests=sorted({d for seq in scheduler.waiting for d in seq.digests}),
            kv_cache_usage=self._blocks.num_used_blocks / self._blocks.num_blocks,
            num_preemptions=scheduler.num_preemptions,
            prefix_cache_queries=self._blocks.num_queried_tokens,
            prefix_cache_hits=self._blocks.num_hit_tokens,
            prompt_tokens=self._num_prompt_tokens,
            generation_tokens=self._num_generation_tokens,
            steps=self._num_steps,
            step_tokens=self._num_step_tokens,
            adapter_loads=slots.num_loads,
            adapter_evictions=slots.num_evictions,
            adapter_load_seconds=slots.load_seconds,
            adapters_on_device=sum(r.state in on_device for r in residents),
            adapters_on_host=sum(r.has_host_image for r in residents),
            adapter_bytes_used=slots.device_bytes_used,
            adapter_bytes_total=slots.device_bytes_total,
            adapter_joins=slots.num_joins,
            adapter_refusals=slots.num_refusals,
            step_token_counts=tuple(self._step_token_counts),
            superblocks_to_kv=exchange.num_to_kv if exchange else 0,
            superblocks_to_adapters=exchange.num_to_adapters if exchange else 0,
        )

    def reset_prefix_cache(self) -> bool:
        self._blocks.reset_prefix_cache()
        return True

    def prober(self) -> Prober:
        if self._prober is None:
            raise EngineError("this engine has no prober")
        return self._prober

    def next_rank(self) -> Rank:
        """A place in the queue of adapter loads for somebody who is not a request."""
        self._num_ranks += 1
        return self._fair.next_to(self._num_ranks - 1)

    def fail_users(self, digest: str, error: ErrorInfo) -> None:
        """End every request that uses the adapter."""
        for seq in [seq for seq in self._sequences.values() if digest in seq.digests]:
            self._fail(seq, error)

    def check_invariants(self) -> None:
        """Assert that all books agree. For tests and idle time."""
        scheduler = self._scheduler
        scheduler.check_invariants()
        self._slots.check_invariants()
        if self._exchange is not None:
            self._exchange.check_invariants()
        live = {id(seq) for seq in (*scheduler.running, *scheduler.waiting)}
        assert live == {id(seq) for seq in self._sequences.values()}, "a live sequence is lost"
        assert live == {id(seq) for seq in self._by_rank.values()}, "ranks"
        assert len(self._in_flight) <= self._runner.max_in_flight, "too many steps in flight"
        if self._constraints is not None:
            self._constraints.check_invariants(list(self._sequences.values()))
        running = Counter(d for seq in scheduler.running for d in seq.digests)
        running += self._in_flight.held
        assert running == Counter(
            {r.digest: r.running for r in self._slots.residents() if r.running}
        )

    def _tell(self, news: News) -> None:
        self.on_news(news)

    def _on_transition(self, change: Transition) -> None:
        self.on_news(
            api.AdapterEvent(
                digest=change.digest,
                before=api.AdapterState(change.before.value),
                after=api.AdapterState(change.after.value),
                seconds=change.seconds,
                time=time.time(),
                detail=change.detail,
                reason=change.reason,
                phases={phase.value: seconds for phase, seconds in change.phases.items()},
            )
        )


def _finish(seq: Sequence, token_id: int) -> tuple[FinishReason | None, int | None]:
    """Does this token, about to be appended, end the sequence? With the stop token, if one did."""
    num_tokens = len(seq.token_ids)
    if seq.has_grammar and token_id in seq.eos_token_ids:
        return FinishReason.STOP, None  # its mask allows eos only where it may end
    if num_tokens - seq.num_prompt_tokens >= seq.sampling.min_tokens:
        if token_id in seq.eos_token_ids:
            return FinishReason.STOP, None
        if token_id in seq.sampling.stop_token_ids:
            return FinishReason.STOP, token_id
    if num_tokens + 1 >= seq.max_num_tokens:
        return FinishReason.LENGTH, None
    return None, None
