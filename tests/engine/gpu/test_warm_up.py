"""The warm-up compiles what later steps use, captures included."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loraplex.engine.gpu.dummy_steps import DummySteps, dummy_adapter
from loraplex.engine.gpu.warm_up import warm_up
from loraplex.engine.lane import Lanes
from loraplex.engine.probe import paged_logits
from loraplex.kernels.gpu.configurations import distinct

meta = sys.modules["meta_runner"]
MAX_LEN = meta.MAX_BLOCKS * 16


class Warm:
    """A warmed-up runner, and the configurations that are compiled by then."""

    def __init__(self, family: str, **options: Any) -> None:
        self.runner, self.pool = meta.make_meta_runner(family, torch.bfloat16, **options)
        with meta.watched() as (notes, _):
            warm_up(self.runner, self.pool, meta.MAX_SEQS, meta.MAX_TOKENS, MAX_LEN)
        self.compiled = distinct(notes).keys()


@pytest.fixture(scope="module")
def warm() -> Any:
    made: dict[str, Warm] = {}

    def make(family: str, **options: Any) -> Warm:
        key = repr((family, options))
        if key not in made:
            made[key] = Warm(family, **options)
        return made[key]

    return make


runs = st.lists(
    st.one_of(
        st.tuples(st.just(1), st.integers(1, MAX_LEN)),
        st.integers(1, 200).flatmap(lambda n: st.tuples(st.just(n), st.integers(n, MAX_LEN))),
    ),
    min_size=1,
    max_size=meta.MAX_SEQS,
).filter(lambda runs: sum(new for new, _ in runs) <= meta.MAX_TOKENS)
sampling = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.0, 0.7]),
        "top_k": st.sampled_from([1, 40]),
        "top_p": st.just(0.9),
        "min_p": st.just(0.1),
        "logprobs": st.sampled_from([0, 3, 20]),
        "prompt_logprobs": st.sampled_from([0, 2]),
        "presence_penalty": st.just(0.5),
        "logit_bias": st.just({3: -1.0}),
        "allowed_token_ids": st.just([1, 2, 3]),
    },
)


@pytest.mark.parametrize(
    ("family", "options"),
    [("llama", {}), ("qwen3", {}), ("llama", {"batch_invariant": True})],
)
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(runs=runs, adapted=st.lists(st.integers(0, 2), min_size=1, max_size=5), sampling=sampling)
def test_no_step_compiles_anything(
    family: str, options: dict[str, Any], warm: Any, runs: Any, adapted: Any, sampling: Any
) -> None:
    ready = warm(family, **options)
    steps = DummySteps(ready.runner, MAX_LEN)
    with meta.watched() as (notes, _), dummy_adapter(ready.pool) as use:
        uses = [(), (use,), (use, use)]
        steps.run(runs, [uses[i] for i in adapted], **sampling)
    new = distinct(notes).keys() - ready.compiled
    assert not new, "\n".join(map(str, new))
    assert notes


@settings(max_examples=20, deadline=None)
@given(
    new=st.integers(2, 200),
    before=st.integers(0, 40),
    active=st.integers(1, 199),
    beside=st.lists(st.integers(0, 1), max_size=2),
)
def test_an_adapter_that_begins_inside_a_step_compiles_nothing(
    warm: Any, new: int, before: int, active: int, beside: list[int]
) -> None:
    ready = warm("llama")
    steps = DummySteps(ready.runner, MAX_LEN)
    with meta.watched() as (notes, _), dummy_adapter(ready.pool) as use:
        seq = steps.sequence(min(before + new, MAX_LEN), (use,))
        new = min(new, seq.num_tokens)
        seq.spans = ((0, ()), (max(0, seq.num_tokens - active), (use,)))
        others = [(steps.sequence(9, ((use,), ())[i]), 1) for i in beside]
        schedule = steps.schedule([(seq, new), *others])
        ready.runner.collect(ready.runner.launch(schedule))
        ready.runner.forget([s.seq.seq_id for s in schedule.scheduled])
    new_ones = distinct(notes).keys() - ready.compiled
    assert not new_ones, "\n".join(map(str, new_ones))
    assert notes


@torch.inference_mode()
def test_the_first_probe_compiles_nothing(warm: Any) -> None:
    """Adapters are registered while others are served."""
    ready = warm("llama")
    tokens = torch.zeros(12, dtype=torch.int64, device=meta.META)
    with meta.watched() as (notes, _), dummy_adapter(ready.pool) as use:
        for digest in (None, use.digest):
            decoder = ready.runner.decoder
            lanes = Lanes(ready.pool, decoder.lane_model)
            paged_logits(decoder, ready.pool, 16, tokens, digest, lanes)
    assert notes
    assert not distinct(notes).keys() - ready.compiled


@torch.inference_mode()
def test_a_step_with_a_lane_compiles_nothing(warm: Any) -> None:
    """Which runs without a graph, decodes too."""
    ready = warm("llama")
    steps = DummySteps(ready.runner, MAX_LEN)
    with meta.watched() as (notes, _), meta.dummy_extras(ready.pool) as use:
        for runs in ([(1, 7)], [(1, 7)] * 5, [(1, 9)] * 24, [(1, 9), (30, 30)], [(200, 200)] * 2):
            for uses in ([(use,)], [(), (use,)]):
                steps.run(runs, uses)
    assert notes
    new = distinct(notes).keys() - ready.compiled
    assert not new, "\n".join(map(str, new))


def test_captures_alone_would_not_do() -> None:
    """The companion: without its steps the warm-up leaves kernels uncompiled."""
    runner, pool = meta.make_meta_runner()
    with meta.watched() as (notes, _):
        runner.graphs.capture()
    compiled = distinct(notes).keys()
    with meta.watched() as (notes, _), dummy_adapter(pool) as use:
        DummySteps(runner, MAX_LEN).run([(40, 40)], [(use,)], temperature=1.0)
    assert distinct(notes).keys() - compiled
