"""Signed Adam on rows of candidates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attacks._matching.batch import Candidates, Objective, Rows
from attacks._matching.priors import box, roughness
from simulator.progress import tick

Evaluate = Callable[[Candidates, Rows], tuple[Float[Tensor, " rows"], Candidates]]

TRACE_POINTS = 20
DECAYS = (3 / 8, 5 / 8, 7 / 8)
STILL_FALLING = 0.05
"""Relative improvement over a tenth of the run that counts as not yet converged."""


@dataclass(frozen=True)
class Run:
    """Where a run ended, row by row.

    Attributes:
        best: the iterate of lowest objective; the start where the objective never was a number.
        objective: at ``best``; infinite where it never was a number.
        trace: (step, objective of each row) pairs.
        converged: whether the objective had flattened.
    """

    best: Candidates
    objective: Float[Tensor, " rows"]
    trace: tuple[tuple[int, Float[Tensor, " rows"]], ...]
    converged: tuple[bool, ...]


def signed_adam(evaluate: Objective, start: Candidates, *, steps: int, learning_rate: float, final_prior: float = 1.0, task: str) -> Run:
    """Adam on the sign of the gradient, projected to [0, 1]; the step falls to a tenth at 3/8, 5/8 and 7/8 of the run.

    The weight of the prior falls geometrically to ``final_prior`` times its first value at 7/8 of the run and then stays. While it
    moves, objectives of different steps cannot be compared, so the best iterate is that of the last eighth (of the whole run where
    the weight never moves), and its objective is the one under the final weight.

    Converged means that the distance of the updates, without the prior, fell by less than 5 % over the tenth of the run before the
    second decay. Later the steps are so small that any objective is flat, so the end of the run proves nothing.
    """
    rows = torch.arange(len(start))
    x, first, second = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    best, lowest = start.clone(), torch.full((len(start),), torch.inf)
    matches, trace = [], []
    for step in range(steps):
        prior = final_prior ** min(1.0, step / (DECAYS[2] * steps))
        value, gradient = evaluate(x, rows, prior)
        better = torch.isfinite(value) if prior > final_prior else value < lowest  # both False for NaN
        lowest = torch.where(better, value, lowest)
        best[better] = x[better]
        if DECAYS[1] - 0.1 <= step / steps <= DECAYS[1]:
            matches.append(value - prior * evaluate.tv * row_roughness(x))
        if step % max(1, steps // TRACE_POINTS) == 0 or step == steps - 1:
            trace.append((step, value))
        if step % 10 == 0:
            tick(task, step, steps, f"objective {float(value.mean()):.2e}")
        sign = torch.nan_to_num(gradient).sign()
        first = 0.9 * first + 0.1 * sign
        second = 0.999 * second + 0.001 * sign.square()
        rate = learning_rate * 0.1 ** sum(step >= decay * steps for decay in DECAYS)
        direction = (first / (1 - 0.9 ** (step + 1))) / ((second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
        x = box(x - rate * direction)
    tick(task, steps, steps, f"objective {float(lowest.mean()):.2e}")
    return Run(best, lowest, tuple(trace), tuple((flattened(matches) & torch.isfinite(lowest)).tolist()))


def row_roughness(x: Candidates) -> Float[Tensor, " rows"]:
    """Roughness of each candidate."""
    return torch.stack([roughness(row) for row in x])


def flattened(matches: list[Float[Tensor, " rows"]]) -> Bool[Tensor, " rows"]:
    """Whether the distance fell by less than 5 % from the first to the second half of this stretch; halves, since signs jitter."""
    if len(matches) < 4:
        return torch.zeros_like(matches[0], dtype=torch.bool) if matches else torch.tensor(False)
    half = len(matches) // 2
    before, after = torch.stack(matches[:half]).mean(0), torch.stack(matches[half:]).mean(0)
    return (before - after) < STILL_FALLING / 2 * before
