"""`loraplex serve`: check, bind, start, show where the bytes go, serve until told to stop."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import logging
import math
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
import uvicorn
from fastapi import FastAPI
from rich.table import Table
from typer.main import get_command

from loraplex.engine.api import MemoryInfo
from loraplex.engine.client import EngineClient
from loraplex.platform.app import create_app
from loraplex.platform.cli import output
from loraplex.platform.cli.http_protocol import KEEP_ALIVE_S, BoundedProtocol
from loraplex.platform.cli.loading import LoadingBar
from loraplex.platform.cli.output import CliError, UsageError
from loraplex.platform.cli.registry import registry_has_keys
from loraplex.platform.cli.settings_flags import build_settings, with_settings_flags
from loraplex.platform.runtime import Runtime
from loraplex.platform.settings import Settings
from loraplex.platform.telemetry import setup_logging

log = logging.getLogger(__name__)

POLL_S = 0.05
DEAD_PEER_MS = 120_000  # of unacknowledged data, also to a peer whose window stays closed
LAST_WORDS_S = 3.0  # for streams to say that the server stops, behind the grace they get

AfterReady = Callable[[str], bool]


def command() -> Any:
    """The `serve` command with all its flags."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(with_settings_flags(serve))
    return get_command(app)


def serve(
    given: dict[str, Any],
    *,
    allow_unauthenticated: Annotated[
        bool,
        typer.Option(
            "--allow-unauthenticated",
            help="Listen beyond this machine although no key guards it.",
        ),
    ] = False,
) -> None:
    """Serve a base model and its adapters over HTTP.

    Every flag is also an environment variable: --max-num-seqs is LORAPLEX_MAX_NUM_SEQS. The flag
    wins.
    """
    settings = build_settings(given)
    if not (
        settings.api_key
        or allow_unauthenticated
        or is_loopback(settings.host)
        or registry_has_keys(settings.effective_database_url, settings.data_dir)
    ):
        raise UsageError(
            f"--host {settings.host} is reachable from other machines and nothing guards it: make "
            "a key with `loraplex key create`, set --api-key, or say --allow-unauthenticated"
        )
    run(settings)


def run(settings: Settings, after_ready: AfterReady | None = None) -> None:
    """Serve until SIGTERM or SIGINT. `after_ready(url)` runs in a thread once requests can be
    answered; the server stops when it returns False.

    Raises: CliError when the port is taken or the model cannot be served.
    """
    with bind(settings.host, settings.port) as listener:
        make_data_dir(settings.data_dir)
        setup_logging(settings.log_level, settings.log_format)
        # Its start and stop lines would break into ours.
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(_Serving(settings, listener, after_ready).run())


class _Server(uvicorn.Server):
    """Ends streams that outlast the grace with an event that says so, before they are cut."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        stopper = asyncio.create_task(self._end_streams())
        try:
            await super().shutdown(sockets)
        finally:
            stopper.cancel()

    async def _end_streams(self) -> None:
        app = self.config.app
        assert isinstance(app, FastAPI), "we serve our own application"
        runtime: Runtime | None = getattr(app.state, "runtime", None)
        if runtime is not None:
            await asyncio.sleep(runtime.settings.shutdown_timeout_s)
            runtime.lifetimes.stop()


class _Serving:
    def __init__(
        self, settings: Settings, listener: socket.socket, after_ready: AfterReady | None
    ) -> None:
        self.settings = settings
        self.listener = listener
        self.after_ready = after_ready
        self.url = url_of(settings.host, listener.getsockname()[1])
        self.failure: Exception | None = None
        self.quiet = settings.log_format == "json"
        self.loading = LoadingBar()
        engine = EngineClient(settings.engine_config(), on_progress=self.loading.update)
        self.app: FastAPI = create_app(settings, engine, on_engine_failed=self._engine_failed)
        self.server = _Server(
            uvicorn.Config(
                self.app,
                http=BoundedProtocol,
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=math.ceil(settings.shutdown_timeout_s + LAST_WORDS_S),
            )
        )

    async def run(self) -> None:
        # uvicorn raises its signals again when it is done: the exit status would be theirs.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)
        guide = asyncio.create_task(self._guide())
        try:
            await self.server.serve(sockets=[self.listener])
        except SystemExit:  # uvicorn's way of saying that the lifespan failed
            raise CliError("the server could not start; the log above says why") from None
        finally:
            guide.cancel()
            await asyncio.gather(guide, return_exceptions=True)
        if self.failure is not None:
            raise CliError(str(self.failure)) from self.failure

    def _engine_failed(self, error: Exception) -> None:
        self.failure = error
        self.server.should_exit = True

    async def _guide(self) -> None:
        """Wait for the engine, tell the user, then hand over to `after_ready`."""
        with self.loading:
            while not self._ready():
                await asyncio.sleep(POLL_S)
        await self._announce(self.app.state.runtime)
        if self.after_ready is not None:
            try:
                keep_serving = await asyncio.to_thread(self.after_ready, self.url)
            except Exception as error:
                self._engine_failed(error)
            else:
                self.server.should_exit |= not keep_serving

    def _ready(self) -> bool:
        runtime: Runtime | None = getattr(self.app.state, "runtime", None)
        return self.server.started and runtime is not None and runtime.ready

    async def _announce(self, runtime: Runtime) -> None:
        memory = await runtime.engine.memory()
        if self.quiet:
            log.info("serving", extra={"url": self.url})
            return
        console = output.stderr()
        console.print(memory_table(memory))
        console.print(
            f"[bold green]serving[/] {runtime.base_name} at [bold]{self.url}[/]  "
            f"API docs {self.url}/docs  (Ctrl-C stops)",
            soft_wrap=True,
        )


def memory_table(memory: MemoryInfo) -> Table:
    """Where the bytes go, each with what they are good for."""
    rows = output.table("memory", ">size", "for")
    tokens = memory.kv_blocks_total * memory.block_size
    pages = memory.adapter_bytes_total // max(1, memory.adapter_page_bytes)
    rows.add_row("weights", output.size(memory.weights_bytes), "the base model")
    rows.add_row("KV cache", output.size(memory.kv_cache_bytes), f"{tokens:,} tokens")
    rows.add_row(
        "adapters", output.size(memory.adapter_bytes_total), f"{pages:,} of rank 16 at once"
    )
    rows.add_row(
        "adapters, host",
        output.size(memory.host_adapter_bytes_total),
        "adapters that left the device",
    )
    rows.add_row("workspace", output.size(memory.workspace_bytes), "one step")
    rows.add_row(
        "free",
        output.size(memory.device_bytes_free),
        f"of {output.size(memory.device_bytes_total)}",
    )
    return rows


def bind(host: str, port: int) -> socket.socket:
    """Listen before the model is loaded: a taken port should be known at once.

    Raises: CliError naming address and way out.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # of the connections too: who is gone is given up
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, DEAD_PEER_MS)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            why = f"port {port} on {host} is in use; choose another with --port"
        elif error.errno == errno.EACCES:
            why = f"port {port} needs more rights; choose one above 1023 with --port"
        else:
            why = f"cannot listen on --host {host} --port {port}: {error.strerror or error}"
        raise CliError(why) from error
    return listener


def make_data_dir(path: Path) -> None:
    """Raises: CliError naming the folder and the way out."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = error.strerror or str(error)
        raise CliError(f"cannot use {path}: {why}; choose another with --data-dir") from error


def url_of(host: str, port: int) -> str:
    """An address that works from this machine."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:  # not on Windows
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory
