"""How adapters are named by clients, and nothing of where they are kept.

`sql` (newest version), `sql@3` (that version), `sql:prod` (an alias), `sha256:<64 hex>` (exactly
this content).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from loraplex.platform.errors import ApiError

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}")
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_REFERENCE = re.compile(
    rf"(?P<name>{NAME.pattern})(?:@(?P<version>[1-9][0-9]{{0,8}})|:(?P<alias>{NAME.pattern}))?"
)


@dataclass(frozen=True, slots=True)
class Reference:
    """Exactly one of `digest` and `name` is set; at most one of `version` and `alias`."""

    name: str | None = None
    version: int | None = None
    alias: str | None = None
    digest: str | None = None

    @classmethod
    def parse(cls, text: str) -> Reference | None:
        """None when `text` cannot be a reference."""
        if found := _DIGEST.fullmatch(text):
            return cls(digest=found[1])
        if found := _REFERENCE.fullmatch(text):
            version = found["version"]
            return cls(
                name=found["name"], version=int(version) if version else None, alias=found["alias"]
            )
        return None


def check_name(text: str, *, what: str = "adapter name", param: str = "name") -> str:
    """Raises: ApiError(invalid_request) saying what a name may be."""
    if not NAME.fullmatch(text):
        raise ApiError(
            "invalid_request",
            f"{what} {text[:140]!r} is not allowed: lower-case letters, digits, '.', '_' and '-', "
            "starting with a letter or digit, at most 128 characters",
            param=param,
        )
    return text


def adapter_not_found(text: str, *, param: str | None = None) -> ApiError:
    return ApiError(
        "adapter_not_found",
        f"there is no adapter {text[:140]!r}; GET /v1/adapters lists those that exist",
        param=param,
    )
