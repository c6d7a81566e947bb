"""Moves adapters from file to host image to device pages, off the step loop.

Implements `adapters.residency.Loader` with one background thread. The thread reads files, builds
images and copies bytes into frames that nobody reads yet; the page tables, which kernels do read,
change only in `poll` and `drop_device`, on the engine's thread between steps.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from loraplex.adapters.errors import AdapterError
from loraplex.adapters.extras_parts import ExtrasShape, Prepared
from loraplex.adapters.host_arena import HostArena
from loraplex.adapters.page_file import PageFile
from loraplex.adapters.page_image import PageImage
from loraplex.adapters.page_layout import PageLayout
from loraplex.adapters.pool import PagePool
from loraplex.adapters.residency import AdapterSize, LoadDone, Phase, Stage
from loraplex.adapters.store import AdapterStore
from loraplex.adapters.weights import LoadedAdapter, load_weights, locate
from loraplex.engine.api import ModuleShape
from loraplex.engine.base_weights import BaseWeights

logger = logging.getLogger(__name__)


class _Stopwatch:
    """What the time since its making went into, by phase."""

    def __init__(self) -> None:
        self.phases: dict[Phase, float] = {}
        self._since = time.perf_counter()

    def lap(self, phase: Phase) -> None:
        """The time since the last lap was this phase's."""
        now = time.perf_counter()
        self.phases[phase] = self.phases.get(phase, 0.0) + now - self._since
        self._since = now


@dataclass(slots=True)
class _Job:
    """run: called with `done`, which reports success; a return does so, too, if nobody has.
    last: the phase that ends when `done` is called.
    """

    digest: str
    stage: Stage
    run: Callable[[Callable[[], None]], None]
    watch: _Stopwatch
    last: Phase
    reported: bool = False


