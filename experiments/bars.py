"""Progress on the terminal: a bar for the whole run and one for each task under way; where there is no terminal, a line now and then."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from experiments.workers import Notify

QUIET_SECONDS = 60.0
"""At most one line in this time where there is no terminal."""


@contextmanager
def progress_bars(console: Console, tasks: int, unit: str = "arms × seeds") -> Iterator[tuple[Notify, Callable[..., None]]]:
    """Yield what tells the bars of ticks, and what tells them of an ended task, of the time left in words, and of how many have ended.

    Without that number, ended tasks are counted here: those of before a run was resumed are not among them.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bars:
        whole = bars.add_task("run", total=tasks, note=unit)
        lines: dict[str, Any] = {}
        ended, last = 0, -QUIET_SECONDS

        def notify(task: Any, what: str, done: int, total: int, note: str) -> None:
            label = _label(task)
            if label not in lines:
                lines[label] = bars.add_task(label, total=total, note="")
            bars.update(lines[label], description=f"{escape(label)}: {escape(what)}", completed=done, total=total, note=escape(note))

        def advance(task: Any, left: str = "", done: int | None = None) -> None:
            nonlocal ended, last
            line = lines.pop(_label(task), None)
            if line is not None:
                bars.remove_task(line)
            ended = ended + 1 if done is None else done
            bars.update(whole, completed=ended, note=f"{unit}, about {left} left" if left else unit)
            if left and not console.is_terminal and time.monotonic() - last > QUIET_SECONDS:
                last = time.monotonic()
                console.print(f"{ended} of {tasks} {unit} done, about {left} left", highlight=False)

        yield notify, advance


def _label(task: Any) -> str:
    return f"{task.arm}, seed {task.seed}" if hasattr(task, "arm") else str(task)
