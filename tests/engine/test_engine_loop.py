"""The engine's loop with a fake model: whatever happens, every request gets the right tokens and
one end.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import pytest
from engine_fakes import EOS, FRAME_BYTES, MODEL, SIZES, Bench, next_token
from grammar_fakes import fake_grammar
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from loraplex.engine import api
from loraplex.engine.api import FinishReason
from loraplex.engine.errors import AdapterUnavailable, InvalidRequest, QueueFull
from loraplex.engine.superblocks import Division

# --- requests -----------------------------------------------------------------------------------


def test_mixed_requests_share_steps_and_all_end_right() -> None:
    bench = Bench()
    for i, adapters in enumerate([{}, {"a": 1.0}, {"b": 1.0}, {"a": 1.0, "b": 0.5}, {"a": 0.5}]):
        bench.add([i, 2, 3, 4, 5, 6], adapters, max_tokens=7)
    bench.run()
    bench.check_over()
    assert max(len(batch.scheduled) for batch in bench.runner.batches) == 5


def test_batches_put_decodes_first_and_equal_compositions_together() -> None:
    bench = Bench(max_num_batched_tokens=16)
    for i in range(3):
        bench.add([i], {"a": 1.0}, max_tokens=20)
        bench.add([i], {"b": 1.0}, max_tokens=20)
    for _ in range(4):
        bench.step()
    bench.add(list(range(12)), {"b": 1.0})
    bench.add(list(range(12)), {"a": 1.0})
    bench.step()
    batch = bench.runner.batches[-1]
    assert [item.is_decode for item in batch.scheduled] == [True] * 6 + [False]
    assert batch.num_decodes == 6
    names = [item.seq.digests[0] for item in batch.scheduled[:6]]
    assert names == ["a", "a", "a", "b", "b", "b"]
    assert batch.num_tokens == sum(item.num_tokens for item in batch.scheduled) == 16


def test_first_output_tells_queue_time_and_cached_tokens() -> None:
    bench = Bench()
    prompt = list(range(10))
    bench.add(prompt)
    bench.run()
    second = bench.add(prompt)
    bench.now += 3
    bench.run()
    first = bench.firsts[second]
    assert first.num_cached_tokens == 8  # two full blocks; the third is not full
    assert first.queue_s == pytest.approx(3.125)


def test_a_full_hit_recomputes_only_the_last_block() -> None:
    bench = Bench()
    prompt = list(range(8))
    bench.add(prompt)
    bench.run()
    second = bench.add(prompt)
    bench.run()
    assert bench.firsts[second].num_cached_tokens == 4
    bench.check_over()


def test_equal_prompts_of_one_step_share_blocks() -> None:
    bench = Bench()
    first, second = bench.add(list(range(9))), bench.add(list(range(9)))
    bench.step()
    assert bench.firsts[first].num_cached_tokens == 0
    assert bench.firsts[second].num_cached_tokens == 8
    bench.run()
    bench.check_over()


@pytest.mark.parametrize(
    ("adapters", "salt"), [({"a": 1.0}, ""), ({"b": 0.5}, ""), ({"b": 1.0}, "tenant")]
)
def test_no_hit_across_adapters_weights_or_salts(adapters: dict[str, float], salt: str) -> None:
    bench = Bench()
    bench.add(list(range(9)), {"b": 1.0})
    bench.run()
    other = bench.add(list(range(9)), adapters, salt=salt)
    bench.run()
    assert bench.firsts[other].num_cached_tokens == 0
    bench.check_over()


def test_a_composition_hits_whatever_its_order() -> None:
    bench = Bench()
    bench.add(list(range(9)), {"a": 1.0, "b": 0.5})
    bench.run()
    other = bench.add(list(range(9)), {"b": 0.5, "a": 1.0})
    bench.run()
    assert bench.firsts[other].num_cached_tokens == 8


def test_prompt_logprobs_cover_the_whole_prompt_in_chunks_and_ignore_hits() -> None:
    bench = Bench(max_num_batched_tokens=8)
    prompt = list(range(20))
    bench.add(prompt)
    bench.run()
    name = bench.add(prompt, prompt_logprobs=0)
    bench.run()
    entries = bench.firsts[name].prompt_logprobs
    assert entries is not None
    assert entries[0] is None
    assert [entry.token_id for entry in entries[1:] if entry] == prompt[1:]


def test_preemption_changes_no_token() -> None:
    bench = Bench(num_blocks=10, prefix_cache=False)
    for i in range(4):
        bench.add([i, 1, 2], max_tokens=30)
    bench.run()
    bench.check_over()
    assert bench.engine.stats().num_preemptions > 0


def test_stop_reasons() -> None:
    bench = Bench()
    tokens = [1, 2, 3]
    stop = next_token(tokens, [()] * len(tokens))
    at_once = bench.add(tokens, stop_token_ids=(stop,))
    later = bench.add(tokens, stop_token_ids=(stop,), min_tokens=2)
    length = bench.add([5] * 60, max_tokens=None)
    bench.run()
    assert bench.ends[at_once].finish_reason is FinishReason.STOP
    assert bench.ends[at_once].stop_token_id == stop
    assert bench.tokens[at_once] == [stop]
    assert len(bench.tokens[later]) >= 2
    assert bench.ends[length].finish_reason is FinishReason.LENGTH
    assert len(bench.tokens[length]) == MODEL.max_model_len - 60


@pytest.mark.parametrize(("ignore", "count"), [(False, 1), (True, 4)])
def test_eos_ends_unless_ignored(ignore: bool, count: int) -> None:
    bench = Bench()
    bench.runner.model = lambda tokens, adapters: EOS
    name = bench.add([1, 2], ignore_eos=ignore)
    bench.run()
    assert bench.tokens[name] == [EOS] * count
    assert bench.ends[name].stop_token_id is None


def test_cancel_frees_at_once_and_says_so_once() -> None:
    bench = Bench(at_once=False)
    running, waiting = bench.add([1] * 9, max_tokens=40), bench.add([1], {"a": 1.0})
    bench.step()
    assert bench.blocks.num_used_blocks == 3
    assert bench.engine.cancel(running)
    assert bench.engine.cancel(waiting)
    assert bench.blocks.num_used_blocks == 0
    assert not bench.engine.cancel(running)
    bench.step()
    assert {end.finish_reason for end in bench.ends.values()} == {FinishReason.ABORT}
    assert len(bench.ends) == 2


def test_a_failed_step_is_computed_anew() -> None:
    """Blocks published by the failed step were never written: nobody may hit them afterwards."""
    bench = Bench()
    failed = [bench.add(list(range(9))), bench.add(list(range(9)))]
    bench.runner.fail_next = True
    bench.step()
    assert not bench.ends
    again = bench.add(list(range(9)))
    bench.run()
    assert not bench.engine.is_broken
    assert bench.firsts[failed[0]].num_cached_tokens == 0
    for name in (*failed, again):
        bench.check_tokens(name)


def test_steps_that_fail_in_a_row_end_their_sequences() -> None:
    bench = Bench()
    failed = [bench.add(list(range(9))), bench.add(list(range(9)))]
    for _ in range(2):
        assert not bench.engine.is_broken
        bench.runner.fail_next = True
        bench.step()
    assert bench.engine.is_broken
    for name in failed:
        end = bench.ends[name]
        assert end.error is not None
        assert end.error.code == "step_failed"
        assert "device on fire" in end.error.message
    again = bench.add(list(range(9)))
    bench.run()
    assert bench.firsts[again].num_cached_tokens == 0
    bench.check_tokens(again)


def test_a_sequence_whose_steps_always_fail_ends() -> None:
    """Others make progress between its failures, so no two steps fail in a row."""
    bench = Bench(max_num_seqs=1)
    bad = bench.add(list(range(9)), priority=1)
    for _ in range(3):
        assert not bench.engine.is_broken
        bench.runner.fail_next = True
        bench.step()
        if bad not in bench.ends:
            good = bench.add([3], max_tokens=1, priority=-1)
            bench.step()
            assert good in bench.ends
    assert bench.engine.is_broken
    assert bench.ends[bad].finish_reason is FinishReason.ERROR


def test_bounded_queue_and_unique_ids() -> None:
    bench = Bench(max_num_waiting=1)
    bench.add([1])
    with pytest.raises(QueueFull, match="max_num_waiting"):
        bench.add([1])
    bench.step()
    with pytest.raises(InvalidRequest, match="in use by a live request"):
        bench.engine.add(next(iter(bench.requests.values())))


def test_priority_goes_before_arrival() -> None:
    bench = Bench(max_num_seqs=1)
    late, early = bench.add([1], priority=5), bench.add([2], priority=-1)
    bench.step()
    assert bench.tokens[early]
    assert not bench.tokens[late]
    assert bench.engine.requests()[0].waiting_reason == "quota"


# --- adapters -----------------------------------------------------------------------------------


def test_a_missing_adapter_is_passed_over_and_blocks_nobody() -> None:
    bench = Bench(at_once=False)
    blocked, free = bench.add([1], {"a": 1.0}), bench.add([2])
    for _ in range(5):
        bench.step()
    assert free in bench.ends
    assert bench.engine.stats().waiting_by_reason == {"adapter_loading": 1}
    bench.loader.succeed_from_now_on()
    bench.run()
    assert blocked in bench.ends
    bench.check_over()


def test_a_load_begins_when_its_request_is_queued_not_when_it_could_run() -> None:
    bench = Bench(at_once=False, max_num_seqs=1)
    running = bench.add([1], max_tokens=9)
    bench.step()
    bench.add([2], {"a": 1.0})
    bench.step()
    assert bench.engine.adapters()[0].state is api.AdapterState.HOST_LOADING
    bench.loader.finish(0)
    bench.step()
    bench.loader.finish(0)
    bench.step()
    assert bench.engine.adapters()[0].state is api.AdapterState.DEVICE
    assert running not in bench.ends, "it was loaded while another request had the only place"
    bench.run()
    bench.check_over()


def test_a_failed_load_ends_its_requests_and_is_tried_again_after_a_while() -> None:
    bench = Bench(at_once=False)
    name, other = bench.add([1], {"a": 1.0}), bench.add([1], {"a": 1.0, "b": 1.0})
    bench.step()
    bench.loader.finish(0, ok=False)
    bench.step()
    for end in (bench.ends[name], bench.ends[other]):
        assert end.error == api.ErrorInfo(
            "adapter_load_failed", "disk on fire", "adapter_unavailable"
        )
    with pytest.raises(AdapterUnavailable, match="tried again in 1 s"):
        bench.add([1], {"a": 1.0})
    bench.now += 2
    bench.loader.succeed_from_now_on()
    again = bench.add([1], {"a": 1.0})
    bench.run()
    bench.check_tokens(again)


@pytest.mark.parametrize(
    ("adapters", "code"),
    [({"nobody": 1.0}, "adapter_not_found"), ({"huge": 1.0}, "adapter_too_large"),
     ({"d": 1.0, "a": 1.0}, "adapter_too_large")],
)  # fmt: skip
def test_an_impossible_adapter_is_refused_at_once(adapters: dict[str, float], code: str) -> None:
    bench = Bench()
    with pytest.raises(AdapterUnavailable) as caught:
        bench.add([1], adapters)
    assert caught.value.code == code
    assert not bench.engine.has_work()


def test_a_zero_weight_needs_no_adapter() -> None:
    bench = Bench(at_once=False)
    name = bench.add([1], {"a": 0.0})
    bench.run()
    bench.check_tokens(name)


def test_steady_use_of_one_adapter_starves_no_other() -> None:
    """a..c fill the device and never go idle; d needs all of it and must get it some time."""
    bench = Bench()
    starving = ""
    for i in range(60):
        for adapter in "abc":
            bench.add([i], {adapter: 1.0}, max_tokens=5)
        if i == 5:
            starving = bench.add([7], {"d": 1.0})
        bench.step()
        if starving in bench.ends:
            break
    assert starving in bench.ends
    bench.run()
    bench.check_over()


# --- orders -------------------------------------------------------------------------------------


def test_load_waits_and_answers_when_resident() -> None:
    bench = Bench(at_once=False)
    call = bench.call("load", digest="a")
    bench.step()
    assert call not in bench.answers
    for _ in range(2):
        bench.loader.finish(0)
        bench.step()
    info = bench.result(call, api.AdapterResidencyInfo)
    assert info.state is api.AdapterState.DEVICE
    assert not bench.engine.has_work()
    states = [(event.before.value, event.after.value) for event in bench.events]
    assert states == [("absent", "host_loading"), ("host_loading", "host"),
                      ("host", "device_loading"), ("device_loading", "device")]  # fmt: skip


def test_load_without_wait_answers_now_and_loads_all_the_same() -> None:
    bench = Bench()
    call = bench.call("load", digest="a", wait=False)
    assert bench.result(call, api.AdapterResidencyInfo).state is api.AdapterState.ABSENT
    bench.run()
    assert bench.engine.adapters()[0].state is api.AdapterState.DEVICE


def test_load_reports_failure_and_unknown_digests() -> None:
    bench = Bench(at_once=False)
    unknown = bench.call("load", digest="nobody")
    assert bench.answers[unknown].error == api.ErrorInfo(
        "adapter_not_found", "no adapter nobody in the store", "adapter_unavailable"
    )
    call = bench.call("load", digest="a")
    bench.step()
    bench.loader.finish(0, ok=False)
    bench.step()
    error = bench.answers[call].error
    assert error is not None
    assert error.code == "adapter_load_failed"
    retry = bench.call("load", digest="a")  # no back-off for an operator
    bench.loader.at_once = True
    bench.run()
    assert bench.result(retry, api.AdapterResidencyInfo).state is api.AdapterState.DEVICE


def test_evict_refuses_while_in_use_drains_when_told_and_reports_bytes() -> None:
    bench = Bench()
    name = bench.add([1], {"a": 1.0}, max_tokens=6)
    while not bench.tokens[name]:
        bench.step()
    refused = bench.call("evict", digest="a")
    assert bench.answers[refused].error is not None
    drained = bench.call("evict", digest="a", drain=True)
    late = bench.add([2], {"a": 1.0})
    assert drained not in bench.answers
    bench.step()
    assert not bench.tokens[late]
    bench.run()
    assert bench.result(drained, api.FreedBytes) == api.FreedBytes(device_bytes=10)
    assert bench.ends.keys() == {name, late}
    both = bench.call("evict", digest="a", tier="host")
    assert bench.result(both, api.FreedBytes) == api.FreedBytes(device_bytes=10, host_bytes=10)


def test_a_drain_that_times_out_serves_again() -> None:
    bench = Bench()
    name = bench.add([1], {"a": 1.0}, max_tokens=30)
    while not bench.tokens[name]:
        bench.step()
    call = bench.call("evict", digest="a", drain=True, timeout_s=0.5)
    late = bench.add([2], {"a": 1.0}, max_tokens=1)
    for _ in range(8):
        bench.step()
    error = bench.answers[call].error
    assert error is not None
    assert error.code == "adapter_in_use"
    assert late in bench.ends


def test_a_pin_ends_a_drain_and_the_order_for_it() -> None:
    """The bug this guards: the order to evict ended, refused, and left the adapter draining."""
    bench = Bench()
    name = bench.add([1], {"a": 1.0}, max_tokens=6)
    bench.step_until(lambda: bench.tokens[name])
    evict = bench.call("evict", digest="a", drain=True)
    late = bench.add([2], {"a": 1.0})
    bench.call("pin", digest="a")
    bench.run()
    error = bench.answers[evict].error
    assert error is not None
    assert error.code == "adapter_pinned"
    bench.check_tokens(late)
    bench.check_over()


def test_pins_survive_pressure_and_block_what_cannot_fit() -> None:
    bench = Bench()
    bench.call("pin", digest="c")
    bench.run()
    for adapter in "abab":
        bench.add([1], {adapter: 1.0})
    bench.run()
    states = {info.digest: info.state for info in bench.engine.adapters()}
    assert states["c"] is api.AdapterState.DEVICE
    with pytest.raises(AdapterUnavailable) as caught:
        bench.add([1], {"d": 1.0})
    assert caught.value.code == "adapter_no_room"
    bench.call("unpin", digest="c")
    bench.add([1], {"d": 1.0})
    bench.run()
    bench.check_over()


def test_a_pin_that_leaves_no_room_fails_who_waits_for_it() -> None:
    bench = Bench()
    bench.call("load", digest="a")
    bench.run()
    name = bench.add([1], {"d": 1.0})
    bench.call("pin", digest="a")
    bench.run()
    error = bench.ends[name].error
    assert error is not None
    assert error.code == "adapter_no_room"


@pytest.mark.parametrize("force", [False, True])
def test_forget_refuses_drains_or_fails_and_frees_all(force: bool) -> None:
    bench = Bench()
    name = bench.add([1], {"a": 1.0}, max_tokens=6)
    while not bench.tokens[name]:
        bench.step()
    call = bench.call("forget", digest="a", force=force)
    bench.step()
    if not force:
        with pytest.raises(AdapterUnavailable) as caught:
            bench.add([1], {"a": 1.0})
        assert caught.value.code == "adapter_deleted"
    bench.run()
    freed = bench.result(call, api.FreedBytes)
    assert freed == api.FreedBytes(device_bytes=10, host_bytes=10)
    reason = bench.ends[name].finish_reason
    assert reason is (FinishReason.ERROR if force else FinishReason.LENGTH)
    assert bench.engine.adapters() == []
    bench.add([1], {"a": 1.0})  # the same digest may come again
    bench.run()


def test_a_forget_that_times_out_changes_nothing() -> None:
    bench = Bench()
    name = bench.add([1], {"a": 1.0}, max_tokens=20)
    while not bench.tokens[name]:
        bench.step()
    call = bench.call("forget", digest="a", timeout_s=0.3)
    for _ in range(4):
        bench.step()
    error = bench.answers[call].error
    assert error is not None
    assert (error.code, error.kind) == ("adapter_in_use", "adapter_in_use")
    bench.add([2], {"a": 1.0})
    bench.run()
    bench.check_over()


def test_forget_ends_the_loads_of_orders_and_waits_for_what_is_under_way() -> None:
    """The bug this guards: the background's probe of an adapter made its deletion a conflict."""
    bench = Bench(at_once=False)
    load = bench.call("load", digest="a")
    bench.step()
    call = bench.call("forget", digest="a", timeout_s=0.0)
    for _ in range(3):
        bench.step()
    error = bench.answers[load].error
    assert error is not None
    assert error.code == "adapter_deleted"
    assert call not in bench.answers, "nothing is dropped while it loads"
    bench.loader.finish(0)
    bench.run()
    assert bench.result(call, api.FreedBytes) == api.FreedBytes(device_bytes=0, host_bytes=10)
    assert bench.engine.adapters() == []


