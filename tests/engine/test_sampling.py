"""The sampler against a plain one-row reference, its distributions, and its independence."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling_cases import CASES, CPU, EOS, VOCAB, make_logits, make_sequence
from torch import Tensor

from loraplex.engine.sampling import Sampler, token_logprobs, uniform
from loraplex.engine.sequence import Sequence


def sample(logits: Tensor, *sequences: Sequence) -> list[int]:
    return Sampler(logits.shape[1], CPU).sample(logits, list(sequences)).token_ids


def reference_probabilities(logits: Tensor, seq: Sequence) -> list[float]:
    """One row, in words: what each token's chance is."""
    p, scores = seq.sampling, [float(x) for x in logits]
    for token, bias in p.logit_bias.items():
        scores[token] += bias
    if p.allowed_token_ids is not None:
        scores = [s if t in p.allowed_token_ids else -math.inf for t, s in enumerate(scores)]
    if seq.mask is not None:
        scores = [s if seq.mask[t // 32] >> t % 32 & 1 else -math.inf for t, s in enumerate(scores)]
    elif seq.num_output_tokens < p.min_tokens:
        for token in (EOS, *p.stop_token_ids):
            scores[token] = -math.inf
    for token in set(seq.token_ids):
        s = scores[token]
        scores[token] = s / p.repetition_penalty if s > 0 else s * p.repetition_penalty
    for token in set(seq.output_token_ids):
        scores[token] -= p.presence_penalty
        scores[token] -= p.frequency_penalty * seq.output_token_ids.count(token)
    top = max(scores)
    weights = [math.exp((s - top) / p.temperature) for s in scores]
    order = sorted(range(len(weights)), key=lambda t: -weights[t])
    if p.top_k > 0:
        order = order[: p.top_k]
    total, passed, kept = sum(weights[t] for t in order), 0.0, []
    for token in order:
        if passed / total < p.top_p or not kept:
            kept.append(token)
        passed += weights[token]
    kept = [t for t in kept if weights[t] >= p.min_p * weights[kept[0]]]
    total = sum(weights[t] for t in kept)
    return [weights[t] / total if t in kept else 0.0 for t in range(len(weights))]


@pytest.mark.parametrize("case", CASES)
def test_tokens_come_with_their_probability(case: str) -> None:
    """4000 draws against the reference by chi-square. Fixed seeds: it passes always or never.

    The limit is six standard deviations of the statistic.
    """
    num_draws, [logits] = 4000, make_logits()
    sequences = [
        make_sequence((1, 2, 9), (4, 4, 11), seed=seed, **CASES[case]) for seed in range(num_draws)
    ]
    drawn = sample(logits.expand(num_draws, -1), *sequences)
    expected = reference_probabilities(logits, sequences[0])
    counts = torch.bincount(torch.tensor(drawn), minlength=VOCAB).tolist()
    assert all(n == 0 for n, p in zip(counts, expected, strict=True) if p == 0)
    terms = [
        (n - p * num_draws) ** 2 / (p * num_draws)
        for n, p in zip(counts, expected, strict=True)
        if p * num_draws >= 5
    ]
    assert sum(terms) < len(terms) + 6 * math.sqrt(2 * len(terms))


def test_the_distribution_test_can_fail() -> None:
    """The same statistic against a slightly other temperature."""
    num_draws, [logits] = 4000, make_logits()
    drawn = sample(
        logits.expand(num_draws, -1),
        *[make_sequence(seed=seed, temperature=0.7) for seed in range(num_draws)],
    )
    expected = reference_probabilities(logits, make_sequence(temperature=0.8))
    counts = torch.bincount(torch.tensor(drawn), minlength=VOCAB).tolist()
    terms = [
        (n - p * num_draws) ** 2 / (p * num_draws)
        for n, p in zip(counts, expected, strict=True)
        if p * num_draws >= 5
    ]
    assert sum(terms) > len(terms) + 6 * math.sqrt(2 * len(terms))


@pytest.mark.parametrize("case", CASES)
def test_greedy_takes_the_likeliest_after_the_edits(case: str) -> None:
    params = {**CASES[case], "temperature": 0.0}
    for seed in range(20):
        [logits] = make_logits(seed=seed)
        seq = make_sequence((1, 2, 9), (4, 4, 11), **params)
        warm = make_sequence((1, 2, 9), (4, 4, 11), **{**params, "temperature": 1.0})
        expected = reference_probabilities(logits, warm)
        assert sample(logits[None], seq) == [expected.index(max(expected))]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(
        st.fixed_dictionaries(
            {
                "temperature": st.sampled_from([0.0, 0.5, 1.0, 1.7]),
                "top_k": st.sampled_from([0, 1, 4, 40]),
                "top_p": st.sampled_from([1.0, 0.9, 0.3, 0.01]),
                "min_p": st.sampled_from([0.0, 0.1]),
                "repetition_penalty": st.sampled_from([1.0, 1.3]),
                "min_tokens": st.sampled_from([0, 5]),
                "logprobs": st.sampled_from([None, 0, 3]),
                "seed": st.integers(0, 2**63 - 1),
            }
        ),
        min_size=2,
        max_size=6,
    )
)
def test_a_row_does_not_see_its_neighbours(rows: list[dict[str, Any]]) -> None:
    """Ties included: the logits are few values, as in bf16."""
    logits = make_logits(len(rows)).round().bfloat16()
    sequences = [make_sequence(**row) for row in rows]
    together = Sampler(VOCAB, CPU).sample(logits, sequences)
    for i, seq in enumerate(sequences):
        alone = Sampler(VOCAB, CPU).sample(logits[i : i + 1], [seq])
        assert alone.token_ids == [together.token_ids[i]]
        assert alone.logprobs == [together.logprobs[i]]


def test_penalties_follow_the_output_step_by_step() -> None:
    """Counts are kept between steps; a sampler that starts late must come to the same."""
    logits = make_logits()
    params = {"temperature": 0.0, "frequency_penalty": 0.5, "repetition_penalty": 1.1}
    seq, sampler = make_sequence(**params), Sampler(VOCAB, CPU)
    for _ in range(30):
        [token] = sampler.sample(logits, [seq]).token_ids
        fresh = make_sequence((1, 2), tuple(seq.output_token_ids), **params)
        assert [token] == sample(logits, fresh)
        seq.token_ids.append(token)
    assert len(set(seq.output_token_ids)) > 5
    sampler.forget([seq.seq_id])
    assert not sampler._seen
    assert not sampler._traits


def test_logits_are_not_changed() -> None:
    logits = make_logits(2)
    before = logits.clone()
    sample(logits, make_sequence(logit_bias={1: 9.0}), make_sequence(repetition_penalty=2.0))
    assert torch.equal(logits, before)


def test_a_seed_repeats_and_another_differs() -> None:
    logits = make_logits().expand(40, -1)
    first = sample(logits, *[make_sequence(output=(5,) * i, seed=1) for i in range(40)])
    again = sample(logits, *[make_sequence(output=(5,) * i, seed=1) for i in range(40)])
    other = sample(logits, *[make_sequence(output=(5,) * i, seed=2) for i in range(40)])
    assert first == again
    assert first != other
    assert len(set(first)) > 1, "the position counts"


def test_uniform_is_even_and_in_range() -> None:
    seeds = [*range(200), 2**64 - 1]
    values = torch.from_numpy(
        uniform([s for s in seeds for _ in range(100)], list(range(100)) * 201)
    )
    assert bool((values >= 0).all() and (values < 1).all())
    counts = torch.histc(values, bins=20, min=0, max=1)
    assert float(((counts - 1005) ** 2 / 1005).sum()) < 19 + 6 * math.sqrt(38)
    assert len(values.unique()) == len(values)
    by_seed = values.view(201, 100)
    assert abs(float(torch.corrcoef(by_seed[:2])[0, 1])) < 0.4, "neighbouring seeds are unrelated"


def test_an_almost_zero_temperature_is_greedy() -> None:
    logits = make_logits(20)
    sequences = [make_sequence(temperature=1e-30, seed=i) for i in range(20)]
    assert sample(logits, *sequences) == logits.argmax(-1).tolist()


def test_logprobs_are_of_the_raw_logits() -> None:
    logits = make_logits()
    seq = make_sequence(
        temperature=0.2, logit_bias={11: 100.0}, logprobs=4, top_k=3, repetition_penalty=1.5
    )
    sampled = Sampler(VOCAB, CPU).sample(logits, [seq])
    [entry], expected = sampled.logprobs, logits[0].log_softmax(-1)
    assert sampled.token_ids == [11]
    assert entry is not None
    assert entry.token_id == 11
    assert entry.logprob == pytest.approx(float(expected[11]), abs=1e-5)
    assert entry.rank == int((expected > expected[11]).sum()) + 1
    assert entry.top_ids == expected.topk(4).indices.tolist()
    assert entry.top_logprobs == pytest.approx(expected.topk(4).values.tolist(), abs=1e-5)


def test_logprobs_of_rows_that_want_different_numbers() -> None:
    found = token_logprobs(make_logits(3), [1, 2, 3], [0, 2, VOCAB])
    assert [len(entry.top_ids) for entry in found] == [0, 2, VOCAB]
