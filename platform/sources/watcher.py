"""A watched directory: each sub-folder with the two files is an adapter of the folder's name.

Looked at every two seconds (network file systems tell nobody when they change). A folder is pulled
when its two files have stayed the same over two looks, and again when they change; what came of it
is in the pull's record, so that a restart reads only what has changed meanwhile. A folder that goes
takes nothing with it: adapters are deleted over the API.
"""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path

from loraplex.adapters.manifest import CONFIG_FILE, WEIGHTS_FILE
from loraplex.platform.callers import system
from loraplex.platform.errors import ApiError
from loraplex.platform.served_model import ServedModel
from loraplex.platform.sources.directories import DirectoryOrigin
from loraplex.platform.sources.pulls import PullService

log = logging.getLogger(__name__)

POLL_S = 2.0
CALLER = system("watch")


class Watcher:
    def __init__(self, pulls: PullService, root: Path, *, max_pulls: int) -> None:
        self._pulls = pulls
        self._root = root
        self._max_pulls = max_pulls
        self._seen: dict[str, str] = {}  # folder -> its stamp at the last look
        self._done: dict[str, str] = {}  # folder -> the stamp that was pulled, or refused
        self._unreadable = False

    async def run(self, model: ServedModel) -> None:
        """Until cancelled."""
        self._done = await self._pulls.folder_stamps()
        while True:
            try:
                await self._look(model)
            except Exception:  # a database that is locked, say: the next look may be luckier
                log.exception("watch_failed")
            await asyncio.sleep(POLL_S)

    async def _look(self, model: ServedModel) -> None:
        try:
            stamps = await asyncio.to_thread(folder_stamps, self._root)
            self._unreadable = False
        except OSError as error:
            if not self._unreadable:
                reason = error.strerror or str(error)
                log.warning(
                    "watch_dir_unreadable", extra={"path": str(self._root), "reason": reason}
                )
            self._unreadable = True
            return
        settled = {
            name: stamp
            for name, stamp in stamps.items()
            if self._seen.get(name) == stamp and self._done.get(name) != stamp
        }
        self._seen = stamps
        running: set[asyncio.Task[None]] = set()
        for name, stamp in sorted(settled.items()):
            task = await self._pull(name, stamp, model)
            if task is not None:
                running.add(task)
            if len(running) >= self._max_pulls:
                _, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        if running:
            await asyncio.wait(running)

    async def _pull(self, name: str, stamp: str, model: ServedModel) -> asyncio.Task[None] | None:
        origin = DirectoryOrigin(self._root, name, f"watch:{name}")
        origin.packed = False  # a folder, even if it is called a.zip
        try:
            job = await self._pulls.pull_folder(CALLER, name, origin, stamp, model)
        except ApiError as error:
            if error.code in ("pull_under_way", "queue_full"):
                return None  # at the next look
            log.warning("watched_folder_refused", extra={"folder": name, "reason": error.message})
            self._done[name] = stamp
            return None
        self._done[name] = stamp
        return job.task


def folder_stamps(root: Path) -> dict[str, str]:
    """sub-folder -> what its two files look like from outside; only where both are.

    Raises: OSError if the root cannot be listed.
    """
    stamps = {}
    with os.scandir(root) as entries:
        for entry in entries:
            try:
                if entry.name.startswith(".") or not entry.is_dir():
                    continue
                files = [os.stat(f"{entry.path}/{name}") for name in (CONFIG_FILE, WEIGHTS_FILE)]
            except OSError:
                continue  # it is being made, or being removed
            stamps[entry.name] = " ".join(f"{f.st_ino}-{f.st_size}-{f.st_mtime_ns}" for f in files)
    return stamps
