"""What public records say of how a batch's counts show in the last layer's gradient; made once for all uploads of a round."""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attacks._gradient import mean_gradient, noise_level, norm
from attacks._labels.credible import most_credible
from attacks._labels.moments import Belief, Moments, moments, statistics
from attacks._labels.runs import along_the_way, reference, weights
from attacks._layers import Call
from simulator.adversary import Knowledge
from simulator.types import Batch, Broadcast, Observation, Tensors

UNTRIED = Belief(True, 0.3, 0.5, 1.0)
"""Taken where the last layer has no bias, so that counts are not read from it alone."""


@dataclass(frozen=True)
class Taught:
    """How to read a gradient, and what each class leaves in what is read.

    Attributes:
        seen: directions of the last layer's inputs that are read: the rows of its weight, of unit length.
        middle: of those inputs, which the bias takes along.
        biased: whether the layer has a bias.
        belief, moments: how far the moments of the classes are trusted, and these.
    """

    seen: Float[Tensor, "inputs classes"]
    middle: Float[Tensor, " inputs"]
    biased: bool
    belief: Belief
    moments: Moments

    def statistic(self, gradient: Tensors, head: Call) -> Float[Tensor, " statistic"]:
        """What is read of a mean gradient."""
        weight = gradient[head.weight].double()
        if not self.biased:
            return (weight @ self.seen).flatten()
        bias = gradient[head.bias].double()
        return torch.cat([bias[:, None], weight @ self.seen - torch.outer(bias, self.middle @ self.seen)], 1).flatten()


_MADE: WeakKeyDictionary[nn.Module, tuple[Broadcast, Batch, object, Taught]] = WeakKeyDictionary()


def taught(view: Observation, knowledge: Knowledge, head: Call, *, biased: bool) -> Taught:
    """What the public records teach about uploads like this one. Of several local steps it depends on the upload, too."""
    assert knowledge.public is not None
    known, records = _MADE.get(knowledge.model), knowledge.num_examples
    alike = (knowledge.training, f"{noise_deviation(view, knowledge):.3g}", records, len(view.upload.senders), biased)
    if known is not None and known[0] is view.broadcast and known[1] is knowledge.public and known[2] == alike:
        return known[3]
    public, classes = reference(knowledge), knowledge.schema.num_classes
    runs = along_the_way(view, knowledge, public.inputs)
    labels = public.labels[: len(runs[0].softmax)]
    middle = runs[0].head.inputs.double().mean(0) if biased else torch.zeros(head.inputs.shape[1], dtype=torch.float64)
    rows = weights(view.broadcast.parameters, head)[0]
    seen = rows.T / rows.norm(dim=1).clamp(min=1e-12)

    def columns(features: Tensor) -> Tensor:
        projected = (features.double() - middle) @ seen
        return torch.cat([torch.ones(len(features), 1, dtype=torch.float64), projected], 1) if biased else projected

    each = [statistics(run.softmax, columns(run.head.inputs), labels, knowledge.training) for run in runs]
    statistic = torch.stack(each).mean(0)
    added = noise_of(view, knowledge, seen, middle, biased=biased)
    belief = most_credible(statistic, labels, classes, records, added) if biased else UNTRIED
    found = Taught(seen, middle, biased, belief, moments(statistic, labels, classes, belief, added))
    if len(runs) == 1:
        _MADE[knowledge.model] = (view.broadcast, knowledge.public, alike, found)
    return found


def noise_deviation(view: Observation, knowledge: Knowledge) -> float:
    """Deviation of the known noise on each coordinate of the mean gradient."""
    gradient = mean_gradient(view, knowledge)
    return noise_level(view, knowledge) * norm(gradient) / float(sum(tensor.numel() for tensor in gradient.values()) ** 0.5)


def noise_of(
    view: Observation, knowledge: Knowledge, seen: Float[Tensor, "inputs classes"], middle: Float[Tensor, " inputs"], *, biased: bool
) -> Float[Tensor, "columns columns"] | None:
    """Covariance of what known defenses add to each class's part of :meth:`Taught.statistic` of the records together; None for nothing.

    Independent noise e on a class's weights and f on its bias is f beside e·seen − f·middle·seen.
    """
    deviation = knowledge.num_examples * noise_deviation(view, knowledge)
    if not deviation:
        return None
    gram = seen.T @ seen
    if biased:
        corner = (middle @ seen)[None]
        top = torch.cat([torch.ones(1, 1, dtype=torch.float64), -corner], 1)
        gram = torch.cat([top, torch.cat([-corner.T, gram + corner.T @ corner], 1)])
    return deviation**2 * gram
