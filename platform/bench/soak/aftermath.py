"""When all is quiet: is everything given back, and does the registry agree with the disk?"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

from loraplex.platform.bench.soak.driver import Driver
from loraplex.platform.bench.soak.ledger import Ledger, Name

QUIET_DEADLINE_S = 30.0
DATA_FILES = ("registry.sqlite", "server.log")


async def quiet(driver: Driver, ledger: Ledger) -> None:
    """Nobody runs or waits any more, nothing is used, no block is held."""
    deadline = time.monotonic() + QUIET_DEADLINE_S
    while True:
        requests = (await driver.get("/v1/admin/requests"))["data"]
        used = [
            slot
            for slot in (await driver.get("/v1/admin/slots"))["data"]
            if slot["running"] or slot["waiting"] or slot["state"] != "device"
        ]
        blocks = (await driver.get("/v1/admin/memory"))["kv_blocks_used"]
        if not (requests or used or blocks):
            return
        if time.monotonic() > deadline:
            ledger.expect(not requests, f"{len(requests)} requests never ended: {requests[:3]}")
            ledger.expect(not used, f"adapters still in use: {used[:3]}")
            ledger.expect(not blocks, f"{blocks} KV blocks are held by nobody")
            return
        await asyncio.sleep(0.1)


async def registry_agrees(driver: Driver, ledger: Ledger, data: Path) -> int:
    """Every version has its files, every file a version. Returns the number of versions."""
    listed = (await driver.get("/v1/adapters?limit=1000"))["data"]
    digests: set[str] = set()
    num_versions = 0
    for item in listed:
        detail = await driver.get(f"/v1/adapters/{item['id']}")
        num_versions += len(detail["versions"])
        for version in detail["versions"]:
            digests.add(version["digest"].removeprefix("sha256:"))
            ledger.expect(
                version["status"] == "ready",
                f"{item['id']}@{version['version']} is {version['status']}",
            )
    for name in ledger.names:
        if name.is_stable:
            ledger.expect(
                name.id in {item["id"] for item in listed}, f"{name.id} is gone from the registry"
            )
    stored = {path.parent.name for path in data.rglob("adapter_model.safetensors")}
    ledger.expect(not digests - stored, f"versions without files: {sorted(digests - stored)[:3]}")
    ledger.expect(not stored - digests, f"files without versions: {sorted(stored - digests)[:3]}")
    return num_versions


async def all_fit(driver: Driver, ledger: Ledger) -> int:
    """The whole memory for adapters can still be used: as many as fit by the books are loaded at
    once. A page that the books gave back and the pool did not would be missing now.

    Contents must all be deleted. Returns the number of adapters loaded.
    """
    total = (await driver.get("/v1/admin/memory"))["adapter_bytes_total"]
    used, names = 0, []
    for content in range(len(ledger.world.contents)):
        name = Name(f"fill-{content:03d}", True)
        await driver.upload(name, content, packed=False, alias=None)
        size = await _device_bytes(driver, name.id)
        if used + size > total:
            await driver.delete(f"/v1/adapters/{name.id}?force=true")
            continue
        used += size
        names.append(name.id)
    for name_id in names:
        await driver.post(f"/v1/admin/adapters/{name_id}/load", {"wait": True})
    slots = {slot["id"] for slot in (await driver.get("/v1/admin/slots"))["data"]}
    missing = [name_id for name_id in names if name_id not in slots]
    ledger.expect(not missing, f"{missing} should fit beside the others, and do not")
    for name_id in names:
        await driver.delete(f"/v1/adapters/{name_id}?force=true")
    return len(names)


async def _device_bytes(driver: Driver, name: str) -> int:
    """Known once it has been loaded."""
    slot = await driver.post(f"/v1/admin/adapters/{name}/load", {"wait": True})
    size = int(slot["device_bytes"])
    await driver.post(f"/v1/admin/adapters/{name}/evict", {"tier": "host"})
    return size


async def delete_all(driver: Driver) -> None:
    for item in (await driver.get("/v1/adapters?limit=1000"))["data"]:
        await driver.delete(f"/v1/adapters/{item['id']}?force=true")


async def nothing_left(driver: Driver, ledger: Ledger, data: Path) -> None:
    """All adapters are deleted: no byte of them is anywhere."""
    memory = await _settled(driver, ("adapter_bytes_used", "host_adapter_bytes_used"))
    for key in ("adapter_bytes_used", "host_adapter_bytes_used", "kv_blocks_used"):
        ledger.expect(memory[key] == 0, f"{key} is {memory[key]} with every adapter deleted")
    slots = (await driver.get("/v1/admin/slots"))["data"]
    ledger.expect(not slots, f"slots of deleted adapters: {slots[:3]}")
    tiers = (await driver.get("/v1/admin/adapters"))["data"]
    ledger.expect(not tiers, f"versions of deleted adapters: {tiers[:3]}")
    left = [
        str(path.relative_to(data))
        for path in data.rglob("*")
        if path.is_file() and path.name != ".lock" and not path.name.startswith(DATA_FILES)
    ]
    ledger.expect(not left, f"files left behind: {left[:5]}")


async def _settled(driver: Driver, keys: tuple[str, ...]) -> dict[str, Any]:
    """The memory's books, once these are zero or it is clear that they stay."""
    deadline = time.monotonic() + QUIET_DEADLINE_S
    while True:
        memory = await driver.get("/v1/admin/memory")
        if not any(memory[key] for key in keys) or time.monotonic() > deadline:
            return memory
        await asyncio.sleep(0.2)
