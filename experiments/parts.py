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


def save(out: Path, task: str, attack: str, trials: Sequence[Trial], *, seconds: float = 0.0) -> None:
    """Keep the trials of one attack, and the seconds that it took; the file of trials is whole or not there."""
    path = _path(out, task, attack)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".seconds").write_text(repr(seconds), encoding="utf-8")
    new = path.with_name(f"{path.name}.new")
    new.write_text("".join(f"{trial.to_json()}\n" for trial in trials), encoding="utf-8")
    os.replace(new, path)


def load(out: Path, task: str, attack: str) -> tuple[list[Trial], float] | None:
    """Return the trials of an attack that had ended before a kill, to the bit as they were, and its seconds; None if it had not.

    One that failed on a victim has not: whatever killed its process, such as a lack of memory, may be gone.
    """
    path = _path(out, task, attack)
    if not path.is_file():
        return None
    trials = [Trial.from_json(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if failed(trials):
        return None
    took = path.with_suffix(".seconds")
    return trials, float(took.read_text(encoding="utf-8")) if took.is_file() else 0.0


def failed(trials: Sequence[Trial]) -> bool:
    """Whether an attack raised or its process died on any of them; one that diverged would do so again."""
    return any(trial.status == "failed" for trial in trials)


def reopen(out: Path, task: str, trials: Sequence[Trial]) -> None:
    """Make an ended task of which an attack failed look as if it were cut off before its end: the attacks that did not fail are kept."""
    for attack in dict.fromkeys(trial.attack for trial in trials):
        own = [trial for trial in trials if trial.attack == attack]
        if not failed(own):
            save(out, task, attack, own, seconds=sum(trial.seconds for trial in own))


def forget(out: Path, task: str) -> None:
    """Drop what a task had done so far: it has ended, or starts from another transcript."""
    shutil.rmtree(out / PARTS / task, ignore_errors=True)


def sweep(out: Path) -> None:
    """Remove the directory of parts if no task left any: for the run itself, since a worker would take it away under another's hands."""
    with contextlib.suppress(OSError):
        (out / PARTS).rmdir()


def _path(out: Path, task: str, attack: str) -> Path:
    return out / PARTS / task / f"{attack}.jsonl"