class AdapterLoader:
    """store_root: the content-addressed store. modules: what adapters of this model may target.
    host_bytes: memory set aside for host images, pinned where that helps; an image past it has
    memory of its own. base: the base model's weights, which some adapters refer to; None: such
    adapters fail.
    """

    def __init__(
        self,
        store_root: Path,
        pool: PagePool,
        modules: Sequence[ModuleShape],
        host_bytes: int = 0,
        base: BaseWeights | None = None,
    ) -> None:
        self.on_done: Callable[[], None] = lambda: None  # called in the loader's thread
        self._store = AdapterStore(store_root)
        self._pool = pool
        self._modules = tuple(modules)
        self._arena = HostArena(
            host_bytes, pool.frame_elements, pool.dtype, pinned=pool.arena.device.type == "cuda"
        )
        self._layouts: dict[str, PageLayout] = {}
        self._base = base
        self._files = PageFile(
            pool.num_layers, pool.module_shapes, pool.dtype, base.fingerprint if base else ""
        )
        self._unsaved: deque[str] = deque()  # read from their weights, without a page file yet
        self._frames: dict[str, list[Tensor]] = {}  # of images, built or being built
        self._images: dict[str, PageImage] = {}
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[LoadDone] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="adapter-loader", daemon=True)
        self._ready = threading.Event()
        # One thread computes for the loader, however many do for the steps. torch keeps the number
        # per thread, but also as the default of threads to come: hence set there, then back here.
        num_threads = torch.get_num_threads()
        self._thread.start()
        self._ready.wait()
        torch.set_num_threads(num_threads)

    def close(self) -> None:
        """Stop after the load under way."""
        self._jobs.put(None)
        self._thread.join()

    def describe(self, digest: str) -> AdapterSize:
        manifest = self._store.manifest(digest)
        mismatches = manifest.mismatches(self._modules)
        if mismatches:
            raise AdapterError(
                f"adapter {digest[:12]} was made for another base model: {mismatches[0].message}",
                code=mismatches[0].code,
            )
        ranks = {}
        for module in manifest.modules:
            key = locate(module.path)
            assert key is not None, f"{module.path} is a module of the model, but has no column"
            ranks[key] = module.rank
        extras = ExtrasShape.of_manifest(manifest)
        layout = self._layouts[digest] = self._pool.layout(ranks, extras)
        size = AdapterSize(
            rank=manifest.rank,
            pages=layout.num_pages,
            device_bytes=self._pool.device_bytes(layout),
            host_bytes=self._pool.host_bytes(layout),
            invocation_tokens=manifest.invocation_tokens,
            needs_weight_one=manifest.needs_weight_one,
        )
        if size.device_bytes > self._pool.bytes_max:
            raise AdapterError(
                f"adapter {digest[:12]} (rank {size.rank}) takes {size.device_bytes:,} bytes of "
                f"adapter memory, there are {self._pool.bytes_max:,}; raise --adapter-memory",
                code="adapter_too_large",
            )
        return size

    def begin_host_load(self, digest: str) -> None:
        if digest not in self._layouts:
            self.describe(digest)
        layout, watch = self._layouts[digest], _Stopwatch()
        frames = self._frames[digest] = self._arena.take(layout.num_image_frames)

        def load(done: Callable[[], None]) -> None:
            folder = self._store.path(digest)
            image = self._files.read(folder, layout, frames, watch.lap)
            if image is None:
                weights = load_weights(folder, self._pool.dtype)
                watch.lap(Phase.READ)
                prepared = self._prepare(weights)
                image = self._pool.build_image(prepared.loaded, frames, prepared.parts)
                watch.lap(Phase.BUILD)
                self._unsaved.append(digest)
            self._images[digest] = image

        self._jobs.put(_Job(digest, Stage.HOST, load, watch, Phase.READ))

    def begin_device_load(self, digest: str) -> None:
        image = self._images[digest]

        def copy(done: Callable[[], None]) -> None:
            self._pool.copy(digest, image, on_head_start=done)

        job = _Job(digest, Stage.DEVICE, copy, _Stopwatch(), Phase.COPY)
        try:
            self._pool.reserve(digest, image.layout)
        except AdapterError as error:
            self._failed(job, error)
        else:
            self._jobs.put(job)

    def drop_device(self, digest: str) -> int:
        return self._pool.remove(digest)

    def drop_host(self, digest: str) -> int:
        # Jobs run in order, so a copy still on its way is over before these frames are filled anew.
        self._arena.give_back(self._frames.pop(digest))
        return self._images.pop(digest).nbytes

    def forget(self, digest: str) -> None:
        self._layouts.pop(digest, None)

    def poll(self) -> list[LoadDone]:
        ended: list[LoadDone] = []
        while True:
            try:
                done = self._done.get_nowait()
            except queue.Empty:
                return ended
            if done.stage is Stage.DEVICE:
                if done.ok:
                    self._pool.publish(done.digest, self._images[done.digest])
                elif self._pool.holds(done.digest):
                    self._pool.remove(done.digest)
            elif not done.ok:
                self._arena.give_back(self._frames.pop(done.digest))
            ended.append(done)

    def _prepare(self, weights: LoadedAdapter) -> Prepared:
        if self._base is None:
            assert not weights.extras, "an adapter that refers to a base model, and none is there"
            return Prepared(weights)
        return self._base.prepare(weights)

    def _work(self) -> None:
        torch.get_num_threads()  # makes torch settle this thread's number before we change it
        torch.set_num_threads(1)
        self._ready.set()
        while (job := self._next_job()) is not None:
            job.watch.lap(Phase.QUEUE)
            try:
                job.run(lambda job=job: self._succeeded(job))  # type: ignore[misc]
            except Exception as error:
                self._failed(job, error)
            else:
                self._succeeded(job)

    def _next_job(self) -> _Job | None:
        """Page files are written only while nothing else is to do."""
        while self._unsaved and self._jobs.empty():
            digest = self._unsaved.popleft()
            image = self._images.get(digest)
            # Dropped meanwhile, its frames stay as they are until a later job fills them.
            if image is not None and not self._files.write(self._store.path(digest), image):
                logger.warning("the page file of adapter %s could not be written", digest[:12])
        return self._jobs.get()

    def _succeeded(self, job: _Job) -> None:
        if not job.reported:
            self._report(job)

    def _failed(self, job: _Job, error: Exception) -> None:
        known = isinstance(error, AdapterError)
        if not known or job.reported:
            logger.error("loading adapter %s failed", job.digest[:12], exc_info=error)
        if not job.reported:  # else steps that wait for the rest fail, and say why
            self._report(
                job,
                error=str(error) if known else f"{type(error).__name__}: {_words(error)}",
                code=error.code if isinstance(error, AdapterError) else "adapter_load_failed",
            )

    def _report(self, job: _Job, error: str | None = None, code: str = "") -> None:
        job.reported = True
        job.watch.lap(job.last)
        phases = job.watch.phases
        seconds = sum(phases.values())
        if error is None:
            done = LoadDone(job.digest, job.stage, True, seconds, phases=phases)
        else:
            done = LoadDone(job.digest, job.stage, False, seconds, error, code, phases)
        self._done.put(done)
        self.on_done()


def _words(error: Exception) -> str:
    """Without the path that errors of the system name: clients are told."""
    return error.strerror or "" if isinstance(error, OSError) else str(error)
