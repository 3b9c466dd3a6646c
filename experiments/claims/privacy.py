"""What guarantees cost beside each other: measurements by the accountant alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from experiments.claims.claim import MEASURES


@dataclass(frozen=True, kw_only=True)
class DistributedDPMeasure:
    """ε of distributed DP over that of a central Gaussian with the same noise in the sum, both by Rényi DP on the same orders.

    Attributes:
        clients: in the cohort; the sum may lose a third of them.
        coordinates: of an update.
        bits: of a word of secure aggregation, whose range is the smallest that the mechanism accepts.
        noise_multiplier: z.
        releases: rounds.
        delta: of both.
    """

    kind: ClassVar[str] = "distributed_dp"

    clients: int
    coordinates: int
    bits: int = 20
    noise_multiplier: float = 1.0
    releases: int = 1
    delta: float = 1e-5

    def names(self) -> Sequence[str]:
        """The ratio, and the two that it is of."""
        return ["epsilon_ratio", "epsilon", "central_epsilon"]

    def __call__(self) -> Mapping[str, float]:
        """Account for both."""
        from defenses.channel._secagg.quantization import Scale
        from defenses.client.distributed_dp import MARGIN, REACH
        from defenses.distributed import SkellamDpEvent, epsilon_of, gaussian_curve, l1_of, rounded_norm, skellam_curve

        honest = 2 * self.clients // 3 + 1
        reach = 1 + REACH * self.noise_multiplier / math.sqrt(honest * self.clients)
        grid = Scale(cohort=self.clients, bits=self.bits, max_examples=1).step(reach)
        l2 = rounded_norm((1 + MARGIN) / grid, self.coordinates)
        event = SkellamDpEvent(l2, l1_of(l2, self.coordinates), (self.noise_multiplier / grid) ** 2)
        ours = epsilon_of(self.releases * skellam_curve(event), self.delta)
        central = epsilon_of(self.releases * gaussian_curve(self.noise_multiplier), self.delta)
        return {"epsilon_ratio": ours / central, "epsilon": ours, "central_epsilon": central}


MEASURES.update({DistributedDPMeasure.kind: DistributedDPMeasure})
