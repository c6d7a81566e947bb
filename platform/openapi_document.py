"""The published OpenAPI document: FastAPI's, with the errors that routes really answer.

FastAPI documents its own 422 for bad input, which is a 400 here, and no error else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from loraplex.platform import access
from loraplex.platform.dialects.error_bodies import SCHEMAS, Dialect

ERROR_REF = {"$ref": "#/components/schemas/Error"}
ERROR_SCHEMA: Mapping[str, Any] = {
    "title": "Error",
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string", "description": "Stable: made for programs."},
                "details": {"type": "array", "items": {"type": "object"}},
            },
        }
    },
}
_TEXTS = {
    400: "Something in the request is wrong; `param` says what",
    401: "No API key, or none that is good",
    403: "The key may not do this",
    404: "There is no such thing, or none that this key may see",
    408: "The body did not arrive in time",
    409: "It is in use, not ready, or taken",
    413: "The body is too large",
    415: "The body is not of the type this route takes",
    422: "The adapter is refused, or cannot be used, with every problem in `details`",
    429: "A limit is reached, or the queue is full; see Retry-After",
    500: "A fault of the server; its log has more",
    502: "The source failed",
    503: "The engine is loading, restarting or stopping; see Retry-After",
    504: "It took longer than the server allows",
    507: "The disk is full",
}
_ALWAYS = (400, 401, 403, 404, 408, 413, 429, 500, 503)
_WITH_BODY = (415,)
_ON_ADAPTERS = (409, 422)  # whoever names one may find it busy or unusable
_ON_STORAGE = (502, 507)
_ON_GENERATION = (504,)

_DIALECTS: Mapping[str, Dialect] = {
    **dict.fromkeys(("/", "/generate", "/generate_stream", "/info"), Dialect.TGI),
    **dict.fromkeys(("/v1/load_lora_adapter", "/v1/unload_lora_adapter"), Dialect.VLLM),
    **dict.fromkeys(("/load_lora_adapter", "/unload_lora_adapter"), Dialect.SGLANG),
}


def document(app: FastAPI) -> dict[str, Any]:
    """Made once, when it is first asked for."""
    if app.openapi_schema is None:
        found = get_openapi(
            title=app.title,
            version=app.version,
            description=app.description,
            routes=app.routes,
            tags=app.openapi_tags,
        )
        schemas = found.setdefault("components", {}).setdefault("schemas", {})
        schemas.pop("HTTPValidationError", None)
        schemas.pop("ValidationError", None)
        schemas["Error"] = dict(ERROR_SCHEMA)
        found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for path, item in found["paths"].items():
            for method, operation in item.items():
                _complete(operation, method.upper(), path)
        app.openapi_schema = found
    return app.openapi_schema


def _complete(operation: dict[str, Any], method: str, path: str) -> None:
    responses = operation["responses"]
    if "HTTPValidationError" in str(responses.get("422", "")):
        del responses["422"]
    if access.rule_of(method, path).open:
        return
    operation["security"] = [{"key": []}]
    for status in _errors_of(operation, path):
        responses.setdefault(
            str(status),
            {
                "description": _TEXTS[status],
                "content": {"application/json": {"schema": _error_schema(path)}},
            },
        )


def _error_schema(path: str) -> Mapping[str, Any]:
    dialect = _DIALECTS.get(path)
    return ERROR_REF if dialect is None else {"anyOf": [ERROR_REF, SCHEMAS[dialect]]}


def _errors_of(operation: Mapping[str, Any], path: str) -> Sequence[int]:
    found = list(_ALWAYS)
    if "requestBody" in operation:
        found += _WITH_BODY
    if "/adapters" in path or "requestBody" in operation or "models" in path:
        found += _ON_ADAPTERS
    if "/adapters" in path or "lora" in path:
        found += _ON_STORAGE
    if not path.startswith(("/v1/adapters", "/v1/admin")):
        found += _ON_GENERATION
    return found
