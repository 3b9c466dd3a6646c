"""Langevin noise: each step of an optimizer is jostled, so that it leaves narrow minima."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from attacks._matching.objective import Candidates, Objective, Rows, Values
from attacks._matching.priors import SETTLED


@dataclass
class Jostled:
    """An objective whose projection adds noise first; it falls to 0 in proportion to what is left of :data:`SETTLED` of the run.

    Attributes:
        inner: the objective.
        rngs: one for each row of the full stack, so that no row's noise depends on who else is attacked.
        deviation: of the noise at the start.
        annealed: whether it falls along half a cosine over the whole run, as the steps of an annealed optimizer do.
    """

    inner: Objective
    rngs: list[torch.Generator]
    deviation: float
    annealed: bool = False
    _rows: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    _progress: float = 0.0

    @property
    def restarts(self) -> int:
        """Rows of each victim."""
        return self.inner.restarts

    @property
    def seconds(self) -> float:
        """CPU time for all rows."""
        return self.inner.seconds

    @property
    def settles(self) -> bool:
        """As the objective; the noise itself is not in its values."""
        return self.inner.settles

    @property
    def rates(self) -> Float[Tensor, " freedom"] | None:
        """Factors on the step of Adam."""
        return self.inner.rates

    @property
    def task(self) -> str:
        """What to call the work where progress is shown."""
        return self.inner.task

    def __call__(self, z: Candidates, rows: Rows, progress: float = 1.0) -> Values:
        """Evaluate; the projection that follows is of the same rows."""
        self._rows, self._progress = rows, progress
        return self.inner(z, rows, progress)

    def project(self, z: Candidates) -> Candidates:
        """Add noise and project."""
        left = (1 + math.cos(math.pi * self._progress)) / 2 if self.annealed else max(0.0, 1 - self._progress / SETTLED)
        noise = torch.stack([torch.randn(z.shape[1], generator=self.rngs[int(row)], dtype=z.dtype) for row in self._rows])
        return self.inner.project(z + self.deviation * left * noise)


def langevin(objective: Objective, start: Candidates, *, deviation: float, annealed: bool = False) -> Jostled:
    """Noise whose seed is the start of each row."""
    seeds = [int(row.double().square().sum() * 2**20) % 2**62 for row in start]
    return Jostled(objective, [torch.Generator().manual_seed(seed) for seed in seeds], deviation, annealed)
