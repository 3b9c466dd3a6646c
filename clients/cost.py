"""What a round costs a client: noted on the client's own machine, never sent, since the server could learn from it."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

FILE = "clients.jsonl"
"""In ``out-dir``, where that is a directory of this machine: one line for each message that a client answered."""


HELLO = "0"
"""Group of the messages before the first round."""


@contextmanager
def noted(run_config: Mapping[str, object], client: object, round: str) -> Iterator[None]:
    """Time the work inside, in CPU seconds of this thread, and append it to the run's file; without such a directory note nothing."""
    started = time.thread_time()
    yield
    out = str(run_config.get("out-dir", ""))
    if not os.path.isabs(out):  # not this run's
        return
    line = json.dumps({"client": client, "round": round, "seconds": time.thread_time() - started})
    with suppress(FileNotFoundError, NotADirectoryError):
        lines = os.open(os.path.join(out, FILE), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(lines, f"{line}\n".encode())  # in one call: clients may be processes
        finally:
            os.close(lines)


def seconds_of_a_round(out: Path) -> float | None:
    """The median over clients and rounds of the CPU seconds that one client worked in one round; None where nothing was noted."""
    if not (out / FILE).is_file():
        return None
    spent: dict[tuple[int, str], float] = {}
    for line in (out / FILE).read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        if entry["round"] == HELLO:
            continue
        key = int(entry["client"]), str(entry["round"])
        spent[key] = spent.get(key, 0.0) + float(entry["seconds"])
    return statistics.median(spent.values()) if spent else None
