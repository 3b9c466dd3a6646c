"""The simulated client of DP-SGD: each record's gradient is scaled down to a norm before they are averaged."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attacks._matching.client import Recipe, Trial
from attacks._matching.simulate import run_recipe
from simulator.training import GradientRule, per_example_gradients, root
from simulator.types import Batch, Tensors


def clipping(clip_norm: float, label_smoothing: float) -> GradientRule:
    """The mean of the records' gradients, each clipped to ``clip_norm``; differentiable."""

    def rule(model: nn.Module, parameters: Tensors, buffers: Tensors, batch: Batch) -> tuple[Tensors, Tensors]:
        each = per_example_gradients(model, parameters, buffers, batch, label_smoothing=label_smoothing)
        norms = root(torch.stack([tensor.flatten(1).square().sum(1) for tensor in each.values()]).sum(0))
        scale = clip_norm / norms.clamp(min=clip_norm) / len(batch)
        return {name: torch.tensordot(scale, tensor, 1) for name, tensor in each.items()}, buffers

    return rule


@dataclass(frozen=True)
class PerRecord(Recipe):
    """The recipe with clipping of each record's gradient.

    Attributes:
        clip_norm: largest L2 norm that one record's gradient keeps.
    """

    clip_norm: float

    def simulate(self, trial: Trial) -> tuple[Float[Tensor, " coordinates"], Tensors]:
        """Run the recipe."""
        kin = trial.kin
        return run_recipe(
            kin.model, trial.parameters, trial.buffers, trial.inputs, trial.labels,
            recipe=kin.recipe, order=kin.order, names=kin.names, rule=clipping(self.clip_norm, kin.recipe.label_smoothing),
        )  # fmt: skip
