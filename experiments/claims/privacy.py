"""What guarantees cost beside each other: measurements by the accountant alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
from scipy.special import gammaln, logsumexp

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


@dataclass(frozen=True, kw_only=True)
class DPSGDMeasure:
    """ε of DP-SGD under Poisson sampling by our accountant, and by the moments accountant, whose values papers report.

    Attributes:
        records: of the one client.
        batch_size: expected.
        epochs: passes over as many records.
        noise_multiplier: z.
        delta: of both.
    """

    kind: ClassVar[str] = "dp_sgd"

    records: int = 60000
    batch_size: int = 256
    epochs: int
    noise_multiplier: float
    delta: float = 1e-5

    @property
    def steps(self) -> int:
        """Noisy steps of the whole training."""
        return self.epochs * self.records // self.batch_size

    def names(self) -> Sequence[str]:
        """By privacy loss distributions, and by moments."""
        return ["epsilon", "moments_epsilon"]

    def __call__(self) -> Mapping[str, float]:
        """Account for one client whose every round is a step."""
        from defenses.accounting import guarantee
        from defenses.client.dp_sgd import DPSGD
        from simulator.data.digits import Digits
        from simulator.models.mlp import Linear
        from simulator.types import LocalTraining
        from simulator.world import Federation, World

        federation, defense = Federation(clients=1, rounds=self.steps), DPSGD(noise_multiplier=self.noise_multiplier)
        recipe = LocalTraining(batch_size=self.batch_size, sampling="poisson")
        world = World(data=Digits(), model=Linear(), federation=federation, training=recipe, defenses=(defense,))
        ours = guarantee(world, records_held=[self.records], delta=self.delta).epsilon
        moments = moments_epsilon(self.batch_size / self.records, self.noise_multiplier, self.steps, self.delta)
        return {"epsilon": ours, "moments_epsilon": moments}


def moments_epsilon(rate: float, noise_multiplier: float, steps: int, delta: float) -> float:
    """ε by the moments accountant of Abadi et al. (2016), theorem 2, over integer orders: in closed form, without dp-accounting.

    Of the two moments of lemma 3 it takes E[(ν/ν₀)^α] under ν₀, which is never the smaller (Mironov et al., 2019, arXiv:1908.10530).
    """
    found = math.inf
    for order in range(2, 257):
        drawn = np.arange(order + 1)
        ways = gammaln(order + 1) - gammaln(drawn + 1) - gammaln(order - drawn + 1)
        chance = (order - drawn) * math.log1p(-rate) + drawn * math.log(rate)
        moment = float(logsumexp(ways + chance + drawn * (drawn - 1) / (2 * noise_multiplier**2)))
        found = min(found, (steps * moment - math.log(delta)) / (order - 1))
    return found


MEASURES.update({DistributedDPMeasure.kind: DistributedDPMeasure, DPSGDMeasure.kind: DPSGDMeasure})
