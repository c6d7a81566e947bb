"""Threads that run jobs in turn, with stacks as large as the jobs need. Knows nothing of them."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Protocol


class JobQueue(Protocol):
    def submit(self, job: Callable[[], None]) -> None: ...
    def close(self) -> None: ...


class Workers:
    """Threads with large stacks that run jobs in turn; started with the first job."""

    def __init__(self, name: str, num_threads: int, stack_bytes: int) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._name = name
        self._num_threads = num_threads
        self._stack_bytes = stack_bytes
        self._threads: list[threading.Thread] = []

    def submit(self, job: Callable[[], None]) -> None:
        if not self._threads:
            self._start()
        self._jobs.put(job)

    def close(self) -> None:
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join(timeout=5)

    def _start(self) -> None:
        usual = threading.stack_size(self._stack_bytes)
        try:
            for i in range(self._num_threads):
                thread = threading.Thread(target=self._run, name=f"{self._name}-{i}", daemon=True)
                thread.start()
                self._threads.append(thread)
        finally:
            threading.stack_size(usual)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
