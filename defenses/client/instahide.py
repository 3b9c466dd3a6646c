"""InstaHide: a client trains on mixtures of k records under a random mask of signs.

    x̃ = σ ∘ Σⱼ λⱼ·xⱼ,    ỹ = Σ λⱼ·yⱼ over the private j,    σ uniform in {−1, 1}^pixels,    Σⱼ λⱼ = 1,  λⱼ ≤ c_max

Source: Huang, Song, Li and Arora, 2020, arXiv:2010.02772, algorithm 1 (``intra``) and its variant with public images (``inter``): two
private records and k − 2 public ones, whose labels do not count, λ₁ + λ₂ ≥ 0.3; λ as in the authors' code: |N(0, 1)|, normalized,
drawn until the bounds hold.
Deviations: public records are those of the world's public split, not patches of ImageNet chosen for their texture. Partners are drawn
independently, not by permutations of the data set. Signs turn pixels about 0.5, which the models' first layer maps to 0, as the
authors turn normalized pixels: so encoded inputs stay in [0, 1]. A user's own network that normalizes otherwise sees another mask.
Hook: ``on_batch``, anew each time a record is used.

What it protects: the look of a record: an encoding, rebuilt exactly, shows a mixture of k pictures under a random mask, and nothing here
rebuilds the record from it. Nothing is guaranteed, and who it is can mostly be told.

What it does not protect: the encoding leaks whole, and its magnitudes |x̃ − 0.5| are those of the mixture: the mask hides one bit of a
pixel. Targets, and the private shares with them, are read off the head's bias. Its security argument is about one encoding among many
unknown ones, not about gradients, and it fell to an attack on the authors' own challenge. It claims nothing (ε = ∞). As under MixUp,
PSNR against the record is low whatever leaks: 5 dB where the encoding is exact.

Broken by: many encodings (Carlini et al., 2021, arXiv:2011.05315: take magnitudes, cluster the encodings that share a record, assign and
solve; the 100 images of the authors' challenge from 5000 encodings); that attack is not part of this project. One encoding is enough
to identify: ``candidate_identification`` peels it off a record's gradient and sums over the signs under a Gaussian model of the partners
(the table on this defense's page; chance is one in a hundred). Averaging magnitudes
over 100 encodings of one record does not reconstruct it (11.2 dB, the public mean 11.3). Tests:
tests/defenses/test_heuristics_solved.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from defenses.client._mixing import mixed, nobody_to_mix_with, partners, pool_of, targets
from simulator.defense import ClientContext, Defense
from simulator.registry import register
from simulator.types import Batch
from simulator.world import World

GRAY = 0.5
"""The pixel about which signs turn: the models' first layer maps it to 0."""

LEAST_PRIVATE = 0.3
"""Least sum of the shares of the two private records among public ones, as in the authors' code."""


def draw_shares(count: int, k: int, largest: float, *, least: float, rng: torch.Generator) -> Float[Tensor, "count k"]:
    """Rows of k shares that sum to 1, none above ``largest`` and the first two together at least ``least``."""
    shares = torch.zeros(count, k)
    wrong = torch.ones(count, dtype=torch.bool)
    while bool(wrong.any()):
        drawn = torch.randn(int(wrong.sum()), k, generator=rng).abs()
        shares[wrong] = drawn / drawn.sum(1, keepdim=True)
        wrong = (shares.max(1).values > largest) | (shares[:, :2].sum(1) < least)
    return shares


@register("defenses", "instahide")
@dataclass(frozen=True)
class InstaHide(Defense):
    """Trains on mixtures of k records under a random mask of signs (InstaHide); many encodings of a record give it away.

    Attributes:
        k: records in a mixture.
        c_max: largest share of one record; above 1/k.
        partners: ``intra`` mixes with private records, ``inter`` with one private record and with k − 2 public ones.
    """

    k: int = 4
    c_max: float = 0.65
    partners: Literal["intra", "inter"] = "intra"

    def __post_init__(self) -> None:
        fewest = 3 if self.partners == "inter" else 2
        if self.k < fewest:
            raise ValueError(f"k must be ≥ {fewest} with partners = {self.partners!r}, got {self.k}. The paper has 4 and 6.")
        if not 1.1 / self.k <= self.c_max <= 1:
            raise ValueError(f"c_max must be in [1.1/k, 1] = [{1.1 / self.k:.3f}, 1], got {self.c_max}. The paper has 0.65.")

    def refuses(self, world: World) -> str | None:
        """Refuse clients that have nothing to mix, and public partners where there are none."""
        if self.partners == "inter" and not int(len(world.data.load().records) * world.split.public):
            return "split.public must leave public records for partners = 'inter', got 0. Raise it or set partners = 'intra'."
        return nobody_to_mix_with(world)

    def on_batch(self, batch: Batch, context: ClientContext) -> Batch:
        """Mix each record with its partners and flip signs."""
        pool, count, rng = pool_of(context), len(batch), context.rng
        inter = self.partners == "inter"
        shares = draw_shares(count, self.k, self.c_max, least=LEAST_PRIVATE if inter else 0.0, rng=rng)
        private = [batch, *(partners(pool.held, count, rng) for _ in range(1 if inter else self.k - 1))]
        public = [partners(pool.public, count, rng) for _ in range(self.k - len(private))]
        inputs = mixed(shares, [part.inputs for part in [*private, *public]])
        wanted = mixed(shares[:, : len(private)], [targets(part, pool.classes) for part in private])
        signs = 2 * torch.randint(2, inputs.shape, generator=rng) - 1
        return replace(batch, inputs=GRAY + signs * (inputs - GRAY), targets=wanted)
