"""From views to reconstructions: the frame that all gradient-matching attacks share."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attacks._matching.batch import Candidates, Objective, chunks, rows_at_once
from attacks._matching.objective import Distance
from attacks._matching.optimize import Run
from attacks._matching.priors import box
from attacks._matching.simulate import prepare
from simulator.adversary import Knowledge, Reconstruction
from simulator.types import Observation

Optimize = Callable[[Objective, Candidates], Run]


@dataclass(frozen=True)
class Setting:
    """What is minimized, for how many restarts, in which precision and memory."""

    distance: Distance
    tv: float
    restarts: int
    dtype: torch.dtype
    memory_mb: int


def uniform_start(rng: torch.Generator, restarts: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Restarts of one victim, uniform in [0, 1], from its own generator: independent of who else is attacked."""
    return torch.rand(restarts, *shape, generator=rng, dtype=dtype)


def solve(
    views: Sequence[Observation],
    knowledge: Sequence[Knowledge],
    rngs: Sequence[torch.Generator],
    *,
    setting: Setting,
    optimize: Optimize,
) -> list[Reconstruction]:
    """Match every view's update; of a victim's restarts the one of lowest objective is returned."""
    victims = [prepare(view, known) for view, known in zip(views, knowledge, strict=True)]
    found: dict[int, Reconstruction] = {}
    for members in chunks(victims, setting.restarts, memory_mb=setting.memory_mb, dtype=setting.dtype):
        began = time.perf_counter()
        chosen = [victims[i] for i in members]
        rows = rows_at_once(chosen[0], memory_mb=setting.memory_mb, dtype=setting.dtype)
        objective = Objective(chosen, setting.restarts, setting.distance, setting.tv, setting.dtype, rows)
        shape = (len(chosen[0].labels), *chosen[0].shape)
        start = torch.cat([uniform_start(rngs[i], setting.restarts, shape, setting.dtype) for i in members])
        run = optimize(objective, start)
        seconds = (time.perf_counter() - began) / len(members)
        for place, index in enumerate(members):
            rows_of_victim = slice(place * setting.restarts, (place + 1) * setting.restarts)
            row = place * setting.restarts + int(run.objective[rows_of_victim].argmin())
            found[index] = Reconstruction(
                inputs=box(run.best[row]).float(),
                labels=victims[index].labels,
                objective=float(run.objective[row]),
                trace=tuple((step, float(values[row])) for step, values in run.trace),
                certificate=("",) * len(victims[index].labels),
                seconds=seconds,
                converged=run.converged[row],
            )
    return [found[i] for i in range(len(victims))]
