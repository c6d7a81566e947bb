"""What one running server has: made by the lifespan of `app.py`, reached by routes through
`runtime`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastapi import Request

from loraplex.adapters.store import AdapterStore
from loraplex.platform.adapter_service import AdapterService
from loraplex.platform.admin_service import AdminService
from loraplex.platform.alias_service import AliasService
from loraplex.platform.callers import Caller
from loraplex.platform.db import Database
from loraplex.platform.embeddings import EmbeddingService
from loraplex.platform.engine_port import EnginePort
from loraplex.platform.errors import ApiError
from loraplex.platform.inference import InferenceService, Prepared
from loraplex.platform.keys import KeyRing
from loraplex.platform.lifetimes import Lifetimes
from loraplex.platform.limits import Admission
from loraplex.platform.proofs import ProofService
from loraplex.platform.request_metrics import RequestMetrics
from loraplex.platform.resolution import Resolver
from loraplex.platform.served_model import ServedModel
from loraplex.platform.settings import Settings
from loraplex.platform.sources.pulled_adapters import PulledAdapters
from loraplex.platform.sources.pulls import PullService
from loraplex.platform.tenant_service import TenantService
from loraplex.platform.token_service import TokenService
from loraplex.platform.usage import UsageMeter, Use
from loraplex.platform.usage_report import UsageReport

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider


@dataclass(slots=True)
class Runtime:
    """Everything with a life of its own. `model` is None until the engine was ready once."""

    settings: Settings
    engine: EnginePort
    db: Database
    store: AdapterStore
    keys: KeyRing
    admission: Admission
    lifetimes: Lifetimes
    tenants: TenantService
    resolver: Resolver
    adapters: AdapterService
    proofs: ProofService
    pulls: PullService
    pulled: PulledAdapters
    aliases: AliasService
    admin: AdminService
    inference: InferenceService
    embeddings: EmbeddingService
    tokens: TokenService
    metrics: RequestMetrics
    usage: UsageMeter
    usage_report: UsageReport
    base_name: str
    tracing: TracerProvider | None = None
    model: ServedModel | None = None
    start_failure: str | None = None

    @property
    def failure(self) -> str | None:
        """Why the engine will not be ready again by itself."""
        return self.start_failure or self.engine.failure

    @property
    def told_failure(self) -> str:
        """The same for clients: it may name files, which is nothing for strangers."""
        return "the server's log says why" if self.keys.required else self.failure or ""

    @property
    def ready(self) -> bool:
        return self.model is not None and self.engine.ready

    def served_model(self) -> ServedModel:
        """Raises: ApiError(model_loading | engine_unavailable), both with Retry-After."""
        if self.failure is not None:
            raise ApiError(
                "engine_unavailable", f"the engine is down for good: {self.told_failure}"
            )
        if self.model is None:
            raise ApiError("model_loading", "the model is still loading; GET /readyz tells when")
        if not self.engine.ready:
            raise ApiError("engine_unavailable", "the engine is restarting; try again shortly")
        return self.model

    def generation_ended(self, prepared: Prepared, outcome: str) -> None:
        """Count one request. Called exactly once for each, however it ended."""
        self.metrics.record(prepared, outcome)
        generation = prepared.generation
        use = Use(
            requests=1,
            failures=int(outcome == "error"),
            prompt_tokens=generation.num_prompt_tokens,
            generated_tokens=generation.num_tokens,
            seconds=time.perf_counter() - generation.timing.started,
        )
        members = [adapter for adapter, _ in prepared.composition.members]
        self.usage.add(prepared.caller, members, use)
        if prepared.caller.lease is not None:
            prepared.caller.lease.facts.update(
                {
                    "loraplex.answer_id": prepared.answer.id,
                    "loraplex.adapters": "+".join(adapter.label for adapter in members),
                    "loraplex.outcome": outcome,
                    "gen_ai.usage.input_tokens": use.prompt_tokens,
                    "gen_ai.usage.output_tokens": use.generated_tokens,
                }
            )


def runtime(request: Request) -> Runtime:
    """FastAPI dependency."""
    found: Runtime = request.app.state.runtime
    return found


def caller(request: Request) -> Caller:
    """FastAPI dependency: who calls."""
    found: Caller = request.state.caller
    return found
