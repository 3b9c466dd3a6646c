"""What guarantees cost beside each other: measurements by the accountant alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from defenses.distributed import SkellamDpEvent, epsilon_of, gaussian_curve, l1_of, rounded_norm, skellam_curve
from experiments.claims.claim import MEASURES


@dataclass(frozen=True, kw_only=True)
class DistributedDPMeasure:
    """ε of distributed DP over that of a central Gaussian with the same noise in the sum, both by Rényi DP on the same orders.

    Beside it ε of the papers' rule for the words' range: 4 standard deviations of a rotated coordinate, and noise from all clients.

    Attributes:
        clients: in the cohort.
        threshold: of secure aggregation, the fewest clients in a sum; 0 is its default, above two thirds.
        coordinates: of an update.
        bits: of a word of secure aggregation.
        rotate: as in the mechanism; without, ``clip_range`` is the smallest that it accepts.
        wrap_chance: as in the mechanism.
        noise_multiplier: z.
        releases: rounds.
        delta: of both.
    """

    kind: ClassVar[str] = "distributed_dp"

    clients: int
    coordinates: int
    threshold: int = 0
    bits: Literal[16, 20, 24, 32] = 20
    rotate: bool = True
    wrap_chance: float = 1e-12
    noise_multiplier: float = 1.0
    releases: int = 1
    delta: float = 1e-5

    def names(self) -> Sequence[str]:
        """The ratio, the two that it is of, and the papers'."""
        return ["epsilon_ratio", "epsilon", "central_epsilon", "papers_epsilon"]

    def __call__(self) -> Mapping[str, float]:
        """Account for both."""
        from defenses.channel.secure_aggregation import SecureAggregation
        from defenses.client.distributed_dp import DistributedDP
        from simulator.world import Federation, World

        own = DistributedDP(noise_multiplier=self.noise_multiplier, colluding=0, rotate=self.rotate, wrap_chance=self.wrap_chance)
        channel = SecureAggregation(bits=self.bits, max_examples=1, threshold=self.threshold, dropout=0.0)
        world = World(data=None, model=None, federation=Federation(clients=self.clients), defenses=(own, channel))
        if not self.rotate:
            world = replace(world, defenses=(own, replace(channel, clip_range=own.least_range(world))))
        ours = epsilon_of(self.releases * skellam_curve(own.release(world, self.coordinates)), self.delta)
        central = epsilon_of(self.releases * gaussian_curve(self.noise_multiplier), self.delta)
        papers = epsilon_of(self.releases * skellam_curve(self.papers_release()), self.delta)
        return {"epsilon_ratio": ours / central, "epsilon": ours, "central_epsilon": central, "papers_epsilon": papers}

    def papers_release(self) -> SkellamDpEvent:
        """The grid g of 2^bits·g/2 = 4·√(n²/d + n·(g²/4 + z²/n)), and what a clip norm of 1 is on it."""
        n, z = self.clients, self.noise_multiplier
        grid = 4 * math.sqrt((n**2 / self.coordinates + z**2) / (4 ** (self.bits - 1) - 4 * n))
        l2 = rounded_norm(1 / grid, self.coordinates)
        return SkellamDpEvent(l2, l1_of(l2, self.coordinates), (z / grid) ** 2)


MEASURES.update({DistributedDPMeasure.kind: DistributedDPMeasure})
