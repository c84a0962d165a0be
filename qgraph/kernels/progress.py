"""What a user sees while the kernels are compiled: a bar on a terminal, else one line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager

TEXT = "compiling qgraph's CPU kernels, once"


@contextmanager
def shown() -> Generator[Callable[[int, int], None]]:
    """Gives what is to be called with (files compiled, files in all)."""
    if not sys.stderr.isatty():
        print(f"qgraph: {TEXT} (takes about half a minute) …", file=sys.stderr, flush=True)
        yield lambda done, of: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(TEXT, total=None)
        yield lambda done, of: progress.update(task, completed=done, total=of)
