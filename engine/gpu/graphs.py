"""Decode steps captured once, at the start, and replayed for whatever they then hold.

A graph repeats launches with the very arguments of its capture, so all that differs between steps
must be read from device memory: which adapters, of which rank, on which rows, and how many rows are
real. There is one graph per batch size of a short list; a step takes the next larger one.

CUDA Graphs: https://developer.nvidia.com/blog/cuda-graphs/. Capture by bucket as in vLLM.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from loraplex.engine.gpu.attention_plan import AttentionPlanner
from loraplex.engine.gpu.host_step import HostStep
from loraplex.engine.gpu.metadata import Metadata, StepInputs
from loraplex.engine.gpu.step_layout import Layout, StepSizes

logger = logging.getLogger(__name__)

Forward = Callable[[StepInputs], Tensor]  # -> [rows, hidden]

PAGES_PER_ROW = 8  # ranks of 128 on every row of a full bucket
MIN_PAGES = 64  # ... and of 1024 on a single one


class Graph(Protocol):
    def replay(self) -> None: ...


class GraphBackend(Protocol):
    def capture(self, run: Callable[[], Tensor]) -> tuple[Graph, Tensor]:
        """Record what `run` launches; the tensor it returns is filled by every replay."""
        ...


class CudaGraphs:
    """All graphs take their intermediate memory from one pool, which the largest one sizes."""

    def __init__(self) -> None:
        self._cuda: Any = torch.cuda
        self._pool: Any = None
        self._stream = self._cuda.Stream()

    def capture(self, run: Callable[[], Tensor]) -> tuple[Graph, Tensor]:
        # The first run compiles kernels and loads libraries, which a capture must not.
        cuda = self._cuda
        self._stream.wait_stream(cuda.current_stream())
        with cuda.stream(self._stream):
            run()
        self._stream.synchronize()
        graph = cuda.CUDAGraph()
        with cuda.graph(graph, pool=self._pool, stream=self._stream):
            output = run()
        self._pool = graph.pool()
        return graph, output


class RepeatedCalls:
    """Where there is no CUDA: a replay calls `run` again. Whatever `run` took from the host when it
    was captured is what it still holds then, as in a graph.
    """

    def capture(self, run: Callable[[], Tensor]) -> tuple[Graph, Tensor]:
        output = run()

        class Repeat:
            def replay(self) -> None:
                output.copy_(run())

        return Repeat(), output


@dataclass(frozen=True, slots=True, eq=False)
class _Captured:
    inputs: StepInputs
    graph: Graph
    hidden: Tensor


def decode_buckets(max_num_seqs: int) -> list[int]:
    """Batch sizes to capture: dense where a row more costs most. The last is `max_num_seqs`."""
    sizes = [1, 2, 4, *range(8, 65, 8), *range(80, max_num_seqs + 1, 16)]
    return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]


class DecodeGraphs:
    """forward: launches the model on a step's inputs and nothing else."""

    def __init__(
        self,
        metadata: Metadata,
        attention: AttentionPlanner,
        backend: GraphBackend,
        forward: Forward,
        *,
        max_num_seqs: int,
        max_context: int,
        device: torch.device,
    ) -> None:
        self.num_too_wide = 0  # decode steps whose adapters did not fit their graph
        self._metadata = metadata
        self._attention = attention
        self._max_context = max_context
        self._backend = backend
        self._forward = forward
        self._device = device
        self._buckets = decode_buckets(max_num_seqs)
        self._captured: dict[int, _Captured] = {}

    @torch.inference_mode()
    def capture(self, on_progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Largest first, so that the others find their memory in its pool."""
        layouts = {rows: self._layout(rows) for rows in self._buckets}
        size = max(layout.size for layout in layouts.values()) + self._metadata.room_for_blocks
        memory = torch.zeros(size, dtype=torch.int32, device=self._device)
        for done, rows in enumerate(reversed(self._buckets)):
            on_progress(done, len(self._buckets))
            self._captured[rows] = self._capture(layouts[rows], memory)
        on_progress(len(self._buckets), len(self._buckets))

    def find(self, step: HostStep) -> StepInputs | None:
        """Where to send the step so that a graph can run it. None: it runs without one."""
        if not step.decodes_only or not self._captured:
            return None
        rows = next(size for size in self._buckets if size >= step.sizes.seqs)
        inputs = self._captured[rows].inputs
        if inputs.layout.sizes.holds(step.sizes):
            return inputs
        if self.num_too_wide == 0:
            logger.warning(
                "a decode step of %d rows applies %d rank pages, its graph holds %d: such steps "
                "run without a graph, a little slower",
                step.sizes.seqs,
                step.sizes.small_entries,
                inputs.layout.sizes.small_entries,
            )
        self.num_too_wide += 1
        return None

    def replay(self, inputs: StepInputs) -> Tensor:
        """`[bucket, hidden]`, overwritten by the next replay; the real rows come first."""
        captured = self._captured[inputs.layout.sizes.seqs]
        captured.graph.replay()
        return captured.hidden

    def _capture(self, layout: Layout, memory: Tensor) -> _Captured:
        plan = self._attention.static(layout.sizes.seqs, self._max_context)
        inputs = self._metadata.static(layout, memory, plan)
        self._metadata.blank(inputs)
        graph, hidden = self._backend.capture(lambda: self._forward(inputs))
        return _Captured(inputs, graph, hidden)

    def _layout(self, rows: int) -> Layout:
        pages = max(rows * PAGES_PER_ROW, MIN_PAGES)
        return Layout(
            StepSizes(
                tokens=rows,
                seqs=rows,
                small=rows,
                norm=rows,
                pages=pages,
                small_entries=pages,
                attention_tiles=self._attention.static(rows, self._max_context).num_tiles,
            )
        )
