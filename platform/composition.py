"""Which adapters a request runs on: what `model`, `adapter_id` and `adapters` mean together."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from loraplex.adapters.manifest import WHOLE_FEATURES
from loraplex.engine.activation import activation_start
from loraplex.engine.api import AdapterUse
from loraplex.platform.adapter_defaults import NO_DEFAULTS, AdapterDefaults
from loraplex.platform.callers import Caller
from loraplex.platform.errors import ApiError
from loraplex.platform.openai_schemas import AdapterChoice
from loraplex.platform.resolution import ResolvedAdapter, Resolver
from loraplex.platform.served_model import ServedModel


@dataclass(frozen=True, slots=True)
class Composition:
    """The adapters of one request, in order, with their weights.

    invoked: of activated LoRAs, by digest, whether every prompt has their invocation tokens.
    """

    members: tuple[tuple[ResolvedAdapter, float], ...] = ()
    invoked: Mapping[str, bool] = field(default_factory=dict)

    def in_prompts(self, prompts: Sequence[Sequence[int]]) -> Composition:
        """prompts: the request's, as token ids. The engine searches them by the same function."""
        invoked = {
            adapter.digest: all(
                activation_start(prompt, adapter.invocation_tokens) is not None
                for prompt in prompts
            )
            for adapter, _ in self.members
            if adapter.invocation_tokens
        }
        return replace(self, invoked=invoked)

    def uses(self) -> tuple[AdapterUse, ...]:
        return tuple(AdapterUse(adapter.digest, weight) for adapter, weight in self.members)

    def objects(self) -> tuple[dict[str, Any], ...]:
        objects = []
        for adapter, weight in self.members:
            item: dict[str, Any] = {
                "id": adapter.name,
                "version": adapter.version,
                "digest": f"sha256:{adapter.digest}",
            }
            if len(self.members) > 1:
                item["weight"] = weight
            if adapter.digest in self.invoked:
                item["invoked"] = self.invoked[adapter.digest]
            objects.append(item)
        return tuple(objects)

    @property
    def defaults(self) -> AdapterDefaults:
        """Those of an only member; a mixture has none."""
        return self.members[0][0].defaults if len(self.members) == 1 else NO_DEFAULTS

    def headers(self) -> dict[str, str]:
        if not self.members:
            return {}
        adapters = [adapter for adapter, _ in self.members]
        headers = {
            "x-adapter-version": ",".join(adapter.reference for adapter in adapters),
            "x-adapter-digest": ",".join(f"sha256:{adapter.digest}" for adapter in adapters),
        }
        if self.invoked:
            applied = [self.invoked.get(adapter.digest, True) for adapter in adapters]
            headers["x-adapter-invoked"] = ",".join(str(item).lower() for item in applied)
        return headers


def check_whole(members: Sequence[tuple[ResolvedAdapter, float]]) -> None:
    """Raises: ApiError(invalid_request) when one that is not linear in its weight is scaled or
    combined. The engine refuses it as well; here it still has its name.
    """
    used = [(adapter, weight) for adapter, weight in members if weight != 0]
    for adapter, weight in used:
        whole = sorted(WHOLE_FEATURES.intersection(adapter.features))
        if whole and (len(used) > 1 or weight != 1):
            how = "is combined with others" if len(used) > 1 else f"has weight {weight:g}"
            raise ApiError(
                "invalid_request",
                f"adapter {adapter.reference} {how}, but it uses {', '.join(whole)}, which scales "
                "or replaces weights of the base model and works only whole; send it alone with "
                "weight 1",
                param="adapters",
            )


class Composer:
    def __init__(self, resolver: Resolver) -> None:
        self._resolver = resolver

    async def compose(
        self, body: AdapterChoice, model: ServedModel, caller: Caller, sticky_key: str | None
    ) -> tuple[str, Composition]:
        """The model name to answer with, and the adapters that `model`, `adapter_id` and `adapters`
        mean together. What they mean is decided here, once for the whole request.

        Raises: ApiError(adapter_not_found | model_not_found | adapter_not_ready |
        adapter_proof_failed | invalid_request).
        """
        key = sticky_key or body.user or uuid.uuid4().hex
        by_model = None
        if body.model and body.model not in (model.name, model.info.name):
            # "base:adapter" is how SGLang's clients name an adapter.
            text = body.model.removeprefix(f"{model.name}:")
            by_model = await self._by_model(caller, text, key)
        if body.adapters:
            members = [(item.id, item.weight) for item in body.adapters]
            param = "adapters"
        else:
            name = body.adapter_id or body.lora_path
            members = [(name, 1.0)] if name else []
            param = "adapter_id" if body.adapter_id or not name else "lora_path"
        resolved = [
            (await self._resolver.choose(caller, text, key, param=param), weight)
            for text, weight in members
        ]
        if by_model is not None:
            if resolved and [adapter.digest for adapter, _ in resolved] != [by_model.digest]:
                raise ApiError(
                    "invalid_request",
                    f"model names adapter {body.model!r} and {param} another one; send one of them",
                    param=param,
                )
            resolved = resolved or [(by_model, 1.0)]
        digests = [adapter.digest for adapter, _ in resolved]
        if len(set(digests)) != len(digests):
            raise ApiError(
                "invalid_request",
                "the composition names one adapter twice; add up its weights",
                param="adapters",
            )
        check_whole(resolved)
        return body.model or model.name, Composition(tuple(resolved))

    async def _by_model(self, caller: Caller, text: str, key: str) -> ResolvedAdapter:
        try:
            return await self._resolver.choose(caller, text, key, param="model")
        except ApiError as error:
            if error.code == "adapter_not_found" and not set(text) & {"@", ":"}:
                raise ApiError(
                    "model_not_found",
                    f"there is no model or adapter {text[:140]!r}; GET /v1/models lists them",
                    param="model",
                ) from None
            raise
