"""`load_lora_adapter` and `unload_lora_adapter`: adapters registered from a path, and taken back.

A path is one of the sources that pulls may read (`sources/`): a folder under `--source-dirs`, a hub
repository, or a source as written elsewhere. What was uploaded is not unloaded: it may be the only
copy.
"""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import ValidationError

from loraplex.platform.callers import Caller
from loraplex.platform.errors import ApiError
from loraplex.platform.runtime import Runtime
from loraplex.platform.sources.schemas import PullOrder

DRAIN_TIMEOUT_S = 60.0
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
_SOURCE = re.compile(r"(hub:|dir:|[a-z][a-z0-9+]*://).*")


async def load(
    state: Runtime, who: Caller, name: str, path: str, *, replaces: bool, pinned: bool = False
) -> None:
    """Register what is at `path` as adapter `name`, and wait until it is there.

    Raises: ApiError(adapter_not_found) when nothing is there, name_taken when the name is in use
    and not to be replaced, source_not_allowed, and whatever an upload of it would raise.
    """
    model = state.served_model()
    if pinned:
        who.check_operator("pinning an adapter")
    if not replaces and await _exists(state, who, name):
        raise ApiError(
            "name_taken",
            f"The lora adapter '{name}' has already been loaded. If you want to load the adapter "
            "in place, set 'load_inplace' to True.",
        )
    try:
        source = source_of(path, state.settings.source_directories)
        order = PullOrder.model_validate({"name": name, "source": source})
    except ValidationError as error:
        raise ApiError(
            "invalid_request", str(error.errors()[0]["msg"]), param="lora_path"
        ) from None
    await state.pulls.start(who, order, model)
    ended = await state.pulls.ended(who, name)
    if ended.error is not None:
        if ended.error.code == "source_failed" and "there is no" in ended.error.message:
            raise ApiError("adapter_not_found", f"No adapter found for '{name}' at {path[:200]}")
        raise ApiError(ended.error.code, ended.error.message, details=ended.error.details)
    if ended.status != "ready":
        raise ApiError("pull_interrupted", f"the load of '{name}' was {ended.status}")
    if pinned:
        await state.admin.pin(who, name, pinned=True)


async def unload(state: Runtime, who: Caller, name: str) -> None:
    """Forget an adapter that `load` registered, once the requests that run on it are done.

    Raises: ApiError(adapter_not_found | invalid_request | adapter_in_use).
    """
    if not await _exists(state, who, name):
        raise ApiError("adapter_not_found", f"The lora adapter '{name}' cannot be found.")
    there = {row.version for row in (await state.adapters.get(who, name)).versions}
    uploaded = sorted(there - await state.pulls.versions(who, name))
    if uploaded:
        raise ApiError(
            "invalid_request",
            f"The lora adapter '{name}' was uploaded (version {uploaded[0]}), not loaded from a "
            f"path; DELETE /v1/adapters/{name} removes it for good",
        )
    await state.pulled.delete(who, name, version=None, force=False, drain_timeout_s=DRAIN_TIMEOUT_S)


async def loaded(state: Runtime, who: Caller) -> dict[str, str]:
    """Adapter -> where it came from, as its last load had it; empty for uploads."""
    pulls = {pull.id: pull.source for pull in (await state.pulls.page(who)).data}
    names = [name for name, _ in await state.adapters.names(who) if ":" not in name]
    return {name: pulls.get(name, "") for name in names}


def source_of(path: str, directories: dict[str, Path]) -> str:
    """The source that a client's path means: `dir:NAME/rest` for a path of the server under one of
    the allowed directories, `hub:org/name` for a hub id; sources stay as they are.
    """
    if _SOURCE.fullmatch(path):
        return path
    if path.startswith("/"):
        parts = [part for part in path.split("/") if part not in ("", ".")]
        if ".." not in parts:
            for name, root in directories.items():
                rest = _below(parts, root)
                if rest:
                    return f"dir:{name}/{rest}"
        known = ", ".join(sorted(directories)) or "none"
        raise ApiError(
            "source_not_allowed",
            "lora_path is not below a directory that adapters may be loaded from "
            f"(allowed: {known}); --source-dirs NAME=PATH adds one",
            param="lora_path",
        )
    if _HUB_ID.fullmatch(path):
        return f"hub:{path}"
    raise ApiError(
        "invalid_request",
        f"lora_path {path[:120]!r} is neither an absolute path, nor a hub id (org/name), nor a "
        "source (dir:NAME/path, https://...)",
        param="lora_path",
    )


def _below(parts: list[str], root: Path) -> str:
    base = [part for part in str(root.absolute()).split("/") if part]
    return "/".join(parts[len(base) :]) if parts[: len(base)] == base else ""


async def _exists(state: Runtime, who: Caller, name: str) -> bool:
    try:
        await state.adapters.get(who, name)
    except ApiError as error:
        if error.code != "adapter_not_found":
            raise
        return False
    return True
