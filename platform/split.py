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
    # The key is hashed once, however many versions there are: a client may send a long one. JSON
    # lets half a surrogate pair through, which has no UTF-8 of its own.
    hashed = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=16).digest()
    return min(live, key=lambda item: _draw(f"{name}@{item[0]}", hashed) / item[1])[0]


def _draw(candidate: str, hashed_key: bytes) -> float:
    """Exponentially distributed with mean 1; a function of its arguments."""
    drawn = hashlib.blake2b(candidate.encode(), key=hashed_key, digest_size=8).digest()
    return -math.log(((int.from_bytes(drawn, "big") >> 11) + 0.5) / 2**53)
