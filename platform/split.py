"""Which version of a weighted split a key gets: the same one every time, on every server.

Weighted rendezvous hashing: each version draws an exponential time from its hash with the key, at
the rate of its weight, and the earliest wins. Shares are exact in the mean, and a change of weights
moves only the keys it must: raising one version's weight moves keys to it and none between others.
Knows nothing of where splits are kept.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping


def choose(name: str, weights: Mapping[int, int], key: str) -> int:
    """The version that `key` gets. name: what is split (`sql:prod`), so that two splits assign the
    same keys independently. weights: version -> weight, none negative, at least one positive.
    """
    live = [(version, weight) for version, weight in weights.items() if weight > 0]
    assert live, f"nothing of {name} has a weight"
    if len(live) == 1:
        return live[0][0]
    return min(live, key=lambda item: _draw(name, item[0], key) / item[1])[0]


def _draw(name: str, version: int, key: str) -> float:
    """Exponentially distributed with mean 1; a function of its arguments."""
    # A name has no NUL, so no two (name, version, key) make one text. JSON lets half a surrogate
    # pair through, which has no UTF-8 of its own.
    text = f"{name}@{version}\0{key}".encode("utf-8", "surrogatepass")
    bits = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 11
    return -math.log((bits + 0.5) / 2**53)
