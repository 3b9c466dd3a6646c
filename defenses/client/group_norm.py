"""GroupNorm in place of BatchNorm: no statistics of the batch are uploaded, and none couple its records.

Source: Wu and He, 2018, arXiv:1803.08494; that BatchNorm's statistics are what strong attacks live on: Huang et al., 2021,
    arXiv:2112.00059, section 3; Yin et al., 2021, arXiv:2104.07586.
Deviations: 8 groups unless told otherwise; the paper has 32, for wider layers.
Hook: ``on_model``.

What it protects: the means and variances of the batch at every normalization, which are in no upload, since none are computed; and the
records of one batch from one another, as none enters another's gradient. Nothing is guaranteed.

What it does not protect: the gradient, which then is one of independent records. It takes the running statistics out of the upload, by
which ``grad_inversion`` and ``inverting_gradients`` judge their guesses, and it makes per-record gradients possible (DP-SGD). It
claims nothing (ε = ∞).

Broken by: gradient matching without statistics, where that works on the network at all. What the statistics are worth to it where
there are some: 3.6 dB (``fedpeek claims batch-norm-statistics``). Exact attacks on small networks have no BatchNorm to lose.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from defenses.refusal import unbuildable
from simulator.defense import Defense
from simulator.models.hygiene import GroupNormed
from simulator.registry import register
from simulator.world import World


@register("defenses", "group_norm")
@dataclass(frozen=True)
class GroupNorm(Defense):
    """Puts GroupNorm in place of BatchNorm, so that no statistics of the batch leave the client.

    Attributes:
        groups: of channels that are normalized together; 1 is layer normalization. A layer whose channels it does not divide takes
            their largest common divisor.
    """

    groups: int = 8

    def __post_init__(self) -> None:
        if self.groups < 1:
            raise ValueError(f"groups must be ≥ 1, got {self.groups}. 8 suits small networks; 1 is layer normalization.")

    def refuses(self, world: World) -> str | None:
        """Refuse models without BatchNorm."""
        return unbuildable(world)

    def on_model(self, family: Any) -> Any:
        """The family with its norms changed."""
        return GroupNormed(family, self.groups)
