"""Client Privacy Leakage: a patterned start, and a term for the label.

Source: Wei et al., 2020, arXiv:2004.10397, algorithm 2; github.com/git-disl/CPL_attack, LFW_enhanced_random_ASR.ipynb, for the optimizer,
    the start (one random square of 16×16 pixels, repeated) and the label (the row of the last layer with the smallest sum).
Deviations: the published notebook leaves the label term of the paper out; here its weight is a setting, and 0 is the notebook; with the
    term: cpl-paper. Labels by attacks.update.labels. The iterate of the lowest objective is returned, clipped to [0, 1].
"""

from __future__ import annotations

from dataclasses import dataclass

from attacks._matching.distances import squared
from attacks._matching.lbfgs import published_lbfgs
from attacks._matching.objective import Candidates, Objective, Setting
from attacks._matching.optimize import Run
from attacks._matching.priors import Weighted, task
from attacks._matching.solve import Matching
from attacks._matching.variables import Pixels
from simulator.registry import register


@register("attacks", "cpl")
@dataclass(frozen=True)
class CPL(Matching):
    """Gradient matching by L-BFGS without a line search from a patterned start.

    Attributes:
        iterations: calls of torch.optim.LBFGS with its defaults: learning rate 1, 20 steps each.
        task: weight of the squared distance between predicted probabilities and labels, against the squared distance of gradients.
        seconds: CPU time for each victim, at most.
        restarts: random starts for each victim; the lowest objective wins.
        memory_mb: budget for victims and restarts that are attacked at once.
    """

    iterations: int = 300
    task: float = 0.0
    seconds: float = 60.0
    restarts: int = 1
    memory_mb: int = 1024

    def setting(self) -> Setting:
        """Squared distance of gradients, and the label term."""
        return Setting(
            distance=squared,
            variable=Pixels("patterned"),
            priors=(Weighted(task, self.task),),
            restarts=self.restarts,
            seconds=self.seconds,
            memory_mb=self.memory_mb,
        )

    def optimize(self, objective: Objective, start: Candidates) -> Run:
        """L-BFGS without a line search."""
        return published_lbfgs(objective, start, outer=self.iterations)
