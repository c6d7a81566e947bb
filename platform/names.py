"""How adapters are named by clients, and nothing of where they are kept.

`sql@3` (that version), `sql:prod` (an alias), `sha256:<64 hex>` (exactly this content), `sql`
(the alias `default` if somebody made one, else the newest version), `sql:latest` (the newest).
Those are one's own tenant's; `acme/sql`, `acme/sql@3`... are tenant acme's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from loraplex.platform.errors import ApiError

DEFAULT_ALIAS = "default"  # what a bare name means, once it is set
LATEST_ALIAS = "latest"  # always the newest version; nobody can set it

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}")
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_REFERENCE = re.compile(
    rf"(?:(?P<tenant>{NAME.pattern})/)?(?P<name>{NAME.pattern})(?:@(?P<version>[1-9][0-9]{{0,8}})|:(?P<alias>{NAME.pattern}))?"
)


@dataclass(frozen=True, slots=True)
class Reference:
    """Exactly one of `digest` and `name` is set; at most one of `version` and `alias`. `tenant`
    None: the caller's own.
    """

    name: str | None = None
    version: int | None = None
    alias: str | None = None
    digest: str | None = None
    tenant: str | None = None

    @property
    def is_bare(self) -> bool:
        """Just a name."""
        return self.name is not None and self.version is None and self.alias is None

    @classmethod
    def parse(cls, text: str) -> Reference | None:
        """None when `text` cannot be a reference."""
        if found := _DIGEST.fullmatch(text):
            return cls(digest=found[1])
        if found := _REFERENCE.fullmatch(text):
            version = found["version"]
            return cls(
                name=found["name"],
                version=int(version) if version else None,
                alias=found["alias"],
                tenant=found["tenant"],
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


def check_alias(text: str) -> str:
    """Raises: ApiError(invalid_request) saying what an alias may be."""
    check_name(text, what="alias", param="alias")
    if text == LATEST_ALIAS:
        raise ApiError(
            "invalid_request",
            "the alias 'latest' is reserved: it always means the newest version; to say what the "
            "bare name means, set the alias 'default'",
            param="alias",
        )
    if text.isdigit():
        raise ApiError(
            "invalid_request",
            f"alias {text!r} looks like a version, which is written id@{text}; use a word",
            param="alias",
        )
    return text


def adapter_not_found(text: str, *, param: str | None = None) -> ApiError:
    return ApiError(
        "adapter_not_found",
        f"there is no adapter {text[:140]!r}; GET /v1/adapters lists those that exist",
        param=param,
    )