def test_forget_lets_orders_be_when_requests_keep_the_adapter() -> None:
    bench = Bench(at_once=False)
    name = bench.add([1], {"a": 1.0})
    load = bench.call("load", digest="a")
    bench.step()
    call = bench.call("forget", digest="a", timeout_s=0.0)
    bench.step()
    error = bench.answers[call].error
    assert error is not None
    assert error.code == "adapter_in_use"
    bench.loader.at_once = True
    bench.loader.finish(0)
    bench.run()
    assert bench.ends[name].finish_reason is FinishReason.LENGTH
    assert bench.result(load, api.AdapterResidencyInfo).state is api.AdapterState.DEVICE


def test_keep_takes_a_forget_back() -> None:
    bench = Bench()
    name = bench.add([1], {"a": 1.0}, max_tokens=10)
    while not bench.tokens[name]:
        bench.step()
    assert bench.result(bench.call("keep", digest="a"), bool) is False
    forget = bench.call("forget", digest="a", timeout_s=60.0)
    bench.step()
    assert bench.result(bench.call("keep", digest="a"), bool) is True
    later = bench.add([2], {"a": 1.0})
    bench.run()
    assert bench.result(forget, api.FreedBytes) == api.FreedBytes()
    assert {bench.ends[n].finish_reason for n in (name, later)} == {FinishReason.LENGTH}
    again = bench.call("forget", digest="a", timeout_s=0.0)
    bench.run()
    assert bench.result(again, api.FreedBytes).device_bytes == 10, "an older keep is used up"


