"""Command-line values as the orders of the API, with its own checks."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from loraplex.platform.cli.output import UsageError

Order = TypeVar("Order", bound=BaseModel)


def checked(kind: type[Order], **values: Any) -> Order:
    """Raises: UsageError naming the first flag at fault."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = next((str(part) for part in reversed(first["loc"]) if isinstance(part, str)), "")
        flag = {"scopes": "scope", "adapters": "adapter", "expires_in_s": "expires"}.get(name, name)
        raise UsageError(f"--{flag.replace('_', '-')} {first['input']}: {first['msg']}") from None
