"""Keys: kept as hashes, shown once, checked from memory, gone when they are to be gone."""

from __future__ import annotations

import hashlib
import sqlite3
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from loraplex.platform import keys as keys_module
from loraplex.platform import tenant_service
from loraplex.platform.callers import Caller
from loraplex.platform.db import Database
from loraplex.platform.models import ApiKey, utc_now
from loraplex.platform.tenant_schemas import KeyOrder, TenantOrder
from loraplex.platform.tenant_service import TenantService


async def made(server: Any, **order: Any) -> Any:
    answer = await server.http.post("/v1/admin/keys", json=order)
    assert answer.status_code == 201, answer.text
    return answer.json()


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


async def status(server: Any, key: str, path: str = "/v1/models") -> int:
    answer = await server.http.get(path, headers=bearer(key))
    code: int = answer.status_code
    return code


async def test_the_registry_keeps_a_hash_and_shows_the_key_once(
    server: Any, tmp_path: Path
) -> None:
    created = await made(server, name="first", scopes=["admin", "infer"])
    key = created["key"]
    assert key.startswith(f"lpx_{created['id']}_")
    assert len(key.split("_", 2)[2]) == 43  # 256 bits
    server.http.headers.update(bearer(key))
    listed = (await server.http.get("/v1/admin/keys")).json()["data"]
    assert listed == [{name: value for name, value in created.items() if name != "key"}]
    rows = sqlite3.connect(tmp_path / "data" / "registry.sqlite")
    dump = "\n".join(rows.iterdump())
    rows.close()
    assert key not in dump
    assert key.split("_", 2)[2] not in dump
    assert hashlib.sha256(key.encode()).hexdigest() in dump


async def test_a_server_is_open_until_there_is_a_key_and_never_again(server: Any) -> None:
    assert (await server.http.get("/v1/models")).status_code == 200
    created = await made(server, scopes=["admin"])
    assert (await server.http.get("/v1/models")).status_code == 401
    gone = await server.http.delete(
        f"/v1/admin/keys/{created['id']}", headers=bearer(created["key"])
    )
    assert gone.json()["status"] == "revoked"
    assert (await server.http.get("/v1/models")).status_code == 401
    assert await status(server, created["key"]) == 401


@pytest.mark.parametrize("change", ["last", "first", "id", "short", "long", "prefix"])
async def test_almost_a_key_is_none(server: Any, change: str) -> None:
    key = (await made(server))["key"]
    flipped = "A" if key[-1] != "A" else "B"
    wrong = {
        "last": key[:-1] + flipped,
        "first": key[:17] + ("A" if key[17] != "A" else "B") + key[18:],
        "id": key[:4] + ("0" if key[4] != "0" else "1") + key[5:],
        "short": key[:-1],
        "long": key + "A",
        "prefix": key[:17],
    }[change]
    assert await status(server, key) == 200
    assert await status(server, wrong) == 401


async def test_an_expired_key_says_so(server: Any) -> None:
    await made(server, scopes=["admin"])
    async with server.runtime.db.unit_of_work() as session:
        key_id, key, hashed = keys_module.new_key()
        session.add(
            ApiKey(
                id=key_id,
                hash=hashed,
                scopes=["infer"],
                limits={},
                expires_at=utc_now() - timedelta(seconds=1),
            )
        )
    server.runtime.keys.forget()
    answer = await server.http.get("/v1/models", headers=bearer(key))
    assert answer.status_code == 401
    assert answer.json()["error"]["message"] == "this API key has expired"


