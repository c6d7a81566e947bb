"""Names of KV blocks by content: a chained hash whose first link says which weights made the K/V.

    root    = H(composition at the first token, cache salt)
    hash[0] = H(root,    tokens of block 0)
    hash[i] = H(hash[i - 1], tokens of block i)

Where an activated LoRA begins inside the sequence, another link goes before the block in which it
does: H(last link, composition from there on, place in the block). What lies before it is hashed
like the base model's, and is shared with it.

So equal hashes mean equal tokens from the very start under the same adapters and weights at every
token: two adapters never share a block by accident. 128 bits of blake2b; the block manager still
compares tokens before it trusts a hit.
"""

from __future__ import annotations

import struct
from hashlib import blake2b

from loraplex.engine.api import AdapterUse
from loraplex.engine.sequence import Sequence

_DIGEST_BYTES = 16
_Uses = tuple[AdapterUse, ...]  # canonical, so that order has no say; weights have


def root_hash(uses: _Uses, cache_salt: str) -> bytes:
    """The first link. uses: what applies to the first token."""
    salt = cache_salt.encode()
    return _link(struct.pack("<q", len(salt)) + salt + _packed(uses))


def _activation_hash(parent: bytes, uses: _Uses, offset: int) -> bytes:
    """The link before a block. uses: what applies from its token `offset` on."""
    # `person` keeps it apart from the hash of any block, whose tokens are a client's choice.
    return _link(parent + struct.pack("<q", offset) + _packed(uses), person=b"activation")


def _packed(uses: _Uses) -> bytes:
    names = [(use.digest.encode(), use.weight) for use in uses]
    return b"".join(struct.pack("<qd", len(name), weight) + name for name, weight in names)


def _link(content: bytes, person: bytes = b"") -> bytes:
    return blake2b(content, digest_size=_DIGEST_BYTES, person=person).digest()


def block_hashes(seq: Sequence, num_blocks: int, block_size: int) -> list[bytes]:
    """Hashes of at least the first `num_blocks` full blocks of `seq`; kept in the sequence and
    only ever extended, for tokens are only ever appended."""
    hashes = seq.block_hashes
    if len(hashes) >= num_blocks:
        return hashes
    parent = hashes[-1] if hashes else root_hash(seq.spans[0][1], seq.request.cache_salt)
    pack = struct.Struct(f"<{block_size}q").pack
    for start in range(len(hashes) * block_size, num_blocks * block_size, block_size):
        end = start + block_size
        for first, uses in seq.spans[1:]:
            if start <= first < end:
                parent = _activation_hash(parent, uses, first - start)
        parent = _link(parent + pack(*seq.token_ids[start:end]))
        hashes.append(parent)
    return hashes
