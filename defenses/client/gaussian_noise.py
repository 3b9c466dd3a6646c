"""Gaussian noise on the update, without clipping: the baseline of most papers on gradient inversion.

Source: Zhu, Liu and Han, 2019, arXiv:1906.08935, section 5.1 (noise with scales 1e-4 to 1e-1 on the gradient; 1e-2 is where they see
the attack start to fail).
Deviations: the paper does not say whether its scale is a variance or a standard deviation; ``sigma`` is a standard deviation.
Hook: ``on_update``.

What it protects: nothing is guaranteed. It hides what is small beside ``sigma`` in one upload: fine detail first, the whole picture once
the noise is larger than the gradient, from whoever has neither a prior nor other rounds.

What it does not protect: it makes no differential-privacy claim, because nothing bounds the update (ε = ∞); put ``clip`` directly
before it for one. Noise is added once to each upload: an adversary who sees the same record in several rounds averages it out.
The noise is float32 from torch's generator: simulation grade, not safe against floating-point attacks (Mironov, 2012).
Broken by: candidate_identification, which still names the record among known candidates where pictures fail; gradient matching while the
noise is small beside the gradient; averaging over rounds that reuse a record.
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


def add_gaussian(tensors: Tensors, sigma: float, rng: torch.Generator) -> Tensors:
    """Add independent noise N(0, sigma²) to every coordinate; drawn on the CPU, so that every device gets the same bits."""
    return {name: tensor + sigma * torch.randn(tensor.shape, generator=rng).to(tensor) for name, tensor in tensors.items()}


def require_noise_multiplier(noise_multiplier: float, clip_norm: float) -> None:
    """Raise ValueError unless noise_multiplier·clip_norm is a standard deviation."""
    if not 0 <= noise_multiplier < math.inf:
        raise ValueError(f"noise_multiplier must be ≥ 0 and finite, got {noise_multiplier}. Use noise_multiplier = 0 for clipping only.")
    if noise_multiplier and math.isinf(clip_norm):
        raise ValueError(f"clip_norm must be finite with noise_multiplier = {noise_multiplier}, got inf. Noise is in units of clip_norm.")


@register("defenses", "gaussian_noise")
@dataclass(frozen=True)
class GaussianNoise(Defense):
    """Adds Gaussian noise to the update; without clipping it has no guarantee.

    Attributes:
        sigma: standard deviation of the noise on each coordinate, absolute, in the update's own unit.
    """

    role: ClassVar[Role] = "noise"

    sigma: float = 0.01

    def __post_init__(self) -> None:
        if not 0 <= self.sigma < math.inf:
            raise ValueError(f"sigma must be ≥ 0 and finite, got {self.sigma}. Use sigma = 0 for no noise.")

    def noise_std(self, world: World) -> float:
        """Sigma itself."""
        return self.sigma

    def clipping_and_noise(self, batch: int, *, alone: bool) -> tuple[float, float] | None:
        """No clipping, and sigma beside the gradient over ``batch``."""
        return math.inf, self.sigma * batch

    def on_update(self, update: Update, context: ClientContext) -> Update:
        """Add the noise."""
        return replace(update, tensors=add_gaussian(update.tensors, self.sigma, context.rng))
