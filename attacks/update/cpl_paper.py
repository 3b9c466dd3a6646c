"""Client Privacy Leakage with the label term of its paper: the yardstick for cpl.

Source: Wei et al., 2020, arXiv:2004.10397, algorithm 2: D = ‖∇W' − ∇W‖² + α·‖f(x', W) − y‖²; github.com/git-disl/CPL_attack,
    LFW_enhanced_random_ASR.ipynb, for the rest, as in cpl, which is that notebook: it leaves the term out.
Deviations: **α is not verified**: neither the notebooks nor what could be read of the paper name it. 1 is that of breaching's
    config/attack/wei.yaml, which takes the cross-entropy instead. f is read as the predicted probabilities. Labels by
    attacks.update.labels. In float64: beside the label term, which stays near 1, float32 does not see the distance of gradients fall below
    1e-7, so that the answer would depend on who else is attacked. The iterate of the lowest objective is returned, clipped to [0, 1].
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from attacks._matching.objective import Setting
from attacks.update.cpl import CPL
from simulator.registry import register


@register("attacks", "cpl-paper")
@dataclass(frozen=True)
class CPLPaper(CPL):
    """Gradient matching by L-BFGS without a line search from a patterned start, with a term for the label: cpl but for that.

    Attributes:
        iterations: calls of torch.optim.LBFGS with its defaults: learning rate 1, 20 steps each.
        task: weight of the squared distance between predicted probabilities and labels, against the squared distance of gradients.
        seconds: CPU time for each victim, at most.
        restarts: random starts for each victim; the lowest objective wins.
        memory_mb: budget for victims and restarts that are attacked at once.
    """

    task: float = 1.0

    def setting(self) -> Setting:
        """That of cpl, in float64."""
        return replace(super().setting(), dtype=torch.float64)
