"""Inverting Gradients for FedAvg with its published settings: the yardstick for fedavg_matching.

Source: Geiping et al., 2020, arXiv:2003.14053, section 6 (federated averaging); github.com/JonasGeiping/invertinggradients for the
    settings: reconstruct_image.py for ``accumulation > 0``: cosine of the delta, signed Adam, 0.1, 4000 iterations, a tenth of the step at
    3/8, 5/8 and 7/8, no total variation, N(0, 1), boxed.
Deviations: in our units, where a pixel's range is a quarter of the normalized one: 0.025 for 0.1. The authors' clients take all records
    in each step, or batches in an order that the attack knows (rec_mult.py); here the order of the dummies is taken for that order, and
    momentum, decay and whatever else the recipe says are simulated. The iterate of the lowest objective is returned, where the published
    code returns the last one. Labels are recovered where they are not known.
"""

from __future__ import annotations

from dataclasses import dataclass

from attacks.update.fedavg_matching import FedAvgMatching
from attacks.update.inverting_gradients_paper import InvertingGradientsPaper
from simulator.adversary import Knowledge
from simulator.registry import register
from simulator.types import Observation


@register("attacks", "fedavg_matching-paper")
@dataclass(frozen=True)
class FedAvgMatchingPaper(InvertingGradientsPaper):
    """Gradient matching through the unrolled local steps of FedAvg: cosine and signed Adam, as published.

    What is minimized is that of inverting_gradients-paper; the client that follows the recipe step by step is the default one.

    Attributes:
        steps: iterations.
        learning_rate: of signed Adam, in units of the pixel range [0, 1].
        tv: weight of the total variation, see inverting_gradients-paper.
        seconds: CPU time for each victim, at most; the schedule is squeezed into it.
        restarts: random starts for each victim; the lowest objective wins.
        memory_mb: budget for victims and restarts that are attacked at once.
        max_unroll: longest local training to differentiate through.
    """

    steps: int = 4000
    tv: float = 0.0
    max_unroll: int = 64

    def supports(self, view: Observation, knowledge: Knowledge) -> str | None:
        """Refuse gradients, longer unrolls, and labels that cannot be had."""
        return FedAvgMatching(order="fixed", max_unroll=self.max_unroll).supports(view, knowledge)
