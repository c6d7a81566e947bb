"""A second stream beside the current one, for small work that can hide behind a large kernel.

Fork and join are two events, which a CUDA graph captures as parallel branches. Knows nothing of
what is run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class SideStream:
    """Nothing happens on devices without streams.

    Fork before the large kernel is enqueued: it fills every multiprocessor, so what comes later,
    on whatever stream, waits for it. The stream has high priority for the same reason.
    """

    def __init__(self) -> None:
        self._side: tuple[torch.cuda.Stream, torch.cuda.Event, torch.cuda.Event] | None = None
        self._pending = False

    @contextmanager
    def fork(self, device: torch.device) -> Iterator[None]:
        """What is enqueued within runs after what the current stream holds, beside what it gets
        next. Memory allocated within may be used on the current stream between `join` and the next
        fork, and freed any time.
        """
        if device.type != "cuda":
            yield
            return
        self.join()  # of a step that failed between the two
        if self._side is None:
            stream = torch.cuda.Stream(device, priority=-1)
            self._side = stream, torch.cuda.Event(), torch.cuda.Event()
        stream, forked, done = self._side
        forked.record()
        stream.wait_event(forked)
        with torch.cuda.stream(stream):
            yield
            done.record()
        self._pending = True

    def join(self) -> None:
        """The current stream goes on when the forked work is done; nothing if nothing is under
        way.
        """
        if self._pending:
            assert self._side is not None
            torch.cuda.current_stream().wait_event(self._side[2])
            self._pending = False
