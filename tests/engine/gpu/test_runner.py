"""The GPU runner against the CPU's: the same sequences, steps overlapped, graphs replayed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from loraplex.engine.gpu import events
from loraplex.engine.gpu.events import DeviceLost
from loraplex.engine.gpu.sampler import DeviceSampler

steps_of = sys.modules["steps"]


@pytest.fixture
def expected(make_bench: Any, tiny_model: Any, make_prompt: Any) -> Callable[..., list[list[int]]]:
    """The tokens that the CPU path makes of the same cases."""

    def make(family: str, num_tokens: int) -> list[list[int]]:
        bench = make_bench(tiny_model(family))
        steps = steps_of.Steps(bench.runner, 128)
        return steps.run(steps_of.cases(steps, bench.digests, make_prompt), num_tokens)

    return make


@pytest.mark.parametrize("capture", [True, False])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_the_tokens_of_the_cpu_path(
    family: str, capture: bool, make_runner: Any, expected: Any, make_prompt: Any
) -> None:
    runner, _, digests = make_runner(family, capture=capture)
    steps = steps_of.Steps(runner, 128)
    assert steps.run(steps_of.cases(steps, digests, make_prompt), 8) == expected(family, 8)


def test_batch_invariance_changes_no_token(
    make_runner: Any, expected: Any, make_prompt: Any
) -> None:
    """All rows in small tiles, all attention in prefill tiles, under graphs, too."""
    runner, _, digests = make_runner(batch_invariant=True)
    steps = steps_of.Steps(runner, 128)
    assert steps.run(steps_of.cases(steps, digests, make_prompt), 8) == expected("llama", 8)


def test_sequences_come_and_go_with_steps_in_flight(
    make_runner: Any, make_bench: Any, tiny_model: Any, make_prompt: Any
) -> None:
    """A preempted sequence starts over in another's row; a new one gets its row and blocks."""
    runner, _, digests = make_runner(max_num_seqs=3)
    bench = make_bench(tiny_model("llama"))

    def live(one: Any, digests: dict[str, str]) -> list[list[int]]:
        steps = steps_of.Steps(one, 40)
        uses = [steps_of.AdapterUse(d) for d in digests.values()]
        first, second, third, fourth = [
            steps.sequence(make_prompt(9 + 7 * i, i), use)
            for i, use in zip(range(4), uses, strict=False)
        ]
        steps.step([(first, 9), (second, 16)])
        steps.step([(first, 1), (second, 1), (third, 23)])
        steps.step([(first, 1), (second, 1), (third, 1)])
        steps.release(second)
        steps.step([(first, 1), (fourth, 30)])
        while steps.in_flight:
            steps.settle()
        steps.release(first)
        steps.run([second, third, fourth], 6)
        for states in [one.states] if hasattr(one, "states") else []:
            states.check_invariants()
        return [seq.output_token_ids[:4] for seq in (first, second, third, fourth)]

    assert live(runner, digests) == live(bench.runner, bench.digests)


def test_prompt_logprobs_come_with_their_tokens(
    make_runner: Any, make_bench: Any, tiny_model: Any, make_prompt: Any
) -> None:
    """In chunks, beside a decode; by the device's sampler, interpreted."""
    runner, _, digests = make_runner(sampler=DeviceSampler(272, 8, torch.device("cpu")))
    bench = make_bench(tiny_model("llama"))
    found = []
    for one, names in ((runner, digests), (bench.runner, bench.digests)):
        steps = steps_of.Steps(one, 128)
        use = steps_of.AdapterUse(names["all"])
        asking = steps.sequence(make_prompt(60), use, prompt_logprobs=2, logprobs=1)
        tokens = steps.run([steps.sequence(make_prompt(3, 1)), asking], 3)
        found.append((tokens, steps.made[asking.seq_id]))
    (tokens, entries), (expected_tokens, expected) = found
    assert tokens == expected_tokens
    assert len(entries) == len(expected) == 59
    for entry, want in zip(entries, expected, strict=True):
        assert (entry.token_id, entry.rank, entry.top_ids) == (
            want.token_id, want.rank, want.top_ids,
        )  # fmt: skip
        assert entry.logprob == pytest.approx(want.logprob, abs=1e-4)


@pytest.mark.parametrize("lost", [True, False])
def test_a_device_that_is_gone_ends_the_process(
    lost: bool, make_runner: Any, make_prompt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Anything else fails the step only."""
    runner, _, _ = make_runner(capture=False)
    steps = steps_of.Steps(runner, 128)
    steps.step([(steps.sequence(make_prompt(5)), 5)])

    def fail(handle: Any) -> Any:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(events, "is_lost", lambda device: lost)
    monkeypatch.setattr(runner._sampler, "collect", fail)
    with pytest.raises(DeviceLost if lost else torch.AcceleratorError, match="illegal"):
        steps.settle()
    assert not issubclass(DeviceLost, Exception), "no handler may swallow it"
