"""Names of KV blocks by content: a chained hash whose first link says which weights made the K/V.

    root    = H(composition, cache salt)
    hash[0] = H(root,    tokens of block 0)
    hash[i] = H(hash[i - 1], tokens of block i)

So equal hashes mean equal tokens from the very start under the same adapters and weights: two
adapters never share a block by accident. 128 bits of blake2b; the block manager still compares
tokens before it trusts a hit.
"""

from __future__ import annotations

import struct
from hashlib import blake2b

from loraplex.engine.sequence import Sequence

_DIGEST_BYTES = 16


def root_hash(composition: tuple[tuple[str, float], ...], cache_salt: str) -> bytes:
    """The first link. `composition` is canonical (`Sequence.composition`): order has no say,
    weights have.
    """
    link = blake2b(digest_size=_DIGEST_BYTES)
    salt = cache_salt.encode()
    link.update(struct.pack("<q", len(salt)) + salt)
    for digest, weight in composition:
        name = digest.encode()
        link.update(struct.pack("<qd", len(name), weight) + name)
    return link.digest()


def block_hashes(seq: Sequence, num_blocks: int, block_size: int) -> list[bytes]:
    """Hashes of at least the first `num_blocks` full blocks of `seq`; kept in the sequence and
    only ever extended, for tokens are only ever appended."""
    hashes = seq.block_hashes
    if len(hashes) >= num_blocks:
        return hashes
    parent = hashes[-1] if hashes else root_hash(seq.composition, seq.request.cache_salt)
    pack = struct.Struct(f"<{block_size}q").pack
    for start in range(len(hashes) * block_size, num_blocks * block_size, block_size):
        tokens = pack(*seq.token_ids[start : start + block_size])
        parent = blake2b(parent + tokens, digest_size=_DIGEST_BYTES).digest()
        hashes.append(parent)
    return hashes
