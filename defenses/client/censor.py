"""Censor: what is uploaded is orthogonal to the gradient, and as long as it.

Of ``trials`` random updates, each tensor orthogonal to the true one and scaled to its norm, the one with which the client's loss
is lowest after a step is uploaded.

Source: Zhang et al., 2025, arXiv:2501.15718 (NDSS), Algorithm 1 and equation 12; trials = 20 and probe = 1e-4 are those of the
authors' code.
Deviations: the authors' code subtracts (r·g/‖g‖)·g, which is orthogonal only where ‖g‖ = 1; here it is (r·g/‖g‖²)·g, as in their
equation. Their code uploads the true gradient where no trial lowers the loss, and stops defending after ten epochs; ours always
uploads the best trial, and stops only after ``rounds``.
Hook: ``on_update``; looks at the private records again.

What it protects: while it acts, the picture, as far as we know, from whoever tries to rebuild it from one upload: that is orthogonal to
the gradient tensor by tensor, so that matching has no direction to follow. An observation, not a guarantee, and paid for with the
training itself.

What it does not protect: the norm of every tensor, and that the gradient is orthogonal to what was uploaded. What it costs: to first
order no trial changes the client's loss, so that the best one is chosen by curvature and rounding. The whole training on digits (MLP,
FedAvg, 15 rounds, 8 clients, three seeds) ends at accuracies of 0.05 to 0.16, about chance, where it reaches 0.94 to 0.96 without a
defense, and 0.94 when only the first five rounds are defended (``pytest --slow -s tests/defenses/test_heuristics_matched.py -k
trains_nothing``). What the authors' code learns comes from its projection, which leaves 1 − ‖g‖ of a trial's part along
the gradient, and from the true gradient, which it uploads where no trial lowers the loss.
It makes no differential-privacy claim (ε = ∞), and ends that of what stands before it.
Broken by: a guess among known candidates: every tensor's norm is that of the true gradient, and tells 8 of 8 records from 99 others.
Nothing that we tried rebuilds pictures from one upload: inverting_gradients gets 9.5 dB, and 9.5 dB from norms and orthogonality; the
mean picture 13.5 dB (``pytest --slow -s tests/defenses/test_heuristics_matched.py``: photos in 16×16, ConvNet at its initial weights,
batches of one).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from defenses.client._private import private_of
from simulator.defense import ClientContext, Defense, Private
from simulator.mechanisms.censor import orthogonal_update
from simulator.registry import register
from simulator.training import loss
from simulator.types import Tensors, Update


@torch.no_grad()
def client_loss(private: Private, parameters: Tensors) -> float:
    """The mean loss over all records of the client's round, at these parameters."""
    batches = [batch for batch in private.batches if len(batch)]
    smoothing = private.broadcast.training.label_smoothing
    each = [loss(private.model, parameters, private.broadcast.buffers, batch, label_smoothing=smoothing)[0] for batch in batches]
    total = sum(float(value) * len(batch) for value, batch in zip(each, batches, strict=True))
    return total / max(1, sum(len(batch) for batch in batches))


@register("defenses", "censor")
@dataclass(frozen=True)
class Censor(Defense):
    """Uploads a random update that is orthogonal to the true one (Censor); no guarantee, and hardly any training.

    Attributes:
        trials: random updates to choose from.
        probe: length of the step, in units of the gradient, after which the loss is compared; a delta is its own step.
        rounds: the defense acts up to this round; 0 means all.
    """

    looks_again: ClassVar[bool] = True

    trials: int = 20
    probe: float = 1e-4
    rounds: int = 0

    def __post_init__(self) -> None:
        if self.trials < 1:
            raise ValueError(f"trials must be ≥ 1, got {self.trials}. 1 takes the first.")
        if not 0 < self.probe < math.inf:
            raise ValueError(f"probe must be > 0 and finite, got {self.probe}. It is the learning rate of the step that is tried.")
        if self.rounds < 0:
            raise ValueError(f"rounds must be ≥ 0, got {self.rounds}. 0 is all rounds.")

    def on_update(self, update: Update, context: ClientContext) -> Update:
        """Draw the trials and keep the one with the lowest loss.

        Raises:
            ValueError: the client's own data are not there.
        """
        private = private_of(context, self.name)
        if self.rounds and context.round > self.rounds:
            return update
        now, step = private.broadcast.parameters, 1.0 if update.kind == "delta" else -self.probe
        best, lowest = dict[str, torch.Tensor](), math.inf
        for _ in range(self.trials):
            draws = {name: torch.randn(tensor.shape, generator=context.rng) for name, tensor in update.tensors.items()}
            trial = orthogonal_update(draws, update.tensors)
            value = client_loss(private, {name: tensor + step * trial[name] for name, tensor in now.items()})
            if not best or value < lowest:  # the first one stands where every loss is nan
                best, lowest = trial, value
        return replace(update, tensors=best)
