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
from math import prod
from typing import Any

import torch

from attacks._gradient import noise_level, unusable
from attacks._learned.train import compression
from attacks._second_order.smoothness import is_smooth
from attacks._solving import State, after, merged
from attacks.update.april import April
from attacks.update.cocktail_party import CocktailParty
from attacks.update.dlg import DLG
from attacks.update.fedavg_matching import FedAvgMatching
from attacks.update.hybrid import Hybrid
from attacks.update.inverting_gradients import InvertingGradients
from attacks.update.learning_to_invert import LearningToInvert
from attacks.update.levenberg_marquardt import LevenbergMarquardt
from attacks.update.linear_leak import LinearLeak
from attacks.update.multi_round_matching import MultiRoundMatching
from attacks.update.r_gap import RGap
from attacks.update.sme import SME
from attacks.update.sparse_factorization import SparseFactorization
from simulator.adversary import Attack, BatchedAttack, Knowledge, Reconstruction
from simulator.progress import tick
from simulator.registry import register
from simulator.types import Observation

LADDER: tuple[type[Any], ...] = (
    CocktailParty,
    LinearLeak,
    SparseFactorization,
    April,
    RGap,
    DLG,
    LevenbergMarquardt,
    Hybrid,
    MultiRoundMatching,
    LearningToInvert,
    InvertingGradients,
    SME,
    FedAvgMatching,
)
"""Strongest per second first: what can be exact, then gradient matching."""

EXACT = (LinearLeak, SparseFactorization, CocktailParty, April, RGap, DLG, LevenbergMarquardt, Hybrid)
"""Solvers that explain an update to its last digits: under noise they explain the noise."""

NOISE = 0.01
"""Norm of the noise relative to the update's, beyond which solvers of that kind lose to matching under a prior."""

HIDDEN = 0.7
"""The same, beyond which matching under a prior loses to an inverter learned from public records. ConvNet, photographs: at 0.24 25.2 dB
learned and 26.5 matched, at 0.93 22.8 and 21.8; LeNet, faces: at 0.1 18.7 and 30.7, at 0.7 18.1 and 12.7; one victim each."""

PRUNED = 0.1
"""Share of coordinates that are left, below which an update counts as hidden, too."""

BLIND = 32
"""Records up to which linear_leak and sparse_factorization, which start by chance, need no help; beyond, cocktail_party takes the place
of the latter: of 64 photographs at 512 neurons none against all in 3 CPU seconds. It comes first, since it needs the update as it came:
what is left of it once others took records out has their rounding in it."""

FORMED = 5000
"""Unknowns up to which levenberg_marquardt forms its normal equations in its default memory; without, it is far behind dlg: 14 dB
against 19 and 21 on batches of eight photographs in 15 CPU seconds."""

SHARE = 0.5
"""Of the budget that is left, what one solver may take while others wait; the last takes all."""

THOROUGH = 0.8
"""The same for Levenberg–Marquardt, which ends what L-BFGS began, or not at all; for hybrid, whose last steps are its
best; and for sme, which makes more of its time than matching through all local steps."""

QUICK = 0.2
"""The same for L-BFGS, which solves what is well conditioned in a fraction of Levenberg–Marquardt's time, and else gives it its start."""

SCOUT = 0.6
"""The same for L-BFGS where that is less than a second."""


def refusal(solver: Attack, view: Observation, knowledge: Knowledge) -> str | None:
    """Why a solver is not asked: its own reason, or that another is stronger wherever both apply."""
    level = noise_level(view, knowledge)
    if isinstance(solver, EXACT) and level > NOISE:
        return f"the noise must be at most {NOISE:.0%} of the update to be explained exactly, got {level:.0%} by the known defenses"
    reason = solver.supports(view, knowledge)
    return stronger(solver, view, knowledge, level) if reason is None else reason


def hidden(view: Observation, knowledge: Knowledge, level: float) -> bool:
    """Whether public records say more than the update: under strong noise, or where signs or few coordinates are all that is left."""
    if LearningToInvert().supports(view, knowledge) is not None or MultiRoundMatching().supports(view, knowledge) is None:
        return False
    if level > HIDDEN:
        return True
    tensors, seen = view.upload.update.tensors, compression(view, knowledge)
    if len(seen) < len(tensors):
        return False
    kept = sum(tensor.numel() if seen[name].kept is None else int(seen[name].kept or 0) for name, tensor in tensors.items())
    return kept <= PRUNED * sum(tensor.numel() for tensor in tensors.values()) or all(how.levels == 1 for how in seen.values())


def stronger(solver: Attack, view: Observation, knowledge: Knowledge, level: float) -> str | None:
    """Which other solver makes this one, which applies too, superfluous."""
    if isinstance(solver, LearningToInvert) != hidden(view, knowledge, level):
        if isinstance(solver, LearningToInvert):
            return f"the update must be hidden by noise over {HIDDEN:.0%} of it, signs or pruning, got one that matching sees more in"
        return "the update must not be hidden by noise, signs or pruning where public records are held. learning_to_invert uses them"
    many, starts_by_chance = knowledge.num_examples > BLIND, isinstance(solver, SparseFactorization)
    if many and starts_by_chance and CocktailParty().supports(view, knowledge) is None:
        return f"the records must be ≤ {BLIND} for starts by chance, got {knowledge.num_examples}. cocktail_party has better ones"
    if isinstance(solver, CocktailParty) and knowledge.num_examples == 1:
        return "the records must be > 1 to be mixed, got 1. linear_leak divides it out"
    if isinstance(solver, CocktailParty) and not many and SparseFactorization().supports(view, knowledge) is None:
        return f"the records must be > {BLIND} for chance to need help, got {knowledge.num_examples}. sparse_factorization finds them"
    alone = isinstance(solver, InvertingGradients) and not isinstance(solver, MultiRoundMatching)
    if alone and MultiRoundMatching().supports(view, knowledge) is None:
        return "one round must be all that shows the records, got several. multi_round_matching uses them all"
    smooth = is_smooth(knowledge, view.broadcast)
    if isinstance(solver, DLG) and not smooth:
        return "the network must be smooth, got kinks such as ReLU's, at which L-BFGS on the gradient of a gradient stalls"
    if isinstance(solver, LevenbergMarquardt) and (unknowns := knowledge.num_examples * prod(knowledge.schema.shape)) > FORMED:
        return f"the unknowns must be ≤ {FORMED} for normal equations, got {unknowns}. dlg makes more of its time"
    solvable = knowledge.num_examples * prod(knowledge.schema.shape) <= FORMED
    if alone and smooth and solvable and level <= NOISE and DLG().supports(view, knowledge) is None:
        return "the network must have kinks, got a smooth one, at which L-BFGS sees more than the signs of first-order steps"
    return None


def applicable(view: Observation, knowledge: Knowledge) -> tuple[type[Any], ...]:
    """The solvers that apply to a view, in order."""
    return tuple(solver for solver in LADDER if refusal(solver(), view, knowledge) is None)


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
        reasons = {solver.name: refusal(solver(), view, knowledge) for solver in LADDER}
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
