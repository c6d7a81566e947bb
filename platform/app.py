"""The application: what it is made of, how it starts and ends, how errors look. `create_app` is all
that is public.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response

from loraplex.adapters.errors import AdapterError, AdapterRefused
from loraplex.adapters.store import AdapterStore
from loraplex.engine.client import EngineClient
from loraplex.engine.errors import EngineError, InvalidRequest
from loraplex.platform import errors, tracing
from loraplex.platform.adapter_service import AdapterService
from loraplex.platform.admin_service import AdminService
from loraplex.platform.admission import AdmissionMiddleware
from loraplex.platform.alias_service import AliasService
from loraplex.platform.auth import AuthMiddleware
from loraplex.platform.body_limit import BodyLimitMiddleware
from loraplex.platform.db import Database
from loraplex.platform.dialects.error_bodies import Dialect, error_answer
from loraplex.platform.embeddings import EmbeddingService
from loraplex.platform.engine_port import EnginePort
from loraplex.platform.envelope import EnvelopeMiddleware, envelope_headers
from loraplex.platform.errors import ApiError
from loraplex.platform.inference import InferenceService
from loraplex.platform.keys import KeyRing
from loraplex.platform.lifetimes import Lifetimes
from loraplex.platform.limits import Admission
from loraplex.platform.openapi_document import document
from loraplex.platform.proofs import ProofService
from loraplex.platform.reconcile import reconcile_files, reconcile_model
from loraplex.platform.request_metrics import RequestMetrics
from loraplex.platform.resolution import Resolver
from loraplex.platform.routes import (
    adapters,
    admin,
    aliases,
    health,
    lora_adapters,
    openai,
    pulls,
    tenants,
    tgi,
    tokens,
)
from loraplex.platform.routes import usage as usage_routes
from loraplex.platform.runtime import Runtime
from loraplex.platform.served_model import ServedModel, served_name
from loraplex.platform.settings import Settings
from loraplex.platform.sources.addresses import HostList
from loraplex.platform.sources.http_client import HttpClient
from loraplex.platform.sources.parsing import Sources
from loraplex.platform.sources.pulled_adapters import PulledAdapters
from loraplex.platform.sources.pulls import PullService
from loraplex.platform.sources.watcher import Watcher
from loraplex.platform.tenant_service import TenantService
from loraplex.platform.token_service import TokenService
from loraplex.platform.tracing import TracingMiddleware
from loraplex.platform.usage import UsageMeter
from loraplex.platform.usage_report import UsageReport

log = logging.getLogger(__name__)

ROUTERS = (
    pulls.router,
    adapters.router,
    aliases.router,
    admin.router,
    tenants.router,
    usage_routes.router,
    openai.router,
    tokens.router,
    lora_adapters.vllm,
    lora_adapters.sglang,
    tgi.router,
    health.router,
)

OnEngineFailed = Callable[[Exception], None]
OnEngineProgress = Callable[[str, int, int], None]  # phase, done, total


def create_app(
    settings: Settings,
    engine: EnginePort | None = None,
    *,
    on_engine_failed: OnEngineFailed | None = None,
    on_engine_progress: OnEngineProgress | None = None,
) -> FastAPI:
    """The ASGI application of one server.

    The lifespan opens the registry and the store, then starts the engine in the background, so that
    /healthz answers while the model loads. `engine` replaces the engine process (tests).
    `on_engine_failed` hears of a start-up that can never succeed (wrong model, too little memory):
    the CLI prints it and stops the server.
    """
    serving = engine or EngineClient(settings.engine_config(), on_progress=on_engine_progress)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        settings.data_dir.mkdir(parents=True, exist_ok=True)
        store = await asyncio.to_thread(AdapterStore, settings.adapter_dir.absolute())
        db = await Database.open(settings.effective_database_url)
        await reconcile_files(db, store)
        keys = KeyRing(db, [key.get_secret_value() for key in settings.api_key])
        admission = Admission()
        usage = UsageMeter(db)
        resolver = Resolver(db)
        proofs = ProofService(db, store, serving, resolver)
        service = AdapterService(
            db,
            store,
            serving,
            resolver,
            settings.max_upload_bytes,
            proofs.wake,
            tenant_templates=settings.tenant_templates,
        )
        hosts = HostList(settings.source_hosts)
        client = HttpClient(hosts, allow_private=settings.source_private_addresses)
        sources = Sources(
            client,
            hub_endpoint=settings.hub_endpoint,
            buckets=settings.source_buckets,
            directories=settings.source_directories,
            max_pulls=settings.max_pulls,
        )
        pull_service = PullService(
            db,
            service,
            sources,
            max_pulls=settings.max_pulls,
            timeout_s=settings.pull_timeout_s,
        )
        runtime = Runtime(
            settings=settings,
            engine=serving,
            db=db,
            store=store,
            keys=keys,
            admission=admission,
            lifetimes=Lifetimes(settings.request_timeout_s, settings.stall_timeout_s),
            tenants=TenantService(db, keys.forget),
            resolver=resolver,
            adapters=service,
            proofs=proofs,
            pulls=pull_service,
            pulled=PulledAdapters(service, pull_service),
            aliases=AliasService(db, resolver),
            admin=AdminService(db, store, serving, service, resolver, admission),
            inference=InferenceService(
                serving,
                resolver,
                None if settings.tool_format == "auto" else settings.tool_format,
                tenant_templates=settings.tenant_templates,
            ),
            embeddings=EmbeddingService(serving, resolver),
            tokens=TokenService(resolver, tenant_templates=settings.tenant_templates),
            metrics=RequestMetrics(),
            usage=usage,
            usage_report=UsageReport(db, usage),
            tracing=tracing.tracer_provider(),
            base_name=served_name(settings.model, settings.served_model_name),
        )
        app.state.runtime = runtime
        tasks = [
            asyncio.create_task(_start_engine(runtime, on_engine_failed)),
            asyncio.create_task(runtime.usage.run()),
            asyncio.create_task(proofs.run()),
        ]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await pull_service.close()
            await sources.close()
            await serving.stop()
            await runtime.usage.close()
            await tracing.close(runtime.tracing)
            await db.close()

    app = FastAPI(
        title="Loraplex",
        description="Many LoRA adapters of one base model, served from one process pair.",
        version=version("loraplex"),
        lifespan=lifespan,
        redoc_url=None,
        middleware=[
            *_cors(settings.cors_origins),
            Middleware(EnvelopeMiddleware),
            Middleware(AuthMiddleware),
            Middleware(AdmissionMiddleware),
            Middleware(TracingMiddleware),
            Middleware(BodyLimitMiddleware, max_bytes=settings.max_body_bytes),
        ],
        exception_handlers=_HANDLERS,
    )
    for router in ROUTERS:
        app.include_router(router)
    app.openapi = partial(document, app)  # type: ignore[method-assign]
    return app


def _cors(origins: Sequence[str]) -> list[Middleware]:
    """Browsers' pages of these origins may call; nobody's unless told."""
    if not origins:
        return []
    exposed = ["x-request-id", "x-adapter-version", "x-adapter-digest", "retry-after"]
    return [
        Middleware(
            CORSMiddleware,
            allow_origins=list(origins),
            allow_methods=["GET", "POST", "PUT", "PATCH", "DELETE"],
            allow_headers=["authorization", "content-type", "x-tenant", "x-sticky-key"],
            expose_headers=exposed,
        )
    ]


async def _start_engine(runtime: Runtime, on_failed: OnEngineFailed | None) -> None:
    try:
        await runtime.engine.start()
        info, tokenizer = runtime.engine.info, runtime.engine.tokenizer
        assert info is not None, "an engine that started knows its model"
        assert tokenizer is not None, "an engine that started knows its tokenizer"
        model = ServedModel.from_info(info, tokenizer, runtime.base_name)
        await reconcile_model(runtime.db, runtime.store, model)
        await runtime.pulls.begin(model)  # before anybody can order one
        runtime.model = model
        runtime.proofs.wake()
    except Exception as error:
        log.error("engine_start_failed", extra={"reason": str(error)})
        runtime.start_failure = str(error)
        if on_failed is not None:
            on_failed(error)
        return
    log.info(
        "ready",
        extra={
            "model": runtime.base_name,
            "device": info.device,
            "dtype": info.dtype,
            "backend": info.backend,
        },
    )
    settings = runtime.settings
    if settings.watch_dir is not None:
        watcher = Watcher(runtime.pulls, settings.watch_dir, max_pulls=settings.max_pulls)
        await watcher.run(model)


# --- errors ---------------------------------------------------------------------------------------


def _respond(request: Request, status: int, code: str, message: str, **fields: Any) -> JSONResponse:
    dialect = getattr(request.state, "dialect", Dialect.NATIVE)
    headers = errors.headers(status, code)
    status, body = error_answer(dialect, status, code, message, **fields)
    return JSONResponse(body, status, headers=headers)


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    answer = _respond(
        request, error.status, error.code, error.message, param=error.param, details=error.details
    )
    answer.headers.update(error.headers)
    return answer


async def _engine_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, EngineError)
    if error.code == "queue_full":
        request.app.state.runtime.metrics.rejections += 1
    # The engine's validation names the field first: "min_tokens=5: must not exceed...".
    named = (
        re.match(r"([a-z_]+)(=|:)", error.message) if isinstance(error, InvalidRequest) else None
    )
    param = getattr(request.state, "param", None) or (named[1] if named else None)
    answer = _respond(request, errors.status_of(error), error.code, error.message, param=param)
    answer.headers.update(getattr(request.state, "adapter_headers", {}))
    return answer


async def _adapter_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, AdapterError)
    if isinstance(error, AdapterRefused):
        details = [problem.to_dict() for problem in error.problems]
        return _respond(
            request, 422, error.code, f"adapter refused: {error.message}", details=details
        )
    return _respond(request, errors.STATUS.get(error.code, 500), error.code, error.message)


async def _validation_error(request: Request, error: Exception) -> Response:
    """FastAPI's own checks: 400, the first problem in the message, all of them in `details`."""
    assert isinstance(error, RequestValidationError)
    kind = request.headers.get("content-type", "")
    if kind and "json" not in kind and any(item["loc"] == ("body",) for item in error.errors()):
        message = f"the body must be JSON: send `Content-Type: application/json`, not {kind[:80]!r}"
        return _respond(request, 415, "unsupported_media_type", message)
    problems = [_problem(item) for item in error.errors()]
    first = problems[0]
    where = first["param"]
    message = f"{where}: {first['message']}" if where else str(first["message"])
    return _respond(request, 400, "invalid_request", message, param=where, details=problems)


