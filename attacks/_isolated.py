"""Which rounds' sums hold a known record, and whose it then is: exact, however far the model moved between the rounds.

A record adds the outer product of its signal u and its input v to a first linear layer's gradient W. Taking it out lowers the rank by
one if u lies in W's column space, v in its row space, and vᵀW⁺u = 1 (Wedderburn, 1934, "Lectures on matrices", section 5.06); any other
multiple, and any picture that is not among the records, leaves the rank or raises it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from attacks._gradient import mean_gradient
from attacks._layers import Affine, Call, all_buffers, first_linear
from attacks._rest import separable
from attacks._rounds import redraws
from attacks.update.linear_leak import Factors, factors
from simulator.adversary import Knowledge
from simulator.training import per_example_gradients
from simulator.types import Batch, Observation

INSIDE = 0.001
"""Share of a signal or an input outside the sum's range, and distance of vᵀW⁺u from 1, up to which a record is in it: a picture that is
another by so little is the same to a mean squared error of 1e-6, which counts as exact."""

OUTSIDE = 0.1
"""The share from which on it is not; between them, where rounding and a picture much like one of the records look alike, the sum says
neither."""


@dataclass(frozen=True)
class Sum:
    """One round's sum, and the range of its first layer's gradient.

    Attributes:
        view, knowledge: the round as it was shown, and what is known of it.
        layer, affine: the first linear layer and the map that feeds it.
        space: the singular value decomposition of its gradient, without rounding.
        full: whether the rank is as high as it can be, so that everything lies in the range.
    """

    view: Observation
    knowledge: Knowledge
    layer: Call
    affine: Affine
    space: Factors
    full: bool

    def holds(self, record: Batch) -> bool | None:
        """Whether one record, with its label, is behind the sum; None where the sum does not say."""
        if self.full or not separable(self.view, self.knowledge):  # where the record's weight is unknown, or no gradient its own
            return None
        model, sent = self.knowledge.model, self.view.broadcast
        buffers, smoothing = all_buffers(model, sent), self.knowledge.training.label_smoothing
        own = per_example_gradients(model, sent.parameters, buffers, record, label_smoothing=smoothing)[self.layer.bias][0].double()
        signal = own / self.knowledge.num_examples
        seen = self.affine.scale.double() * record.inputs.flatten().double() + self.affine.offset.double()
        if not float(signal.norm()):
            return None
        columns, rows = self.space.left.T @ signal, self.space.right @ seen
        lost = max(outside(signal, columns), outside(seen, rows))
        share = float(rows @ (columns / self.space.values))
        if lost < INSIDE and abs(share - 1) < INSIDE:
            return True
        return False if lost > OUTSIDE or abs(share - 1) > OUTSIDE else None


def outside(whole: Tensor, inside: Tensor) -> float:
    """Share of a vector's norm that its coordinates in a range lack."""
    return float((1 - inside.square().sum() / whole.square().sum()).clamp(min=0).sqrt())


def as_sum(view: Observation, knowledge: Knowledge) -> Sum | None:
    """The sum of one round; None without a first linear layer to look at."""
    found = first_linear(knowledge, view.broadcast)
    if isinstance(found, str):
        return None
    layer, affine = found
    weight = mean_gradient(view, knowledge)[layer.weight].double()
    space = factors(weight)
    return Sum(view, knowledge, layer, affine, space, len(space.values) == min(weight.shape))


def unaided(seen: Observation, knowledge: Knowledge) -> Knowledge:
    """What is known of another round's sum: nothing that was told of the attacked one."""
    examples, recipe = seen.upload.num_examples, seen.broadcast.training
    return replace(knowledge, num_examples=examples, training=recipe, labels=None, label_counts=None, history=())


def owner(presence: Sequence[bool | None], sums: Sequence[Sum], senders: frozenset[int]) -> int:
    """The one of the senders who took part wherever the record is, and nowhere where it is not; −1 if several did.

    That it is missing says something only where every client takes the same records in each round.
    """
    left = set(senders)
    for there, each in zip(presence, sums, strict=True):
        if there:
            left &= each.view.upload.senders
        elif there is False and redraws(each.knowledge.training, each.knowledge.num_examples - len(each.view.upload.senders) + 1) is None:
            left -= each.view.upload.senders
    return left.pop() if len(left) == 1 else -1
