"""Adam on rows of candidates, and what all optimizers share: a budget of CPU time, successive halving, the end of a run."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attacks._matching.objective import Candidates, Rows, Values
from attacks._matching.priors import SETTLED
from simulator.progress import tick

TRACE_POINTS = 20
DECAYS = (3 / 8, 5 / 8, 7 / 8)
CULLS = (1 / 8, 1 / 4, 1 / 2)
"""Shares of a run after which the worse half of the restarts ends (successive halving; Jamieson and Talwalkar, 2016,
arXiv:1502.07943): eight of them cost 2.5 times one."""
STILL_FALLING = 0.05
"""Relative improvement over a tenth of the run that counts as not yet converged."""
SOLVED = {torch.float64: 1e-22, torch.float32: 1e-13}
"""Scale-free distance below which a precision has nothing left to match."""


class Problem(Protocol):
    """What an optimizer asks of an objective."""

    @property
    def restarts(self) -> int:
        """Rows of each victim, neighbours in the stack."""

    @property
    def seconds(self) -> float:
        """CPU time for all rows."""

    @property
    def settles(self) -> bool:
        """Whether values of different steps cannot be compared until :data:`SETTLED` of the run."""

    @property
    def rates(self) -> Float[Tensor, " freedom"] | None:
        """Factors on the step of Adam."""

    @property
    def task(self) -> str:
        """What to call the work where progress is shown."""

    def project(self, z: Candidates) -> Candidates:
        """The nearest allowed rows."""

    def __call__(self, z: Candidates, rows: Rows, progress: float = 1.0) -> Values:
        """Evaluate."""


@dataclass(frozen=True)
class Run:
    """Where a run ended, row by row.

    Attributes:
        best: the iterate of lowest objective; the start where the objective never was a number.
        objective: at ``best``; infinite where it never was a number, and for restarts that were given up.
        trace: (step, objective of each row) pairs.
        converged: whether the objective had flattened.
    """

    best: Candidates
    objective: Float[Tensor, " rows"]
    trace: tuple[tuple[int, Float[Tensor, " rows"]], ...]
    converged: tuple[bool, ...]


class Clock:
    """How far a run is: by its steps, or by its CPU time where that runs out first.

    Until time runs short the share done is a function of the steps alone, so that results do not depend on the machine. When it
    does, the rest of the run is squeezed into what is left, so that schedules still complete.
    """

    def __init__(self, steps: int, seconds: float) -> None:
        self.steps, self.seconds = steps, seconds
        self.done, self.progress = 0, 0.0
        self.began = self.before = time.process_time()
        self.pace = 0.0

    @property
    def over(self) -> bool:
        """Whether steps or time are used up; the first step is always taken."""
        return self.done >= self.steps or self.progress >= 1 - 1e-9 or (self.done > 0 and self.spent > self.seconds)

    @property
    def spent(self) -> float:
        """CPU seconds so far."""
        return time.process_time() - self.began

    def advance(self) -> None:
        """Count one step."""
        now = time.process_time()
        took, self.before = now - self.before, now
        # the first step compiles and allocates: it says nothing about those to come
        self.pace = 0.0 if self.done == 0 else took if self.done == 1 else 0.9 * self.pace + 0.1 * took
        self.done += 1
        share = 1 / self.steps
        if self.pace:
            left = max(1.0, (self.seconds - (now - self.began)) / self.pace)
            share = max(share, (1 - self.progress) / left)
        self.progress += share


def survivors(scores: Float[Tensor, " rows"], rows: Rows, restarts: int, keep: int) -> Bool[Tensor, " rows"]:
    """Which rows go on: the ``keep`` of each victim with the lowest scores; NaN counts as worst."""
    scores = torch.nan_to_num(scores, nan=torch.inf, posinf=torch.inf)
    chosen = torch.zeros_like(rows, dtype=torch.bool)
    for owner in sorted(set((rows // restarts).tolist())):
        members = (rows // restarts == owner).nonzero().flatten()
        chosen[members[scores[members].argsort(stable=True)[:keep]]] = True
    return chosen


def quota(restarts: int, progress: float) -> int:
    """Restarts of each victim that are still running at this share of the run."""
    halvings = sum(progress >= cull for cull in CULLS)
    return max(1, -(-restarts // (1 << halvings)))


def adam(
    objective: Problem,
    start: Candidates,
    *,
    steps: int,
    learning_rate: float,
    signed: bool = False,
    decays: tuple[float, ...] = DECAYS,
    annealed: bool = False,
    halving: bool = True,
) -> Run:
    """Adam on every row, projected after each step; the step size falls to a tenth at each of ``decays``.

    ``signed`` takes the sign of the gradient first, as Geiping et al. do. ``annealed`` lets the step size fall to 0 along half a cosine
    instead (Loshchilov and Hutter, 2017, arXiv:1608.03983). Without ``halving`` all restarts go on to the end.

    Where weights of priors move, objectives of different steps cannot be compared, so the best iterate is that of the last eighth
    (of the whole run where they never move), and its objective is the one under the final weights.

    Converged means that the distance of the updates, without priors, fell by less than 5 % over the tenth of the run before the
    second decay. Later the steps are so small that any objective is flat, so the end of the run proves nothing.
    """
    rows, clock = torch.arange(len(start)), Clock(steps, objective.seconds)
    value = torch.full((len(start),), torch.inf)
    x, first, second = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    best, lowest = start.clone(), torch.full((len(start),), torch.inf, dtype=start.dtype)
    settled, solved = not objective.settles, False
    watched = decays[1] if len(decays) > 1 else 1.0
    matches: list[tuple[float, Float[Tensor, " rows"]]] = []
    trace: list[tuple[int, Float[Tensor, " rows"]]] = []
    while not clock.over and not solved:
        step, progress = clock.done, clock.progress
        keep = quota(objective.restarts, progress) if halving else objective.restarts
        if step and len(rows) > len(start) // objective.restarts * keep:
            kept = survivors(value, rows, objective.restarts, keep)
            lowest[rows[~kept]] = torch.inf
            rows, x, first, second = rows[kept], x[kept], first[kept], second[kept]
        if not settled and progress >= SETTLED:
            settled, lowest = True, torch.full_like(lowest, torch.inf)
        value, match, gradient = objective(x, rows, progress)
        better = value < lowest[rows] if settled else torch.isfinite(value)  # both False for NaN
        lowest[rows[better]] = value[better]
        best[rows[better]] = x[better]
        if watched - 0.1 <= progress <= watched:
            matches.append((progress, spread(match, rows, len(start))))
        if step % max(1, steps // TRACE_POINTS) == 0:
            trace.append((step, spread(value, rows, len(start))))
        if step % 10 == 0:
            tick(objective.task, int(progress * steps), steps, f"objective {float(value.mean()):.2e}")
        solved = bool((match < SOLVED[start.dtype]).all())
        slope = torch.nan_to_num(gradient)
        slope = slope.sign() if signed else slope
        first = 0.9 * first + 0.1 * slope
        second = 0.999 * second + 0.001 * slope.square()
        share = (1 + math.cos(math.pi * progress)) / 2 if annealed else 0.1 ** sum(progress >= decay - 1e-9 for decay in decays)
        rate = learning_rate * share
        direction = (first / (1 - 0.9 ** (step + 1))) / ((second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
        x = objective.project(x - rate * (direction if objective.rates is None else objective.rates * direction))
        clock.advance()
    if not trace or trace[-1][0] != clock.done - 1:
        trace.append((clock.done - 1, spread(value, rows, len(start))))
    tick(objective.task, steps, steps, f"objective {float(lowest[rows].mean()):.2e}")
    flat = flattened([match for _, match in matches], len(start))
    return Run(best, lowest, tuple(trace), tuple(((flat | solved) & torch.isfinite(lowest)).tolist()))


def spread(values: Float[Tensor, " some"], rows: Rows, count: int) -> Float[Tensor, " rows"]:
    """Values of the rows that still run, in the full stack; infinite elsewhere."""
    full = torch.full((count,), torch.inf, dtype=values.dtype)
    full[rows] = values
    return full


def flattened(matches: list[Float[Tensor, " rows"]], count: int) -> Bool[Tensor, " rows"]:
    """Whether the distance fell by less than 5 % from the first to the second half of this stretch; halves, since signs jitter."""
    if len(matches) < 4:
        return torch.zeros(count, dtype=torch.bool)
    half = len(matches) // 2
    before, after = torch.stack(matches[:half]).mean(0), torch.stack(matches[half:]).mean(0)
    return (before - after) < STILL_FALLING / 2 * before