def test_questions() -> None:
    bench = Bench()
    bench.add([1, 2, 3], {"a": 1.0}, max_tokens=20)
    for _ in range(5):
        bench.step()
    stats = bench.result(bench.call("stats"), api.EngineStats)
    assert stats.num_running == 1
    assert stats.running_digests == ["a"]
    memory = bench.result(bench.call("memory"), api.MemoryInfo)
    assert (memory.kv_blocks_total, memory.kv_blocks_used, memory.adapter_bytes_used) == (64, 2, 10)
    (request,) = bench.result(bench.call("requests"), list[api.RequestInfo])
    assert (request.state, request.digests, request.prompt_tokens) == ("running", ["a"], 3)
    (adapter,) = bench.result(bench.call("adapters"), list[api.AdapterResidencyInfo])
    assert (adapter.running, adapter.loads) == (1, 1)
    assert bench.result(bench.call("reset_prefix_cache"), bool) is True
    error = bench.answers[bench.call("dance")].error
    assert error is not None
    assert "unknown method 'dance'" in error.message


def test_idle_wait_ends_by_wake_and_does_not_wait_after_a_real_step() -> None:
    bench = Bench(at_once=False)
    bench.add([1], {"a": 1.0})
    bench.step()
    bench.engine.wake()
    bench.engine.idle_wait(60)  # would exceed the test's time limit
    bench.add([1])
    bench.step()
    bench.engine.idle_wait(60)


