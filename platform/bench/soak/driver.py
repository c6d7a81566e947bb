"""Sends what users and operators send, at random, and checks each answer as it comes.

Every worker takes one thing after the other; workers run at once, so everything meets everything:
an upload the deletion of its own content under another name, an eviction the load for a request.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import aiohttp

from loraplex.platform.bench.soak.ledger import Ledger, Name
from loraplex.platform.bench.soak.plan import Plan
from loraplex.platform.bench.soak.world import BASE, Composition, Tokens, World, plain

TIMEOUT_S = 120.0
MAX_PINNED = 2
PINNABLE_BYTES = 100_000  # of weights; so pins never keep out what others need
LONG_ANSWER = 100  # tokens of a request that is cancelled on its way

# Shares of what a worker does next, in parts of their sum.
OPERATIONS = {
    "generate": 880,
    "cancel": 40,
    "upload": 22,
    "upload_damaged": 3,
    "delete": 16,
    "alias": 20,
    "evict": 10,
    "load": 6,
    "pin": 4,
    "verify": 1,
    "read": 8,
}
GENERATIONS = ("generate", "cancel")
READS = (
    "/v1/adapters?limit=1000",
    "/v1/models",
    "/v1/admin/slots",
    "/v1/admin/adapters",
    "/v1/admin/memory",
    "/v1/admin/requests",
    "/v1/admin/transitions?limit=20",
    "/metrics",
    "/readyz",
)

# What may answer an operation besides success. Anything else is a violation.
GONE = {
    "adapter_not_found",
    "adapter_deleted",
    "adapter_not_ready",
    "alias_not_found",
    "model_not_found",
}
ALLOWED: dict[str, set[str]] = {
    "generate": GONE,
    "cancel": GONE,
    "upload": set(),
    "upload_damaged": {"adapter_refused"},
    "delete": GONE | {"adapter_in_use", "version_has_alias"},
    "alias": GONE | {"rollback_impossible"},
    "evict": GONE | {"adapter_in_use", "adapter_pinned", "alias_is_split"},
    "load": GONE | {"alias_is_split"},
    "pin": GONE | {"alias_is_split"},
    "verify": GONE | {"alias_is_split"},
    "read": set(),
}


class Refused(Exception):
    """An error answer, or an error event in a stream. `code` is stable."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Driver:
    """`run` carries out the plan; the rest is for who is alone with the server."""

    def __init__(self, url: str, ledger: Ledger, plan: Plan) -> None:
        self._url = url
        self._ledger = ledger
        self._world: World = ledger.world
        self._plan = plan
        self._http: aiohttp.ClientSession
        self.num_sent = 0  # generations
        self._operations: dict[str, Callable[[random.Random], Awaitable[None]]] = {
            "generate": self._generate,
            "cancel": self._cancel,
            "upload": self._upload,
            "upload_damaged": self._upload_damaged,
            "delete": self._delete,
            "alias": self._alias,
            "evict": self._evict,
            "load": self._load,
            "pin": self._pin,
            "verify": self._verify,
            "read": self._read,
        }
        assert set(self._operations) == set(OPERATIONS) == set(ALLOWED), "every one has its rules"

    async def __aenter__(self) -> Driver:
        self._http = aiohttp.ClientSession(
            self._url,
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=TIMEOUT_S),
        )
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._http.close()

    async def run(self, on_progress: Callable[[int], None]) -> None:
        """on_progress: told the number of generations sent, about twice a second."""
        plan, told = self._plan, time.monotonic()
        names = list(OPERATIONS)
        weights = [
            share * (1.0 if name in GENERATIONS else plan.operators)
            for name, share in OPERATIONS.items()
        ]

        async def work(number: int) -> None:
            nonlocal told
            draw = random.Random(f"{plan.seed}-{number}")
            while self.num_sent < plan.num_requests:
                operation = draw.choices(names, weights)[0]
                self.num_sent += operation in GENERATIONS
                await self._perform(operation, draw)
                if time.monotonic() - told > 0.5:
                    told = time.monotonic()
                    on_progress(self.num_sent)

        async with asyncio.TaskGroup() as group:
            for number in range(plan.concurrency):
                group.create_task(work(number))

    async def _perform(self, operation: str, draw: random.Random) -> None:
        ledger = self._ledger
        try:
            await self._operations[operation](draw)
        except Refused as error:
            ledger.done[f"{operation}: {error.code}"] += 1
            ledger.expect(error.code in ALLOWED[operation], f"{operation}: {error.code}: {error}")
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            ledger.done[f"{operation}: broken"] += 1
            ledger.wrong(f"{operation}: {type(error).__name__}: {error}")
        else:
            ledger.done[operation] += 1

    # --- generations ----------------------------------------------------------------------------

    async def _generate(self, draw: random.Random) -> None:
        asked, target, composition, name = self._target(draw)
        prompt = self._ledger.some_prompt(draw, composition)
        body = self._body(prompt, draw.randint(1, 8), target)
        try:
            if draw.random() < 0.5:
                adapters, tokens = await self._stream(body)
            else:
                answer = await self._json("POST", "/v1/completions", body)
                adapters, tokens = _adapters(answer), answer["choices"][0]["token_ids"]
        except Refused as error:
            if name is not None and name.is_stable:
                self._ledger.wrong(f"{asked}, which stays: {error.code}: {error}")
            raise
        self._ledger.expect(
            len(tokens) == body["max_tokens"], f"{asked}: {len(tokens)} tokens, not all asked for"
        )
        self._ledger.check_answer(asked, adapters, prompt, tokens)

    async def _cancel(self, draw: random.Random) -> None:
        """Hang up: after a few events, or before anything came."""
        asked, target, composition, _ = self._target(draw)
        prompt = self._ledger.some_prompt(draw, composition)
        body = self._body(prompt, LONG_ANSWER, target)
        if draw.random() < 0.5:
            adapters, tokens = await self._stream(body, hang_up_after=draw.randint(1, 6))
            if composition is not None:
                for adapter, (_, weight) in zip(adapters, composition.members, strict=True):
                    adapter["weight"] = weight
            self._ledger.check_answer(asked, adapters, prompt, tokens)
            return
        call = asyncio.create_task(self._json("POST", "/v1/completions", body))
        await asyncio.wait((call,), timeout=draw.random() * 0.05)
        call.cancel()
        await asyncio.wait((call,))
        if not call.cancelled() and (error := call.exception()) is not None:
            raise error

    def _target(
        self, draw: random.Random
    ) -> tuple[str, dict[str, Any], Composition | None, Name | None]:
        """What to ask for: in words, as fields of the body, who will answer if that is sure, and
        the name it depends on, if it is one.
        """
        ledger, kind = self._ledger, draw.random()
        name = ledger.some_name(draw)
        if kind < 0.05 or name is None:
            return "the base model", {}, BASE, None
        if kind < 0.15:
            version = draw.choice(list(name.versions))
            who = plain(name.versions[version])
            return f"{name.id}@{version}", {"adapter_id": f"{name.id}@{version}"}, who, name
        if kind < 0.2:
            content = draw.choice(list(name.versions.values()))
            digest = ledger.digest(content)
            return f"content {content}", {"adapter_id": digest}, plain(content), name
        if kind < 0.25:
            composition = draw.choice(self._world.compositions)
            digests = [(ledger.digest(content), weight) for content, weight in composition.members]
            if all(digest for digest, _ in digests):
                members = [{"id": digest, "weight": weight} for digest, weight in digests]
                return f"{composition}", {"adapters": members}, composition, None
        if kind < 0.35:
            return f"{name.id}:prod", {"model": f"{name.id}:prod"}, None, None
        return name.id, {"model": name.id}, None, name

    def _body(self, prompt: int, max_tokens: int, target: dict[str, Any]) -> dict[str, Any]:
        return {
            "prompt": self._world.prompts[prompt],
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
            **target,
        }

    async def _stream(
        self, body: dict[str, Any], hang_up_after: int | None = None
    ) -> tuple[list[dict[str, Any]], Tokens]:
        """Adapters and tokens. hang_up_after: events; then the connection is closed."""
        tokens: Tokens = []
        last: dict[str, Any] = {}
        data = json.dumps({**body, "stream": True})
        async with self._http.post("/v1/completions", data=data, headers=_JSON) as response:
            await _raise_refusal(response)
            events = 0
            async for line in response.content:
                if not line.startswith(b"data: {"):
                    continue
                last = json.loads(line[6:])
                if "error" in last:
                    raise Refused(last["error"]["code"], last["error"]["message"])
                tokens += last["choices"][0].get("token_ids") or []
                events += 1
                if events == hang_up_after:
                    response.close()
                    return _headed(response), tokens
        return _adapters(last), tokens

    # --- operators ------------------------------------------------------------------------------

    async def upload(self, name: Name, content: int, *, packed: bool, alias: str | None) -> None:
        """Raises: Refused."""
        files = self._world.contents[content]
        form = aiohttp.FormData({"name": name.id} | ({"alias": alias} if alias else {}))
        if packed:
            form.add_field("archive", files.archive, filename="adapter.tar.gz")
        else:
            form.add_field("config", files.config, filename="adapter_config.json")
            form.add_field("weights", files.weights, filename="adapter_model.safetensors")
        async with self._http.post("/v1/adapters", data=form) as response:
            await _raise_refusal(response)
            self._ledger.registered(name, content, await response.json())

    async def _upload(self, draw: random.Random) -> None:
        name = draw.choice(self._ledger.names)
        content = draw.randrange(len(self._world.contents))
        alias = "prod" if draw.random() < 0.3 else None
        await self.upload(name, content, packed=draw.random() < 0.5, alias=alias)

    async def _upload_damaged(self, draw: random.Random) -> None:
        """Cut off, or with one byte of the header changed: never acknowledged as something else."""
        files = draw.choice(self._world.contents)
        weights = bytearray(files.weights)
        if draw.random() < 0.5:
            del weights[draw.randrange(len(weights)) :]
        else:
            weights[8 + draw.randrange(200)] = 0xFF  # no JSON has such a byte
        form = aiohttp.FormData({"name": "damaged"})
        form.add_field("config", files.config, filename="adapter_config.json")
        form.add_field("weights", bytes(weights), filename="adapter_model.safetensors")
        async with self._http.post("/v1/adapters", data=form) as response:
            await _raise_refusal(response)
            self._ledger.wrong("a damaged upload was taken")

    async def _delete(self, draw: random.Random) -> None:
        name = self._ledger.some_name(draw, volatile=True)
        if name is None:
            return
        force = draw.random() < 0.5
        query: dict[str, str] = {"force": "true"} if force else {"drain_timeout_s": "2"}
        leaving = list(name.versions)
        if draw.random() < 0.4:
            leaving = [draw.choice(leaving)]
            query["version"] = str(leaving[0])
        answer = await self._json("DELETE", f"/v1/adapters/{name.id}", query=query)
        for version in answer["versions"]:
            name.versions.pop(version, None)

    async def _alias(self, draw: random.Random) -> None:
        name = self._ledger.some_name(draw)
        if name is None:
            return
        path, kind = f"/v1/adapters/{name.id}/aliases/prod", draw.random()
        if kind < 0.15:
            await self._json("POST", f"{path}/rollback")
            return
        if kind < 0.2:
            await self._json("DELETE", path)
            return
        chosen = draw.sample(list(name.versions), min(len(name.versions), draw.randint(1, 3)))
        split = [{"version": v, "weight": draw.randint(1, 9)} for v in chosen]
        await self._json("PUT", path, {"split": split})

    async def _evict(self, draw: random.Random) -> None:
        name = self._ledger.some_name(draw)
        if name is None:
            return
        order = {"tier": draw.choice(["device", "host"]), "drain": draw.random() < 0.5}
        order["timeout_s"] = 5.0
        await self._json("POST", f"/v1/admin/adapters/{name.id}/evict", order)

    async def _load(self, draw: random.Random) -> None:
        name = self._ledger.some_name(draw)
        if name is not None:
            order = {"wait": draw.random() < 0.5}
            await self._json("POST", f"/v1/admin/adapters/{name.id}/load", order)

    async def _pin(self, draw: random.Random) -> None:
        """Pin one, or let the oldest go again. Only small ones, and few, so that all others fit."""
        pinned = self._ledger.pinned
        if len(pinned) >= MAX_PINNED:
            await self.unpin(pinned.pop())
            return
        name = self._ledger.some_name(draw)
        if name is None:
            return
        version = draw.choice(list(name.versions))
        if len(self._world.contents[name.versions[version]].weights) > PINNABLE_BYTES:
            return
        digest = self._ledger.digest(name.versions[version])
        if digest is None:
            return
        pinned.add(digest)  # under its content: other names may keep that
        try:
            await self._json("POST", f"/v1/admin/adapters/{digest}/pin")
        except Refused:
            pinned.discard(digest)
            raise

    async def unpin(self, digest: str) -> None:
        """A content that is gone is not pinned either."""
        with suppress(Refused):
            await self._json("POST", f"/v1/admin/adapters/{digest}/unpin")

    async def _verify(self, draw: random.Random) -> None:
        name = self._ledger.some_name(draw)
        if name is None:
            return
        version = draw.choice(list(name.versions))
        found = await self._json("POST", f"/v1/adapters/{name.id}@{version}/verify")
        self._ledger.expect(found["ok"], f"{name.id}@{version} is not sound: {found}")

    async def _read(self, draw: random.Random) -> None:
        path = draw.choice(READS)
        async with self._http.get(path) as response:
            await _raise_refusal(response)
            await response.read()

    # --- HTTP -----------------------------------------------------------------------------------

    async def get(self, path: str) -> dict[str, Any]:
        """Raises: Refused."""
        return await self._json("GET", path)

    async def post(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Raises: Refused."""
        return await self._json("POST", path, body)

    async def delete(self, path: str) -> dict[str, Any]:
        """Raises: Refused."""
        return await self._json("DELETE", path)

    async def _json(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        query: dict[str, str] | None = None,
    ) -> dict[str, Any]:
        data = None if body is None else json.dumps(body)
        async with self._http.request(
            method, path, data=data, params=query, headers=_JSON
        ) as response:
            await _raise_refusal(response)
            answer: dict[str, Any] = json.loads(await response.read())
            return answer


_JSON = {"content-type": "application/json"}


async def _raise_refusal(response: aiohttp.ClientResponse) -> None:
    if response.status < 400:
        return
    text = await response.text()
    try:
        error = json.loads(text)["error"]
        code, message = str(error["code"]), str(error["message"])
    except (ValueError, KeyError, TypeError):
        code, message = f"HTTP {response.status} without a body of ours", text[:200]
    raise Refused(code, message)


def _adapters(answer: dict[str, Any]) -> list[dict[str, Any]]:
    if "adapters" in answer:
        return list(answer["adapters"])
    return [answer["adapter"]] if answer.get("adapter") else []


def _headed(response: aiohttp.ClientResponse) -> list[dict[str, Any]]:
    """The adapters of an answer by its headers, which come before its end does; without weights."""
    references = response.headers.get("x-adapter-version", "")
    digests = response.headers.get("x-adapter-digest", "")
    if not references:
        return []
    return [
        {
            "id": reference.partition("@")[0],
            "version": reference.partition("@")[2],
            "digest": digest,
        }
        for reference, digest in zip(references.split(","), digests.split(","), strict=True)
    ]
