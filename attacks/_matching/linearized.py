"""One record behind a coarse update, by rounds of statistical linearization, without a derivative of the network but for the last steps.

A ReLU network's gradient jumps where a unit turns on, so that descent and Gauss–Newton end at the first jump. Here records are drawn from
the present belief and sent through the client's own recipe and defense, and the update is regressed on them: the slope is that of the mean
over the belief, and what it leaves is the error of linearizing, known for every coordinate. The defense's likelihood, smoothed by that
error, then says how each coordinate pulls (its score); regressing the scores of simulated uploads on their records says what the pull of
the observed one means, however the errors of coordinates go together. The belief shrinks, and with it the error, round after round.
Last the mean is moved to the nearest mode of the posterior by the network's own derivative (attacks._matching.mode), which in the right
pattern of units is nearly constant; where it explains the upload, 5 rounds are enough instead of 12. What that gains is printed by
``pytest --slow -s tests/attacks/test_linearized.py``.

Source: Tronarp, García-Fernández and Särkkä, 2018, arXiv:1708.06160 (iterated posterior linearization, for any conditional moments);
    Wu et al., 2023, arXiv:2210.10880 (simulated pairs from public records); Balunović et al., 2022, arXiv:2111.04706 (the likelihood of
    the defense); Alistarh et al., 2017, arXiv:1610.02132 (the distribution of the rounding). The regression of scores is our own.
Deviations: the belief's variances fall at most to a quarter in a round, and a pull that is larger than simulated ones counts as noisier.
"""

from __future__ import annotations

import time

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import vmap

from attacks._matching.evidence import Belief, Mechanism, Uploads
from attacks._matching.mode import polished
from attacks._matching.simulate import Victim, simulate
from simulator.progress import tick

SHRINK = 4.0
"""Most that a round divides a variance of the belief by: without, beliefs collapse around a wrong pattern of active units."""

POLISHED = 5
"""Rounds from which on the belief is polished, every second time."""


def updates(victim: Victim, images: Float[Tensor, "samples pixels"], label: int | Tensor) -> Uploads:
    """The updates that the client would make of each of these records alone, all of one label or each of its own."""
    labels = torch.as_tensor(label).expand(len(images))

    def one(image: Tensor, own: Tensor) -> Tensor:
        return simulate(
            victim.model, victim.parameters, victim.buffers, image.view(1, *victim.shape), own[None],
            recipe=victim.recipe, order=victim.order, names=victim.names,
        )  # fmt: skip

    with torch.no_grad():
        return torch.cat([vmap(one)(*part) for part in zip(torch.split(images, 64), torch.split(labels, 64), strict=True)])


def rebuilt(
    victim: Victim, mechanism: Mechanism, prior: Belief, *, rounds: int, samples: int, seconds: float, rng: torch.Generator, task: str
) -> tuple[Belief, bool]:
    """The belief after so many rounds, or when the CPU seconds are over; and whether more would not have changed it.

    From :data:`POLISHED` rounds on, and at the end, it is polished: where that explains the upload, there is no more to be had.
    """
    belief, began, whole = prior, time.process_time(), True
    for number in range(rounds):
        spent = time.process_time() - began
        if number and spent * (number + 1) / number > seconds:
            whole = False
            break
        belief = updated(victim, mechanism, prior, belief, samples, rng)
        tick(task, number + 1, rounds)
        due = POLISHED <= number + 1 < rounds and (number + 1 - POLISHED) % 2 == 0
        if due and (found := polished(victim, mechanism, prior, belief)) is not None:
            return found, True
    found = polished(victim, mechanism, prior, belief)
    return (belief, whole) if found is None else (found, True)


def updated(victim: Victim, mechanism: Mechanism, prior: Belief, belief: Belief, samples: int, rng: torch.Generator) -> Belief:
    """One round: the prior given the upload, linearized over the present belief."""
    pixels = len(prior.mean)
    eye = torch.eye(pixels, dtype=torch.float64)
    root = torch.linalg.cholesky(belief.covariance + 1e-10 * eye)
    half = torch.randn(samples // 2, pixels, generator=rng, dtype=torch.float64)
    images = (belief.mean + torch.cat([half, -half]) @ root.T).clamp(0, 1)
    made = mechanism.clipped(updates(victim, images.float(), int(victim.labels[0])))
    live = ((made != 0).any(0) & mechanism.seen).nonzero().flatten()
    if not len(live):
        return prior
    made, known, free = made[:, live], mechanism.only(live), max(1, samples - pixels - 1)
    middle, away = images.mean(0), images - images.mean(0)
    spread = away.T @ away / samples
    damped = spread + 1e-4 * spread.diagonal().mean() * eye
    slope = torch.linalg.solve(samples * damped, away.T @ (made - made.mean(0)).double()).float()
    left = (made - made.mean(0) - away.float() @ slope).square().sum(0) / free
    error = (left + 0.01 * left.mean() + 1e-12).sqrt()
    at = made.mean(0) + (belief.mean - middle).float() @ slope
    pulls = (known.score(known.drawn(made, rng), at, error) @ slope.T).double()
    pull = (slope @ known.score(known.target[None], at, error)[0]).double() - pulls.mean(0)
    pulls = pulls - pulls.mean(0)
    response = torch.linalg.solve(samples * damped, away.T @ pulls)
    noise = (pulls - away @ response).T @ (pulls - away @ response) / free
    noise = noise + 1e-6 * noise.diagonal().mean() * eye + 1e-30 * eye
    surprise = float(pull @ torch.linalg.solve(response.T @ spread @ response + noise, pull)) / pixels
    gain = torch.linalg.solve(noise * max(1.0, surprise), response.T)
    precision = torch.linalg.inv(prior.covariance)
    covariance = torch.linalg.inv(precision + (response @ gain + (response @ gain).T) / 2)
    mean = covariance @ (precision @ prior.mean + (pull + middle @ response) @ gain)
    if not bool(torch.isfinite(mean).all()):
        return belief
    whitened = torch.linalg.solve_triangular(root, torch.linalg.solve_triangular(root, covariance, upper=False).T, upper=False)
    values, axes = torch.linalg.eigh((whitened + whitened.T) / 2)
    wide = (root @ axes) * values.clamp(min=1 / SHRINK) @ (root @ axes).T
    return Belief(mean.clamp(0, 1), (wide + wide.T) / 2)
