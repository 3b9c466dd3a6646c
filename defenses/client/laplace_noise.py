"""Laplace noise on the update, without clipping: heavier tails than Gaussian noise, and as little of a guarantee.

Source: Zhu, Liu and Han, 2019, arXiv:1906.08935, section 5.1, which tries it beside Gaussian noise with the same variances.
Deviations: ``scale`` is the Laplace parameter b; the paper gives a variance, which is 2b².
Hook: ``on_update``.

What it protects: nothing is guaranteed. As Gaussian noise of the same variance it hides what is small beside it in one upload, from
whoever has neither a prior nor other rounds.

What it does not protect: it makes no differential-privacy claim, because nothing bounds the update (ε = ∞); ``local_dp`` with
``mechanism = "laplace"`` is the calibrated one. Noise is added once to each upload: an adversary who sees the same record in several
rounds averages it out. The noise is float32 from torch's generator: simulation grade, not safe against floating-point attacks
(Mironov, 2012).
Broken by: gradient matching under the noise's own likelihood, an L1 distance (Balunović et al., 2022, arXiv:2111.04706), and a guess
among known candidates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from simulator.defense import ClientContext, Defense, Role
from simulator.registry import register
from simulator.types import Tensors, Update
from simulator.world import World


def add_laplace(tensors: Tensors, scale: float, rng: torch.Generator) -> Tensors:
    """Add independent Laplace noise, b = ``scale``, to every coordinate; drawn on the CPU, so that every device gets the same bits."""

    def draw(shape: torch.Size) -> torch.Tensor:  # a difference of two exponentials; neither is infinite, as the logarithm of a 0 would be
        two = torch.empty(2, *shape, dtype=torch.float64).exponential_(generator=rng)
        return two[0] - two[1]

    return {name: tensor + (scale * draw(tensor.shape)).to(tensor) for name, tensor in tensors.items()}


@register("defenses", "laplace_noise")
@dataclass(frozen=True)
class LaplaceNoise(Defense):
    """Adds Laplace noise to the update; without clipping it has no guarantee.

    Attributes:
        scale: b of the noise on each coordinate, absolute, in the update's own unit; its standard deviation is b·√2.
    """

    role: ClassVar[Role] = "noise"

    scale: float = 0.01

    def __post_init__(self) -> None:
        if not 0 <= self.scale < math.inf:
            raise ValueError(f"scale must be ≥ 0 and finite, got {self.scale}. Use scale = 0 for no noise.")

    def noise_std(self, world: World) -> float:
        """b·√2."""
        return math.sqrt(2) * self.scale

    def on_update(self, update: Update, context: ClientContext) -> Update:
        """Add the noise."""
        return replace(update, tensors=add_laplace(update.tensors, self.scale, context.rng))
