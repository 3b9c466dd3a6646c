"""How long an attack takes on one upload, in CPU seconds; one that takes long is ended, and the rest guessed."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from experiments import isolated
from experiments.trial import attack_victims
from simulator import progress

LONGEST_SECONDS = 6.0
"""Of CPU: an attack that takes longer on the sampled upload is ended."""

Tell = Callable[[str, int, int, str], None]
"""Hears of progress: the task, how much is done of how much, and a note."""


def attack_seconds(attack: Any, victims: Sequence[Any], evaluation: Any, world: Any, tell: Tell) -> tuple[float, bool]:
    """Seconds that an attack takes on one upload, and whether it had to be ended, so that this is a guess.

    It is then taken to go on as it told of itself, or else to use up its budget, which some have for each record.
    """
    budget, own = float(getattr(attack, "seconds", math.inf)), list[tuple[float, float]]()

    def listen(what: str, done: int, total: int, note: str) -> None:
        tell(attack.name, done, total, note)
        if what == attack.name and total:
            own.append((_clock(), done / total))

    clock, whole = _clock(), threading.Event()
    watch = threading.Thread(target=_end_at, args=(clock + LONGEST_SECONDS, whole), daemon=True)
    watch.start()
    try:
        with progress.listening(listen):
            attack_victims(attack, victims, evaluation, world, "estimate")
    finally:
        took, ended = max(0.0, _clock() - clock), not watch.is_alive()
        whole.set()
        watch.join()
    if not ended:
        return took, False
    (first, least), (last, most) = (own[0], own[-1]) if own else ((0.0, 0.0), (0.0, 0.0))
    told = (last - first) / (most - least) if most > least else math.inf
    budgets = budget * victims[0].knowledge.num_examples if 2 * budget < LONGEST_SECONDS else budget
    most_likely = min(told, budgets)
    return max(LONGEST_SECONDS, most_likely if math.isfinite(most_likely) else 0.0), True


def _end_at(clock: float, whole: threading.Event) -> None:
    """End the attack's process at this time of :func:`_clock`, or after three times as long by the clock on the wall."""
    wall = time.perf_counter() + 3 * LONGEST_SECONDS
    while not whole.wait(0.2):
        if _clock() > clock or time.perf_counter() > wall:
            isolated.stop()
            return


def _clock() -> float:
    """CPU seconds of this process and of the attacks'; wall-clock time where the system does not say."""
    attacks = isolated.cpu_seconds()
    return time.perf_counter() if attacks is None else time.process_time() + float(attacks)
