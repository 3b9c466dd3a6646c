"""The router: asks every solver whether it applies, runs the strongest per second first, and hands on only what is not yet proven.

A solver that proves some records of a batch exact takes them out of it: their gradients are subtracted, and the next solver sees the
mean gradient of the others alone. Of guesses without a proof the one is kept whose own simulated update comes nearest to the observed
one. Nothing here sees the truth. A solver that fails is logged; unless others solve the victim, it then counts as not converged.

Source: this project; every solver names its paper.
Deviations: none.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from attacks._choice import LADDER, Choice
from attacks._gradient import unusable
from attacks._solving import State, after, merged
from attacks.update.dlg import DLG
from attacks.update.hybrid import Hybrid
from attacks.update.levenberg_marquardt import LevenbergMarquardt
from attacks.update.sme import SME
from simulator.adversary import BatchedAttack, Knowledge, Reconstruction
from simulator.progress import tick
from simulator.registry import register
from simulator.types import Observation

SHARE = 0.5
"""Of the budget that is left, what one solver may take while others wait; the last takes all."""

THOROUGH = 0.8
"""The same for Levenberg–Marquardt, which ends what L-BFGS began, or not at all; for hybrid, whose last steps are its
best; and for sme, which makes more of its time than matching through all local steps."""

QUICK = 0.2
"""The same for L-BFGS, which solves what is well conditioned in a fraction of Levenberg–Marquardt's time, and else gives it its start."""

SCOUT = 0.6
"""The same for L-BFGS where that is less than a second."""


def applicable(view: Observation, knowledge: Knowledge) -> tuple[type[Any], ...]:
    """The solvers that apply to a view, in order."""
    choice = Choice(view, knowledge)
    return tuple(solver for solver in LADDER if choice.refusal(solver) is None)


def with_budget(solver: type[Any], seconds: float) -> Any:
    """The solver with its default settings and, if it takes one, this budget."""
    return solver(seconds=seconds) if any(item.name == "seconds" for item in fields(solver)) else solver()


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


@register("attacks", "strongest")
@dataclass(frozen=True)
class Strongest:
    """The strongest solvers that apply, in order, within a budget; what one proves, the next need not find.

    Attributes:
        seconds: CPU seconds for each record behind an upload, those of a batch or an aggregate together. A ceiling: easy victims take
            far less. Where it binds, results depend on the machine.
    """

    seconds: float = 30.0

    def __post_init__(self) -> None:
        if not self.seconds > 0:
            raise ValueError(f"seconds must be > 0, got {self.seconds}. 30 is enough for most small victims.")

    def supports(self, view: Observation, knowledge: Knowledge) -> str | None:
        """Refuse what every solver refuses, for all their reasons."""
        if (reason := unusable(view, knowledge)) is not None:
            return reason
        choice = Choice(view, knowledge)
        reasons = {solver.name: choice.refusal(solver) for solver in LADDER}
        if None in reasons.values():
            return None
        return "at least one solver must apply, got none: " + "; ".join(f"{name}: {reason}" for name, reason in reasons.items())

    def __call__(self, view: Observation, knowledge: Knowledge, *, rng: torch.Generator) -> Reconstruction:
        """Attack one victim."""
        return self.many([view], [knowledge], rngs=[rng])[0]

    def many(
        self, views: Sequence[Observation], knowledge: Sequence[Knowledge], *, rngs: Sequence[torch.Generator]
    ) -> list[Reconstruction]:
        """Attack many victims at once, solver by solver."""
        states = [State(view, known, applicable(view, known)) for view, known in zip(views, knowledge, strict=True)]
        for place, solver in enumerate(LADDER):
            tick("solvers", place, len(LADDER), solver.name)
            able = [i for i, state in enumerate(states) if solver in state.able and not state.solved and self._left(state) > 0]
            if able:
                budget = min(self._budget(states[i], solver) for i in able)
                answers = ask(with_budget(solver, budget), [states[i] for i in able], [rngs[i] for i in able])
                for i, (answer, cpu, wall) in zip(able, answers, strict=True):
                    spent = replace(states[i], cpu=states[i].cpu + cpu, wall=states[i].wall + wall)
                    states[i] = after(spent, solver.name, answer)
        tick("solvers", len(LADDER), len(LADDER))
        return [merged(state, known) for state, known in zip(states, knowledge, strict=True)]

    def _left(self, state: State) -> float:
        """CPU seconds that are left of the whole upload's budget."""
        return self.seconds * (state.knowledge.num_examples + (0 if state.inside else len(state.proven))) - state.cpu

    def _budget(self, state: State, solver: type[Any]) -> float:
        """CPU seconds for one solver: all that are left for the last that applies, else their share."""
        left = self._left(state)
        if solver is state.able[-1]:
            return left
        if solver is DLG and LevenbergMarquardt in state.able:
            return max(QUICK * left, min(SCOUT * left, 1.0))
        return (THOROUGH if solver in (DLG, LevenbergMarquardt, Hybrid, SME) else SHARE) * left
