"""What a task has done so far: the trials of each attack, kept until the task ends, so that a kill loses one attack on one arm at most."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from experiments.result import Trial

PARTS = "parts"
"""Directory in a run's; gone when its task has ended."""


def save(out: Path, task: str, attack: str, trials: Sequence[Trial]) -> None:
    """Keep the trials of one attack; its file is whole or not there."""
    path = _path(out, task, attack)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.new")
    new.write_text("".join(f"{trial.to_json()}\n" for trial in trials), encoding="utf-8")
    os.replace(new, path)


def load(out: Path, task: str, attack: str) -> list[Trial] | None:
    """Return the trials of an attack that had ended before a kill, to the bit as they were; None if it had not."""
    path = _path(out, task, attack)
    if not path.is_file():
        return None
    return [Trial.from_json(line) for line in path.read_text(encoding="utf-8").splitlines()]


def forget(out: Path, task: str) -> None:
    """Drop what a task had done so far: it has ended, or starts from another transcript."""
    shutil.rmtree(out / PARTS / task, ignore_errors=True)


def sweep(out: Path) -> None:
    """Remove the directory of parts if no task left any: for the run itself, since a worker would take it away under another's hands."""
    with contextlib.suppress(OSError):
        (out / PARTS).rmdir()


def _path(out: Path, task: str, attack: str) -> Path:
    return out / PARTS / task / f"{attack}.jsonl"
