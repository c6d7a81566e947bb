"""On a real GPU: graphs against eager steps, overlap against waiting, memory, and compilation."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import triton

from loraplex.engine.gpu.dummy_steps import EVERYTHING, DummySteps, dummy_adapter
from loraplex.engine.gpu.memory_profile import peak_bytes
from loraplex.engine.gpu.warm_up import warm_up

pytestmark = pytest.mark.gpu
steps_of = sys.modules["steps"]
GPU = torch.device("cuda:0")
MAX_SEQS, MAX_TOKENS, MAX_LEN = 8, 48, 128


def tokens(runner: Any, digests: dict[str, str], make_prompt: Any, ahead: int = 1) -> Any:
    steps = steps_of.Steps(runner, 128)
    runner.max_in_flight = ahead
    sequences = steps_of.cases(steps, digests, make_prompt)
    made = steps.run(sequences, 12)
    runner.forget([seq.seq_id for seq in sequences])
    return made


@contextmanager
def compilations() -> Iterator[list[str]]:
    """The kernels that Triton compiles, or loads from its cache, within the block."""
    found: list[str] = []

    def note(**facts: Any) -> None:
        found.append(facts["repr"])

    before = triton.knobs.runtime.jit_post_compile_hook
    triton.knobs.runtime.jit_post_compile_hook = note
    try:
        yield found
    finally:
        triton.knobs.runtime.jit_post_compile_hook = before


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_graphs_and_overlap_change_no_token(
    family: str, make_runner: Any, make_bench: Any, tiny_model: Any, make_prompt: Any
) -> None:
    """Against each other and against the CPU path: fp32, greedy, all adapters mixed."""
    eager, _, digests = make_runner(family, device=GPU, capture=False)
    captured, _, _ = make_runner(family, device=GPU)
    made = tokens(eager, digests, make_prompt)
    assert tokens(captured, digests, make_prompt) == made
    assert tokens(captured, digests, make_prompt, ahead=0) == made
    assert captured.graphs.num_too_wide == 0
    bench = make_bench(tiny_model(family))
    steps = steps_of.Steps(bench.runner, 128)
    assert steps.run(steps_of.cases(steps, bench.digests, make_prompt), 12) == made


def test_batch_invariance_is_bitwise(make_runner: Any, make_prompt: Any) -> None:
    """A sequence alone and among others: the same logits to the last bit."""
    runner, _, digests = make_runner(device=GPU, batch_invariant=True)
    kept: list[Any] = []
    launch = runner._sampler.launch

    def keep(logits: Any, items: Any, last_tokens: Any) -> Any:
        kept.append({seq.num_prompt_tokens: row.clone() for (seq, _, _), row in zip(
            items, logits, strict=True)})  # fmt: skip
        return launch(logits, items, last_tokens)

    runner._sampler.launch = keep
    use = steps_of.AdapterUse(digests["all"])
    found = []
    for others in (0, 5):
        kept.clear()
        steps = steps_of.Steps(runner, 128)
        sequences = [steps.sequence(make_prompt(21), use)]
        sequences += [steps.sequence(make_prompt(7 + i, i)) for i in range(others)]
        steps.run(sequences, 6)
        runner.forget([seq.seq_id for seq in sequences])
        found.append([step[21] for step in kept if 21 in step])
    alone, among = found
    assert len(alone) == len(among) == 6
    assert all(torch.equal(a, b) for a, b in zip(alone, among, strict=True))


def test_no_request_waits_for_a_compiler(make_runner: Any, make_prompt: Any) -> None:
    runner, pool, digests = make_runner(device=GPU, capture=False)
    with compilations() as before:
        warm_up(runner, pool, MAX_SEQS, MAX_TOKENS, MAX_LEN)
    assert before
    with compilations() as after, dummy_adapter(pool) as use:
        tokens(runner, digests, make_prompt)
        steps = DummySteps(runner, MAX_LEN)
        for runs in ([(1, 9)], [(1, 9)] * 5, [(1, 9), (33, 60)], [(45, 45)], [(6, 100), (6, 6)]):
            for sampling in ({}, {"temperature": 0.9}, EVERYTHING):
                steps.run(runs, [(use,), ()], **sampling)
    assert after == []


def test_a_launch_returns_before_the_device_is_done(make_runner: Any, make_prompt: Any) -> None:
    runner, _, _ = make_runner(device=GPU)
    steps = steps_of.Steps(runner, 128)
    seq = steps.sequence(make_prompt(9))
    steps.run([seq], 2)
    torch.cuda._sleep(2_000_000_000)  # cycles: about a second
    schedule_at = len(steps.in_flight)
    steps.step([(seq, 1)])
    assert len(steps.in_flight) == schedule_at + 1
    [(_, handle)] = steps.in_flight
    assert not handle.over.query(), "launch waited for the device"
    steps.settle()


def test_peaks_are_measured() -> None:
    def run() -> None:
        first = torch.empty(10 << 20, dtype=torch.uint8, device=GPU)
        del first
        torch.empty(5 << 20, dtype=torch.uint8, device=GPU)

    assert 10 << 20 <= peak_bytes(run, GPU) < 15 << 20
