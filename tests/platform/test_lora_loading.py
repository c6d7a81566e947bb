"""vLLM's and SGLang's routes for adapters, over folders of the server."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from loraplex.platform.dialects.lora_loading import source_of
from loraplex.platform.errors import ApiError


@pytest.fixture
def folders(tmp_path: Path, fake_engine_module: Any, adapter_files_module: Any) -> Path:
    root = tmp_path / "adapters"
    for name, alpha in (("sql", 8), ("other", 4)):
        (root / name).mkdir(parents=True)
        config = adapter_files_module.config(lora_alpha=alpha, r=4)
        (root / name / "adapter_config.json").write_text(json.dumps(config))
        weights = adapter_files_module.weights(fake_engine_module.model_info().modules)
        (root / name / "adapter_model.safetensors").write_bytes(weights)
    (tmp_path / "outside").mkdir()
    (root / "link").symlink_to(tmp_path / "outside")
    (root / "bad").mkdir()
    (root / "bad" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1}')
    (root / "bad" / "adapter_model.safetensors").write_bytes(b"nothing")
    return root


@pytest.fixture
async def loading(start: Any, folders: Path) -> AsyncIterator[Any]:
    async with start(source_dirs=f"shared={folders}") as server:
        yield server


async def vllm(server: Any, action: str, **body: Any) -> Any:
    return await server.http.post(f"/v1/{action}_lora_adapter", json=body)


async def names(server: Any) -> list[str]:
    models = (await server.http.get("/v1/models")).json()["data"]
    return [model["id"] for model in models if model["parent"]]


async def test_vllm_loads_serves_and_unloads(loading: Any, folders: Path) -> None:
    path = str(folders / "sql")
    answer = await vllm(loading, "load", lora_name="sql", lora_path=path)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/plain")
    assert answer.text == "Success: LoRA adapter 'sql' added successfully."
    assert await names(loading) == ["sql"]
    completion = await loading.http.post("/v1/completions", json={"model": "sql", "prompt": "x"})
    assert completion.json()["adapter"]["id"] == "sql"
    answer = await vllm(loading, "unload", lora_name="sql", lora_int_id=None)
    assert (answer.status_code, answer.text) == (
        200,
        "Success: LoRA adapter 'sql' removed successfully.",
    )
    assert await names(loading) == []
    gone = await loading.http.post("/v1/completions", json={"model": "sql", "prompt": "x"})
    assert gone.status_code == 404


async def test_vllm_loads_a_name_again_in_place_only(loading: Any, folders: Path) -> None:
    await vllm(loading, "load", lora_name="sql", lora_path=str(folders / "sql"))
    answer = await vllm(loading, "load", lora_name="sql", lora_path=str(folders / "other"))
    assert answer.status_code == 400
    assert answer.json() == {
        "error": {
            "message": "The lora adapter 'sql' has already been loaded. If you want to load the "
            "adapter in place, set 'load_inplace' to True.",
            "type": "InvalidUserInput",
            "param": None,
            "code": 400,
        }
    }
    answer = await vllm(
        loading, "load", lora_name="sql", lora_path=str(folders / "other"), load_inplace=True
    )
    assert answer.status_code == 200
    found = (await loading.http.get("/v1/adapters/sql")).json()
    assert (found["version"], found["alpha"]) == (2, 4)


async def test_vllm_refusals(loading: Any, folders: Path, tmp_path: Path) -> None:
    for body, status, kind, words in (
        ({}, 400, "InvalidUserInput", "lora_name"),
        ({"lora_name": "a"}, 400, "InvalidUserInput", "lora_path"),
        ({"lora_name": "tiny", "lora_path": str(folders / "sql")}, 400, "InvalidUserInput", "tiny"),
        ({"lora_name": "a", "lora_path": str(folders / "no")}, 404, "NotFoundError", "No adapter"),
        ({"lora_name": "a", "lora_path": str(folders / "bad")}, 400, "InvalidUserInput", ""),
        ({"lora_name": "a", "lora_path": "/etc"}, 403, "PermissionDeniedError", "shared"),
        (
            {"lora_name": "a", "lora_path": str(folders / ".." / "outside")},
            403,
            "PermissionDeniedError",
            "shared",
        ),
        ({"lora_name": "a", "lora_path": "org/repo"}, 403, "PermissionDeniedError", "hosts"),
        ({"lora_name": "a", "lora_path": "sql"}, 400, "InvalidUserInput", "hub id"),
        ({"lora_name": "A b", "lora_path": str(folders / "sql")}, 400, "InvalidUserInput", "A b"),
    ):
        answer = await vllm(loading, "load", **body)
        assert answer.status_code == status, (body, answer.text)
        error = answer.json()["error"]
        assert (error["type"], error["code"]) == (kind, status)
        assert words in error["message"]
        assert str(tmp_path / "outside") not in error["message"]
    linked = await vllm(loading, "load", lora_name="a", lora_path=str(folders / "link"))
    assert linked.status_code in (403, 404)
    missing = await vllm(loading, "unload", lora_name="nobody")
    assert missing.status_code == 404
    assert "cannot be found" in missing.json()["error"]["message"]
    assert await names(loading) == []


async def test_what_was_uploaded_is_not_unloaded(loading: Any) -> None:
    """It may be the only copy; vLLM's clients unload what is on a disk still."""
    await loading.upload("mine")
    answer = await vllm(loading, "unload", lora_name="mine")
    assert answer.status_code == 400
    assert "DELETE /v1/adapters/mine" in answer.json()["error"]["message"]
    assert await names(loading) == ["mine"]


