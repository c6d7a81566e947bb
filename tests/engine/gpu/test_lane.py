"""Adapters of every format on the GPU's runner: steps with them run without a graph, with the same
tokens as on the CPU's.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest

from loraplex.adapters.pool import PagePool
from loraplex.engine.api import AdapterUse
from loraplex.engine.base_weights import BaseWeights

steps_of = sys.modules["steps"]


def install(pool: PagePool, decoder: Any, formats: dict[str, Any]) -> None:
    base = BaseWeights(decoder)
    for case in formats.values():
        prepared = base.prepare(case.loaded)
        image = pool.build_image(prepared.loaded, parts=prepared.parts)
        pool.install(case.loaded.digest, image)


def test_the_tokens_of_the_cpu_path(
    make_runner: Any, make_bench: Any, make_formats: Any, tiny_model: Any, make_prompt: Any
) -> None:
    """Captured steps of the others in between: what follows them must not be taken for their
    rows, nor the other way round.
    """
    formats, made, entries = make_formats("qwen3"), [], []
    runner, pool, digests = make_runner("qwen3", max_num_seqs=8)
    bench = make_bench(tiny_model("qwen3"))
    install(pool, runner.decoder, formats)
    install(bench.pool, bench.decoder, formats)
    replayed = []
    replay = runner.graphs.replay
    runner.graphs.replay = lambda inputs: replayed.append(inputs) or replay(inputs)
    try:
        for one in (runner, bench.runner):
            steps = steps_of.Steps(one, 128)
            plain = AdapterUse((digests if one is runner else bench.digests)["all"])
            first = steps.sequence(make_prompt(9, 1), plain)
            steps.run([first], 3)
            steps.release(first)
            sequences = [
                steps.sequence(make_prompt(7 + 3 * i, i), AdapterUse(case.loaded.digest))
                for i, case in enumerate(formats.values())
            ]
            asking = steps.sequence(
                make_prompt(20), AdapterUse(formats["several"].loaded.digest), prompt_logprobs=0
            )
            sequences += [steps.sequence(make_prompt(6)), steps.sequence(make_prompt(9), plain)]
            made.append(steps.run([*sequences, asking], 5))
            entries.append([e.logprob for e in steps.made[asking.seq_id]])
    finally:
        for case in formats.values():
            bench.pool.remove(case.loaded.digest)
    assert made[0] == made[1]
    assert entries[0] == pytest.approx(entries[1], abs=1e-3)
    assert 0 < len(replayed) <= 2, "only the steps without a lane have a graph"
