"""The surrogate client: one gradient at a point on the segment from the broadcast to the uploaded parameters."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from attacks._gradient import reach
from attacks._matching.client import Recipe, Trial
from attacks._matching.simulate import Span, Victim, run_recipe
from simulator.types import LocalTraining, Tensors

Point = Literal["learned", "center", "broadcast"]

PACE = 0.01
"""Step of α in units of the step of a pixel: 0.001 beside 0.1, as Zhu et al. have 0.001 beside 1 in normalized units."""


def center(recipe: LocalTraining, steps: int) -> float:
    """Where on the segment, 0 to 1, a client whose gradient stayed the same computed its gradients, weighted by what each moved.

    After t steps it has gone :func:`reach` (t); a gradient that n steps can still carry on moves the end by reach(n) − reach(n − 1).
    For plain SGD (T − 1)/2T, 0 for one step; less under momentum, which makes early gradients count more.
    """
    gone = [reach(recipe, t) for t in range(steps + 1)]
    moved = [gone[steps - t] - gone[steps - t - 1] for t in range(steps)]
    return sum(weight * position for weight, position in zip(moved, gone[:-1], strict=True)) / gone[-1] ** 2


def unflat(vector: Float[Tensor, " coordinates"], like: Tensors, spans: tuple[Span, ...], names: tuple[str, ...]) -> Tensors:
    """The named tensors that :func:`~attacks._matching.simulate.flat` made one vector of."""
    return {name: vector[a:b].view(like[name].shape) for name, (a, b) in zip(names, spans, strict=True)}


@dataclass(frozen=True)
class Surrogate(Recipe):
    """A client whose delta points along one gradient of all its records, taken at θα = θ + α·delta; α is optimized, too.

    Zhu et al., 2023, arXiv:2306.00127. Only the direction of the result means anything. What the recipe adds to a gradient that is
    linear in the parameters, weight decay and the proximal term, is added at θα.

    Attributes:
        point: ``learned`` starts α at :func:`center` and optimizes it; ``center`` leaves it there; ``broadcast`` keeps α = 0: the naive
            attack that takes the delta for one gradient.
        begin: where a learned α starts; None is :func:`center`.
        pace: of a learned α, in units of the step of a pixel.
    """

    point: Point = "learned"
    begin: float | None = None
    pace: float = PACE

    def start(self, victim: Victim, rng: torch.Generator) -> Float[Tensor, " extras"]:
        """α alone."""
        alpha = 0.0 if self.point == "broadcast" else center(victim.recipe, len(victim.order))
        if self.point == "learned" and self.begin is not None:
            alpha = self.begin
        return torch.tensor([alpha], dtype=torch.float64)

    def simulate(self, trial: Trial) -> tuple[Float[Tensor, " coordinates"], Tensors]:
        """Minus the gradient of the local objective at θα."""
        kin, alpha = trial.kin, trial.extras[0]
        moved = unflat(trial.target, kin.parameters, kin.spans, kin.names)
        there = {name: tensor + alpha * moved[name] if name in moved else tensor for name, tensor in trial.parameters.items()}
        recipe = replace(kin.recipe, algorithm="fedsgd")
        everyone = ((0, len(trial.labels)),)
        gradient, after = run_recipe(
            kin.model, there, trial.buffers, trial.inputs, trial.labels, recipe=recipe, order=everyone, names=kin.names
        )
        if kin.recipe.weight_decay or kin.recipe.proximal:
            decayed = [kin.recipe.weight_decay * there[name] + kin.recipe.proximal * alpha * moved[name] for name in kin.names]
            gradient = gradient + torch.cat([tensor.flatten() for tensor in decayed])
        return -gradient, after

    def project(self, extras: Float[Tensor, "rows extras"]) -> Float[Tensor, "rows extras"]:
        """Onto the segment."""
        return extras.clamp(0, 1)

    def rates(self, victim: Victim) -> Float[Tensor, " extras"]:
        """``pace`` where α is learned and the client took more than one step."""
        return torch.tensor([self.pace if self.point == "learned" and len(victim.order) > 1 else 0.0])
