"""One soak from start to verdict."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loraplex.platform.bench.loadgen import drive
from loraplex.platform.bench.peer import ServerPeer
from loraplex.platform.bench.soak import aftermath
from loraplex.platform.bench.soak.driver import Driver, Refused
from loraplex.platform.bench.soak.ledger import Ledger
from loraplex.platform.bench.soak.plan import Plan
from loraplex.platform.bench.soak.processes import MIB, Watched, grown, watch
from loraplex.platform.bench.soak.world import World, make_world

# A page of rank 16 on all modules in float32. So many fit, of some 1.3 for each content.
PAGE_BYTES = 131_072
PAGES_PER_CONTENT, HOST_PAGES_PER_CONTENT = 0.5, 0.4
KV_CACHE_BYTES = 1 * MIB  # 128 blocks of 16 tokens: many at once have to preempt each other
NUM_STABLE = 8
SAMPLES = 200  # of memory and handles, over the run
# Growth is judged over the last half of runs so long: before, the engine still warms up (oneDNN
# keeps a primitive for each of the first thousand shapes that it meets).
WARM_REQUESTS = 20_000
# malloc does not give everything back at once; a leak of 1 KiB a request shows.
GROWTH_LIMIT_BYTES = 8 * MIB
GROWTH_LIMIT_PER_REQUEST = 256.0
# The registry's pool of connections opens three files each; nothing else may stay open.
HANDLES_LIMIT = 48

Say = Callable[[str], None]


def soak(plan: Plan, folder: Path, say: Say, world: World | None = None) -> dict[str, Any]:
    """Returns the figures; `violations` says what was wrong, and is empty if nothing was.

    folder: empty; takes model, adapters and the server's data. world: one that is made already.
    Raises: PeerError when the server or the reference does not come up.
    """
    if world is None:
        say(f"making {plan.num_contents} adapters with peft, and what they say")
        world = make_world(folder, plan.num_contents, plan.num_compositions, plan.seed)
    data = folder / "data"
    with ServerPeer(world.model, data, *memory_flags(world), *plan.server_flags) as server:
        server.wait_ready()
        return drive(_run(plan, world, server, data, say))


def memory_flags(world: World) -> list[str]:
    """Room for half of the contents on the device, for fewer on the host, and for few tokens. In
    float32, greedy tokens do not depend on what shares a step.
    """
    contents = len(world.contents)
    device = int(PAGE_BYTES * max(6, contents * PAGES_PER_CONTENT))
    host = int(PAGE_BYTES * max(3, contents * HOST_PAGES_PER_CONTENT))
    return [
        "--dtype", "float32", "--adapter-memory", str(device), "--host-adapter-memory", str(host),
        "--kv-cache-memory", str(KV_CACHE_BYTES),
    ]  # fmt: skip


async def _run(
    plan: Plan, world: World, server: ServerPeer, data: Path, say: Say
) -> dict[str, Any]:
    ledger = Ledger(world, NUM_STABLE, plan.num_volatile)
    watched = watch(server.pid)
    for process in watched:
        process.sample(0)
    async with Driver(server.url, ledger, plan) as driver:
        await _register_stable(driver, ledger, plan.seed)
        begun = time.monotonic()
        await driver.run(_sampler(watched, plan.num_requests, say))
        seconds = time.monotonic() - begun
    say("waiting for quiet, then deleting everything")
    versions = fitted = 0
    async with Driver(server.url, ledger, plan) as driver:
        try:
            for digest in list(ledger.pinned):
                await driver.unpin(digest)
            await aftermath.quiet(driver, ledger)
            versions = await aftermath.registry_agrees(driver, ledger, data)
            ledger.settle_claims()
            await aftermath.delete_all(driver)
            fitted = await aftermath.all_fit(driver, ledger)
            await aftermath.nothing_left(driver, ledger, data)
        except Refused as error:
            ledger.wrong(f"afterwards, alone on the server: {error.code}: {error}")
    await asyncio.sleep(1.0)  # the server sees that the connections are closed
    for process in watched:
        process.sample(plan.num_requests)
    limit = GROWTH_LIMIT_BYTES + GROWTH_LIMIT_PER_REQUEST * plan.num_requests / 2
    if plan.num_requests >= WARM_REQUESTS:
        for what in grown(watched, limit):
            ledger.wrong(what)
    for process in watched:
        ledger.expect(not process.died, f"the {process.name} process died")
        before, after = process.samples[0].handles, process.samples[-1].handles
        ledger.expect(
            after <= before + HANDLES_LIMIT,
            f"the {process.name} process had {before} open files before, and has {after} now",
        )
    return {
        "num_requests": plan.num_requests,
        "seed": plan.seed,
        "concurrency": plan.concurrency,
        "contents": len(world.contents),
        "seconds": round(seconds, 2),
        "requests_s": round(plan.num_requests / seconds, 1),
        "tokens_checked": ledger.tokens_checked,
        "versions_at_the_end": versions,
        "adapters_that_filled_the_memory": fitted,
        "outcomes": dict(sorted(ledger.done.items())),
        "growth_limit_mib": round(limit / MIB, 1),
        **{process.name: process.as_dict() for process in watched},
        "num_violations": ledger.num_violations,
        "violations": ledger.violations,
    }


async def _register_stable(driver: Driver, ledger: Ledger, seed: int) -> None:
    draw = random.Random(f"stable-{seed}")
    for name in ledger.names:
        if name.is_stable:
            content = draw.randrange(len(ledger.world.contents))
            await driver.upload(name, content, packed=False, alias=None)


def _sampler(watched: list[Watched], num_requests: int, say: Say) -> Callable[[int], None]:
    """Samples the processes every so many requests, and tells of progress every ten samples."""
    every, count = max(1, num_requests // SAMPLES), 0

    def on_progress(sent: int) -> None:
        nonlocal count
        if sent < count * every:
            return
        count = sent // every + 1
        for process in watched:
            process.sample(sent)
        if count % 10 == 1:
            now = ", ".join(
                f"{p.name} {p.samples[-1].rss / MIB:.0f} MiB {p.samples[-1].handles} handles"
                for p in watched
            )
            say(f"{sent:,} of {num_requests:,} requests; {now}")

    return on_progress