def _problem(item: dict[str, Any]) -> dict[str, Any]:
    # loc: ("body", field, ...) and branches of unions behind it; a broken JSON text has its
    # position there.
    loc = item["loc"]
    param = loc[1] if len(loc) > 1 and isinstance(loc[1], str) else None
    if param in ("parameters", "sampling_params") and len(loc) > 2:  # what these hold is meant
        param = f"{param}.{loc[2]}"
    message = str(item["msg"]).removeprefix("Value error, ")
    if item["type"] == "json_invalid":
        message = f"the body is not valid JSON: {item.get('ctx', {}).get('error', message)}"
    elif not loc[1:]:
        message = f"the body is not what this route takes: {message}"
    elif inner := [str(part) for part in loc[2:] if _is_place(part)]:
        message = f"{'.'.join(inner)}: {message}"
    return {"param": param, "message": message}


def _is_place(part: str | int) -> bool:
    """A field or an index; pydantic names the branches of unions at the same place."""
    if isinstance(part, int):
        return True
    return re.fullmatch("[a-z_]+", part) is not None and part not in ("str", "int", "float", "bool")


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = error.detail
    if error.status_code == 404:
        message = errors.no_such_route(request.url.path).message
    elif error.status_code == 405:
        allowed = (error.headers or {}).get("allow", "")
        message = f"{request.method} is not allowed on {request.url.path}; allowed: {allowed}"
    return _respond(request, error.status_code, errors.code_of(error.status_code), message)


async def _disconnected(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _unexpected(request: Request, error: Exception) -> Response:
    """Our bug. The log has the traceback (the server writes it), the client only this."""
    answer = _respond(
        request, 500, "internal_error", "an internal error; the server's log has the details"
    )
    answer.headers.update(
        envelope_headers(request.url.path, getattr(request.state, "request_id", "-"))
    )
    return answer


_HANDLERS: dict[int | type[Exception], Any] = {
    ApiError: _api_error,
    EngineError: _engine_error,
    AdapterError: _adapter_error,
    RequestValidationError: _validation_error,
    HTTPException: _http_error,
    ClientDisconnect: _disconnected,
    Exception: _unexpected,
}