# --- anything in any order ----------------------------------------------------------------------


class EngineMachine(RuleBasedStateMachine):
    """Few blocks, little adapter room, slow and failing loads and masks, stops, cancels, orders,
    failing steps.
    """

    max_in_flight = 0

    @initialize(
        num_blocks=st.integers(6, 20),
        max_num_seqs=st.integers(1, 5),
        extra_tokens=st.integers(0, 8),
        host_bytes=st.sampled_from([0, 20, 60]),
        prefix_cache=st.booleans(),
    )
    def build(self, extra_tokens: int, max_num_seqs: int, **options: Any) -> None:
        self.bench = Bench(
            max_in_flight=self.max_in_flight,
            at_once=False,
            masks_at_once=False,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_seqs + extra_tokens,
            **options,
        )
        self.calls: list[int] = []

    @rule(
        stem=st.sampled_from([0, 1]),
        length=st.integers(1, 14),
        max_tokens=st.integers(1, 9),
        adapters=st.sampled_from(
            [
                {},
                {"a": 1.0},
                {"a": 0.5},
                {"b": 1.0},
                {"a": 1.0, "b": 1.0},
                {"c": 1.0},
                {"d": 1.0},
                {"x": 1.0},
                {"x": 1.0, "y": 1.0},
                {"a": 1.0, "y": 1.0},
            ]
        ),
        priority=st.sampled_from([0, 0, 0, -1, 1]),
        prompt_logprobs=st.sampled_from([None, None, 0]),
        stop_token_ids=st.sampled_from([(), (), tuple(range(0, EOS, 4))]),
        min_tokens=st.sampled_from([0, 0, 1, 3]),
        ignore_eos=st.sampled_from([False, False, True]),
        grammar=st.one_of(
            st.none(),
            st.builds(
                fake_grammar,
                st.integers(0, 2),
                st.integers(0, 9),
                st.sampled_from([-1, -1, -1, -2, 0, 3]),
            ),
        ),
    )
    def add(self, stem: int, length: int, max_tokens: int, min_tokens: int, **rest: Any) -> None:
        prompt = [stem, *range(length - 1)]  # so that prefixes are shared often
        rest |= {"max_tokens": max_tokens, "min_tokens": min(min_tokens, max_tokens)}
        with suppress(AdapterUnavailable):  # failed lately, deleted or pinned out
            self.bench.add(prompt, **rest)

    @rule(
        data=st.data(),
        max_tokens=st.integers(1, 9),
        turn=st.sampled_from([[1], [3, 4], [1, 3, 4, 1], [5]]),
        adapters=st.sampled_from([None, None, {}, {"x": 1.0}, {"a": 1.0, "x": 1.0}, {"y": 1.0}]),
    )
    @precondition(lambda self: self.bench.requests)
    def follow_up(
        self,
        data: st.DataObject,
        max_tokens: int,
        turn: list[int],
        adapters: dict[str, float] | None,
    ) -> None:
        """The next turn of a conversation, which finds what the last one computed. It may call an
        activated LoRA, again or for the first time. adapters: None for those of the last turn.
        """
        bench = self.bench
        request = bench.requests[data.draw(st.sampled_from(sorted(bench.requests)))]
        prompt = [*request.prompt_token_ids, *bench.tokens[request.request_id], *turn]
        if len(prompt) + max_tokens <= bench.max_model_len:
            with suppress(AdapterUnavailable):
                uses = {use.digest: use.weight for use in request.adapters}
                uses = uses if adapters is None else adapters
                bench.add(prompt, uses, max_tokens=max_tokens)

    @rule()
    def step(self) -> None:
        self.bench.step()

    @rule(data=st.data())
    @precondition(lambda self: self.bench.requests)
    def cancel(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.bench.requests)))
        assert self.bench.engine.cancel(name) or name not in self.bench.engine._sequences

    @rule(data=st.data())
    @precondition(lambda self: self.bench.engine._scheduler.running)
    def cancel_and_evict(self, data: st.DataObject) -> None:
        """The adapter of a request that just ran is nobody's, but a step may still read it."""
        seq = data.draw(st.sampled_from(self.bench.engine._scheduler.running))
        self.bench.engine.cancel(seq.request_id)
        for digest in seq.digests:
            self.order("evict", digest=digest, tier="host", drain=True, timeout_s=0.5)

    @rule(data=st.data(), ok=st.sampled_from([True, True, True, False]))
    @precondition(lambda self: self.bench.loader.under_way)
    def load_ends(self, data: st.DataObject, ok: bool) -> None:
        index = data.draw(st.integers(0, len(self.bench.loader.under_way) - 1))
        self.bench.loader.finish(index, ok=ok)

    @rule(data=st.data())
    @precondition(lambda self: self.bench.compile_jobs.jobs or self.bench.mask_jobs.jobs)
    def mask_comes(self, data: st.DataObject) -> None:
        workers = data.draw(
            st.sampled_from([w for w in (self.bench.compile_jobs, self.bench.mask_jobs) if w.jobs])
        )
        workers.run(data.draw(st.integers(0, len(workers.jobs) - 1)))

    @rule(at_launch=st.booleans())
    def step_fails(self, at_launch: bool) -> None:
        runner = self.bench.runner
        runner.fail_next, runner.fail_next_run = at_launch, not at_launch
        self.bench.step()
        runner.fail_next = runner.fail_next_run = False

    @rule(
        method=st.sampled_from(
            ["load", "pin", "unpin", "evict", "forget", "keep", "reset_prefix_cache"]
        ),
        digest=st.sampled_from("abcdxy"),
        tier=st.sampled_from(["device", "host"]),
        wait=st.booleans(),
        drain=st.booleans(),
        force=st.booleans(),
        timeout_s=st.sampled_from([None, 0.0, 0.5]),
    )
    def any_order(self, method: str, **fields: Any) -> None:
        self.order(method, **fields)

    def order(self, method: str, **fields: Any) -> None:
        call_id = len(self.calls)
        self.bench.engine.call(api.Call(call_id, method, **fields))
        self.calls.append(call_id)

    @invariant()
    def books_agree(self) -> None:
        if hasattr(self, "bench"):
            self.bench.engine.check_invariants()

    def teardown(self) -> None:
        """Let loads succeed from now on: then everything must end, and be right."""
        if not hasattr(self, "bench"):
            return
        bench = self.bench
        for digest in "abcdxy":
            bench.engine.call(api.Call(-ord(digest), "unpin", digest=digest))
        bench.loader.succeed_from_now_on()
        bench.compile_jobs.run_all()
        bench.mask_jobs.run_all()
        # Up to 50 requests of some 20 tokens, in the worst case one token a step, some of it twice.
        bench.run(limit=5000)
        bench.check_over()
        assert set(self.calls) <= bench.answers.keys()


