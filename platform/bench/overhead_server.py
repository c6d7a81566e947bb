"""The two servers that `overhead.py` compares, each alone in a process of its own.

    python -m loraplex.platform.bench.overhead_server ours|plain INTERVAL_S DIRECTORY

`ours` is the whole API process in front of an engine that computes nothing; `plain` is what the
framework alone can do: one Starlette route that streams the same events, made beforehand, by a
timer. The port stands in the first line of the output.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from loraplex.platform.bench.instant_engine import TEXT


def our_app(interval_s: float, directory: Path) -> Any:
    from loraplex.engine.client import EngineClient
    from loraplex.platform.app import create_app
    from loraplex.platform.settings import Settings

    fields: dict[str, Any] = {"model": f"instant:{interval_s}", "data_dir": directory}
    settings = Settings(**fields)
    factory = "loraplex.platform.bench.instant_engine:build"
    return create_app(settings, EngineClient(settings.engine_config(), factory=factory))


def plain_app(interval_s: float) -> Starlette:
    def event(text: str, reason: str | None) -> bytes:
        choice = {
            "index": 0,
            "text": text,
            "logprobs": None,
            "finish_reason": reason,
            "stop_reason": None,
        }
        head = {"id": "cmpl-" + 32 * "0", "object": "text_completion", "created": 1790000000}
        body = {**head, "model": f"instant:{interval_s}", "choices": [choice]}
        return b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"

    middle = [event(chr(byte), None) for byte in TEXT]
    last = event("x", "length") + b"data: [DONE]\n\n"

    async def completions(request: Request) -> Response:
        count = (await request.json())["max_tokens"]

        async def events() -> AsyncIterator[bytes]:
            due = asyncio.get_running_loop().time()
            for i in range(count - 1):
                yield middle[i % len(middle)]
                due += interval_s
                await asyncio.sleep(due - asyncio.get_running_loop().time())
            yield last

        return StreamingResponse(events(), media_type="text/event-stream")

    async def ready(request: Request) -> Response:
        return JSONResponse({})

    routes = [Route("/v1/completions", completions, methods=["POST"]), Route("/readyz", ready)]
    return Starlette(routes=routes)


def main() -> None:
    which, interval_s, directory = sys.argv[1], float(sys.argv[2]), Path(sys.argv[3])
    app = our_app(interval_s, directory) if which == "ours" else plain_app(interval_s)
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    # As `loraplex serve` runs it.
    config = uvicorn.Config(
        app, http="httptools", lifespan="on", log_config=None, access_log=False,
        timeout_graceful_shutdown=1,
    )  # fmt: skip
    uvicorn.Server(config).run([listener])


if __name__ == "__main__":
    main()
