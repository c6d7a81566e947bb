"""Steps in flight: what the engine does while the device runs, and what it must not touch."""

from __future__ import annotations

from typing import Any

import pytest
from engine_fakes import BLOCK, EOS, Bench, next_token

from loraplex.engine import api
from loraplex.engine.api import AdapterState, FinishReason


def overlapped(**options: Any) -> Bench:
    return Bench(**{"max_in_flight": 1, **options})


def spy(bench: Bench, owner: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls of a method join the runner's events."""
    method = getattr(owner, name)

    def told(*args: Any, **kwargs: Any) -> Any:
        bench.runner.events.append(name)
        return method(*args, **kwargs)

    monkeypatch.setattr(owner, name, told)


def rows(bench: Bench) -> int:
    return sum(len(batch.scheduled) for batch in bench.runner.batches)


# --- the order of work --------------------------------------------------------------------------


def test_a_step_is_prepared_and_launched_before_the_one_before_it_is_collected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = overlapped()
    for owner, name in [
        (bench.loader, "poll"),
        (bench.engine._scheduler, "schedule"),
        (bench.engine._scheduler, "settle"),
    ]:
        spy(bench, owner, name, monkeypatch)
    bench.add([1, 2, 3], max_tokens=3)
    bench.run()
    assert bench.runner.events == [
        *("poll", "schedule", "launch 0"),
        *("poll", "schedule", "launch 1", "collect 0", "settle"),
        *("poll", "schedule", "launch 2", "collect 1", "settle"),
        *("poll", "schedule", "collect 2", "settle"),  # nothing to schedule: wait for the last
    ]


def test_without_depth_a_step_is_settled_in_the_step_that_launched_it() -> None:
    bench = overlapped(max_in_flight=0)
    bench.add([1, 2, 3], max_tokens=2)
    bench.run()
    assert bench.runner.events == ["launch 0", "collect 0", "launch 1", "collect 1"]


def test_pending_tokens_are_fed_back_and_known_ones_are_not() -> None:
    bench = overlapped(max_num_batched_tokens=8)
    bench.add([1] * 12, max_tokens=4)
    bench.run()
    (first, *_), *rest = [batch.scheduled for batch in bench.runner.batches]
    assert (first.num_tokens, first.samples, first.feeds_back) == (8, False, False)
    assert [(item.start, item.feeds_back) for (item,) in rest] == [
        (8, False), (12, True), (13, True), (14, True)
    ]  # fmt: skip


def test_no_row_runs_past_a_known_end() -> None:
    """The last token is not run, so a request that ends by its length costs no row in vain."""
    counts = []
    for depth in (0, 1, 2):
        bench = overlapped(max_in_flight=depth)
        for i in range(3):
            bench.add([i, 1], max_tokens=2 + i)
        bench.run()
        bench.check_over()
        counts.append((rows(bench), len(bench.runner.batches)))
    assert counts[0] == counts[1] == counts[2]


def test_nobody_sleeps_on_a_step_in_flight() -> None:
    bench = overlapped()
    bench.runner.model = lambda tokens, adapters: EOS
    name = bench.add([1, 2])
    bench.step_until(lambda: name in bench.ends)
    assert bench.engine.has_work()  # a row that nobody waits for is still to be settled
    bench.engine.idle_wait(60)  # would exceed the test's time limit
    bench.step()
    assert bench.engine.ran_last_step  # what it gave back may let others run
    assert not bench.engine.has_work()


def test_steps_count_when_they_are_settled() -> None:
    bench = overlapped()
    bench.add([1, 2, 3], max_tokens=5)
    bench.step()
    assert bench.engine.stats().steps == 0
    bench.run()
    stats = bench.engine.stats()
    assert (stats.steps, stats.step_tokens, stats.generation_tokens) == (5, 7, 5)


# --- ends -----------------------------------------------------------------------------------------


def test_a_token_that_ends_its_request_drops_the_row_in_flight() -> None:
    bench = overlapped()
    bench.runner.model = lambda tokens, adapters: EOS if len(tokens) == 5 else 7
    name = bench.add([1, 2, 3], max_tokens=9)
    other = bench.add([9], max_tokens=9)
    bench.run()
    assert bench.tokens[name] == [7, 7, EOS]
    assert bench.tokens[other] == [7, 7, 7, 7, EOS]
    assert bench.ends[name].finish_reason is FinishReason.STOP
    assert rows(bench) == 3 + 5 + 2  # for each one row more than tokens
    bench.check_over()


def test_min_tokens_counts_the_pending() -> None:
    bench = overlapped()
    stop = next_token([1, 2], [(), ()])
    name = bench.add([1, 2], stop_token_ids=(stop,), min_tokens=3, max_tokens=6)
    bench.run()
    assert stop not in bench.tokens[name][:3]
    bench.check_over()  # the fake runner looks at what is suppressed in each row


def test_prompt_logprobs_go_out_with_the_first_token_whatever_is_in_flight() -> None:
    bench = overlapped(max_num_batched_tokens=8)
    prompt = list(range(20))
    name = bench.add(prompt, prompt_logprobs=0)
    bench.run()
    entries = bench.firsts[name].prompt_logprobs
    assert entries is not None
    assert [entry.token_id for entry in entries[1:] if entry] == prompt[1:]
    bench.check_over()


def test_cancelled_with_its_last_token_in_flight() -> None:
    bench = overlapped()
    name = bench.add([1, 2], max_tokens=1)
    bench.step()
    assert bench.engine.cancel(name)
    bench.run()
    assert bench.ends[name].finish_reason is FinishReason.ABORT
    assert bench.tokens[name] == []
    bench.check_over()


def test_a_preempted_request_samples_its_pending_token_again() -> None:
    """Also with prompt log-probabilities, of which it had sent none."""
    bench = overlapped(num_blocks=10, prefix_cache=False)
    for i in range(4):
        bench.add([i, 1, 2], max_tokens=30, prompt_logprobs=0)
    bench.run()
    bench.check_over()
    assert bench.engine.stats().num_preemptions > 0
    for first in bench.firsts.values():
        assert first.prompt_logprobs is not None
        assert len(first.prompt_logprobs) == 3


# --- what steps in flight still use ---------------------------------------------------------------


def test_an_adapter_leaves_the_device_when_the_steps_that_use_it_are_settled() -> None:
    """Its memory would be overwritten by a copy that no step's order holds back."""
    bench = overlapped()
    name = bench.add([1], {"d": 1.0}, max_tokens=20)
    bench.step_until(lambda: bench.tokens[name])
    late = bench.add([2], {"a": 1.0})
    bench.engine.cancel(name)
    (used,) = (r for r in bench.slots.residents() if r.digest == "d")
    assert used.running == 1
    call = bench.call("evict", digest="d", drain=True)
    assert call not in bench.answers
    assert used.state.value == AdapterState.DRAINING.value
    bench.run()  # the fake device checks the adapters of each step when it runs it
    assert bench.result(call, api.FreedBytes) == api.FreedBytes(device_bytes=40)
    assert late in bench.ends
    bench.check_over()


def test_an_adapter_waits_for_the_last_of_several_steps() -> None:
    bench = overlapped(max_in_flight=2)
    name = bench.add([1], {"d": 1.0}, max_tokens=20)
    other = bench.add([2], max_tokens=20)
    bench.step_until(lambda: bench.tokens[name] and bench.tokens[other])
    bench.engine.cancel(name)
    (used,) = (r for r in bench.slots.residents() if r.digest == "d")
    held = []
    for _ in range(3):
        held.append(used.running)
        bench.step()
    assert held == [1, 1, 0]


def test_blocks_are_free_at_once_and_their_next_owner_is_right() -> None:
    """Steps take effect in order, so who gets the blocks writes them after the step in flight."""
    bench = overlapped(num_blocks=4, prefix_cache=False)
    name = bench.add([1] * 10, max_tokens=5)
    bench.step()
    bench.engine.cancel(name)
    assert bench.blocks.num_used_blocks == 0
    other = bench.add([2] * 10, max_tokens=5)
    bench.run()
    bench.check_tokens(other)
    bench.check_over()


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_a_conversation_finds_every_full_block_of_its_last_turn(depth: int) -> None:
    """Also one that the last token to run completes, which is known only when it has run."""
    for max_tokens in range(1, 2 * BLOCK + 2):
        bench = overlapped(max_in_flight=depth)
        name = bench.add([1, 2, 3], max_tokens=max_tokens)
        bench.run()
        turn = [1, 2, 3, *bench.tokens[name]]
        follow_up = bench.add([*turn, 4, 5])
        bench.run()
        num_run = len(turn) - 1  # all but the last
        assert bench.firsts[follow_up].num_cached_tokens == num_run // BLOCK * BLOCK
        bench.check_over()


# --- failures -------------------------------------------------------------------------------------


def test_after_a_failure_on_the_device_all_that_build_on_it_are_computed_anew() -> None:
    bench = overlapped()
    prompt = list(range(9))
    bench.add(prompt, max_tokens=9)
    bench.runner.fail_next_run = True
    bench.step()
    bench.add(prompt)  # shares the blocks of the step that fails
    bench.step()
    assert bench.runner.events == ["launch 0", "launch 1", "collect 0"]
    assert not bench.ends
    assert not any(bench.tokens.values())
    bench.run()
    assert not bench.engine.is_broken
    bench.check_over()


def test_failures_in_a_row_on_the_device_fail_all_that_build_on_them() -> None:
    bench = overlapped()
    prompt = list(range(9))
    names = [bench.add(prompt, max_tokens=9), bench.add(prompt)]
    for _ in range(2):
        assert not bench.engine.is_broken
        bench.runner.fail_next_run = True
        bench.step()
        bench.step()
    assert bench.engine.is_broken
    for name in names:
        error = bench.ends[name].error
        assert error is not None
        assert error.code == "step_failed"
        assert "device on fire" in error.message
        assert bench.tokens[name] == []
    again = bench.add(prompt)
    bench.run()
    assert bench.firsts[again].num_cached_tokens == 0
    bench.check_over()


def test_a_request_that_ended_before_its_step_failed_leaves_nothing_to_be_found() -> None:
    bench = overlapped()
    prompt = list(range(9))
    name = bench.add(prompt)
    bench.runner.fail_next_run = True
    bench.step()
    bench.engine.cancel(name)
    bench.step()
    assert bench.ends[name].finish_reason is FinishReason.ABORT
    again = bench.add(prompt)
    bench.run()
    assert bench.firsts[again].num_cached_tokens == 0
    bench.check_over()


def test_a_failed_launch_leaves_the_step_before_it_alone() -> None:
    bench = overlapped()
    done = bench.add([1], max_tokens=1)
    bench.step()
    failed = bench.add([2], max_tokens=3)
    bench.runner.fail_next = True
    bench.run()
    assert bench.ends[failed].finish_reason is FinishReason.LENGTH
    assert bench.ends[done].finish_reason is FinishReason.LENGTH
    bench.check_over()