async def test_an_upload_under_a_loaded_name_is_not_unloaded_either(
    loading: Any, folders: Path
) -> None:
    """Whichever came first."""
    path = str(folders / "other")
    await loading.upload("first")
    loaded = await vllm(loading, "load", lora_name="first", lora_path=path, load_inplace=True)
    assert loaded.status_code == 200
    await vllm(loading, "load", lora_name="second", lora_path=path)
    await loading.upload("second")
    for name in ("first", "second"):
        answer = await vllm(loading, "unload", lora_name=name)
        assert answer.status_code == 400, name
        assert f"DELETE /v1/adapters/{name}" in answer.json()["error"]["message"]
    assert await names(loading) == ["first", "second"]


async def test_sglang_tells_what_is_loaded(loading: Any, folders: Path) -> None:
    async def post(action: str, **body: Any) -> tuple[int, dict[str, Any]]:
        answer = await loading.http.post(f"/{action}_lora_adapter", json=body)
        return answer.status_code, answer.json()

    status, body = await post("load", lora_name="a", lora_path=str(folders / "sql"), pinned=True)
    assert status == 200, body
    assert body == {
        "success": True,
        "error_message": None,
        "loaded_adapters": {"a": "dir:shared/sql"},
    }
    assert loading.engine.pinned
    status, body = await post("load", lora_name="a", lora_path=str(folders / "sql"))
    assert (status, body["success"]) == (400, False)
    assert body["loaded_adapters"] == {"a": "dir:shared/sql"}
    assert "already" in body["error_message"]
    await loading.http.post("/v1/admin/adapters/a/unpin")
    status, body = await post("unload", lora_name="a")
    assert (status, body["success"], body["loaded_adapters"]) == (200, True, {})
    status, body = await post("unload", lora_name="a")
    assert (status, body["success"]) == (400, False)
    status, body = await post("load", lora_path="x")
    assert (status, body["success"]) == (400, False)


def test_paths_and_hub_ids_become_sources() -> None:
    allowed = {"a": Path("/srv/a"), "b": Path("/srv/a/b")}
    for path, source in (
        ("/srv/a/x", "dir:a/x"),
        ("/srv//a/./x/y/", "dir:a/x/y"),
        ("org/name", "hub:org/name"),
        ("org/name@v1", "hub:org/name@v1"),
        ("hubert/name", "hub:hubert/name"),
        ("dirk/name", "hub:dirk/name"),
        ("hub:org/name", "hub:org/name"),
        ("dir:a/x", "dir:a/x"),
        ("https://host/a.zip", "https://host/a.zip"),
        ("s3://bucket/a", "s3://bucket/a"),
    ):
        assert source_of(path, allowed) == source
    for path in ("/srv/a", "/srv/ab/x", "/", "/srv/a/../c", "../x", "name", "~/x", "a/b/c"):
        with pytest.raises(ApiError):
            source_of(path, allowed)
