"""Deep Leakage from Gradients, with a line search.

Source: Zhu et al., 2019, arXiv:1906.08935, algorithm 1: L-BFGS on the squared distance of gradients. Labels as in Zhao et al., 2020,
    arXiv:2001.02610 (iDLG): recovered first, not optimized.
Deviations: strong-Wolfe line search, float64, gradients compared as unit vectors (clipping changes nothing), no stopping tolerance.
    The numbers that L-BFGS moves are cosine coefficients, scaled by the fall of natural spectra, from a gray start
    (attacks._matching.spectrum). upload.buffers (BatchNorm statistics after training) are not used, though a server sees them.
    What all of this together is worth beside the published settings: claim B13; of single parts nothing is claimed. Tried and not taken:
    squared distances relative to each tensor's, or to its root.
    Dropout masks that are not read off are optimized along (Scheliga et al., 2022, arXiv:2208.06163), unbounded: claims dropout-joint
    and dropout-read.
    The search stops at the rounding of the update; a solved victim of up to 1500 unknowns is certified like Levenberg–Marquardt's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from attacks._dropout import layers as dropping_layers
from attacks._gradient import maybe_clipped
from attacks._matching.client import Recipe
from attacks._matching.distances import l2
from attacks._matching.lbfgs import lbfgs
from attacks._matching.masks import Masked
from attacks._matching.objective import Candidates, Objective, Setting
from attacks._matching.optimize import SOLVED, Run
from attacks._matching.simulate import prepare
from attacks._matching.solve import Matching
from attacks._matching.spectrum import Spectrum
from attacks._second_order.proof import RADIUS, ROUNDING, error_bound
from attacks._second_order.residual import Residual
from simulator.adversary import Knowledge, Reconstruction
from simulator.registry import register
from simulator.types import Observation

PROOF = "unique match"
PROVABLE = 1500
"""Unknowns up to which a proof costs less than the search."""


@register("attacks", "dlg")
@dataclass(frozen=True)
class DLG(Matching):
    """Gradient matching by L-BFGS in float64, for smooth networks of small images.

    Attributes:
        evaluations: of the objective and its gradient, at most, for each restart.
        seconds: CPU time for each victim, at most.
        restarts: random starts for each victim; the lowest objective wins.
        history: remembered pairs of L-BFGS.
        memory_mb: budget for victims and restarts that are attacked at once.
        masks: of dropout that the upload does not give away: ``joint`` optimizes them along; ``expected`` drops nothing.
    """

    evaluations: int = 6000
    seconds: float = 40.0
    restarts: int = 1
    history: int = 100
    memory_mb: int = 1024
    masks: Literal["joint", "expected"] = "joint"

    def setting(self) -> Setting:
        """Directions of gradients, in float64."""
        return Setting(
            distance=l2,
            variable=Spectrum(),
            client=Masked() if self.masks == "joint" else Recipe(),
            restarts=self.restarts,
            dtype=torch.float64,
            seconds=self.seconds,
            memory_mb=self.memory_mb,
        )

    def optimize(self, objective: Objective, start: Candidates) -> Run:
        """L-BFGS with a line search."""
        solved = SOLVED[objective.victims[0].target.dtype]
        return lbfgs(objective, start, evaluations=self.evaluations, history=self.history, solved=solved)

    def many(
        self, views: Sequence[Observation], knowledge: Sequence[Knowledge], *, rngs: Sequence[torch.Generator]
    ) -> list[Reconstruction]:
        """Attack many victims at once, and certify those that are solved."""
        answers = super().many(views, knowledge, rngs=rngs)
        return [
            replace(answer, certificate=(PROOF,) * len(answer.labels)) if proven(view, known, answer, rng) else answer
            for view, known, answer, rng in zip(views, knowledge, answers, rngs, strict=True)
        ]


def proven(view: Observation, knowledge: Knowledge, answer: Reconstruction, rng: torch.Generator) -> bool:
    """Whether the answer explains the update to rounding, and nothing else nearby does."""
    assert answer.inputs is not None
    if not 2 * answer.objective < ROUNDING**2 or answer.inputs.numel() > PROVABLE:
        return False
    residual = Residual(prepare(view, replace(knowledge, labels=answer.labels)), maybe_clipped(view, knowledge))
    if dropping_layers(residual.victim.model):
        return False  # other masks explain it with another picture
    return error_bound(residual, answer.inputs, rng=rng) <= RADIUS
