"""Deep Leakage from Gradients, with a line search.

Source: Zhu et al., 2019, arXiv:1906.08935, algorithm 1: L-BFGS on the squared distance of gradients. Labels as in Zhao et al., 2020,
    arXiv:2001.02610 (iDLG): recovered first, not optimized.
Deviations: strong-Wolfe line search, float64, gradients compared as unit vectors (clipping changes nothing), no stopping tolerance,
    start in [0, 1]. upload.buffers (BatchNorm statistics after training) are not used, though a server sees them.
    On the sigmoid LeNet, 32×32×3, the published optimizer stops at 24.5 / 18.5 / 12.9 dB where these reach 39.6 / 33.9 / 33.5 dB.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from attacks._gradient import not_finite
from attacks._matching.batch import Candidates, Objective
from attacks._matching.lbfgs import lbfgs
from attacks._matching.optimize import Run
from attacks._matching.simulate import unroll_length
from attacks._matching.solve import Setting, solve
from attacks.update.labels import unrecoverable
from simulator.adversary import Knowledge, Reconstruction
from simulator.registry import register
from simulator.types import Observation


@register("attacks", "dlg")
@dataclass(frozen=True)
class DLG:
    """Gradient matching by L-BFGS in float64, for smooth networks of small images.

    Attributes:
        evaluations: of the objective and its gradient, at most, for each restart.
        restarts: random starts for each victim; the lowest objective wins.
        history: remembered pairs of L-BFGS.
        memory_mb: budget for victims and restarts that are attacked at once.
    """

    evaluations: int = 1200
    restarts: int = 1
    history: int = 100
    memory_mb: int = 1024

    def __post_init__(self) -> None:
        for name in ("evaluations", "restarts", "history", "memory_mb"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be ≥ 1, got {getattr(self, name)}. The default is {type(self).__dict__[name]}.")

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
            return lbfgs(objective, start, evaluations=self.evaluations, history=self.history, task="dlg")

        setting = Setting("l2", 0.0, self.restarts, torch.float64, self.memory_mb)
        return solve(views, knowledge, rngs, setting=setting, optimize=optimize)
