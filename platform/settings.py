"""The settings of one server: `LORAPLEX_...` variables and the same names as flags of `loraplex
serve`.

Precedence: argument (the CLI's flags) > environment > default. A `LORAPLEX_` variable that is no
setting is an error, so a typing mistake cannot pass silently. Nothing is read at import.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SecretStr, field_validator
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from loraplex.engine.config import EngineConfig
from loraplex.platform.names import NAME
from loraplex.platform.sources.addresses import HostList
from loraplex.platform.sources.buckets import check_bucket

ENV_PREFIX = "LORAPLEX_"

_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{letter}B": 1000**power for power, letter in enumerate("KMGT", start=1)}
_UNITS |= {f"{letter}IB": 1024**power for power, letter in enumerate("KMGT", start=1)}


def parse_size(value: Any) -> Any:
    """Bytes from `1048576`, `"512MB"` (10^6) or `"2GiB"` (2^30). Raises ValueError naming the way
    out.
    """
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value)
    unit = _UNITS.get(found[2].upper()) if found else None
    if found is None or unit is None:
        raise ValueError(
            f"{value!r} is not a size; write bytes or a unit, such as 512MB, 2GB or 2GiB"
        )
    return int(float(found[1]) * unit)


Size = Annotated[int, BeforeValidator(parse_size), Field(ge=0)]
PositiveSize = Annotated[int, BeforeValidator(parse_size), Field(gt=0)]


class _Environment(EnvSettingsSource):
    """The environment, read closed: variables with our prefix that name no setting reach
    `extra="forbid"`.
    """

    def __call__(self) -> dict[str, Any]:
        values = super().__call__()
        known = {f"{ENV_PREFIX}{name.upper()}" for name in self.settings_cls.model_fields}
        # For the client commands: where a server is, and what `adapter pull` sends along.
        known |= {f"{ENV_PREFIX}URL", f"{ENV_PREFIX}SOURCE_TOKEN"}
        for name in os.environ:
            if name.upper().startswith(ENV_PREFIX) and name.upper() not in known:
                values[name] = os.environ[name]
        return values


class Settings(BaseSettings):
    """What one server runs with. Every field is a flag (`--max-model-len`) and a variable
    (`LORAPLEX_MAX_MODEL_LEN`).

    Raises: pydantic.ValidationError (a ValueError) naming the setting, its value and what would be
    right.
    """

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, extra="forbid", frozen=True, hide_input_in_errors=True
    )

    # what is served
    model: str = Field(description="Base model: a Hugging Face directory or hub id.")
    served_model_name: str | None = Field(
        None,
        description="Name of the base model in the API; default: the directory's name or hub id.",
    )
    host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0 for every interface.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 picks a free one.")
    data_dir: Path = Field(
        Path("loraplex-data"),
        description="Directory of the registry and the adapter files: all that has to be kept.",
    )

    # the engine
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where the model runs.")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="Number format of weights and KV cache; auto follows the model."
    )
    backend: Literal["auto", "torch", "native", "triton"] = Field(
        "auto", description="Kernels to use; auto takes the fastest that works here."
    )
    batch_invariant: bool = Field(
        False,
        description="Compute every request bitwise alike, whatever shares its steps; GPU only, "
        "slower.",
    )
    num_threads: int | None = Field(
        None, ge=1, description="CPU threads of the engine; default: one per core."
    )
    max_model_len: int | None = Field(
        None, ge=1, description="Longest prompt plus output, in tokens; default: the model's own."
    )
    max_num_seqs: int | None = Field(
        None,
        ge=1,
        description="Sequences that run in one step at most; default: 64 on a CPU, 256 on a GPU.",
    )
    max_num_batched_tokens: int | None = Field(
        None,
        ge=1,
        description="Tokens in one step at most, longer prompts run in chunks; "
        "default: 512 on a CPU, 2048 on a GPU.",
    )
    max_num_waiting: int = Field(
        4096, ge=1, description="Requests that may wait; more are refused with 429."
    )
    block_size: int = Field(16, ge=1, description="Tokens per KV-cache block.")
    gpu_memory_utilization: float = Field(
        0.9, gt=0, le=1, description="Share of the GPU's memory that may be used."
    )
    kv_cache_memory: PositiveSize | None = Field(
        None,
        description="Memory for the KV cache, such as 2GiB; default: shared with the adapters.",
    )
    adapter_memory: PositiveSize | None = Field(
        None,
        description="Device memory for adapters, such as 512MB; default: shared with the KV cache.",
    )
    host_adapter_memory: Size | None = Field(
        None,
        description="Host memory for adapters that left the device; 0 = none; default: automatic.",
    )
    enable_prefix_cache: bool = Field(
        True, description="Share the KV cache of equal prompt beginnings (per adapter)."
    )

    # the API
    tool_format: Literal["auto", "hermes", "llama3", "mistral", "json"] = Field(
        "auto",
        description="How the model writes tool calls; auto goes by its chat template.",
    )
    tenant_templates: bool = Field(
        False,
        description="Run chat templates that tenants bring, in requests and with adapters. They "
        "are sandboxed and timed, but may eat memory.",
    )
    api_key: Annotated[tuple[SecretStr, ...], NoDecode] = Field(
        (),
        description="Key that clients must send as `Authorization: Bearer KEY`; may be given "
        "several times (comma-separated in the environment). None: open to all who reach the port.",
    )
    database_url: str | None = Field(
        None, description="SQLAlchemy URL of the registry; default: SQLite in the data directory."
    )
    max_upload_bytes: PositiveSize = Field(
        2 * 1024**3, description="Largest adapter upload, such as 2GiB."
    )
    max_body_bytes: PositiveSize = Field(
        32 * 1024**2, description="Largest body of any other request, such as 32MiB."
    )

    request_timeout_s: float = Field(
        600, gt=0, description="Longest time for one inference request, in seconds."
    )
    stall_timeout_s: float = Field(
        30,
        gt=0,
        description="How long a client may read nothing of its answer before it is cut off, in "
        "seconds.",
    )
    shutdown_timeout_s: float = Field(
        10, ge=0, description="How long running requests may go on after SIGTERM, in seconds."
    )
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Origin whose pages may call from a browser, such as https://app.example.org; "
        "may be given several times. None: no page may.",
    )

    # where adapters may be pulled from
    source_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Host that pulls may ask over https, such as huggingface.co, *.hf.co or "
        "example.org:8443; may be given several times. None: no pulls over https and from hubs.",
    )
    source_private_addresses: bool = Field(
        False, description="Let pulls connect to addresses of private networks, and use http."
    )
    source_buckets: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Object storage that pulls may read with the server's credentials, such as "
        "s3://bucket/prefix (needs fsspec and its package for it); may be given several times.",
    )
    source_dirs: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Directory that pulls may read as dir:NAME/..., written NAME=PATH; may be "
        "given several times.",
    )
    watch_dir: Path | None = Field(
        None,
        description="Directory whose sub-folders are registered as adapters, at start and whenever "
        "they appear or change.",
    )
    hub_endpoint: str = Field(
        "https://huggingface.co", description="Hub that hub:org/name sources come from."
    )
    max_pulls: int = Field(4, ge=1, le=64, description="Pulls that run at once; others wait.")
    pull_timeout_s: float = Field(
        3600, gt=0, description="Longest time for one pull, in seconds, its retries included."
    )

    # logging
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least important messages to log."
    )
    log_format: Literal["text", "json"] = Field(
        "text", description="Log lines for people (text) or for machines (json)."
    )

    @field_validator(
        "api_key", "cors_origins", "source_hosts", "source_buckets", "source_dirs", mode="before"
    )
    @classmethod
    def _split_lists(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",")]
        return tuple(part for part in value if part)

    @field_validator("cors_origins")
    @classmethod
    def _origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for origin in value:
            if not re.fullmatch(r"https?://[^\s/?#@*]+", origin):
                raise ValueError(f"{origin!r} is not an origin such as https://app.example.org")
        return value

    @field_validator("source_hosts")
    @classmethod
    def _hosts(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        HostList(value)
        return value

    @field_validator("source_buckets")
    @classmethod
    def _buckets(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for url in value:
            check_bucket(url)
        return value

    @field_validator("source_dirs")
    @classmethod
    def _directories(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        names = [entry.partition("=")[0] for entry in value]
        for entry, name in zip(value, names, strict=True):
            if not NAME.fullmatch(name) or not Path(entry.partition("=")[2]).is_absolute():
                raise ValueError(f"{entry!r} is not NAME=PATH with an absolute path")
            if names.count(name) > 1:
                raise ValueError(f"{name!r} is given twice")
        return value

    @field_validator("hub_endpoint")
    @classmethod
    def _endpoint(cls, value: str) -> str:
        if not re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#]*)?", value):
            raise ValueError(f"{value!r} is not a URL such as https://huggingface.co")
        return value

    @field_validator("api_key")
    @classmethod
    def _refuse_short_keys(cls, value: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        if any(len(key.get_secret_value()) < 8 for key in value):
            raise ValueError("an API key must have at least 8 characters")
        return value

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, _Environment(settings_cls)

    @property
    def adapter_dir(self) -> Path:
        """Root of the content-addressed adapter store."""
        return self.data_dir / "adapters"

    @property
    def source_directories(self) -> dict[str, Path]:
        """NAME -> directory, of `source_dirs`."""
        pairs = (entry.partition("=") for entry in self.source_dirs)
        return {name: Path(path) for name, _, path in pairs}

    @property
    def effective_database_url(self) -> str:
        return self.database_url or f"sqlite+aiosqlite:///{self.data_dir / 'registry.sqlite'}"

    def engine_config(self) -> EngineConfig:
        """Raises: ValueError for combinations the engine refuses."""
        return EngineConfig(
            model=self.model,
            adapter_dir=self.adapter_dir.absolute(),
            device=self.device,
            dtype=self.dtype,
            max_model_len=self.max_model_len,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_num_waiting=self.max_num_waiting,
            block_size=self.block_size,
            kv_cache_memory=self.kv_cache_memory,
            adapter_memory=self.adapter_memory,
            host_adapter_memory=self.host_adapter_memory,
            gpu_memory_utilization=self.gpu_memory_utilization,
            enable_prefix_cache=self.enable_prefix_cache,
            num_threads=self.num_threads,
            backend=self.backend,
            batch_invariant=self.batch_invariant,
        )
