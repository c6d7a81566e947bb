"""The engine process as the API process holds it: started, watched, killed. Knows nothing of
messages.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from loraplex.engine.wire import LaunchOrder, encode_order

_TAIL_LINES = 20

# The engine's compute threads share the cores with the API process. GNU OpenMP spins for
# milliseconds at every barrier before it sleeps: far too long when another process has the core it
# waits for, and too short a spin pays a wake-up for every operation. Tokens/s over HTTP, "small" of
# `loraplex bench table` at concurrency 8 / 32, two quiet Zen 4 cores, November 2026:
# 1000: 756 / 1315, 5000 (some 150 us): 916 / 1536, 20000: 905 / 1530, GNU's own: 889 / 1542.
# On cores that others keep busy, GNU's own fell to a tenth of what short spins gave.
_ENVIRONMENT = {"GOMP_SPINCOUNT": "5000"}


@dataclass(frozen=True, slots=True)
class Death:
    how: str  # "exit code 1", "signal 9 (SIGKILL)"
    last_lines: str  # of its output

    def __str__(self) -> str:
        return f"{self.how}; its last lines:\n{self.last_lines}" if self.last_lines else self.how


class ChildProcess:
    """A running `python -m loraplex.engine.process`. Its output comes line by line; the last are
    kept.
    """

    def __init__(self, process: asyncio.subprocess.Process, on_line: Callable[[str], None]) -> None:
        self._process = process
        self._on_line = on_line
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self._reader = asyncio.create_task(self._read(), name="loraplex-engine-output")

    @classmethod
    async def start(cls, order: LaunchOrder, on_line: Callable[[str], None]) -> ChildProcess:
        # -P: the current directory must not become importable, whatever lies in it.
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",
            "-m",
            "loraplex.engine.process",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={**_ENVIRONMENT, **os.environ},
        )
        assert process.stdin is not None
        process.stdin.write(encode_order(order))
        return cls(process, on_line)

    @property
    def pid(self) -> int:
        return self._process.pid

    async def wait(self) -> Death:
        """Until it is gone and its output read."""
        code = await self._process.wait()
        # A grandchild may hold the pipe open for ever.
        await asyncio.wait((self._reader,), timeout=1.0)
        self._reader.cancel()
        assert self._process.stdin is not None
        self._process.stdin.close()
        how = f"exit code {code}" if code >= 0 else f"signal {-code} ({_signal_name(-code)})"
        return Death(how, "\n".join(self._tail))

    async def kill(self) -> None:
        """End it now, if it still runs."""
        if self._process.returncode is None:
            self._process.kill()
            await self.wait()

    async def _read(self) -> None:
        assert self._process.stdout is not None
        while True:
            try:
                line = await self._process.stdout.readline()
            except ValueError:  # a line beyond the reader's limit: dropped
                continue
            if not line:
                return
            text = line.decode("utf-8", "replace").rstrip()
            self._tail.append(text)
            self._on_line(text)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "unknown"
