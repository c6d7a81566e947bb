"""Errors as clients see them: one body, one table from stable code to HTTP status.

ApiError                  raised by routes and services, carries a code of `STATUS`
EngineError (engine)      carries its own code; its class gives the status of an unlisted one
AdapterRefused (adapters) becomes 422 with every problem in `details`

Knows nothing of routes; `app.py` installs the handlers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loraplex.engine import errors as engine_errors

STATUS: Mapping[str, int] = {
    "invalid_request": 400,
    "invalid_grammar": 400,
    "unsupported_parameter": 400,
    "context_length_exceeded": 400,
    "invalid_api_key": 401,
    "permission_denied": 403,
    "source_not_allowed": 403,
    "adapter_not_found": 404,
    "adapter_deleted": 404,
    "alias_not_found": 404,
    "model_not_found": 404,
    "not_found": 404,
    "key_not_found": 404,
    "tenant_not_found": 404,
    "method_not_allowed": 405,
    "alias_is_split": 409,
    "adapter_in_use": 409,
    "adapter_not_ready": 409,
    "adapter_pinned": 409,
    "adapter_proof_failed": 409,
    "adapter_quarantined": 409,
    "adapter_no_room": 409,
    "name_taken": 409,
    "pull_under_way": 409,
    "rollback_impossible": 409,
    "version_has_alias": 409,
    "body_timeout": 408,
    "content_too_large": 413,
    "unsupported_media_type": 415,
    "adapter_refused": 422,
    "adapter_unavailable": 422,
    "adapter_too_large": 422,
    "base_model_mismatch": 422,
    "digest_mismatch": 422,
    "queue_full": 429,
    "quota_exceeded": 429,
    "rate_limit_exceeded": 429,
    "internal_error": 500,
    "adapter_corrupt": 500,
    "model_unsupported": 500,
    "probe_failed": 500,
    "request_kills_engine": 500,
    "source_failed": 502,
    "headers_too_large": 431,
    "storage_full": 507,
    "server_stopping": 503,
    "request_timeout": 504,
    "adapter_load_failed": 503,
    "adapter_load_timeout": 503,
    "engine_unavailable": 503,
    "model_loading": 503,
    "pull_interrupted": 503,
}

RETRY_AFTER_S: Mapping[str, int] = {
    "queue_full": 1,
    "quota_exceeded": 60,
    "engine_unavailable": 2,
    "model_loading": 2,
}

_CODE_OF_STATUS = {
    400: "invalid_request",
    401: "invalid_api_key",
    403: "permission_denied",
    404: "not_found",
    405: "method_not_allowed",
    408: "body_timeout",
    413: "content_too_large",
    415: "unsupported_media_type",
}

_TYPE_OF_STATUS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    409: "conflict_error",
    429: "rate_limit_error",
}

_STATUS_OF_CLASS: tuple[tuple[type[engine_errors.EngineError], int], ...] = (
    (engine_errors.InvalidRequest, 400),
    (engine_errors.AdapterUnavailable, 422),
    (engine_errors.AdapterInUse, 409),
    (engine_errors.QueueFull, 429),
    (engine_errors.EngineDead, 503),
)


class ApiError(Exception):
    """A refusal with a stable code. `details` are JSON objects, `param` is the field at fault."""

    def __init__(
        self,
        code: str,
        message: str,
        *,
        param: str | None = None,
        details: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        super().__init__(message)
        assert code in STATUS, f"error code {code!r} has no status"
        self.code = code
        self.message = message
        self.param = param
        self.details = details
        self.headers: dict[str, str] = {}

    @property
    def status(self) -> int:
        return STATUS[self.code]


def no_such_route(path: str) -> ApiError:
    return ApiError("not_found", f"there is no {path}; /docs lists what there is")


def status_of(error: engine_errors.EngineError) -> int:
    """The HTTP status of an engine error: by its code, else by its class, else 500."""
    found = STATUS.get(error.code)
    if found is not None:
        return found
    return next((status for kind, status in _STATUS_OF_CLASS if isinstance(error, kind)), 500)


def code_of(status: int) -> str:
    """The stable code for a bare HTTP error of the framework (unknown route, wrong method...)."""
    return _CODE_OF_STATUS.get(status, "internal_error" if status >= 500 else "invalid_request")


def type_of(status: int) -> str:
    """The OpenAI-style error type of a status."""
    return _TYPE_OF_STATUS.get(status, "server_error" if status >= 500 else "invalid_request_error")


def body(
    status: int,
    code: str,
    message: str,
    *,
    param: str | None = None,
    details: Sequence[Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """The one error body."""
    error: dict[str, Any] = {
        "message": message,
        "type": type_of(status),
        "param": param,
        "code": code,
    }
    if details is not None:
        error["details"] = list(details)
    return {"error": error}


def headers(status: int, code: str) -> dict[str, str]:
    """Retry-After where a retry can help; the challenge that a 401 must carry."""
    if status == 408:
        return {"connection": "close"}  # the rest of the request may still come
    if status in (429, 503):
        return {"retry-after": str(RETRY_AFTER_S.get(code, 1))}
    return {"www-authenticate": "Bearer"} if status == 401 else {}
