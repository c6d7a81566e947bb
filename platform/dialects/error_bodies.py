"""Refusals in the form that a dialect's clients read. The cause is always one of `errors.STATUS`.

A route of another dialect is made with `speaking(...)`; every error below it, also one that FastAPI
finds before the endpoint runs, then has that dialect's body.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from fastapi.routing import APIRoute
from starlette.types import Receive, Scope, Send

from loraplex.platform import errors


class Dialect(StrEnum):
    NATIVE = "native"
    TGI = "tgi"  # and LoRAX, which took its forms
    VLLM = "vllm"  # its adapter routes; the others have the native body
    SGLANG = "sglang"  # its adapter routes, the same


def speaking(dialect: Dialect) -> type[APIRoute]:
    """The class of routes whose errors have this form."""

    class DialectRoute(APIRoute):
        async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
            scope.setdefault("state", {})["dialect"] = dialect
            await super().handle(scope, receive, send)

    return DialectRoute


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": list(properties), "properties": properties}


_TEXT = {"type": "string"}
# What errors look like in the published document, beside the native body, which stays that of
# errors found before a route is: of keys and limits.
SCHEMAS: Mapping[Dialect, Mapping[str, Any]] = {
    Dialect.TGI: _object(error=_TEXT, error_type=_TEXT),
    Dialect.VLLM: _object(error=_object(message=_TEXT, type=_TEXT, code={"type": "integer"})),
    Dialect.SGLANG: _object(success={"type": "boolean"}, error_message=_TEXT),
}


def error_answer(
    dialect: Dialect, status: int, code: str, message: str, **fields: Any
) -> tuple[int, dict[str, Any]]:
    """Status and body. fields: `param`, `details` of the native body."""
    match dialect:
        case Dialect.TGI:
            return _tgi(status, code, message)
        case Dialect.VLLM:
            return _vllm(status, code, message)
        case Dialect.SGLANG:
            body = {"success": False, "error_message": message, "loaded_adapters": {}}
            return (400 if status in (409, 422) else status), body
    return status, errors.body(status, code, message, **fields)


def tgi_event(status: int, code: str, message: str) -> dict[str, Any]:
    """An error in the middle of a stream."""
    return _tgi(424 if status >= 500 else status, code, message)[1]


def _tgi(status: int, code: str, message: str) -> tuple[int, dict[str, Any]]:
    match status:
        case 400 | 409 | 415 | 422:
            body = {"error": f"Input validation error: {message}", "error_type": "validation"}
            return 422, body
        case 429:
            return status, {"error": message, "error_type": "overloaded"}
        case 404:
            return status, {"error": message, "error_type": "not_found"}
        case 424 | 500 | 503:
            return status, {"error": message, "error_type": "generation"}
    return status, {"error": message, "error_type": code}


_VLLM_TYPES = {404: "NotFoundError", 401: "AuthenticationError", 403: "PermissionDeniedError"}


def _vllm(status: int, code: str, message: str) -> tuple[int, dict[str, Any]]:
    if status in (409, 422):  # what it says of any request it does not like
        status = 400
    kind = _VLLM_TYPES.get(status, "InternalServerError" if status >= 500 else "InvalidUserInput")
    error = {"message": message, "type": kind, "param": None, "code": status}
    return status, {"error": error}
