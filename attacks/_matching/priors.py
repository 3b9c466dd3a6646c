"""What is likely about an image before anything is seen of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import functional_call

from attacks._matching.client import Trial
from simulator.models.elementary import ElementaryNorms

Images = Float[Tensor, "*rows channel height width"]
Prior = Callable[[Trial], Float[Tensor, ""]]
"""A penalty on a candidate."""

SETTLED = 7 / 8
"""Share of a run after which the weight of a prior no longer moves."""


@dataclass(frozen=True)
class Weighted:
    """A prior with its weight against the distance of the updates.

    Attributes:
        prior: the penalty.
        weight: at the start of the run.
        final: from :data:`SETTLED` of the run on, reached geometrically; None keeps ``weight``.
        grouped: whether the prior reads ``consensus``.
    """

    prior: Prior
    weight: float
    final: float | None = None
    grouped: bool = False

    def at(self, progress: float) -> float:
        """The weight when this share of the run is done."""
        if self.final is None or not self.weight:
            return self.weight
        return float(self.weight * (self.final / self.weight) ** min(1.0, progress / SETTLED))

    @property
    def moves(self) -> bool:
        """Whether the weight changes during the run."""
        return self.final is not None and self.final != self.weight


def total_variation(inputs: Images) -> Float[Tensor, ""]:
    """Mean absolute difference of neighbours, horizontal plus vertical, on the scale of the inputs."""
    return (inputs[..., 1:] - inputs[..., :-1]).abs().mean() + (inputs[..., 1:, :] - inputs[..., :-1, :]).abs().mean()


def roughness(inputs: Images) -> Float[Tensor, ""]:
    """Total variation; with three channels, plus that of the channel differences r − g, g − b and r − b.

    Edges of natural images coincide in all channels and cancel in the differences; noise does not.
    """
    if inputs.shape[-3] != 3:
        return total_variation(inputs)
    red, green, blue = inputs.unbind(-3)
    opponents = torch.stack([red - green, green - blue, red - blue], dim=-3)
    return total_variation(inputs) + total_variation(opponents)


def rough(trial: Trial) -> Float[Tensor, ""]:
    """:func:`roughness` of a candidate."""
    return roughness(trial.inputs)


def variation(trial: Trial) -> Float[Tensor, ""]:
    """:func:`total_variation` of a candidate."""
    return total_variation(trial.inputs)


def task(trial: Trial) -> Float[Tensor, ""]:
    """Squared distance of the predicted probabilities from the labels, summed over classes, mean over records.

    Wei et al., 2020, arXiv:2004.10397: the reconstruction shall also be a record that the model takes for one of its label.
    """
    with ElementaryNorms():
        logits = functional_call(trial.kin.model, {**trial.parameters, **trial.buffers}, (trial.inputs,))
    wanted = (trial.labels[:, None] == torch.arange(logits.shape[1])).to(logits.dtype)  # one_hot does not go through vmap
    penalty: Tensor = (logits.softmax(1) - wanted).square().sum(1).mean()
    return penalty


def box(inputs: Images) -> Images:
    """Project onto [0, 1], the range of a pixel."""
    return inputs.clamp(0, 1)
