"""Which requests a benchmark sends: adapter, lengths, arrival time. Knows nothing of HTTP.

Two families, each with the seed and the order of draws of the paper it comes from, so that figures
can be compared with theirs: Punica's popularities (2310.18547), all requests at hand at once;
S-LoRA's synthetic trace (2311.03285), requests arriving over time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

POPULARITIES = ("base", "identical", "uniform", "skewed", "distinct")
PUNICA_SEED = 0xABCDABCD987
SLORA_SEED = 42
SKEW = 1.5  # Punica's "zipf:1.5"

# Ids below this are left out of random prompts: tokenizers keep their special tokens there.
FIRST_TOKEN_ID = 3


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """`adapter` is an index into the adapters at hand, None the base model; `start_s` counts from
    the run's start.
    """

    adapter: int | None
    prompt_len: int
    output_len: int
    start_s: float = 0.0


def group_sizes(num_requests: int, popularity: str) -> list[int]:
    """How many requests each adapter gets; the sum is `num_requests`, largest first.

    identical: one adapter takes all. distinct: one request each. uniform: ceil(sqrt(n)) adapters,
    as even as can be. skewed: sizes floor(1.5^k) while they fit, the last group takes the rest.

    Raises: ValueError for another word.
    """
    if num_requests < 1:
        return []
    if popularity == "identical":
        return [num_requests]
    if popularity == "distinct":
        return [1] * num_requests
    if popularity == "uniform":
        # n * (bs // n) is never more than bs, and short of it by less than n.
        n = math.ceil(math.sqrt(num_requests))
        size, rest = divmod(num_requests, n)
        return [size + 1] * rest + [size] * (n - rest)
    if popularity == "skewed":
        sizes: list[int] = []
        left, growth = num_requests, 1.0
        while math.floor(growth) < left:
            sizes.append(math.floor(growth))
            left -= sizes[-1]
            growth *= SKEW
        return sorted([*sizes, left], reverse=True)
    raise ValueError(f"popularity {popularity!r} is not one of {', '.join(POPULARITIES)}")


def punica(
    popularity: str, num_requests: int, num_adapters: int, prompt_len: int, output_len: int
) -> list[PlannedRequest]:
    """`num_requests` requests of equal length, adapters dealt by `popularity` and shuffled.

    With fewer adapters than groups, group g uses adapter g mod `num_adapters`; so `distinct` over 8
    adapters gives each an equal share.

    Raises: ValueError when the popularity needs adapters and there are none.
    """
    if popularity == "base":
        return [PlannedRequest(None, prompt_len, output_len)] * num_requests
    sizes = group_sizes(num_requests, popularity)
    if num_adapters < 1:
        raise ValueError(f"popularity {popularity!r} needs adapters, and none are given")
    groups = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    np.random.Generator(np.random.PCG64(seed=PUNICA_SEED)).shuffle(groups)
    return [PlannedRequest(int(g) % num_adapters, prompt_len, output_len) for g in groups]


def slora(
    num_adapters: int,
    alpha: float,
    rate: float,
    cv: float,
    duration_s: float,
    prompt_range: tuple[int, int],
    output_range: tuple[int, int],
    seed: int = SLORA_SEED,
) -> list[PlannedRequest]:
    """S-LoRA's trace: int(rate * duration_s) requests; the upper ends of the ranges are exclusive.

    Adapter floor(n * Power(alpha)): density alpha * x^(alpha-1), so alpha=1 is uniform and a small
    alpha favours low indices. Gaps are Gamma of shape 1/cv^2 and mean 1/rate: cv=1 is Poisson, more
    is burstier. Draws come from numpy's old global generator in the order power, prompt, output,
    gamma, as in their script.
    """
    if num_adapters < 1:
        raise ValueError("the S-LoRA trace needs at least one adapter")
    rng = np.random.RandomState(seed)
    total = int(rate * duration_s)
    adapters = (rng.power(alpha, total) * num_adapters).astype(int)
    prompts = rng.randint(*prompt_range, total)
    outputs = rng.randint(*output_range, total)
    starts = np.cumsum(rng.gamma(1 / cv**2, cv**2 / rate, total))
    return [
        PlannedRequest(int(a), int(p), int(o), float(s))
        for a, p, o, s in zip(adapters, prompts, outputs, starts, strict=True)
    ]


def poisson(
    plan: Sequence[PlannedRequest], rate: float, seed: int = SLORA_SEED
) -> list[PlannedRequest]:
    """The same requests, arriving at random at `rate` per second instead of all at once."""
    starts = np.cumsum(np.random.RandomState(seed).exponential(1 / rate, len(plan)))
    return [
        PlannedRequest(p.adapter, p.prompt_len, p.output_len, float(s))
        for p, s in zip(plan, starts, strict=True)
    ]


def prompts(plan: Sequence[PlannedRequest], vocab_size: int, seed: int) -> list[list[int]]:
    """Random token ids, different for every request: a prefix cache must find nothing to reuse."""
    rng = np.random.Generator(np.random.PCG64(seed))
    return [rng.integers(FIRST_TOKEN_ID, vocab_size, p.prompt_len).tolist() for p in plan]


def describe(plan: Sequence[PlannedRequest]) -> dict[str, Any]:
    """The plan in numbers, for the report."""
    used = {p.adapter for p in plan} - {None}
    return {
        "num_requests": len(plan),
        "num_adapters": len(used),
        "prompt_tokens": sum(p.prompt_len for p in plan),
        "planned_output_tokens": sum(p.output_len for p in plan),
    }