async def test_a_key_expires_while_it_is_cached(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = (await made(server, expires_in_s=600))["key"]
    assert await status(server, key) == 200
    monkeypatch.setattr(keys_module, "utc_now", lambda: utc_now() + timedelta(seconds=601))
    assert await status(server, key) == 401


async def test_a_disabled_tenant_is_out_until_it_is_enabled(start: Any) -> None:
    async with start(api_key="operator-key") as server:
        server.http.headers.update(bearer("operator-key"))
        await server.http.post("/v1/admin/tenants", json={"name": "acme"})
        key = (await made(server, tenant="acme"))["key"]
        for disabled, expected in ((True, 401), (False, 200)):
            await server.http.patch("/v1/admin/tenants/acme", json={"disabled": disabled})
            assert await status(server, key) == expected


async def test_what_another_process_changes_is_seen_soon(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`loraplex key` works on the registry while the server runs."""
    key = (await made(server))["key"]
    assert await status(server, key) == 200
    other = await Database.open(server.runtime.settings.effective_database_url)
    await TenantService(other, lambda: None).revoke_key(Caller(), key.split("_")[1])
    await other.close()
    monkeypatch.setattr(keys_module, "RECHECK_S", 0.0)
    assert await status(server, key) == 401


@pytest.mark.parametrize("by_itself", [True, False])
async def test_a_clock_that_is_slow_does_not_keep_a_key_alive(
    server: Any, monkeypatch: pytest.MonkeyPatch, by_itself: bool
) -> None:
    """Of another server, or of this one after it was set back."""
    key = (await made(server))["key"]
    await server.runtime.tenants.create_key(Caller(), KeyOrder())  # the latest change
    assert await status(server, key) == 200
    monkeypatch.setattr(tenant_service, "utc_now", lambda: utc_now() - timedelta(hours=1))
    if by_itself:
        await server.runtime.tenants.revoke_key(Caller(), key.split("_")[1])
    else:
        other = await Database.open(server.runtime.settings.effective_database_url)
        await TenantService(other, lambda: None).revoke_key(Caller(), key.split("_")[1])
        await other.close()
        monkeypatch.setattr(keys_module, "RECHECK_S", 0.0)
    assert await status(server, key) == 401


async def test_keys_are_checked_from_memory(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    key = (await made(server))["key"]
    assert await status(server, key) == 200

    def broken(*args: Any) -> Any:
        raise AssertionError("the registry was asked")

    monkeypatch.setattr(keys_module, "KeyRepository", broken)
    for _ in range(3):
        await server.runtime.keys.caller(f"Bearer {key}", "")


async def test_every_kind_of_bad_order_is_a_400(server: Any) -> None:
    for order in (
        {"scopes": []},
        {"scopes": ["root"]},
        {"expires_in_s": 0},
        {"expires_in_s": "nan"},
        {"adapters": ["../x"]},
        {"limits": {"requests_per_s": 0}},
        {"limits": {"max_adapters": 3}},
        {"tenant": "A"},
        {"owner": "x"},
    ):
        answer = await server.http.post("/v1/admin/keys", json=order)
        assert answer.status_code == 400, order
    missing = await server.http.post("/v1/admin/keys", json={"tenant": "nobody"})
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "tenant_not_found")
    again = await server.http.post("/v1/admin/tenants", json={"name": "default"})
    assert (again.status_code, again.json()["error"]["code"]) == (409, "name_taken")
    nobody = await server.http.patch("/v1/admin/tenants/nobody", json={})
    assert (nobody.status_code, nobody.json()["error"]["code"]) == (404, "tenant_not_found")


async def test_the_service_works_without_a_server(tmp_path: Path) -> None:
    db = await Database.open(f"sqlite+aiosqlite:///{tmp_path / 'r.sqlite'}")
    service = TenantService(db, lambda: None)
    await service.create_tenant(Caller("cli"), TenantOrder(name="acme"))
    created = await service.create_key(Caller("cli"), KeyOrder(tenant="acme"))
    ring = keys_module.KeyRing(db, [])
    who = await ring.caller(f"Bearer {created.key}", "")
    await db.close()
    assert (who.tenant, who.home, who.key_id) == ("acme", "acme", created.id)


async def test_a_key_revoked_while_the_keys_are_read_is_out_at_once(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The read had begun before the change: what it found must not count as fresh."""
    key = (await made(server))["key"]
    ring, real = server.runtime.keys, keys_module.TenantRepository.state

    async def slow(repository: Any) -> Any:
        found = await real(repository)
        monkeypatch.undo()
        await server.runtime.tenants.revoke_key(Caller(), key.split("_")[1])
        return found

    monkeypatch.setattr(keys_module.TenantRepository, "state", slow)
    ring.forget()
    await status(server, key)
    assert await status(server, key) == 401
