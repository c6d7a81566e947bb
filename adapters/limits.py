"""How large an uploaded adapter may be, in bytes and counts. The platform's settings may differ."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    max_rank: int = 512
    max_tensors: int = 65_536
    max_config_bytes: int = 1 * MIB
    max_header_bytes: int = 16 * MIB  # of the weights file; the format itself allows 100 MB
    max_weights_bytes: int = 8192 * MIB
    max_archive_members: int = 10_000
    max_archive_ratio: int = 100  # unpacked / packed, looked at once more than 64 MiB are unpacked