class SharingMachine(EngineMachine):
    """Blocks and adapters share one memory: 2 or 3 blocks, or 2 frames, a superblock."""

    @initialize(
        kv=st.integers(0, 4),
        adapters=st.integers(1, 4),
        size=st.sampled_from([2, 3]),
        max_num_seqs=st.integers(1, 5),
        extra_tokens=st.integers(0, 8),
        host_bytes=st.sampled_from([0, 60]),
        prefix_cache=st.booleans(),
    )
    def build(  # type: ignore[override]
        self, kv: int, adapters: int, size: int, **options: Any
    ) -> None:
        kv_floor = 6 // size
        self.division = Division(
            superblock_bytes=20,
            blocks_per_superblock=size,
            frames_per_superblock=2,
            kv_superblocks=kv_floor + kv,
            adapter_superblocks=adapters,
            kv_floor=kv_floor,
            adapter_floor=1,
        )
        super().build(division=self.division, **options)

    @rule(length=st.integers(12, 20), max_tokens=st.integers(1, 4))
    def add_long(self, length: int, max_tokens: int) -> None:
        self.bench.add(list(range(length)), max_tokens=max_tokens)

    def teardown(self) -> None:
        """And with nothing to do, an adapter that takes all it may, and a sequence that does."""
        super().teardown()
        if not hasattr(self, "bench"):
            return
        bench = self.bench
        bench.now += 100
        uses = {"a": 1.0, "b": 1.0, "c": 1.0, "d": 1.0}
        if kv_and_adapters_fit(self.division, uses):
            with suppress(AdapterUnavailable):  # deleted
                bench.add([1], uses, max_tokens=1)
                bench.run()
        bench.add([2] * (bench.max_model_len - 1), max_tokens=1)
        bench.run()
        bench.check_over()


def kv_and_adapters_fit(division: Division, digests: Iterable[str]) -> bool:
    room = division.max_adapter_superblocks * division.frames_per_superblock * FRAME_BYTES
    return sum(SIZES[digest] for digest in digests) <= room


class OverlappedSharingMachine(SharingMachine):
    max_in_flight = 1


class OverlappedMachine(EngineMachine):
    """A step is launched before the one before it is collected."""

    max_in_flight = 1


class DeepMachine(EngineMachine):
    """No runner has this depth; but nothing in the engine counts on one."""

    max_in_flight = 2


@pytest.mark.parametrize(
    ("machine", "examples"),
    [
        (EngineMachine, 120),
        (OverlappedMachine, 120),
        (DeepMachine, 120),
        (SharingMachine, 40),
        (OverlappedSharingMachine, 60),
    ],
)
def test_anything_in_any_order_ends_right(
    machine: type[EngineMachine], examples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loraplex.engine.engine.MASK_WAIT_S", 0)  # masks come by hand
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=50,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
