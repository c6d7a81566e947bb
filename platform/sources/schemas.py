"""Bodies of the pull routes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator

from loraplex.platform.schemas import AdapterDetail, checked_metadata

PullStatus = Literal["queued", "downloading", "validating", "ready", "failed", "cancelled"]


class PullOrder(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str
    source: Annotated[str, Field(min_length=1, max_length=4096)] = Field(
        description="https://host/a.tar.gz, https://host/folder/, hub:org/name@revision, "
        "s3://bucket/prefix or dir:NAME/path."
    )
    revision: Annotated[str, Field(min_length=1, max_length=256)] | None = Field(
        None, description="Branch, tag or commit of a hub repository; default: main."
    )
    digest: Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")] | None = Field(
        None, description="The adapter's digest: any other content is refused."
    )
    token: Annotated[SecretStr, Field(min_length=1, max_length=4096)] | None = Field(
        None, description="For private https and hub sources. Used for this pull, never kept."
    )
    alias: str | None = None
    description: Annotated[str, Field(max_length=10_000)] | None = None
    metadata: dict[str, Any] | None = None

    @field_validator("metadata")
    @classmethod
    def _plain_json(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        return value if value is None else checked_metadata(value)

    @field_validator("token")
    @classmethod
    def _fit_for_a_header(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not all("!" <= c <= "~" for c in value.get_secret_value()):
            raise ValueError("has characters that no token has")
        return value


class PullError(BaseModel):
    """As an upload's error body has it."""

    code: str
    message: str
    details: list[dict[str, Any]] = []


class PullObject(BaseModel):
    """The last pull of an adapter. `bytes_total` is null until the source has said it; `version`
    and `digest` are what it became.
    """

    id: str
    object: Literal["pull"] = "pull"
    source: str
    revision: str | None
    status: PullStatus
    bytes_done: int
    bytes_total: int | None
    retries: int
    restarts: int
    version: int | None
    digest: str | None
    error: PullError | None
    created_at: int
    ended_at: int | None


class PullList(BaseModel):
    object: Literal["list"] = "list"
    data: list[PullObject]


class AdapterWithPull(AdapterDetail):
    pull: PullObject | None = None


class PendingAdapter(BaseModel):
    """An adapter that has no version yet: its first pull is under way, or has failed."""

    id: str
    object: Literal["adapter"] = "adapter"
    tenant: str
    version: None = None
    status: PullStatus
    error: str | None
    residency: Literal["absent"] = "absent"
    description: str
    metadata: dict[str, Any]
    aliases: dict[str, Any] = {}
    versions: list[Any] = []
    pull: PullObject
