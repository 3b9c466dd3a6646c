"""The router: asks every solver whether it applies, runs the strongest per second first, and hands on only what is not yet proven.

A solver that proves some records of a batch exact takes them out of it: their gradients are subtracted, and the next solver sees the mean
gradient of the others alone. Of guesses without a proof the one is kept whose own simulated update comes nearest to the observed one. A
solver that fails is logged; unless others solve the victim, it then counts as not converged. Where public records are held, what algebra
leaves unsolved is contested (:mod:`attacks._contest`), unless BatchNorm's statistics, other rounds or a defense that cannot be imitated
say more than a rehearsal would: by the learned inverter, if it is better on uploads of some of those records. Time that is left when all
were asked goes into further starts of matching, as long as they gain. Nothing here sees the truth.

Source: this project; every solver names its paper.
Deviations: weights of total variation are the solvers' own. tuned_inverting_gradients chooses its weight in a rehearsal and is not asked:
    five weights take five times a victim's time. It gains nothing where the default was tuned (its docstring), and up to two decibels on
    a network that is unlike those (docs/breaching.md, as shipped against tuned).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from attacks._apart import inseparable, part_by_part
from attacks._asking import ask, with_budget
from attacks._choice import ALGEBRAIC, EXACT, LADDER, MATCHING, Choice
from attacks._contest import contested, may_rehearse
from attacks._gradient import unusable
from attacks._rest import farthest
from attacks._solving import State, after, charged, clocks, judged, merged, usable
from attacks.update.dlg import DLG
from attacks.update.hybrid import Hybrid
from attacks.update.levenberg_marquardt import LevenbergMarquardt
from attacks.update.sme import SME
from simulator.adversary import Knowledge, Reconstruction
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

RESERVE = 0.1
"""Of the budget of the records that are left, what a solver gets as long as none has answered, however long the others took."""

GAIN = 0.01
"""Relative improvement of the score that makes another start of matching worth its time."""


def applicable(view: Observation, knowledge: Knowledge) -> tuple[type[Any], ...]:
    """The solvers that apply to a view, in order."""
    choice = Choice(view, knowledge)
    return tuple(solver for solver in LADDER if choice.refusal(solver) is None)


def begun(views: Sequence[Observation], knowledge: Sequence[Knowledge]) -> list[State]:
    """Victims of whom nothing is known yet but which solvers apply."""
    began = clocks()
    return charged([State(view, known, applicable(view, known)) for view, known in zip(views, knowledge, strict=True)], began)


def open_to(state: State) -> State:
    """The state with every solver that applies to what is left still to be asked, but for the barred ones."""
    able = tuple(solver for solver in applicable(state.view, state.knowledge) if solver not in state.barred)
    return replace(state, able=able, asked=frozenset(), short=False, extra=None, gaining=False)


def several_sums(state: State) -> bool:
    """Whether the sums of other rounds take this one apart."""
    return len(state.view.upload.senders) > 1 and bool(state.knowledge.history) and inseparable(state.view, state.knowledge) is None


def next_solver(state: State, among: Collection[type[Any]] | None) -> type[Any] | None:
    """The first solver that applies to what is left and was not asked about it; among these, if not all."""
    return next((solver for solver in state.able if solver not in state.asked and (among is None or solver in among)), None)


def by_matching(
    views: Sequence[Observation], knowledge: Sequence[Knowledge], rngs: Sequence[torch.Generator], seconds: float
) -> list[State]:
    """How far the ladder without algebra comes with these views in so many CPU seconds for each."""
    states = [open_to(replace(state, barred=ALGEBRAIC)) for state in begun(views, knowledge)]
    return Strongest(seconds / knowledge[0].num_examples)._climbed(states, rngs)


def advanced(before: State, solver: type[Any], answer: Reconstruction | None, cpu: float, wall: float) -> State:
    """The state with what a solver answered, and what it took.

    Matching is asked again if it gained, longer if it had not flattened; a repeat that fails changes nothing.
    """
    again, before = solver in before.asked, replace(before, cpu=before.cpu + cpu, wall=before.wall + wall, extra=None, longer=False)
    if again and not usable(answer):
        return before
    matching, flat = solver in MATCHING, answer is not None and answer.converged
    if answer is not None and (matching or (solver is DLG and LevenbergMarquardt in before.able)):
        answer = replace(answer, converged=True)  # it, or the other, goes on where it stopped
    state = after(replace(before, asked=before.asked | {solver}), solver.name, answer)
    if state.knowledge is not before.knowledge:  # fewer records are left, and other solvers may apply to them
        return open_to(state)
    if not matching:
        return state
    gained = state.score < (1 - GAIN) * before.score
    gaining = gained if again else not flat
    return replace(state, extra=solver if gained else None, last=cpu, longer=not again and not flat and gained, gaining=gaining)


@register("attacks", "strongest")
@dataclass(frozen=True)
class Strongest:
    """The strongest solvers that apply, in order, within a budget; what one proves, the next need not find.

    Attributes:
        seconds: CPU seconds for each record behind an upload, those of a batch or an aggregate together, the router's own work among
            them. A ceiling, but for what each solver cannot interrupt: easy victims take far less. Where it binds, results depend on
            the machine.
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
        if None in reasons.values() or inseparable(view, knowledge) is None:
            return None
        return "at least one solver must apply, got none: " + "; ".join(f"{name}: {reason}" for name, reason in reasons.items())

    def __call__(self, view: Observation, knowledge: Knowledge, *, rng: torch.Generator) -> Reconstruction:
        """Attack one victim."""
        return self.many([view], [knowledge], rngs=[rng])[0]

    def many(
        self, views: Sequence[Observation], knowledge: Sequence[Knowledge], *, rngs: Sequence[torch.Generator]
    ) -> list[Reconstruction]:
        """Attack many victims at once."""
        states = begun(views, knowledge)
        if rivals := [i for i, state in enumerate(states) if may_rehearse(state)]:
            mine = [rngs[i] for i in rivals]
            begins = self._climbed([states[i] for i in rivals], mine, ALGEBRAIC)
            for i, state in zip(rivals, contested(begins, mine, by_matching, self._left), strict=True):
                states[i] = state
        return [merged(state, known) for state, known in zip(self._climbed(states, rngs), knowledge, strict=True)]

    def _climbed(
        self, starts: Sequence[State], rngs: Sequence[torch.Generator], among: Collection[type[Any]] | None = None
    ) -> list[State]:
        """The ladder, solver by solver."""
        states = list(starts)
        whole = {i for i, state in enumerate(states) if several_sums(state)}
        while (wanted := {i: solver for i, state in enumerate(states) if (solver := self._next(state, among)) is not None}) or whole:
            if late := {i for i in whole if i not in wanted or wanted[i] not in EXACT}:
                whole -= late
                for i in late:
                    states[i] = self._apart(states[i], starts[i].view, starts[i].knowledge, rngs[i])
                continue
            solver = min(wanted.values(), key=LADDER.index)
            longer = all(states[i].longer for i, wish in wanted.items() if wish is solver)
            able = [i for i, wish in wanted.items() if wish is solver and states[i].longer == longer]
            tick("solvers", LADDER.index(solver), len(LADDER), solver.name)
            budgets = {i: self._budget(states[i], solver) * (SHARE if i in whole else 1) for i in able}
            able = [i for i in able if 2 * budgets[i] >= max(budgets.values())]  # the others, who have less left, are asked next
            budget = min(budgets[i] for i in able)
            answers = ask(with_budget(solver, budget, longer=longer), [states[i] for i in able], [rngs[i] for i in able])
            for i, (answer, cpu, wall) in zip(able, answers, strict=True):
                began = clocks()
                states[i] = charged([advanced(self._bounded(states[i], cpu), solver, answer, cpu, wall)], began)[0]
        tick("solvers", len(LADDER), len(LADDER))
        unasked = [not state.solved and next_solver(state, among) is not None for state in states]
        return [replace(state, short=state.short or late) for state, late in zip(states, unasked, strict=True)]

    def _next(self, state: State, among: Collection[type[Any]] | None) -> type[Any] | None:
        """The solver to be asked next; None where nothing is left to find, no solver, or no time.

        Matching that came last is asked again as long as it gains and there is time for as much again.
        """
        if state.solved or (self._left(state) <= 0 and state.answer is not None):
            return None
        solver = next_solver(state, among)
        return state.extra if solver is None and self._left(state) >= state.last else solver

    def _apart(self, state: State, view: Observation, knowledge: Knowledge, rng: torch.Generator) -> State:
        """The state with what the sums of other rounds say of each sender; they tell of the whole sum, proven records included."""
        began, seconds = clocks(), SHARE * self._left(state) / knowledge.num_examples
        if state.solved or not seconds > 0:
            return state
        state = self._bounded(state)
        answer = part_by_part(view, knowledge, replace(self, seconds=seconds), rng=rng)
        assert answer.inputs is not None
        rest = farthest(answer.inputs, [] if state.inside else [item.image for item in state.proven])
        short = state.short or not answer.converged
        return charged([judged(replace(state, short=short), "gradient_disaggregation", answer, rest.tolist())], began)[0]

    def _bounded(self, state: State, spent: float = 0.0) -> State:
        """The state with the CPU time at which its budget ends, once so many seconds more are counted."""
        return replace(state, until=clocks()[0] + self._left(state) - spent)

    def _left(self, state: State) -> float:
        """CPU seconds that are left of the whole upload's budget."""
        return self.seconds * (state.knowledge.num_examples + (0 if state.inside else len(state.proven))) - state.cpu

    def _budget(self, state: State, solver: type[Any]) -> float:
        """CPU seconds for one solver: all that are left for the last that applies, else their share."""
        left = self._left(state)
        if state.answer is None:
            left = max(left, RESERVE * self.seconds * state.knowledge.num_examples)
        if not set(state.able) - state.asked - {solver}:
            return left
        if solver is DLG and LevenbergMarquardt in state.able:
            return max(QUICK * left, min(SCOUT * left, 1.0))
        return (THOROUGH if solver in (DLG, LevenbergMarquardt, Hybrid, SME) else SHARE) * left
