"""MixUp: a client trains on convex combinations of pairs of its records, and of their labels.

    x̃ = λ·xᵢ + (1 − λ)·xⱼ,    ỹ = λ·yᵢ + (1 − λ)·yⱼ,    λ ~ Beta(α, α)

Source: Zhang et al., 2018, arXiv:1710.09412, equation 1; as a defense of gradients in Huang et al., 2021, arXiv:2112.00059.
Deviations: each pair has a λ of its own, as in the equation; the authors' code draws one for a batch. Partners come from all that the
client holds, as in the equation, and not from the batch alone, so a batch of one record is mixed, too.
Hook: ``on_batch``, anew each time a record is used.

What it protects: nothing is guaranteed. What is rebuilt are two records laid over each other, in which the weaker one is hard to see; the
shares are drawn anew each time.

What it does not protect: the mixture is trained on, and the mixture leaks: in most of them one record, or both, can be seen. Its shares
leak as well, since the head's bias shows the targets. It claims nothing (ε = ∞). Measured on the true record, the error of a perfectly
reconstructed mixture looks like protection: the truth that is scored against stays the unmixed record, and a low PSNR here says that
the record was mixed, not that it cannot be told.

Broken by: whatever breaks no defense, and demixing. Digits, mlp, one record for each upload: ``linear_leak`` reads every mixture and all
shares off exactly; against the record that is 18 dB. Of 100 candidates the nearest is the record in 52 of 100 uploads; the one that
leaves (x̃ − λ·x)/(1 − λ) nearest to [0, 1] in 92. ``candidate_identification`` asks how well
what is left could be another record (the table on this defense's page). Where a record is used again and
again, the median by pixel of its 3, 6 and 33 purest of 5, 20 and 100 mixtures is at 23, 31 and 37 dB (the public mean: 11).
tests/defenses/test_heuristics_solved.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from defenses.client._mixing import beta_shares, mixed, nobody_to_mix_with, partners, pool_of, targets
from simulator.defense import ClientContext, Defense
from simulator.registry import register
from simulator.types import Batch
from simulator.world import World


@register("defenses", "mixup")
@dataclass(frozen=True)
class MixUp(Defense):
    """Trains on mixtures of two records and of their labels (MixUp); the mixture is what leaks, both records in it.

    Attributes:
        alpha: of the Beta distribution of shares; 1 is uniform, small ones leave most records nearly pure.
    """

    alpha: float = 1.0

    def __post_init__(self) -> None:
        if not self.alpha > 0:
            raise ValueError(f"alpha must be > 0, got {self.alpha}. 1 draws shares uniformly.")

    def refuses(self, world: World) -> str | None:
        """Refuse clients that have nothing to mix."""
        return nobody_to_mix_with(world)

    def on_batch(self, batch: Batch, context: ClientContext) -> Batch:
        """Mix each record with a partner."""
        pool = pool_of(context)
        others = partners(pool.held, len(batch), context.rng)
        share = beta_shares(self.alpha, len(batch), context.rng)
        shares = torch.stack([share, 1 - share], 1)
        ours, theirs = targets(batch, pool.classes), targets(others, pool.classes)
        return replace(batch, inputs=mixed(shares, [batch.inputs, others.inputs]), targets=mixed(shares, [ours, theirs]))
