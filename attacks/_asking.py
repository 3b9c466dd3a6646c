"""Asking one solver of the router: within a budget, about several victims at once where it can, and so that its failure costs nothing."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch

from attacks._solving import State
from attacks.update.levenberg_marquardt import LevenbergMarquardt
from simulator.adversary import BatchedAttack, Reconstruction

LONGER = 3
"""Factor on the steps of matching that is repeated because it had not flattened."""


def with_budget(solver: type[Any], seconds: float, *, longer: bool = False) -> Any:
    """The solver with its default settings, if it takes one this budget, and if it is to run longer more steps."""
    names = {item.name for item in fields(solver)}
    chosen = solver(seconds=seconds) if "seconds" in names else solver()
    return replace(chosen, steps=LONGER * chosen.steps) if longer and "steps" in names else chosen


def ask(solver: Any, states: Sequence[State], rngs: Sequence[torch.Generator]) -> list[tuple[Reconstruction | None, float, float]]:
    """What a solver answers for each state, with the CPU and wall-clock seconds it took; None where it failed."""
    if len(states) > 1 and isinstance(solver, BatchedAttack):
        cpu, wall = time.process_time(), time.perf_counter()
        try:
            answers = solver.many([state.view for state in states], [state.knowledge for state in states], rngs=rngs)
            cpu, wall = (time.process_time() - cpu) / len(states), (time.perf_counter() - wall) / len(states)
            return [(answer, cpu, wall) for answer in answers]
        except Exception:  # then one by one
            logging.getLogger("fedpeek").exception("%s failed on %d victims at once", solver.name, len(states))
    found: list[tuple[Reconstruction | None, float, float]] = []
    for state, rng in zip(states, rngs, strict=True):
        cpu, wall = time.process_time(), time.perf_counter()
        try:
            if isinstance(solver, LevenbergMarquardt):
                answer: Reconstruction | None = solver.improve(state.view, state.knowledge, state.guess, rng=rng)
            else:
                answer = solver(state.view, state.knowledge, rng=rng)
        except Exception:  # one solver's failure must not cost what the others find
            logging.getLogger("fedpeek").exception("%s failed inside strongest", solver.name)
            answer = None
        found.append((answer, time.process_time() - cpu, time.perf_counter() - wall))
    return found
