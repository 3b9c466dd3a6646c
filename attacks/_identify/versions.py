"""What defenses of the records may have made of each candidate: all of it where that is a short list, else draws."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from attacks._identify.choice import Owners
from attacks.modeled import MIXING, TRANSFORMING
from simulator.adversary import Knowledge
from simulator.mechanisms import augment
from simulator.types import Batch

ALONE = 0.97
"""Share from which on a partner of another class is taken for noise."""

GRAY = 0.5
"""The pixel about which InstaHide's signs turn."""


def mixing(knowledge: Knowledge) -> tuple[str, Mapping[str, object]] | None:
    """Name and settings of the one defense that mixes records, if there is one and no other changes them."""
    changing = [(name, settings) for name, settings in knowledge.defenses if name in (*MIXING, *TRANSFORMING)]
    return changing[0] if len(changing) == 1 and changing[0][0] in MIXING else None


def transformed(pool: Batch, knowledge: Knowledge) -> tuple[Batch, Owners]:
    """All that ATS can make of each candidate, and the candidate that each is of; themselves without it.

    Policies are equally likely, and within one all signs; of policies with fewer signs each outcome is repeated.
    """
    owner = torch.arange(len(pool))
    for settings in (settings for name, settings in knowledge.defenses if name in TRANSFORMING):
        policies = augment.policies(str(settings["policy"]))
        made = [[each for policy in policies for each in _evenly(pool.inputs[i], policy, policies)] for i in range(len(pool))]
        owner = owner.repeat_interleave(len(made[0]))
        labels = pool.labels.repeat_interleave(len(made[0]))
        pool = Batch(torch.stack([each for versions in made for each in versions]), labels)
    return pool, owner


def _evenly(image: Tensor, policy: tuple[int, ...], policies: tuple[tuple[int, ...], ...]) -> list[Tensor]:
    def signs(of: tuple[int, ...]) -> int:
        return sum(augment.LIBRARY[number][0] in augment.SIGNED for number in of)

    again: int = 2 ** (max(map(signs, policies)) - signs(policy))
    return augment.outcomes(image, policy) * again


def drawn_shares(name: str, settings: Mapping[str, object], count: int, rng: torch.Generator) -> Float[Tensor, "count k"]:
    """Shares of the records in mixtures, the client's own first."""
    if name == "mixup":
        alpha = float(str(settings["alpha"]))
        seed = int(torch.randint(2**62, (1,), generator=rng))
        share = torch.from_numpy(np.random.default_rng(seed).beta(alpha, alpha, count)).float()
        return torch.stack([share, 1 - share], 1)
    k, largest = int(str(settings["k"])), float(str(settings["c_max"]))
    drawn = torch.randn(8 * count, k, generator=rng).abs()
    drawn = drawn / drawn.sum(1, keepdim=True)
    kept = drawn[drawn.amax(1) <= largest][:count]
    return kept if len(kept) == count else torch.cat([kept, torch.full((count - len(kept), k), 1 / k)])


def drawn(
    name: str, settings: Mapping[str, object], own: Batch, others: Batch, classes: int, rng: torch.Generator
) -> tuple[Float[Tensor, "count channel height width"], Float[Tensor, "count classes"]]:
    """What the defense might make of each of these records, with partners out of ``others``: pictures and targets."""
    shares = drawn_shares(name, settings, len(own), rng)
    partners = torch.randint(len(others), (len(own), shares.shape[1] - 1), generator=rng)
    inputs = torch.einsum("n,nchw->nchw", shares[:, 0], own.inputs) + torch.einsum("nk,nkchw->nchw", shares[:, 1:], others.inputs[partners])
    wanted = torch.einsum("nk,nkc->nc", shares, F.one_hot(torch.cat([own.labels[:, None], others.labels[partners]], 1), classes).float())
    if name == "instahide":
        inputs = GRAY + (2 * torch.randint(2, inputs.shape, generator=rng) - 1) * (inputs - GRAY)
    return inputs, wanted


def drawn_given(
    targets: Float[Tensor, " classes"], own: Batch, others: Batch, rng: torch.Generator
) -> tuple[Float[Tensor, "count channel height width"], Float[Tensor, "count classes"]]:
    """What MixUp might make of each of these records, towards these targets: at its class's share, with a partner of the other class."""
    classes = len(targets)
    pair = targets.topk(2).indices
    share = torch.zeros(classes).index_put((pair,), (targets[pair] / targets[pair].sum().clamp(min=1e-9)))
    partner = torch.where(own.labels == pair[0], pair[1], pair[0])
    a = share[own.labels]
    partner = torch.where(a > ALONE, own.labels, partner)
    chance = (others.labels[None] == partner[:, None]).float() + 1e-6
    met = others.inputs[torch.multinomial(chance, 1, generator=rng)[:, 0]]
    inputs = torch.einsum("n,nchw->nchw", a, own.inputs) + torch.einsum("n,nchw->nchw", 1 - a, met)
    hot = (F.one_hot(some, classes).float() for some in (own.labels, partner))
    return inputs, sum(part * weight[:, None] for part, weight in zip(hot, (a, 1 - a), strict=True))  # type: ignore[return-value]
