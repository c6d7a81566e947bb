"""Workloads are what the papers say: group sizes by formula, draws by the papers' own seeds and
order.
"""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex.platform.bench import workload
from loraplex.platform.bench.workload import PlannedRequest, group_sizes, punica, slora

GROUPED = ("identical", "uniform", "skewed", "distinct")
counts = st.integers(1, 3000)


@given(n=counts, popularity=st.sampled_from(GROUPED))
def test_groups_hold_every_request_largest_first(n: int, popularity: str) -> None:
    sizes = group_sizes(n, popularity)
    assert sum(sizes) == n
    assert min(sizes) >= 1
    assert sizes == sorted(sizes, reverse=True)


@given(n=counts)
def test_uniform_is_the_square_root_as_even_as_can_be(n: int) -> None:
    sizes = group_sizes(n, "uniform")
    assert len(sizes) == math.ceil(math.sqrt(n))
    assert max(sizes) - min(sizes) <= 1


@given(n=counts)
def test_skewed_sizes_are_powers_of_one_and_a_half_and_a_rest(n: int) -> None:
    sizes = group_sizes(n, "skewed")
    powers = [math.floor(1.5**k) for k in range(len(sizes) - 1)]
    rest = n - sum(powers)
    assert sorted(sizes) == sorted([*powers, rest])
    # One more whole group would not have left anything for the last.
    assert rest <= math.floor(1.5 ** len(powers))


def test_the_ends_and_known_values() -> None:
    assert group_sizes(32, "identical") == [32]
    assert group_sizes(4, "distinct") == [1, 1, 1, 1]
    assert group_sizes(32, "uniform") == [6, 6, 5, 5, 5, 5]
    assert group_sizes(32, "skewed") == [11, 7, 5, 3, 2, 2, 1, 1]
    assert group_sizes(0, "uniform") == []
    with pytest.raises(ValueError, match="'zipf' is not one of base, identical"):
        group_sizes(3, "zipf")


@given(n=st.integers(1, 200), popularity=st.sampled_from(GROUPED))
def test_punica_deals_the_groups_and_shuffles_with_its_seed(n: int, popularity: str) -> None:
    plan = punica(popularity, n, n, 10, 20)
    used = Counter(p.adapter for p in plan)
    assert sorted(used.values(), reverse=True) == group_sizes(n, popularity)
    assert plan == punica(popularity, n, n, 10, 20)
    assert {(p.prompt_len, p.output_len, p.start_s) for p in plan} == {(10, 20, 0.0)}


def test_punica_shuffle_is_pcg64_with_the_published_seed() -> None:
    sizes = group_sizes(8, "uniform")
    expected = np.array([g for g, size in enumerate(sizes) for _ in range(size)], dtype=np.int32)
    np.random.Generator(np.random.PCG64(seed=0xABCDABCD987)).shuffle(expected)
    assert [p.adapter for p in punica("uniform", 8, 8, 1, 1)] == expected.tolist()


@given(n=st.integers(1, 300), adapters=st.integers(1, 40))
def test_fewer_adapters_than_groups_share_evenly(n: int, adapters: int) -> None:
    used = Counter(p.adapter for p in punica("distinct", n, adapters, 1, 1))
    assert len(used) == min(n, adapters)
    assert max(used.values()) - min(used.values()) <= 1


def test_base_needs_no_adapters_and_the_others_do() -> None:
    assert punica("base", 2, 0, 3, 4) == [PlannedRequest(None, 3, 4)] * 2
    with pytest.raises(ValueError, match="needs adapters"):
        punica("uniform", 2, 0, 3, 4)


def test_slora_draws_power_then_prompt_then_output_then_gamma() -> None:
    plan = slora(100, 0.6, 2.0, 2.0, 30.5, (8, 512), (8, 256), seed=42)
    np.random.seed(42)  # their script draws from the global generator
    power = np.random.power(0.6, 61)
    prompts = np.random.randint(8, 512, 61)
    outputs = np.random.randint(8, 256, 61)
    gaps = np.random.gamma(1 / 4, 4 / 2.0, 61)
    assert [p.adapter for p in plan] == (power * 100).astype(int).tolist()
    assert [p.prompt_len for p in plan] == prompts.tolist()
    assert [p.output_len for p in plan] == outputs.tolist()
    assert [p.start_s for p in plan] == pytest.approx(np.cumsum(gaps).tolist())


def test_slora_follows_its_distributions() -> None:
    n, rate, cv = 20_000, 10.0, 2.0
    plan = slora(10, 0.5, rate, cv, n / rate, (8, 10), (3, 4))
    share = Counter(p.adapter for p in plan)
    for i in range(10):  # P(adapter <= i) = ((i + 1) / n) ** alpha
        below = sum(share[j] for j in range(i + 1)) / n
        assert below == pytest.approx(((i + 1) / 10) ** 0.5, abs=0.02)
    gaps = np.diff([0.0, *(p.start_s for p in plan)])
    assert gaps.mean() == pytest.approx(1 / rate, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.05)
    assert {p.prompt_len for p in plan} == {8, 9}, "the upper end is exclusive"
    assert {p.output_len for p in plan} == {3}
    with pytest.raises(ValueError, match="at least one adapter"):
        slora(0, 1, 1, 1, 1, (1, 2), (1, 2))


def test_poisson_only_changes_the_arrivals() -> None:
    plan = punica("distinct", 2000, 7, 5, 6)
    timed = workload.poisson(plan, rate=4.0)
    assert [(p.adapter, p.prompt_len, p.output_len) for p in timed] == [
        (p.adapter, p.prompt_len, p.output_len) for p in plan
    ]
    starts = [p.start_s for p in timed]
    assert starts == sorted(starts)
    assert starts[-1] == pytest.approx(500, rel=0.1)


def test_prompts_are_all_different_and_avoid_special_ids() -> None:
    plan = punica("base", 50, 0, 20, 1)
    found = workload.prompts(plan, vocab_size=100, seed=1)
    assert {len(p) for p in found} == {20}
    assert len({tuple(p) for p in found}) == 50
    assert 3 <= min(map(min, found))
    assert max(map(max, found)) < 100
    assert found == workload.prompts(plan, 100, seed=1)
    assert found != workload.prompts(plan, 100, seed=2)


def test_describe() -> None:
    plan = [PlannedRequest(0, 3, 4), PlannedRequest(None, 5, 6), PlannedRequest(0, 1, 1)]
    assert workload.describe(plan) == {
        "num_requests": 3,
        "num_adapters": 1,
        "prompt_tokens": 9,
        "planned_output_tokens": 11,
    }
