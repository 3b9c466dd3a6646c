"""Gradient matching for FedAvg: the simulated client runs the whole recipe, and the attack differentiates through it.

Source: Geiping et al., 2020, arXiv:2003.14053, section 5 (unrolled local updates); Dimitrov et al., 2022, arXiv:2206.12395.
Deviations: the client's shuffling is unknown, so the dummies keep one assumed order in all epochs, where Dimitrov et al. optimize
    separate variables for each epoch under an order-invariant prior. Several senders are one client with larger batches.
    The defaults and the prior are those of inverting_gradients, not tuned for FedAvg. upload.buffers (BatchNorm statistics after training)
    are not used, though a server sees them.
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


@register("attacks", "fedavg_matching")
@dataclass(frozen=True)
class FedAvgMatching:
    """Gradient matching through the unrolled local steps of FedAvg: cosine, total variation, signed Adam.

    Attributes:
        steps: iterations.
        learning_rate: of signed Adam, in units of the pixel range [0, 1]; the paper's 0.1 is in normalized units, about 0.025 here.
        tv: weight of the total variation at the start: mean absolute difference of neighbours, horizontal plus vertical, for pixels in
            [0, 1], against the angle between the updates in radians. With three channels, that of their differences is added.
        tv_final: weight at 7/8 of the run, reached geometrically; equal to ``tv`` keeps it constant.
        restarts: random starts for each victim; the lowest objective wins.
        max_unroll: longest local training to differentiate through.
        memory_mb: budget for victims and restarts that are attacked at once.
    """

    steps: int = 1000
    learning_rate: float = 0.1
    tv: float = 0.3
    tv_final: float = 0.02
    restarts: int = 1
    max_unroll: int = 64
    memory_mb: int = 1024

    def __post_init__(self) -> None:
        for name in ("steps", "restarts", "max_unroll", "memory_mb"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be ≥ 1, got {getattr(self, name)}. The default is {type(self).__dict__[name]}.")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be > 0, got {self.learning_rate}. The default is 0.1.")
        if not 0 <= self.tv_final <= self.tv or (self.tv > 0) != (self.tv_final > 0):
            raise ValueError(f"tv must be ≥ tv_final > 0, or both 0, got {self.tv} and {self.tv_final}. Set both; 0 is no total variation.")

    def supports(self, view: Observation, knowledge: Knowledge) -> str | None:
        """Refuse gradients, unrolls longer than ``max_unroll``, and labels that cannot be had."""
        if view.upload.update.kind != "delta":
            return "the update must be a delta, got a gradient. Use inverting_gradients"
        if (length := unroll_length(view, knowledge)) > self.max_unroll:
            return f"the client must take at most max_unroll = {self.max_unroll} local steps, got {length}. Raise it; memory grows too"
        return not_finite(view) or unrecoverable(view, knowledge)

    def __call__(self, view: Observation, knowledge: Knowledge, *, rng: torch.Generator) -> Reconstruction:
        """Attack one victim."""
        return self.many([view], [knowledge], rngs=[rng])[0]

    def many(
        self, views: Sequence[Observation], knowledge: Sequence[Knowledge], *, rngs: Sequence[torch.Generator]
    ) -> list[Reconstruction]:
        """Attack many victims at once."""

        def optimize(objective: Objective, start: Candidates) -> Run:
            final_prior = self.tv_final / self.tv if self.tv else 1.0
            return signed_adam(
                objective, start, steps=self.steps, learning_rate=self.learning_rate, final_prior=final_prior, task="fedavg_matching"
            )

        setting = Setting("angle", self.tv, self.restarts, torch.float32, self.memory_mb)
        return solve(views, knowledge, rngs, setting=setting, optimize=optimize)
