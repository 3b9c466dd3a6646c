"""From views to reconstructions: the frame that all gradient-matching attacks share."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import fields

import torch

from attacks._gradient import unusable
from attacks._matching.batch import chunks, rows_at_once
from attacks._matching.normalization import assumed
from attacks._matching.objective import Candidates, Objective, Setting
from attacks._matching.optimize import Run
from attacks._matching.priors import box
from attacks._matching.simulate import Victim, prepare, unroll_length
from attacks.update.labels import unrecoverable
from simulator.adversary import Knowledge, Reconstruction
from simulator.types import Observation

Optimize = Callable[[Objective, Candidates], Run]


class Matching:
    """What makes a frozen dataclass of settings an attack: say what is minimized (``setting``) and how (``optimize``).

    Fields that are whole numbers must be at least 1, other numbers at least 0, step sizes and times above 0.
    """

    name: str

    def setting(self) -> Setting:
        """The parts of the objective."""
        raise NotImplementedError

    def optimize(self, objective: Objective, start: Candidates) -> Run:
        """Minimize it from ``start``."""
        raise NotImplementedError

    def __post_init__(self) -> None:
        for field in fields(self):  # type: ignore[arg-type]
            value, least = getattr(self, field.name), int(isinstance(field.default, int))
            if isinstance(value, int | float) and not value >= least:
                raise ValueError(f"{field.name} must be ≥ {least}, got {value}. The default is {field.default}.")
            if value == 0 and field.name in ("seconds", "learning_rate"):
                raise ValueError(f"{field.name} must be > 0, got {value}. The default is {field.default}.")

    def supports(self, view: Observation, knowledge: Knowledge) -> str | None:
        """Refuse deltas of several steps, and labels that cannot be had."""
        if unroll_length(view, knowledge) > 1:
            return "the update must be a gradient or the delta of one step, got several local steps. Use fedavg_matching"
        return unusable(view, knowledge) or unrecoverable(view, knowledge)

    def __call__(self, view: Observation, knowledge: Knowledge, *, rng: torch.Generator) -> Reconstruction:
        """Attack one victim."""
        return self.many([view], [knowledge], rngs=[rng])[0]

    def many(
        self, views: Sequence[Observation], knowledge: Sequence[Knowledge], *, rngs: Sequence[torch.Generator]
    ) -> list[Reconstruction]:
        """Attack many victims at once."""
        return solve(views, knowledge, rngs, setting=self.setting(), optimize=self.optimize, task=self.name)


def solve(
    views: Sequence[Observation],
    knowledge: Sequence[Knowledge],
    rngs: Sequence[torch.Generator],
    *,
    setting: Setting,
    optimize: Optimize,
    task: str,
    ready: Callable[[Observation, Knowledge], Victim] = prepare,
) -> list[Reconstruction]:
    """Match every view's update, made ready by ``ready``; of a victim's restarts the one of lowest objective is returned."""
    victims = assumed([ready(view, known) for view, known in zip(views, knowledge, strict=True)], setting.normalization)
    found: dict[int, Reconstruction] = {}
    for members in chunks(victims, setting.restarts, memory_mb=setting.memory_mb, dtype=setting.dtype):
        began = time.perf_counter()
        chosen = [victims[i] for i in members]
        objective = Objective(chosen, setting, rows_at_once(chosen[0], memory_mb=setting.memory_mb, dtype=setting.dtype), task)
        run = optimize(objective, objective.start([rngs[i] for i in members]))
        seconds = (time.perf_counter() - began) / len(members)
        for place, index in enumerate(members):
            rows_of_victim = slice(place * setting.restarts, (place + 1) * setting.restarts)
            row = place * setting.restarts + int(run.objective[rows_of_victim].argmin())
            with torch.no_grad():
                inputs, extras = objective.decode(run.best[row])
            labels = setting.client.labels(victims[index], extras)
            found[index] = Reconstruction(
                inputs=box(torch.nan_to_num(inputs, nan=0.5)).float(),
                labels=labels,
                objective=float(run.objective[row]),
                trace=tuple((step, float(values[row])) for step, values in run.trace),
                certificate=("",) * len(labels),
                seconds=seconds,
                converged=run.converged[row],
            )
    return [found[i] for i in range(len(victims))]
