"""What a PATCH changes of an adapter's row, and how the audit log tells it. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from loraplex.platform.models import Adapter, AdapterShare
from loraplex.platform.schemas import AdapterPatch


def described(adapter: Adapter) -> dict[str, Any]:
    """All that a patch can change. adapter: with its shares."""
    return {
        "description": adapter.description,
        "metadata": adapter.metadata_,
        "visibility": adapter.visibility,
        "shared_with": [share.tenant for share in adapter.shares],
        "defaults": adapter.defaults,
    }


def apply(change: AdapterPatch, adapter: Adapter) -> None:
    """What was not sent stays."""
    if change.description is not None:
        adapter.description = change.description
    if change.metadata is not None:
        adapter.metadata_ = change.metadata
    if change.visibility is not None:
        adapter.visibility = change.visibility
    if change.shared_with is not None:
        _share(adapter, change.shared_with)
    if change.defaults is not None:
        adapter.defaults = change.defaults.stored_form()


def _share(adapter: Adapter, tenants: Sequence[str]) -> None:
    kept = [share for share in adapter.shares if share.tenant in tenants]
    added = set(tenants) - {share.tenant for share in kept}
    adapter.shares[:] = sorted(
        [*kept, *(AdapterShare(tenant=tenant) for tenant in added)], key=lambda share: share.tenant
    )
