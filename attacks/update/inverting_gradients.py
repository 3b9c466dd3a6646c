"""Inverting Gradients: the cosine of gradients, total variation, and Adam on signs.

Source: Geiping et al., 2020, arXiv:2003.14053, equation 4 and section 4; github.com/JonasGeiping/invertinggradients for the schedule.
Deviations: see the class; to be measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from attacks._gradient import not_finite
from attacks._matching.batch import Candidates, Objective
from attacks._matching.optimize import Run, signed_adam
from attacks._matching.simulate import unroll_length
from attacks._matching.solve import Setting, solve
from attacks.update.labels import unrecoverable
from simulator.adversary import Knowledge, Reconstruction
from simulator.registry import register
from simulator.types import Observation


@register("attacks", "inverting_gradients")
@dataclass(frozen=True)
class InvertingGradients:
    """Gradient matching by cosine with total variation and signed Adam, for ReLU networks.

    Attributes:
        steps: iterations.
        learning_rate: of signed Adam, in units of the pixel range [0, 1]; the paper's 0.1 is per unit of normalized input.
        tv: weight of the total variation, mean absolute difference of neighbours on the scale of [0, 1].
        restarts: random starts for each victim; the lowest objective wins.
        memory_mb: budget for victims and restarts that are attacked at once.
    """

    steps: int = 1000
    learning_rate: float = 0.1
    tv: float = 4e-3
    restarts: int = 1
    memory_mb: int = 1024

    def __post_init__(self) -> None:
        for name in ("steps", "restarts", "memory_mb"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be ≥ 1, got {getattr(self, name)}. The default is {type(self).__dict__[name]}.")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be > 0, got {self.learning_rate}. The default is 0.1.")
        if not self.tv >= 0:
            raise ValueError(f"tv must be ≥ 0, got {self.tv}. Use 0 for no total variation.")

    def supports(self, view: Observation, knowledge: Knowledge) -> str | None:
        """Refuse deltas of several steps, and labels that cannot be had."""
        if unroll_length(view, knowledge) > 1:
            return "the update must be a gradient or the delta of one step, got several local steps. Use fedavg_matching"
        return not_finite(view) or unrecoverable(view, knowledge)

    def __call__(self, view: Observation, knowledge: Knowledge, *, rng: torch.Generator) -> Reconstruction:
        """Attack one victim."""
        return self.many([view], [knowledge], rngs=[rng])[0]

    def many(
        self, views: Sequence[Observation], knowledge: Sequence[Knowledge], *, rngs: Sequence[torch.Generator]
    ) -> list[Reconstruction]:
        """Attack many victims at once."""

        def optimize(objective: Objective, start: Candidates) -> Run:
            return signed_adam(objective, start, steps=self.steps, learning_rate=self.learning_rate, task="inverting_gradients")

        setting = Setting("cosine", self.tv, self.restarts, torch.float32, self.memory_mb)
        return solve(views, knowledge, rngs, setting=setting, optimize=optimize)
