"""What a world's defenses guarantee against the server, and the ceilings that this puts on what any attack can reach.

There are two kinds of ceilings. That of the whole training is for whoever has every upload. That of a view is for what the attacks on one
round were handed, all releases of the unit's data up to the latest round in it (``defenses.accounting.until`` says why no fewer):
an attack is compared with its own view's, since no attack on round 1 reaches what round 60 allows, not even on broken code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

from torch import nn

from clients.private import records_held
from defenses import fisher
from defenses.accounting import Guarantee, certified, guarantee, until
from defenses.bounds import Ceilings, ceilings
from experiments.under_attack import Victim
from simulator.defense import Claim, overrides
from simulator.front import first_is_linear
from simulator.models.dropout import Dropout
from simulator.models.latent import Bottleneck
from simulator.models.normalize import Normalize
from simulator.rng import stream
from simulator.world import World

RECORDS, PROBES = 5, 20
"""Of so many attacked records the Fisher information is estimated, which takes a second; the most exposed one counts. Fewer than 20 probes
would be too few for what :meth:`defenses.fisher.Trace.above` says of its upper end."""

RANDOM_LAYERS = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd, Dropout, Bottleneck)
"""Under which a record has no gradient of its own, or no fixed one; dropout only where it drops."""

CHANGING = ("on_gradient", "on_step", "on_update")
"""The hooks that change a gradient, in the order in which a client comes to them: every defense's first, then every one's second."""


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
    if not victims or any(isinstance(layer, RANDOM_LAYERS) and getattr(layer, "p", 1) for layer in victims[0].knowledge.model.modules()):
        return []
    held, found = records_held(world), []
    records = [(victim, place) for victim in victims for place in range(len(victim.truth))][:RECORDS]
    for victim, place in records:
        if (known := clipping_and_noise(world, held[victim.clients[place]])) is None:
            return []  # the most exposed record is unknown
        clip_norm, std = known
        estimate = fisher.trace(
            victim.knowledge.model, victim.view.broadcast.parameters, victim.view.broadcast.buffers, victim.truth.inputs[place],
            victim.truth.labels[place], clip_norm=clip_norm, probes=PROBES, rng=stream(world.seed, "fisher", victim.round, place),
            label_smoothing=world.training.label_smoothing,
        )  # fmt: skip
        found.append(estimate.above().dfil(std))
    return found


def clipping_and_noise(world: World, held: int) -> tuple[float, float] | None:
    """To which norm a record's gradient is clipped, and the Gaussian noise that then hides it, in its own unit; None where this is not so.

    The noise that comes first counts. What follows it, channels included, gets the noisy update and nothing private, so that whoever is
    unbiased from what is left is unbiased from the noisy update: the bound stays. There is none where anything but clipping changes the
    gradient before the noise, where the private batch is looked at again, or where a report on the update leaves before the noise.

    Args:
        world: the federation.
        held: records of the client in question.
    """
    recipe, defenses = world.training, world.defenses
    if recipe.algorithm != "fedsgd" or any(defense.looks_again or overrides(defense, "on_batch") for defense in defenses):
        return None
    batch, clip_norm = recipe.size_of_batch(held), math.inf
    alone = batch == 1 and recipe.sampling == "shuffled"  # a Poisson sample of one expected record may hold two
    for hook, place in product(CHANGING, range(len(defenses))):
        if not overrides(defenses[place], hook):
            continue
        if (found := defenses[place].clipping_and_noise(batch, alone=alone)) is None:
            return None
        clip_norm, std = min(clip_norm, found[0]), found[1]
        if std:
            seen_before = defenses[: place + 1] if hook == "on_update" else ()  # each reports on the update as its own on_update gets it
            return None if any(overrides(defense, "on_buffers") for defense in seen_before) else (clip_norm, std)
    return None
