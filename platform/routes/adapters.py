"""`/v1/adapters`: upload, list, describe, download, delete. Aliases are in aliases.py."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Query, Request, Response
from fastapi.responses import StreamingResponse

from loraplex.platform import uploads
from loraplex.platform.callers import Caller
from loraplex.platform.default_checks import check_defaults
from loraplex.platform.download import tar_gz
from loraplex.platform.errors import ApiError
from loraplex.platform.names import adapter_not_found
from loraplex.platform.runtime import Runtime, caller, runtime
from loraplex.platform.schemas import (
    AdapterDeleted,
    AdapterDetail,
    AdapterList,
    AdapterObject,
    AdapterPatch,
    Verification,
    VerifyOrder,
)
from loraplex.platform.sources.schemas import AdapterWithPull, PendingAdapter
from loraplex.platform.template_rules import check_may_bring_template

router = APIRouter(prefix="/v1/adapters", tags=["adapters"])

AdapterId = Annotated[
    str, Path(description="`id`; where one version is meant also `id@3`, `id:alias`.")
]
State = Annotated[Runtime, Depends(runtime)]
Who = Annotated[Caller, Depends(caller)]

_FILE = {"type": "string", "format": "binary"}
_UPLOAD_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["name"],
                    "properties": {
                        "name": {"type": "string"},
                        "config": {**_FILE, "description": "adapter_config.json"},
                        "weights": {**_FILE, "description": "adapter_model.safetensors"},
                        "archive": {
                            **_FILE,
                            "description": "Instead of the two: a zip, tar or tar.gz of them.",
                        },
                        "description": {"type": "string"},
                        "metadata": {"type": "string", "description": "A JSON object."},
                        "alias": {"type": "string"},
                    },
                }
            }
        },
    }
}


@router.post(
    "",
    status_code=201,
    openapi_extra=_UPLOAD_BODY,
    responses={200: {"model": AdapterObject, "description": "This content was there already"}},
)
async def upload_adapter(
    request: Request, response: Response, state: State, who: Who
) -> AdapterObject:
    """Register an adapter, or a new version of it. Everything is checked first; a refusal names
    every problem.
    """
    model = state.served_model()
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > state.settings.max_upload_bytes:
        raise uploads.too_large(state.settings.max_upload_bytes)
    adapter, created = await state.adapters.register(
        who, request.stream(), request.headers.get("content-type", ""), model
    )
    response.status_code = 201 if created else 200
    return adapter


@router.get("")
async def list_adapters(
    state: State,
    who: Who,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    after: Annotated[str, Query(description="Continue behind this id.")] = "",
    name: Annotated[str, Query(description="Only ids that contain this.")] = "",
) -> AdapterList:
    """Your tenant's adapters by id, each through its newest version. With the header `x-tenant`
    those of another one, as far as you may see them.
    """
    return await state.adapters.page(who, limit=limit, after=after, contains=name)


@router.get("/{adapter_id}")
async def get_adapter(
    adapter_id: AdapterId, state: State, who: Who
) -> AdapterWithPull | PendingAdapter:
    """One adapter with all its versions, seen through the version that was named, and its last
    pull.
    """
    return await state.pulled.get(who, adapter_id)


@router.get("/{adapter_id}/download", response_class=StreamingResponse)
async def download_adapter(adapter_id: AdapterId, state: State, who: Who) -> StreamingResponse:
    """The two files as a tar.gz, for the tenant whose adapter it is."""
    adapter = await state.resolver.find(who, adapter_id)
    who.check_may_change(adapter.tenant, f"adapter {adapter.name!r}")
    try:
        name = adapter.name.rpartition("/")[2]
        chunks = tar_gz(state.adapters.files(adapter.digest), name)
    except FileNotFoundError:
        raise adapter_not_found(adapter_id) from None
    file_name = f"{name}-v{adapter.version}.tar.gz"
    return StreamingResponse(
        chunks,
        media_type="application/gzip",
        headers={
            "content-disposition": f'attachment; filename="{file_name}"',
            "x-adapter-digest": f"sha256:{adapter.digest}",
        },
    )


@router.patch("/{adapter_id}")
async def patch_adapter(
    adapter_id: AdapterId, change: AdapterPatch, state: State, who: Who
) -> AdapterDetail:
    """Change description, metadata, defaults or who may use it; what is not sent stays."""
    if change.defaults is not None:
        if change.defaults.chat_template is not None:
            allowed = state.settings.tenant_templates
            check_may_bring_template(who, allowed, param="defaults")
        await check_defaults(change.defaults, state.served_model())
    return await state.adapters.patch(who, adapter_id, change)


@router.post("/{adapter_id}/verify")
async def verify_adapter(
    adapter_id: AdapterId, state: State, who: Who, order: VerifyOrder | None = None
) -> Verification:
    """Hash the stored files of one version again, and compare what it does with what they say. It
    is loaded for that.
    """
    state.served_model()
    accept = order is not None and order.accept
    return await state.proofs.verify(who, adapter_id, accept=accept)


@router.delete("/{adapter_id}")
async def delete_adapter(
    adapter_id: AdapterId,
    state: State,
    who: Who,
    version: Annotated[int | None, Query(ge=1, description="Only this version.")] = None,
    force: Annotated[bool, Query(description="Abort requests that run on it.")] = False,
    drain_timeout_s: Annotated[
        float | None, Query(ge=0, le=3600, description="Wait so long for running requests.")
    ] = None,
) -> AdapterDeleted:
    """Delete an adapter, with its pull, or one version. New requests are refused at once; running
    ones make it a 409 unless told.
    """
    if version is not None and "@" in adapter_id:
        raise ApiError("invalid_request", "name the version once", param="version")
    name, _, named_version = adapter_id.partition("@")
    if named_version.isdigit():
        version, adapter_id = int(named_version), name
    return await state.pulled.delete(
        who, adapter_id, version=version, force=force, drain_timeout_s=drain_timeout_s
    )
