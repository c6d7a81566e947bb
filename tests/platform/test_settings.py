"""Settings: flags before environment before defaults, sizes, and mistakes that do not pass
silently.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from loraplex.engine.config import EngineConfig
from loraplex.platform.settings import Settings, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("1048576", 1048576),
        ("512MB", 512 * 10**6),
        ("2GiB", 2 * 2**30),
        ("1.5 gib", 3 * 2**29),
        ("10kb", 10_000),
        ("7B", 7),
        (42, 42),
    ],
)
def test_sizes(text: Any, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "2G", "1,5GB", "-1GB", "2 Giga", "1e9"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValidationError, match=r"kv_cache_memory[\s\S]*write bytes or a unit"):
        Settings(model="m", kv_cache_memory=text)  # type: ignore[arg-type]


def test_the_environment_fills_what_is_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAPLEX_MODEL", "from-env")
    monkeypatch.setenv("LORAPLEX_PORT", "9000")
    monkeypatch.setenv("LORAPLEX_ADAPTER_MEMORY", "1GiB")
    monkeypatch.setenv("LORAPLEX_API_KEY", "key-number-one, key-number-two")
    settings = Settings(port=9001)  # type: ignore[call-arg]
    assert (settings.model, settings.port, settings.adapter_memory) == ("from-env", 9001, 2**30)
    assert [k.get_secret_value() for k in settings.api_key] == ["key-number-one", "key-number-two"]


def test_keys_are_not_shown() -> None:
    settings = Settings(model="m", api_key=("super-secret-key",))  # type: ignore[arg-type]
    assert "super" not in repr(settings)
    with pytest.raises(ValidationError, match="8 characters") as refused:
        Settings(model="m", api_key=("s3cret",))  # type: ignore[arg-type]
    assert "s3cret" not in str(refused.value)


@pytest.mark.parametrize("name", ["LORAPLEX_MAX_MODEL_LENGTH", "loraplex_prot"])
def test_a_mistyped_variable_is_an_error(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "1")
    with pytest.raises(ValidationError, match=name):
        Settings(model="m")


def test_an_unknown_setting_is_an_error() -> None:
    with pytest.raises(ValidationError, match="max_lora_rank"):
        Settings(model="m", max_lora_rank=8)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    "change",
    [
        {"port": 70_000},
        {"device": "tpu"},
        {"dtype": "int8"},
        {"max_model_len": 0},
        {"gpu_memory_utilization": 1.5},
        {"kv_cache_memory": 0},
        {"log_level": "loud"},
    ],
)
def test_bad_values_are_named(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(change))):
        Settings(**{"model": "m", **change})


def test_the_engine_config_takes_every_setting_of_its_name(tmp_path: Path) -> None:
    """A new field of EngineConfig must be a setting too, and be handed over."""
    changes: dict[str, Any] = {
        "device": "cpu",
        "dtype": "float32",
        "backend": "torch",
        "batch_invariant": True,
        "num_threads": 3,
        "max_model_len": 1000,
        "max_num_seqs": 7,
        "max_num_batched_tokens": 70,
        "max_num_waiting": 11,
        "block_size": 32,
        "gpu_memory_utilization": 0.5,
        "kv_cache_memory": 1,
        "adapter_memory": 2,
        "host_adapter_memory": 0,
        "enable_prefix_cache": False,
    }
    config = Settings(model="m", data_dir=tmp_path, **changes).engine_config()
    own = {field.name for field in fields(EngineConfig)} - {"model", "adapter_dir"}
    assert own == set(changes)
    assert {name: getattr(config, name) for name in own} == changes
    assert (config.model, config.adapter_dir) == ("m", tmp_path / "adapters")


def test_combinations_the_engine_refuses() -> None:
    with pytest.raises(ValueError, match="max_num_batched_tokens"):
        Settings(model="m", max_num_seqs=100, max_num_batched_tokens=10).engine_config()


def test_every_setting_is_described() -> None:
    for name, field in Settings.model_fields.items():
        assert field.description, name
        assert field.description.endswith("."), name
