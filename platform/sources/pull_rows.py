"""Rows of pulls: made, copied, and told to the audit log. Pure functions."""

from __future__ import annotations

from typing import Any

from loraplex.adapters.errors import AdapterError, AdapterRefused
from loraplex.platform.callers import Caller
from loraplex.platform.errors import ApiError
from loraplex.platform.models import Pull, utc_now
from loraplex.platform.registration import Registration
from loraplex.platform.sources.origin import Origin


def new_row(order: Registration, origin: Origin, caller: Caller) -> Pull:
    return Pull(
        tenant=caller.home,
        name=order.name,
        source=origin.shown,
        has_secret=False,
        alias=order.alias,
        description=order.description,
        metadata_=order.metadata,
        actor=caller.actor,
        status="queued",
        bytes_done=0,
        retries=0,
        restarts=0,
        created_at=utc_now(),
    )


_COLUMNS: tuple[str, ...] = tuple(
    attribute for attribute in Pull.__mapper__.column_attrs.keys() if attribute != "id"
)


def copy_of(row: Pull) -> Pull:
    """The same pull as a row of no session."""
    return Pull(**{name: getattr(row, name) for name in _COLUMNS})


def ordered(row: Pull) -> dict[str, Any]:
    """What was asked for, for the audit log."""
    asked = {
        "source": row.source,
        "revision": row.revision,
        "digest": None if row.pin is None else f"sha256:{row.pin}",
        "alias": row.alias,
    }
    return {name: value for name, value in asked.items() if value is not None}


def problem_of(error: ApiError | AdapterError, source: str) -> dict[str, Any]:
    """As the body of an upload's refusal has it."""
    problem: dict[str, Any] = {"code": error.code, "message": error.message}
    if isinstance(error, AdapterRefused):
        problem["message"] = f"adapter refused: {error.message}"
        problem["details"] = [found.to_dict() for found in error.problems]
        if error.problems[0].code == "archive_format" and source.startswith("http"):
            problem["message"] += " (the URL of a folder with the two files ends with /)"
    return problem
