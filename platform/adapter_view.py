"""Registry rows and engine news as the objects that clients see. Pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from loraplex.adapters.errors import Problem
from loraplex.adapters.manifest import AdapterManifest
from loraplex.engine.api import AdapterResidencyInfo, AdapterState
from loraplex.platform.callers import Caller
from loraplex.platform.models import Adapter, AdapterVersion, Alias, AliasRevision
from loraplex.platform.proof_view import proof_object, refusal
from loraplex.platform.schemas import (
    AdapterDetail,
    AdapterObject,
    AdapterVersionObject,
    AliasObject,
    AliasRevisionObject,
    Residency,
    Slot,
    TierBytes,
    TieredAdapter,
    WeightedVersion,
)

ResidencyMap = Mapping[str, AdapterResidencyInfo]

_RESIDENCY: Mapping[AdapterState, Residency] = {
    AdapterState.HOST_LOADING: "loading",
    AdapterState.DEVICE_LOADING: "loading",
    AdapterState.HOST: "host",
    AdapterState.DEVICE: "device",
    AdapterState.DRAINING: "device",
}


def manifest_summary(
    manifest: AdapterManifest, more_warnings: Iterable[Problem] = ()
) -> dict[str, Any]:
    """What the registry keeps of a manifest; the store has all of it."""
    return {
        "rank": manifest.rank,
        "alpha": manifest.alpha,
        "scaling": manifest.scaling,
        "target_modules": list(manifest.target_modules),
        "num_parameters": manifest.num_parameters,
        "size_bytes": manifest.size_bytes,
        "dtype": manifest.dtype,
        "pages": manifest.pages,
        "features": list(manifest.features),
        "invocation_tokens": list(manifest.invocation_tokens) or None,
        "warnings": [problem.to_dict() for problem in (*manifest.warnings, *more_warnings)],
    }


def residency(digest: str, resident: ResidencyMap) -> Residency:
    info = resident.get(digest)
    return "disk" if info is None else _RESIDENCY.get(info.state, "disk")


def version_fields(row: AdapterVersion, resident: ResidencyMap) -> dict[str, Any]:
    refused = refusal(row)
    return {
        **row.manifest,
        "version": row.version,
        "shipped_defaults": row.shipped_defaults or {},
        "digest": f"sha256:{row.digest}",
        "status": _status(row),
        "error": None if refused is None else refused.reason,
        "proof": None if row.proof is None else proof_object(row.proof),
        "residency": residency(row.digest, resident),
        "created_at": int(row.created_at.timestamp()),
        "last_used_at": None if row.last_used_at is None else int(row.last_used_at.timestamp()),
        "num_requests": row.num_requests,
        "num_prompt_tokens": row.num_prompt_tokens,
        "num_generated_tokens": row.num_generated_tokens,
    }


def _status(row: AdapterVersion) -> str:
    return "failed" if row.status == "ready" and refusal(row) is not None else row.status


def _object_fields(
    caller: Caller, adapter: Adapter, row: AdapterVersion, resident: ResidencyMap
) -> dict[str, Any]:
    is_own = caller.may_change(adapter.tenant)
    return {
        **version_fields(row, resident),
        "id": caller.shown(adapter.tenant, adapter.name),
        "tenant": adapter.tenant,
        "visibility": adapter.visibility,
        "shared_with": [share.tenant for share in adapter.shares] if is_own else [],
        "base_model": row.base_model,
        "description": adapter.description,
        "metadata": adapter.metadata_,
        "defaults": adapter.defaults or {},
        "aliases": {alias.alias: _split(alias.split) for alias in adapter.aliases if alias.targets},
    }


def adapter_object(
    caller: Caller, adapter: Adapter, resident: ResidencyMap, row: AdapterVersion | None = None
) -> AdapterObject:
    """`adapter`, its versions, aliases and shares loaded, seen through `row` (default: the
    newest).
    """
    return AdapterObject(**_object_fields(caller, adapter, row or adapter.versions[-1], resident))


def adapter_detail(
    caller: Caller, adapter: Adapter, resident: ResidencyMap, row: AdapterVersion | None = None
) -> AdapterDetail:
    return AdapterDetail(
        **_object_fields(caller, adapter, row or adapter.versions[-1], resident),
        versions=[
            AdapterVersionObject(**version_fields(version, resident))
            for version in adapter.versions
        ],
    )


def alias_object(caller: Caller, adapter: Adapter, alias: Alias) -> AliasObject:
    split = _split(alias.split)
    return AliasObject(
        id=caller.shown(adapter.tenant, adapter.name),
        alias=alias.alias,
        revision=alias.revision,
        version=split[0].version if len(split) == 1 else None,
        split=split,
    )


def alias_revision(row: AliasRevision) -> AliasRevisionObject:
    return AliasRevisionObject(
        revision=row.revision,
        at=int(row.at.timestamp()),
        actor=row.actor,
        split=[WeightedVersion(**item) for item in row.split],
        restores=row.restores,
    )


def _split(weights: Mapping[int, int]) -> list[WeightedVersion]:
    return [WeightedVersion(version=version, weight=weight) for version, weight in weights.items()]


def slot(caller: Caller, info: AdapterResidencyInfo, row: AdapterVersion | None) -> Slot:
    return Slot(
        id=None if row is None else caller.shown(row.adapter.tenant, row.adapter.name),
        version=None if row is None else row.version,
        digest=f"sha256:{info.digest}",
        state=str(info.state),
        rank=info.rank,
        pages=info.pages,
        device_bytes=info.device_bytes,
        host_bytes=info.host_bytes,
        running=info.running,
        waiting=info.waiting,
        pinned=info.pinned,
        loaded_at=info.loaded_at,
        last_used_at=info.last_used_at,
        hits=info.hits,
        loads=info.loads,
        evictions=info.evictions,
        error=info.error,
    )


def tiered_adapter(
    caller: Caller, row: AdapterVersion, info: AdapterResidencyInfo | None, disk_bytes: int
) -> TieredAdapter:
    resident = {} if info is None else {info.digest: info}
    return TieredAdapter(
        id=caller.shown(row.adapter.tenant, row.adapter.name),
        version=row.version,
        digest=f"sha256:{row.digest}",
        status=_status(row),  # type: ignore[arg-type]  # checked by pydantic
        tier=residency(row.digest, resident),
        bytes=TierBytes(
            disk=disk_bytes,
            host=0 if info is None else info.host_bytes,
            device=0 if info is None else info.device_bytes,
        ),
        hits=0 if info is None else info.hits,
        loads=0 if info is None else info.loads,
        evictions=0 if info is None else info.evictions,
        pinned=info is not None and info.pinned,
        running=0 if info is None else info.running,
        waiting=0 if info is None else info.waiting,
    )
