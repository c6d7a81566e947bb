"""Starts the programs that a comparison needs and talks to them: our server, and the baseline of
`baseline.py`.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

READY_TIMEOUT_S = 300.0


class PeerError(Exception):
    """A program that was started did not come up, or died. The message ends with the last lines it
    wrote.
    """


class BaselinePeer:
    """`baseline.py` in its own process. Use as a context manager; `run` blocks until the case is
    measured.
    """

    def __init__(
        self,
        model: Path,
        adapters: Sequence[Path] = (),
        *,
        dtype: str = "auto",
        threads: int | None = None,
    ) -> None:
        command = [sys.executable, "-m", "loraplex.platform.bench.baseline"]
        command += ["--model", str(model), "--dtype", dtype]
        if threads:
            command += ["--threads", str(threads)]
        if adapters:
            command += ["--adapters", *map(str, adapters)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, case: dict[str, Any]) -> dict[str, Any]:
        """Raises: PeerError when the baseline refuses the case or dies."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(case) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it died: _answer says why
        answer = self._answer()
        if "error" in answer:
            raise PeerError(str(answer["error"]))
        return answer

    def wait_ready(self) -> None:
        self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            tail = self._process.stderr.read().strip().splitlines()[-3:]
            raise PeerError("the transformers + peft baseline died: " + " | ".join(tail))
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __enter__(self) -> BaselinePeer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.terminate()
        self._process.communicate()


class ServerPeer:
    """`loraplex serve` in its own process on a free port, its output in `data_dir/server.log`."""

    def __init__(self, model: Path, data_dir: Path, *flags: str) -> None:
        data_dir.mkdir(parents=True, exist_ok=True)
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._log_path = data_dir / "server.log"
        command = [sys.executable, "-m", "loraplex.platform.cli", "serve"]
        command += ["--model", str(model), "--data-dir", str(data_dir), "--port", str(port), *flags]
        with self._log_path.open("wb") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "NO_COLOR": "1"}
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_ready(self, timeout_s: float = READY_TIMEOUT_S) -> None:
        """Raises: PeerError when the server exits or is not ready in time."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise PeerError(
                    f"the server exited with {self._process.returncode}: {self._tail()}"
                )
            try:
                with urllib.request.urlopen(f"{self.url}/readyz", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        raise PeerError(f"the server was not ready after {timeout_s:.0f} s: {self._tail()}")

    def _tail(self) -> str:
        return " | ".join(self._log_path.read_text(errors="replace").strip().splitlines()[-5:])

    def __enter__(self) -> ServerPeer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
