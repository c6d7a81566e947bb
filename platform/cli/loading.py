"""The bar that moves while the model loads; on a terminal only."""

from __future__ import annotations

from types import TracebackType

from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from loraplex.platform.cli import output


class LoadingBar:
    """Use as a context manager; `update` may be called at any time, also outside."""

    def __init__(self) -> None:
        console = output.stderr()
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("starting", total=None)

    def update(self, phase: str, done: int, total: int) -> None:
        """`total` 0: nobody knows how long."""
        self._progress.update(self._task, description=phase, completed=done, total=total or None)

    def __enter__(self) -> LoadingBar:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()
