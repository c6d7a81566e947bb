"""A real `loraplex serve` process for tests: started, watched, stopped, killed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

import httpx
import psutil

START_DEADLINE_S = 120.0


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


class Server:
    """`loraplex serve` on a free loopback port. Use as a context manager, or start / kill /
    start for crash tests.
    """

    def __init__(
        self, model: Path, data_dir: Path, *flags: str, env: dict[str, str] | None = None
    ) -> None:
        self.model = model
        self.data_dir = data_dir
        self.flags = flags
        self.env = env or {}
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log_path = data_dir.parent / f"server-{self.port}.log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *, wait: bool = True) -> Server:
        command = [sys.executable, "-c", "from loraplex.platform.cli import main; main()", "serve"]
        command += [
            "--model",
            str(self.model),
            "--port",
            str(self.port),
            "--data-dir",
            str(self.data_dir),
            *self.flags,
        ]
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **self.env}
            )
        if wait:
            self.wait_ready()
        return self

    def wait_ready(self) -> None:
        assert self.process is not None
        deadline = time.monotonic() + START_DEADLINE_S
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            try:
                if httpx.get(f"{self.url}/readyz", timeout=2).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.05)
        raise AssertionError(f"the server did not become ready; its log:\n{self.log()}")

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")[-6000:]

    def family(self) -> list[psutil.Process]:
        """The API process and all processes it started."""
        assert self.process is not None
        try:
            parent = psutil.Process(self.process.pid)
            return [parent, *parent.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def kill(self) -> None:
        """SIGKILL the API process, as an out-of-memory killer would. Its engine has to notice by
        itself.
        """
        assert self.process is not None
        family = self.family()
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(10)
        _, alive = psutil.wait_procs(family, timeout=10)
        assert not alive, f"orphans of the killed server: {alive}"

    def stop(self) -> int:
        """SIGTERM and wait; returns the exit status."""
        assert self.process is not None
        family = self.family()
        self.process.send_signal(signal.SIGTERM)
        try:
            status = self.process.wait(30)
        finally:
            _, alive = psutil.wait_procs(family, timeout=10)
            for process in alive:
                process.kill()
        assert not alive, f"orphans after SIGTERM: {alive}"
        return status

    def __enter__(self) -> Server:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.process is not None and self.process.poll() is None:
            self.stop()
