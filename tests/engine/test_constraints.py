"""Sequences with grammars in the engine's loop: who waits for a mask, and who does not."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from engine_fakes import EOS, Bench
from grammar_fakes import fake_grammar

from loraplex.engine import api
from loraplex.engine.api import FinishReason
from loraplex.engine.constraints import MAX_GRAMMARS
from loraplex.engine.errors import InvalidRequest


@pytest.fixture(autouse=True)
def _masks_come_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loraplex.engine.engine.MASK_WAIT_S", 0)


def names_of_steps(bench: Bench) -> list[set[str]]:
    return [{item.seq.request_id for item in batch.scheduled} for batch in bench.runner.batches]


def reasons(bench: Bench) -> dict[str, Any]:
    return {info.request_id: info.waiting_reason for info in bench.engine.requests()}


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_outputs_follow_their_grammars_beside_free_ones(depth: int) -> None:
    bench = Bench(max_in_flight=depth)
    for salt in range(4):
        bench.add([1, 2, salt], max_tokens=12, grammar=fake_grammar(salt, 8))
        bench.add([1, 2, salt], {"a": 1.0}, max_tokens=12, grammar=fake_grammar(0, 20))
        bench.add([1, 2, salt], {"b": 1.0}, max_tokens=12)
    bench.run()
    bench.check_over()
    assert {end.finish_reason for end in bench.ends.values()} >= {
        FinishReason.STOP,
        FinishReason.LENGTH,
    }


def test_with_a_step_in_flight_a_grammar_runs_every_other_step_and_the_rest_every_step() -> None:
    bench = Bench(max_in_flight=1)
    held = bench.add([1], max_tokens=4, grammar=fake_grammar(0, 20))
    free = bench.add([2], max_tokens=8)
    bench.run()
    bench.check_over()
    assert names_of_steps(bench)[:7] == [{held, free}, {free}] * 3 + [{held, free}]


def test_grammars_alone_run_one_step_at_a_time() -> None:
    bench = Bench(max_in_flight=1)
    for salt in range(2):
        bench.add([salt], max_tokens=2, grammar=fake_grammar(salt, 20))
    bench.run()
    assert bench.runner.events == ["launch 0", "collect 0", "launch 1", "collect 1"]
    bench.check_over()


def test_who_has_no_mask_sits_steps_out_and_holds_nobody_up() -> None:
    bench = Bench(masks_at_once=False)
    slow = bench.add([1], max_tokens=3, grammar=fake_grammar(0, 20))
    free = bench.add([2], max_tokens=9)
    bench.step()
    assert reasons(bench)[slow] == "grammar"
    bench.compile_jobs.run(0)
    bench.step()
    assert reasons(bench)[slow] == "grammar"  # its first mask is on its way
    bench.mask_jobs.run(0)
    bench.step()
    assert len(bench.tokens[slow]) == 1
    for _ in range(3):
        bench.step()
    assert len(bench.tokens[slow]) == 1
    assert len(bench.tokens[free]) == 6
    bench.mask_jobs.run_all()
    bench.run()
    bench.check_over()


def test_an_engine_without_a_mask_runs_nothing_and_does_not_spin() -> None:
    bench = Bench(masks_at_once=False)
    bench.add([1], max_tokens=3, grammar=fake_grammar(0, 20))
    bench.step()
    assert bench.runner.batches == []
    assert bench.engine.has_work()
    assert not bench.engine.ran_last_step  # the loop sleeps until the worker wakes it
    bench.compile_jobs.run_all()
    bench.mask_jobs.run_all()
    bench.run()
    bench.check_over()


def test_a_wrong_grammar_fails_before_anything_runs() -> None:
    bench = Bench()
    for fails_at in (-2, 0):  # compiling, the first mask
        name = bench.add([1], {"a": 1.0}, grammar=fake_grammar(0, 9, fails_at))
        bench.run()
        error = bench.ends[name].error
        assert error is not None
        assert error.code == "invalid_grammar"
    assert bench.runner.batches == []
    bench.check_over()


def test_a_grammar_that_becomes_too_complex_ends_its_own_request_only() -> None:
    bench = Bench(max_in_flight=1)
    bad = bench.add([1], max_tokens=9, grammar=fake_grammar(0, 20, 3))
    good = bench.add([1], max_tokens=9, grammar=fake_grammar(0, 20))
    bench.run()
    assert bench.ends[bad].error is not None
    assert len(bench.tokens[bad]) == 3
    assert bench.ends[good].finish_reason is FinishReason.LENGTH
    bench.check_over()


def test_equal_grammars_are_compiled_once_and_a_wrong_one_again_when_it_is_sent_again() -> None:
    bench = Bench()
    for salt in (0, 0, 0, 1):
        bench.add([salt], grammar=fake_grammar(salt, 9))
    bench.run()
    bench.add([5], grammar=fake_grammar(0, 9))
    bench.run()
    assert bench.compiler.num_compiled == 2
    for _ in range(2):
        bench.add([5], grammar=fake_grammar(0, 9, -2))
        bench.run()
    assert bench.compiler.num_compiled == 4


def test_only_so_many_grammars_are_kept_and_the_rest_wait_in_turn() -> None:
    bench = Bench(max_num_waiting=3 * MAX_GRAMMARS, masks_at_once=False)
    names = [
        bench.add([1], max_tokens=2, grammar=fake_grammar(salt, 20))
        for salt in range(2 * MAX_GRAMMARS)
    ]
    assert len(bench.compile_jobs.jobs) == MAX_GRAMMARS
    bench.engine.cancel(names[0])
    assert len(bench.compile_jobs.jobs) == MAX_GRAMMARS  # it is being compiled all the same
    bench.compile_jobs.run_all()
    bench.mask_jobs.run_all()
    bench.run()
    bench.check_over()
    assert bench.compiler.num_compiled == 2 * MAX_GRAMMARS


def test_a_cancelled_request_takes_its_job_with_it() -> None:
    bench = Bench(masks_at_once=False)
    name = bench.add([1], grammar=fake_grammar(0, 9))
    other = bench.add([2], grammar=fake_grammar(0, 9))
    bench.engine.cancel(name)
    bench.compile_jobs.run_all()
    bench.step()
    bench.engine.cancel(other)  # its first mask is on its way
    bench.mask_jobs.run_all()
    bench.run()
    bench.check_over()


@pytest.mark.parametrize("depth", [0, 1])
def test_preemption_changes_no_token(depth: int) -> None:
    bench = Bench(max_in_flight=depth, num_blocks=10, prefix_cache=False)
    for salt in range(4):
        bench.add([salt, 1, 2], max_tokens=30, grammar=fake_grammar(salt, 40), ignore_eos=True)
    bench.run()
    bench.check_over()
    assert bench.engine.stats().num_preemptions > 0
    assert all(len(tokens) == 30 for tokens in bench.tokens.values())


@pytest.mark.parametrize("depth", [0, 1])
def test_a_grammar_goes_on_in_another_engine_where_it_stood(depth: int) -> None:
    """After a crash: the matcher has to take in what the engine that died had chosen."""
    whole = Bench(max_in_flight=depth)
    name = whole.add([3, 1, 2], max_tokens=12, grammar=fake_grammar(5, 40), min_tokens=7)
    whole.run()
    tokens = whole.tokens[name]
    for done in (1, 6, 8):
        other = Bench(max_in_flight=depth)
        request = msgspec.structs.replace(whole.requests[name], output_token_ids=tokens[:done])
        other.requests[name], other.tokens[name] = request, tokens[:done]
        other.engine.add(request)
        other.run()
        assert other.tokens[name] == tokens


def test_min_tokens_and_ignore_eos_put_the_end_off_as_long_as_the_grammar_goes_on() -> None:
    bench = Bench()
    names = [
        bench.add([salt], max_tokens=20, grammar=fake_grammar(salt, 6), **options)
        for salt in range(8)
        for options in ({"min_tokens": 12}, {"ignore_eos": True})
    ]
    bench.run()
    bench.check_over()
    for name in names:
        assert len(bench.tokens[name]) <= 7
        assert bench.tokens[name][-1] == EOS
        assert bench.ends[name].finish_reason is FinishReason.STOP


def test_allowed_token_ids_hold_as_well_and_an_empty_rest_is_an_error() -> None:
    bench = Bench()
    grammar = fake_grammar(0, 20)
    name = bench.add([1], max_tokens=20, grammar=grammar, allowed_token_ids=tuple(range(25)))
    none = bench.add([1], max_tokens=20, grammar=fake_grammar(0, 0), allowed_token_ids=(1,))
    while not bench.ends:
        bench.step()
    error = bench.ends[none].error
    assert error is not None
    assert error.code == "invalid_grammar"
    assert "allowed_token_ids" in error.message
    bench.step_until(lambda: name in bench.ends)
    assert all(token < 25 for token in bench.tokens[name])


def test_an_engine_without_grammars_refuses_them() -> None:
    bench = Bench()
    bench.engine._constraints = None
    request = api.GenerationRequest(
        request_id="x",
        prompt_token_ids=[1],
        sampling=api.SamplingParams(grammar=fake_grammar(0, 1)),
    )
    with pytest.raises(InvalidRequest, match="does not follow grammars"):
        bench.engine.add(request)
