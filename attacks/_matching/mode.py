"""The mode of the posterior near a belief about one record, by Gauss–Newton on the network's own derivative.

Source: Bell, 1994, doi:10.1137/0804035 (an iterated smoother as Gauss–Newton); Balunović et al., 2022, arXiv:2111.04706 (the posterior).
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from attacks._matching.evidence import Belief, Mechanism, Pixels
from attacks._matching.simulate import Victim, simulate

STEPS, SETTLED = 12, 0.5
"""Gauss–Newton steps at most, and the gain in nats below which they end."""

EXPLAINED = 1.5
"""Root mean square of what a mode leaves of the upload, in deviations of its noise, up to which it is taken: else the pattern is wrong."""

EXACT = 1e-4
"""Error on a coordinate where nothing is random, relative to the update's: float32 and what is left of linearizing."""



def polished(victim: Victim, mechanism: Mechanism, prior: Belief, belief: Belief) -> Belief | None:
    """The belief with its mean moved to the nearest mode.

    Sampling ends at its error of linearizing, in the right pattern of active units but above the noise; inside of that pattern the
    network is nearly linear in the record. A step is taken only where it makes record and upload likelier together.

    Returns:
        None where the mode does not explain the upload, so that the pattern is wrong, or where signs are all that is known.
    """
    if mechanism.kind == "signs":
        return None
    label, seen, precision = victim.labels[:1], mechanism.seen, torch.linalg.inv(prior.covariance)
    target = mechanism.target[seen].double()
    noise = mechanism.deviation[seen].double().clamp(min=EXACT * float(target.square().mean().sqrt()))

    def made(image: Pixels) -> Tensor:
        update = simulate(
            victim.model, victim.parameters, victim.buffers, image.view(1, *victim.shape), label,
            recipe=victim.recipe, order=victim.order, names=victim.names,
        )  # fmt: skip
        return mechanism.clipped(update[None])[0, seen]

    def surprise(mean: Pixels, off: Tensor) -> float:
        away = (off / noise).abs()
        apart = mean - prior.mean
        return float((math.sqrt(2) * away if mechanism.laplace else away.square() / 2).sum() + apart @ precision @ apart / 2)

    mean = belief.mean
    off = target - made(mean.float()).detach().double()
    lowest = surprise(mean, off)
    for _ in range(STEPS):
        jacobian = torch.func.jacfwd(made)(mean.float()).detach().double() / noise[:, None]
        weights = math.sqrt(2) / (off / noise).abs().clamp(min=0.1) if mechanism.laplace else torch.ones_like(off)
        curvature = jacobian.T @ (weights[:, None] * jacobian) + precision
        step = torch.linalg.solve(curvature, jacobian.T @ (weights * off / noise) - precision @ (mean - prior.mean))
        for share in (1.0, 0.3, 0.1):
            tried = (mean + share * step).clamp(0, 1)
            gap = target - made(tried.float()).detach().double()
            if (value := surprise(tried, gap)) < lowest:
                break
        else:
            break
        mean, off, before, lowest = tried, gap, lowest, value
        if before - lowest < SETTLED:
            break
    return replace(belief, mean=mean) if float((off / noise).square().mean().sqrt()) < EXPLAINED else None
