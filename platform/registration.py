"""What a new adapter is to be called and described as, checked: an upload's text fields, or a
pull's.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from loraplex.platform.errors import ApiError
from loraplex.platform.names import check_alias, check_name
from loraplex.platform.schemas import checked_metadata
from loraplex.platform.served_model import ServedModel
from loraplex.platform.uploads import Upload


@dataclass(frozen=True, slots=True)
class Registration:
    """None = not sent: what the adapter had stays."""

    name: str
    description: str | None
    metadata: dict[str, Any] | None
    alias: str | None

    @classmethod
    def checked(
        cls,
        model: ServedModel,
        *,
        name: str,
        alias: str | None,
        description: str | None,
        metadata: dict[str, Any] | None,
    ) -> Registration:
        """Raises: ApiError(invalid_request | name_taken)."""
        check_name(name)
        if name in (model.name, model.info.name):
            raise ApiError("name_taken", f"{name!r} is the base model's name", param="name")
        if alias is not None:
            check_alias(alias)
        return cls(name, description, metadata, alias)

    @classmethod
    def from_upload(cls, upload: Upload, model: ServedModel) -> Registration:
        fields = dict(upload.fields)
        order = cls.checked(
            model,
            name=_pop_required(fields, "name"),
            alias=fields.pop("alias", None) or None,
            description=fields.pop("description", None),
            metadata=_metadata(fields),
        )
        if fields:
            unknown = next(iter(fields))
            raise ApiError("invalid_request", f"unknown field {unknown[:80]!r}", param=unknown[:80])
        if upload.files not in ({"archive"}, {"config", "weights"}):
            raise ApiError(
                "invalid_request",
                "send either the files config and weights, or the file archive; "
                f"this upload has {', '.join(sorted(upload.files)) or 'none'}",
                param="archive" if "archive" in upload.files else "weights",
            )
        return order


def _pop_required(fields: dict[str, str], name: str) -> str:
    value = fields.pop(name, "")
    if not value:
        raise ApiError("invalid_request", f"the form field {name!r} is missing", param=name)
    return value


def _metadata(fields: dict[str, str]) -> dict[str, Any] | None:
    raw = fields.pop("metadata", "")
    if not raw:
        return None
    try:
        return checked_metadata(json.loads(raw))
    except (ValueError, RecursionError) as error:
        raise ApiError("invalid_request", f"metadata: {error}", param="metadata") from None
