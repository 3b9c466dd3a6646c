"""Where long work says how far it is; whoever wants to show it installs a listener for its own context."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Listener = Callable[[str, int, int, str], None]

_listener: ContextVar[Listener | None] = ContextVar("fedpeek_progress", default=None)


def tick(task: str, done: int, total: int, note: str = "") -> None:
    """Report that ``done`` of ``total`` units of ``task`` are finished; ``note`` is the current objective or the like."""
    listener = _listener.get()
    if listener is not None:
        listener(task, done, total, note)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Send every tick inside the block to ``listener``."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)
