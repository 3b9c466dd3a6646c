"""A few worker processes that do tasks one after the other and say how far they are.

Unlike a process pool, a worker that dies takes only its own task with it: the task is reported as failed and a new worker takes
the next one.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from simulator import progress
from simulator.errors import SpecError

Notify = Callable[[Any, str, int, int, str], None]
"""(task, what is being done, done, total, note)."""

GRACE_SECONDS = 30.0
"""How long a worker may take to end what it started, such as Flower's processes, when the run is interrupted."""

TICK_SECONDS = 0.1
"""Ticks closer together than this are dropped, but for the last of a kind."""


def each(tasks: Sequence[Any], job: Callable[[Any], Any], workers: int, notify: Notify | None = None) -> Iterator[tuple[Any, Any, str]]:
    """Do every task; yield (task, result, "") as each ends, or (task, None, reason) when its worker died.

    Args:
        tasks: what ``job`` takes; must be picklable, like ``job`` and its results.
        job: a module-level function or a partial of one.
        workers: processes; 1 works in this process, where a job that kills its process kills the run.
        notify: hears the ticks of every worker.
    """
    if workers <= 1 or len(tasks) <= 1:
        for task in tasks:
            with progress.listening(lambda *tick, task=task: notify(task, *tick) if notify else None):  # type: ignore[misc]
                yield task, job(task), ""
        return
    waiting = list(reversed(tasks))
    context = multiprocessing.get_context("spawn")
    busy: dict[Connection, tuple[BaseProcess, Any]] = {}

    def start() -> tuple[BaseProcess, Connection]:
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, job), daemon=True)
        process.start()
        theirs.close()  # so that its death is an end of file here
        return process, ours

    def assign(process: BaseProcess, connection: Connection) -> None:
        if waiting:
            task = waiting.pop()
            connection.send(task)
            busy[connection] = (process, task)
        else:
            connection.close()

    try:
        for _ in range(min(workers, len(tasks))):
            assign(*start())
        while busy:
            for connection in wait(list(busy)):
                assert isinstance(connection, Connection)
                process, task = busy[connection]
                try:
                    kind, *body = connection.recv()
                except EOFError:
                    process.join()
                    del busy[connection]
                    yield task, None, f"its process died with exit code {process.exitcode}"
                    if waiting:
                        assign(*start())
                    continue
                if kind == "tick":
                    if notify is not None:
                        notify(task, *body)
                    continue
                del busy[connection]
                assign(process, connection)
                yield task, body[0], ""
    except KeyboardInterrupt:  # the terminal sent it to the workers, too: let them end what they started
        _join([process for process, _ in busy.values()])
        raise
    finally:
        for process, _ in busy.values():
            process.terminate()
        _join([process for process, _ in busy.values()])


def cores() -> int:
    """Cores that this process may use: of the machine, of its affinity mask, and of its container's quota the fewest."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return max(1, min(allowed, int(quota) // int(period)))
    except (OSError, ValueError):  # no cgroup, or no quota ("max")
        return allowed


def parse(workers: str) -> int | str:
    """What ``--workers`` says: a number of processes on this machine, or the address of a Ray cluster ("" starts one here).

    Raises:
        SpecError: it is neither.
    """
    kind, _, address = workers.partition(":")
    if kind == "ray":
        return address
    if not workers.isdecimal():
        raise SpecError(f"--workers must be a number ≥ 0, ray, or ray:HOST:PORT, got {workers!r}. 0 means one for each core.")
    return int(workers)


def _join(processes: Sequence[BaseProcess]) -> None:
    """Wait for processes that are ending; kill those that do not."""
    deadline = time.monotonic() + GRACE_SECONDS
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()


def _serve(connection: Connection, job: Callable[[Any], Any]) -> None:
    signal.signal(signal.SIGTERM, _end)
    try:
        _work(connection, job)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Python's last steps must not be interrupted: they would print where


def _end(*_: object) -> None:
    """Unwind the stack, so that a driver stops the processes that it started; once, whoever asks again meanwhile."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(1)


def _work(connection: Connection, job: Callable[[Any], Any]) -> None:
    last = 0.0

    def send(message: tuple[Any, ...]) -> None:
        try:
            connection.send(message)
        except BrokenPipeError:  # the run is no more: nobody waits for what this task would find
            sys.exit(1)

    def tell(what: str, done: int, total: int, note: str) -> None:
        nonlocal last
        if done >= total or time.monotonic() - last > TICK_SECONDS:
            last = time.monotonic()
            send(("tick", what, done, total, note))

    with progress.listening(tell):
        while True:
            try:
                task = connection.recv()
            except (EOFError, KeyboardInterrupt):
                return
            try:
                send(("done", job(task)))
            except KeyboardInterrupt:
                return
