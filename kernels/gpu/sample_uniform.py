"""Random numbers that depend on nothing but their place: SplitMix64 of (seed, position, attempt).

The device form of `engine.sampling.uniform`, equal to it bit for bit.
Source: Steele, Lea, Flood 2014, Fast Splittable Pseudorandom Number Generators.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loraplex.kernels.gpu.sample_rows import SEED
from loraplex.kernels.gpu.sample_rows import WORDS as _NUM_WORDS

_GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
_WORDS = tl.constexpr(_NUM_WORDS)


@triton.jit
def load_seed(records, row):
    """uint64"""
    at = records + row * _WORDS + SEED
    low = tl.load(at).to(tl.uint32, bitcast=True).to(tl.uint64)
    high = tl.load(at + 1).to(tl.uint32, bitcast=True).to(tl.uint64)
    return low | (high << 32)


@triton.jit
def uniform(seed, position, attempt):
    """float64 in [0, 1). seed: uint64; position, attempt: integers."""
    place = position.to(tl.uint64) + (tl.cast(attempt, tl.uint64) << 40)
    mixed = _mix(_mix(seed + _GOLDEN) + place * _GOLDEN)
    return (mixed >> 11).to(tl.int64).to(tl.float64) * 2.0**-53


@triton.jit
def _mix(x):
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)
