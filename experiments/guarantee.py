"""What a world's defenses guarantee against the server, and the ceilings that this puts on what any attack can reach.

There are two kinds of ceilings. That of the whole training is for whoever has every upload. That of a view is for what the attacks on one
round were handed, all releases of the unit's data up to the latest round in it (``defenses.accounting.until`` says why no fewer):
an attack is compared with its own view's, since no attack on round 1 reaches what round 60 allows, not even on broken code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from clients.private import records_held
from defenses import fisher
from defenses.accounting import Guarantee, certified, guarantee, until
from defenses.bounds import Ceilings, ceilings
from defenses.client.clip import Clip
from defenses.client.dp_sgd import DPSGD
from defenses.client.gaussian_noise import GaussianNoise
from experiments.under_attack import Victim
from simulator.defense import Claim
from simulator.front import first_is_linear
from simulator.models.normalize import Normalize
from simulator.rng import stream
from simulator.world import World

RECORDS, PROBES = 5, 20
"""Of so many attacked records the Fisher information is estimated, which takes a second; the most exposed one counts. Fewer than 20 probes
would be too few for what :meth:`defenses.fisher.Trace.above` says of its upper end."""

RANDOM_LAYERS = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
"""Under which a record has no gradient of its own, or no fixed one."""


@dataclass(frozen=True)
class Proven:
    """What is certified of a world against the server.

    Attributes:
        guarantee: over the whole training.
        training: the ceilings for whoever has all of it.
        views: those for what the attacks on a round saw, by round.
        seen: the latest round that they saw something of, by attacked round.
    """

    guarantee: Guarantee
    training: Ceilings
    views: dict[int, Ceilings]
    seen: dict[int, int]


def guarantee_of(world: World, *, delta: float, candidates: int, victims: Sequence[Victim] = ()) -> Proven:
    """The guarantee over the whole training, the ceilings under it, and those for what the attacks saw.

    Args:
        world: the federation.
        delta: δ.
        candidates: N, among which the true one is to be named.
        victims: the uploads under attack, each with what it discloses: without any there are no views. The ceilings without a prior are
            about their records; that on PSNR is about inverting a linear layer that sees the record, and is given where the first one is
            such.

    Raises:
        SpecError: δ is not below 1 / number of records.
    """
    held = records_held(world)
    found, dfils = guarantee(world, records_held=held, delta=delta), leakage(world, victims)
    outside = guarantee(world, records_held=held, delta=delta, adversary="outsider")
    if math.isinf(found.epsilon) > math.isinf(outside.epsilon):  # central noise: of no use against this server, and said so
        found = replace(found, sentence=f"{found.sentence} {outside.sentence}")

    def under(claims: Sequence[Claim], attacked: Sequence[Victim]) -> Ceilings:
        linear = [victim for victim in attacked if first_is_linear(victim.knowledge.model, tuple(victim.truth.inputs.shape[1:]))]
        norms = [float((record - mean_seen(victim.knowledge.model)).norm()) for victim in linear for record in victim.truth.inputs]
        pixels = attacked[0].truth.inputs[0].numel() if attacked else 0
        return ceilings(claims, candidates, norms=norms, pixels=pixels, dfils=dfils)

    seen = {victim.round: latest_seen(victim) for victim in victims}
    views = {
        number: under(
            certified(until(world, last), records_held=held)[0] if math.isfinite(found.epsilon) else (),
            [victim for victim in victims if victim.round == number],
        )
        for number, last in seen.items()
    }
    return Proven(found, under(found.claims, victims), views, seen)


def latest_seen(victim: Victim) -> int:
    """The latest round of which the attack on this upload was handed anything: the attacked one, or one of those disclosed beside it."""
    return max(victim.round, *(other.broadcast.round for other in victim.knowledge.history), 1)


def mean_seen(model: nn.Module) -> float:
    """What the model's first layer takes off each pixel."""
    return next((layer.mean for layer in model.modules() if isinstance(layer, Normalize)), 0.0)


def leakage(world: World, victims: Sequence[Victim]) -> list[float]:
    """Fisher information leakage of some attacked records, from one release, at the upper end; empty where no formula holds."""
    known = clipping_and_noise(world)
    if known is None or not victims or any(isinstance(layer, RANDOM_LAYERS) for layer in victims[0].knowledge.model.modules()):
        return []
    clip_norm, std = known
    records = [(victim, place) for victim in victims for place in range(len(victim.truth))][:RECORDS]
    return [
        fisher.trace(
            victim.knowledge.model, victim.view.broadcast.parameters, victim.view.broadcast.buffers, victim.truth.inputs[place],
            victim.truth.labels[place], clip_norm=clip_norm, probes=PROBES, rng=stream(world.seed, "fisher", victim.round, place),
            label_smoothing=world.training.label_smoothing,
        ).above().dfil(std)
        for victim, place in records
    ]  # fmt: skip


def clipping_and_noise(world: World) -> tuple[float, float] | None:
    """To which norm a record's gradient is clipped, and the noise beside it; None for what is no such mechanism of one gradient."""
    recipe = world.training
    if recipe.algorithm != "fedsgd" or not recipe.batch_size:
        return None
    match world.defenses:
        case (DPSGD(clip_norm=bound, noise_multiplier=z),) if z:
            return bound, z * bound
        case (GaussianNoise(sigma=sigma),) if sigma:
            return math.inf, sigma * recipe.batch_size  # the upload is the mean over the batch
        case (Clip(clip_norm=bound), GaussianNoise(sigma=sigma)) if sigma and recipe.batch_size == 1:
            return bound, sigma
    return None
