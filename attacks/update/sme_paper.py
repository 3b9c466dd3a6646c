"""Surrogate model extension with its published settings: the yardstick for sme.

Source: Zhu et al., 2023, arXiv:2306.00127 (ICML); github.com/JunyiZhu-AI/surrogate_model_extension, experiments/configs/cifar_sme.json and
    sme/Adversary/adversary.py: cosine, Adam without sign, 1 for the inputs and 0.001 for α, which starts at 0.5; 1000 iterations, a tenth
    of both steps at 3/8, 5/8 and 7/8; total variation 0.01 of the mean of both directions; N(0, 1), boxed.
Deviations: in our units, where a pixel's range is a quarter of the normalized one, and total variation is the sum of both directions: 0.25
    for 1, and 0.02 for 0.01. The iterate of the lowest objective is returned, where the published code returns the last one. Weight decay
    and FedProx are added at θα. Labels are recovered where they are not known; there they are given. Clients train in eval mode there.
"""

from __future__ import annotations

from dataclasses import dataclass

from attacks._matching.distances import cosine
from attacks._matching.objective import Candidates, Objective, Setting
from attacks._matching.optimize import Run, adam
from attacks._matching.priors import Weighted, variation
from attacks._matching.solve import Matching
from attacks._matching.surrogate import Surrogate
from attacks._matching.variables import Pixels
from attacks.update.sme import SME
from simulator.adversary import Knowledge
from simulator.registry import register
from simulator.types import Observation


@register("attacks", "sme-paper")
@dataclass(frozen=True)
class SMEPaper(Matching):
    """Gradient matching for FedAvg with one gradient a step at a learned point of the segment, as published.

    Attributes:
        alpha: where α starts, 0 to 1.
        alpha_rate: of Adam on α.
        steps: iterations.
        learning_rate: of Adam, in units of the pixel range [0, 1].
        tv: weight of the total variation: mean absolute difference of neighbours, horizontal plus vertical, for pixels in [0, 1], against
            1 − cos of the updates.
        seconds: CPU time for each victim, at most; the schedule is squeezed into it.
        restarts: random starts for each victim; the lowest objective wins.
        memory_mb: budget for victims and restarts that are attacked at once.
    """

    alpha: float = 0.5
    alpha_rate: float = 0.001
    steps: int = 1000
    learning_rate: float = 0.25
    tv: float = 0.02
    seconds: float = 600.0
    restarts: int = 1
    memory_mb: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha > 1:
            raise ValueError(f"alpha must be from 0 to 1, got {self.alpha}. The default is 0.5.")

    def supports(self, view: Observation, knowledge: Knowledge) -> str | None:
        """Refuse gradients, optimizers whose delta is no sum of gradients, and labels that cannot be had."""
        return SME().supports(view, knowledge)

    def setting(self) -> Setting:
        """1 − cos of the delta and one gradient, and total variation of constant weight."""
        return Setting(
            distance=cosine,
            variable=Pixels("normal"),
            client=Surrogate("learned", begin=self.alpha, pace=self.alpha_rate / self.learning_rate),
            priors=(Weighted(variation, self.tv),),
            restarts=self.restarts,
            seconds=self.seconds,
            memory_mb=self.memory_mb,
        )

    def optimize(self, objective: Objective, start: Candidates) -> Run:
        """Adam on pixels and α."""
        return adam(objective, start, steps=self.steps, learning_rate=self.learning_rate)
