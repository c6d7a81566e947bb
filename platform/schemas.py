"""Bodies of the adapter and admin routes. The OpenAI bodies are in openai_schemas.py."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from loraplex.platform.adapter_defaults import AdapterDefaults
from loraplex.platform.names import NAME

MAX_METADATA_BYTES = 64 * 1024
MAX_SPLIT = 16
MAX_WEIGHT = 1_000_000
ONLY_WEIGHT = 100  # of a version that has an alias to itself

Status = Literal["validating", "ready", "failed", "draining", "deleted"]
Residency = Literal["disk", "host", "loading", "device"]


VersionNumber = Annotated[int, Field(strict=True, ge=1, lt=10**9)]


def checked_metadata(value: Any) -> dict[str, Any]:
    """Metadata that any database can keep and any client can read. Raises: ValueError."""
    if not isinstance(value, dict):
        raise ValueError("must be a JSON object")
    try:
        size = len(json.dumps(value, allow_nan=False, ensure_ascii=False).encode())
    except ValueError:  # NaN, Infinity, or half a surrogate pair (a UnicodeEncodeError)
        raise ValueError("has a number or a text that is no valid JSON") from None
    if size > MAX_METADATA_BYTES:
        raise ValueError(f"exceeds {MAX_METADATA_BYTES} bytes")
    return value


Visibility = Literal["private", "shared", "public"]
TenantName = Annotated[str, Field(pattern=f"^{NAME.pattern}$")]


class WeightedVersion(BaseModel):
    """A version and its weight among the others of a split."""

    model_config = ConfigDict(extra="forbid")

    version: VersionNumber
    weight: Annotated[int, Field(strict=True, ge=0, le=MAX_WEIGHT)]


class ProofObject(BaseModel):
    """What the adapter did in the engine, against plain arithmetic on its files.

    error, base_error, effect: distances of logits relative to their norm: engine to arithmetic with
    the adapter, the same without it, and with to without it. null: not a number.
    """

    agrees: bool = Field(description="error <= tolerance")
    error: float | None
    tolerance: float | None
    base_error: float | None
    effect: float | None
    accepted: bool = Field(description="It disagrees, and an operator serves it all the same.")
    flags: list[Literal["disagrees", "no_effect"]]
    probed_at: int
    device: str
    dtype: str
    backend: str


class AdapterVersionObject(BaseModel):
    """One content under a name."""

    version: int
    digest: str
    rank: int
    alpha: float
    scaling: float
    target_modules: list[str]
    num_parameters: int
    size_bytes: int
    dtype: str
    pages: int
    features: list[str] = Field(
        [], description="What it uses beyond A and B of linear modules, such as dora."
    )
    invocation_tokens: list[int] | None = Field(
        None, description="Of an activated LoRA: token ids that switch it on."
    )
    warnings: list[Any] = []
    shipped_defaults: dict[str, Any] = Field({}, description="What its files say of its use.")
    status: Status
    error: str | None = None
    residency: Residency
    proof: ProofObject | None = Field(None, description="null until it was probed.")
    created_at: int
    last_used_at: int | None = None
    num_requests: int = 0
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0


class AdapterObject(AdapterVersionObject):
    """An adapter as seen through one of its versions (the newest unless another was named).

    `id` is `tenant/name` for another tenant's. Only the tenant itself sees `shared_with`.
    """

    id: str
    object: Literal["adapter"] = "adapter"
    tenant: str
    visibility: Visibility
    shared_with: list[str]
    base_model: str
    description: str
    metadata: dict[str, Any]
    defaults: dict[str, Any] = Field(description="Set by PATCH; over those its files ship.")
    aliases: dict[str, list[WeightedVersion]]


class AdapterDetail(AdapterObject):
    versions: list[AdapterVersionObject]


class AdapterList(BaseModel):
    object: Literal["list"] = "list"
    data: list[AdapterObject]
    has_more: bool


class AdapterPatch(BaseModel):
    model_config = ConfigDict(extra="forbid")

    description: Annotated[str, Field(max_length=10_000)] | None = None
    metadata: dict[str, Any] | None = None
    visibility: Visibility | None = None
    shared_with: Annotated[list[TenantName], Field(max_length=1000)] | None = None
    defaults: AdapterDefaults | None = Field(
        None, description="For requests that do not say otherwise; replaces all of the old ones."
    )

    @field_validator("metadata")
    @classmethod
    def _plain_json(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        return value if value is None else checked_metadata(value)


class AliasOrder(BaseModel):
    """What an alias shall mean: one version, or several by weight."""

    model_config = ConfigDict(extra="forbid")

    version: VersionNumber | None = None
    split: Annotated[list[WeightedVersion], Field(min_length=1, max_length=MAX_SPLIT)] | None = (
        Field(None, description="Weights are whole numbers; shares are weight / sum of weights.")
    )

    @field_validator("split")
    @classmethod
    def _some_weight(cls, value: list[WeightedVersion] | None) -> list[WeightedVersion] | None:
        if value is None:
            return value
        versions = [item.version for item in value]
        if len(set(versions)) != len(versions):
            twice = next(version for version in versions if versions.count(version) > 1)
            raise ValueError(f"version {twice} is named twice; add up its weights")
        if not any(item.weight for item in value):
            raise ValueError("every weight is 0, so no request could be served; give one a weight")
        return value

    @model_validator(mode="after")
    def _one_of_both(self) -> AliasOrder:
        if (self.version is None) == (self.split is None):
            raise ValueError(
                'send either "version" or "split", such as {"version": 3} or '
                '{"split": [{"version": 3, "weight": 90}, {"version": 4, "weight": 10}]}'
            )
        return self

    @property
    def weights(self) -> dict[int, int]:
        if self.version is not None:
            return {self.version: ONLY_WEIGHT}
        return {item.version: item.weight for item in self.split or ()}


class RollbackOrder(BaseModel):
    model_config = ConfigDict(extra="forbid")

    revision: Annotated[int, Field(strict=True, ge=1, lt=10**9)] | None = Field(
        None, description="The revision to go back to; default: the one before the last change."
    )


class Freed(BaseModel):
    device_bytes: int = 0
    host_bytes: int = 0
    disk_bytes: int = 0


class AdapterDeleted(BaseModel):
    id: str
    object: Literal["adapter"] = "adapter"
    deleted: Literal[True] = True
    versions: list[int]
    freed: Freed


class VerifyOrder(BaseModel):
    model_config = ConfigDict(extra="forbid")

    accept: bool = Field(False, description="Serve it even if its probe disagrees.")


class Verification(BaseModel):
    """`ok`: its files are as uploaded, and its probe agrees or is accepted."""

    id: str
    version: int
    digest: str
    ok: bool
    damage: str | None = Field(description="How its stored files differ from what was uploaded.")
    proof: ProofObject | None


class AliasObject(BaseModel):
    """`id:alias` and what it means. `version` is null when that is more than one."""

    id: str
    object: Literal["alias"] = "alias"
    alias: str
    revision: int
    version: int | None
    split: list[WeightedVersion]


class AliasList(BaseModel):
    object: Literal["list"] = "list"
    data: list[AliasObject]


class AliasRevisionObject(BaseModel):
    """What an alias meant from `at` on. `split` is empty where it was deleted; `restores` is the
    revision that a rollback went back to.
    """

    revision: int
    at: int
    actor: str
    split: list[WeightedVersion]
    restores: int | None


class AliasHistory(BaseModel):
    object: Literal["list"] = "list"
    data: list[AliasRevisionObject]
    has_more: bool


class AliasDeleted(BaseModel):
    id: str
    alias: str
    deleted: Literal[True] = True


class LoadOrder(BaseModel):
    model_config = ConfigDict(extra="forbid")

    wait: bool = True


class EvictOrder(BaseModel):
    model_config = ConfigDict(extra="forbid")

    tier: Literal["device", "host"] = "device"
    drain: bool = False
    timeout_s: Annotated[float, Field(ge=0, le=3600)] | None = None


class Slot(BaseModel):
    """A resident adapter. `id` and `version` are null if its name was deleted meanwhile."""

    id: str | None
    version: int | None
    digest: str
    state: str
    rank: int
    pages: int
    device_bytes: int
    host_bytes: int
    running: int
    waiting: int
    pinned: bool
    loaded_at: float | None
    last_used_at: float | None
    hits: int
    loads: int
    evictions: int
    error: str | None = None


class SlotTotals(BaseModel):
    """`pages_*` count whole 16-rank pages that adapt every module; smaller adapters take less."""

    adapters: int
    pages_total: int
    pages_used: int
    pages_free: int
    bytes_total: int
    bytes_used: int
    bytes_free: int


class SlotList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Slot]
    totals: SlotTotals | None


class TierBytes(BaseModel):
    disk: int
    host: int
    device: int


class TieredAdapter(BaseModel):
    id: str
    version: int
    digest: str
    status: Status
    tier: Residency
    bytes: TierBytes
    hits: int
    loads: int
    evictions: int
    pinned: bool
    running: int
    waiting: int


class TieredAdapterList(BaseModel):
    object: Literal["list"] = "list"
    data: list[TieredAdapter]


class Evicted(BaseModel):
    id: str
    version: int
    digest: str
    tier: str
    evicted: Literal[True] = True
    freed: Freed


class AdapterRoom(BaseModel):
    """How many more adapters of a rank (all modules adapted) fit on the device now, without
    evicting one or keeping a request waiting, and how many would if adapters had all the memory
    they can have.
    """

    rank: int
    adapters: int
    in_all: int


class MemoryPurpose(BaseModel):
    purpose: str
    bytes: int
    used: int
    text: str


class TokenRoom(BaseModel):
    """How many more tokens of context fit now without evicting an adapter in use, and how many
    would if the KV cache had all the memory it can have.
    """

    tokens: int
    in_all: int


class SharedMemory(BaseModel):
    """What the KV cache and the adapters share and trade in superblocks. The minima and maxima are
    what either side keeps or gets at most; `to_kv_cache` and `to_adapters` count superblocks
    traded so far, `lost` those that could not be moved.
    """

    bytes: int
    superblock_bytes: int
    kv_cache_bytes_min: int
    kv_cache_bytes_max: int
    adapter_bytes_min: int
    adapter_bytes_max: int
    to_kv_cache: int
    to_adapters: int
    lost: int


class Memory(BaseModel):
    """Bytes by purpose. Of memory that is shared, `kv_cache_bytes` and `adapter_bytes_total` are as
    divided now; without sharing `shared` is null and `not_shared_because` says why.
    """

    weights_bytes: int
    kv_cache_bytes: int
    kv_block_bytes: int
    kv_blocks_total: int
    kv_blocks_used: int
    kv_blocks_cached: int
    block_size: int
    adapter_bytes_total: int
    adapter_bytes_used: int
    adapter_bytes_free: int
    adapter_page_bytes: int
    host_adapter_bytes_total: int
    host_adapter_bytes_used: int
    workspace_bytes: int
    device_bytes_total: int
    device_bytes_free: int
    shared: SharedMemory | None
    not_shared_because: str
    tokens_that_fit: TokenRoom
    adapters_that_fit: list[AdapterRoom]
    explanation: list[MemoryPurpose]


class RequestObject(BaseModel):
    id: str
    state: str
    waiting_reason: str | None
    adapters: list[str]
    digests: list[str]
    prompt_tokens: int
    output_tokens: int
    age_s: float


class RequestList(BaseModel):
    object: Literal["list"] = "list"
    data: list[RequestObject]


class TransitionObject(BaseModel):
    """One change of an adapter's residency. `seconds` were spent in `before`; `phases`, of one that
    came to the device, are the seconds of its load. `id` and `version` are null if its name was
    deleted meanwhile.
    """

    id: str | None
    version: int | None
    digest: str
    at: float
    before: str
    after: str
    seconds: float
    reason: str
    detail: str
    phases: dict[str, float]


class TransitionList(BaseModel):
    object: Literal["list"] = "list"
    data: list[TransitionObject]


class Event(BaseModel):
    id: int
    at: int
    tenant: str
    actor: str
    action: str
    subject: str
    before: dict[str, Any] | None
    after: dict[str, Any] | None


class EventList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Event]
    has_more: bool
