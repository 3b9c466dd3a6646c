"""Dropout masks that are optimized along with the images.

Source: Scheliga et al., 2022, arXiv:2208.06163 (DIA): relaxed masks as further variables, with a penalty on their mean.
Deviations: masks start at their expectation 1 − p, not at random; what one record's gradient gives away (attacks._dropout) is no variable.
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attacks._dropout import layers
from attacks._matching.client import Recipe, Trial
from attacks._matching.simulate import Victim, run_recipe
from simulator.models.dropout import masks_from
from simulator.types import Tensors

_SIZES: WeakKeyDictionary[nn.Module, dict[object, list[tuple[int, float]]]] = WeakKeyDictionary()


def masked_sizes(victim: Victim) -> list[tuple[int, float]]:
    """Values and probability of each call of a dropout layer in the simulated client's run, in order; each model is asked once."""
    known = _SIZES.setdefault(victim.model, {})
    if victim.kin not in known:
        known[victim.kin] = _count(victim) if layers(victim.model) else []
    return known[victim.kin]


def _count(victim: Victim) -> list[tuple[int, float]]:
    seen: list[tuple[int, float]] = []

    def record(inputs: Tensor, p: float) -> Tensor:
        seen.append((inputs.numel(), p))
        return torch.ones_like(inputs)

    blank = torch.full((len(victim.labels), *victim.shape), 0.5)
    with masks_from(record):
        run_recipe(
            victim.model, victim.parameters, victim.buffers, blank, victim.labels,
            recipe=victim.recipe, order=victim.order, names=victim.names,
        )  # fmt: skip
    return seen


@dataclass(frozen=True)
class Masked(Recipe):
    """The recipe with relaxed masks of its own for every dropout layer, record and local step."""

    def start(self, victim: Victim, rng: torch.Generator) -> Float[Tensor, " extras"]:
        """Their expectation."""
        return torch.cat([torch.full((size,), 1 - p, dtype=torch.float64) for size, p in [*masked_sizes(victim), (0, 0.0)]])

    def simulate(self, trial: Trial) -> tuple[Float[Tensor, " coordinates"], Tensors]:
        """Run the recipe under the masks."""
        left = trial.extras

        def cut(inputs: Tensor, _: float) -> Tensor:
            nonlocal left
            mask, left = left[: inputs.numel()].view(inputs.shape), left[inputs.numel() :]
            return mask

        with masks_from(cut):
            return super().simulate(trial)

    def project(self, extras: Float[Tensor, "rows extras"]) -> Float[Tensor, "rows extras"]:
        """Between dropped and kept."""
        return extras.clamp(0, 1)


def keep_rate(trial: Trial) -> Float[Tensor, ""]:
    """Mean over the calls of dropout layers of (mean of the mask − (1 − p))²."""
    parts, first = [], 0
    for size, p in masked_sizes(trial.kin):
        parts.append((trial.extras[first : first + size].mean() - (1 - p)).square())
        first += size
    return torch.stack(parts).mean() if parts else trial.inputs.new_zeros(())
