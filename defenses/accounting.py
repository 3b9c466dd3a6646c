"""From a stack of defenses to the ε that it guarantees, and to the sentence that may be printed about it.

    stack of defenses → claims (data) → ``defenses.privacy_loss`` → ε(δ), always with adversary, unit, adjacency and sampling

It fails closed: what it does not know, or cannot certify for this adversary, has ε = ∞ and a reason. Several mechanisms in a row are
each valid alone, since what follows a mechanism is post-processing (hooks are handed the update and nothing private) and what precedes
it is part of what it bounds; their claims are not combined, the best one is the guarantee. Claims for different units or kinds of neighbors
say different things, and so do those against a server that sees less than every upload: the best of each is kept.

Long for one file: every objection to a claim stands beside the claim that it refuses, to be read as one list.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from dp_accounting import PoissonSampledDpEvent

from defenses.client.client_dp import gaussian_upload_claim
from defenses.client.clip import Clip
from defenses.client.gaussian_noise import GaussianNoise
from defenses.distributed import ALL_ORDERS, ORDERS, epsilon_of, gaussian_curve
from defenses.privacy_loss import (
    Accountant,
    epsilon,
    gaussian_dp_epsilon,
    integer_curve,
    leaves,
    noise_multiplier,
    unknown,
)
from defenses.refusal import batch_norm_in_train_mode
from simulator.defense import Claim, overrides
from simulator.errors import SpecError
from simulator.world import World

Adversary = Literal["server", "outsider"]
VIEWER: dict[Adversary, str] = {
    "server": "the honest-but-curious server, which sees every upload",
    "outsider": "an outsider, who sees every released model and no upload",
}


BEHIND_A_CHANNEL = "the honest-but-curious server, whatever a channel hides from it"


@dataclass(frozen=True, kw_only=True)
class Guarantee:
    """What a stack of defenses guarantees over the whole training, with all that must be printed beside it.

    Attributes:
        epsilon: ε ≥ 0; inf where nothing is certified.
        delta: the probability that ε does not bound; below 1/records.
        adversary: against whom it holds.
        viewer: the same in words, with what is seen; where it is less than every upload, it says on whom that rests.
        unit: what one neighbor changes; ``none`` where nothing is certified, as in the next three.
        adjacency: how neighbors differ.
        sampling: what the adversary does not know of who took part.
        accountant: how ε was computed, see :data:`defenses.privacy_loss.Accountant`; ``none`` where it was not.
        sentence: the guarantee, or why there is none, in words.
        claim: the claim that was certified: what ``bounds.reconstruction_ceiling`` takes.
        others: the best guarantees for another unit, another kind of neighbor, or against who sees more, whose ε say something else; the
            sentence names them.
    """

    epsilon: float
    delta: float
    adversary: Adversary
    viewer: str
    unit: Literal["record", "client", "none"]
    adjacency: str
    sampling: str
    accountant: Accountant | Literal["none"]
    sentence: str
    claim: Claim | None = None
    others: tuple[Guarantee, ...] = ()

    @property
    def claims(self) -> tuple[Claim, ...]:
        """What was certified for any unit: each bounds every attack."""
        return tuple(one.claim for one in (self, *self.others) if one.claim is not None)


def guarantee(world: World, *, records_held: Sequence[int], delta: float = 1e-5, adversary: Adversary = "server") -> Guarantee:
    """The best guarantee of the world's defenses against ``adversary``, over the whole training; with it those of other units.

    Args:
        world: the federation, its recipe and its defenses.
        records_held: how many records each client holds.
        delta: below 1/records: at 1/records, publishing one record at random would pass.
        adversary: ``server`` sees uploads; ``outsider`` sees released models only, which are post-processed uploads, so that
            every claim against the server holds against it too.

    Raises:
        SpecError: ``records_held`` is not one count for each client, or ``delta`` is not in (0, 1/records).
    """
    records = sum(records_held)
    if len(records_held) != world.federation.clients or min(records_held) < 0 or not records:
        raise SpecError(
            f"records_held must be one count ≥ 0 for each of {world.federation.clients} clients, got {list(records_held)}. "
            "Use clients.private.records_held(world)."
        )
    if not 0 < delta < 1 / records:
        raise SpecError(f"delta must be > 0 and < 1/records = {1 / records:.3g}, got {delta}. Use the default 1e-5, or 0.1/records.")
    sound, reasons = certified(world, records_held=records_held, adversary=adversary)
    found = [certify(claim, delta, adversary) for claim in sound]
    kept: list[Guarantee] = []
    for one in sorted(found, key=lambda one: one.epsilon):
        if one.epsilon < math.inf and not any(covers(smaller, one) for smaller in kept):
            kept.append(one)
    if kept:
        best, *others = kept
        return replace(best, sentence=" ".join(one.sentence for one in (best, *others)), others=tuple(others))
    nothing = "the accountant finds no finite ε" if world.defenses else "no defense is in place"
    hidden = adversary == "server" and any(defense.channel for defense in world.defenses)
    return no_guarantee(delta, adversary, BEHIND_A_CHANNEL if hidden else VIEWER[adversary], reasons or [nothing])


def covers(smaller: Guarantee, other: Guarantee) -> bool:
    """Whether what ``smaller``, of no larger ε, says implies the other one: of the same neighbors, against who sees as much or more."""
    as_much = smaller.viewer in (VIEWER[smaller.adversary], other.viewer)
    return as_much and (smaller.unit, smaller.adjacency.split()[0]) == (other.unit, other.adjacency.split()[0])


def certified(world: World, *, records_held: Sequence[int], adversary: Adversary = "server") -> tuple[list[Claim], list[str]]:
    """The claims of the world's defenses that hold against ``adversary``, and why the other defenses certify nothing."""
    claims: list[Claim] = []
    reasons: list[str] = []
    for place in range(len(world.defenses)):
        claim = claim_of(world, place, records_held)
        reason = claim if isinstance(claim, str) else objection(claim, world, place, adversary)
        if reason is None and not isinstance(claim, str):
            claims.append(claim)
        elif reason is not None:
            reasons.append(reason)
    return claims, reasons


def until(world: World, last: int) -> World:
    """The world as if it ended with round ``last``: what it certifies bounds every view that holds nothing later.

    A view is what an attack is handed. That of one round alone, ``last``, is its broadcast and an upload. The broadcast is what the
    server made of the initial model and of the uploads before, so that it tells of them, and the adversary may know all the rest: with
    the releases of the attacked round alone, a ceiling could be beaten. Broadcast and upload together are a function of the releases of
    rounds 1 … ``last``, though, and that function knows nothing of the unit's data but what these say. By post-processing whatever
    holds of these releases holds of the view. Later releases are no part of it: their noise and what they show of the unit, which was
    decided before, never reach the attack. A view of several rounds is bounded in the same way, by the latest one that it holds.

    So what counts of a unit (a record, or all that a client holds) is each release that its data enter in rounds 1 … ``last``: of a
    fixed schedule ``World.participations`` at so many rounds, of Poisson sampling the attacked round in full and q of the earlier ones.
    """
    if not 1 <= last <= world.federation.rounds:
        raise ValueError(f"last must be a round in 1..{world.federation.rounds}, got {last}. Use the latest that the attack saw.")
    return replace(world, federation=replace(world.federation, rounds=last, record_rounds=()))


def claim_of(world: World, place: int, records_held: Sequence[int]) -> Claim | str:
    """What the defense at ``place`` claims, together with the one that directly precedes it; or why it claims nothing."""
    defense = world.defenses[place]
    if type(defense) is GaussianNoise:
        return noise_claim(world, place)
    claim = defense.claim(world, records_held)
    if claim is not None:
        return f"{defense.name} cannot act here: {reason}" if (reason := defense.refuses(world)) else claim
    if defense.channel:
        return f"{defense.name} hides whose update is whose and adds no noise, the sum is exact"
    if type(defense) is Clip:
        return "clip bounds the update and adds no noise"
    if reason := defense.refuses(world):
        return f"{defense.name} cannot act here: {reason}"
    return f"{defense.name} is a heuristic or adds no noise, it claims nothing"


def noise_claim(world: World, place: int) -> Claim | str:
    """Noise on the update directly after clipping is the Gaussian mechanism with z = sigma/clip_norm; otherwise it is nothing."""
    noise = world.defenses[place]
    before = next((defense for defense in reversed(world.defenses[:place]) if overrides(defense, "on_update")), None)
    if type(noise) is not GaussianNoise or type(before) is not Clip or math.isinf(before.clip_norm):
        return "gaussian_noise has no clip directly before it, so nothing bounds what it has to hide"
    if not noise.sigma:
        return "gaussian_noise has sigma = 0"
    if reason := batch_norm_in_train_mode(world, "a claim of clip and gaussian_noise"):
        return reason
    return gaussian_upload_claim(world, noise.sigma / before.clip_norm)


def objection(claim: Claim, world: World, place: int, adversary: Adversary) -> str | None:
    """Why the claim of the defense at ``place`` cannot be certified against ``adversary`` in this world, or None."""
    name = world.defenses[place].name
    if adversary == "server" and claim.adversary != "server":
        return f"{name} adds its noise after the server has seen the uploads"
    if reason := unknown(claim.event):
        return f"{name} claims what the accountant does not know: {reason}"
    if claim.unit == "client" and any(isinstance(leaf, PoissonSampledDpEvent) for leaf, _ in leaves(claim.event)):
        return f"{name} claims amplification by sampling of clients, but the server draws the cohort"
    for position, other in enumerate(world.defenses):
        last = world.defenses[place].channel or overrides(world.defenses[place], "integer_noise")  # its noise comes after every hook
        before = position < place or claim.adversary == "outsider" or last
        if claim.unit == "client" and before and other is not world.defenses[place] and overrides(other, "on_buffers"):
            return f"{other.name} reports on the update beside it, without the noise of {name}"
    acts_from = 0 if claim.unit == "record" else place  # on_step follows whatever acts on gradients
    for other in world.defenses[acts_from:]:
        if other.looks_again and other is not world.defenses[place]:
            return f"{other.name} looks at the private batch again after {name} has added its noise"
    if claim.unit == "record":
        for other in world.defenses:
            if other is not world.defenses[place] and overrides(other, "on_batch"):
                return f"{other.name} changes the batch, so one record may enter several gradients that {name} bounds one by one"
    return None


def certify(claim: Claim, delta: float, adversary: Adversary) -> Guarantee:
    """Turn a claim that has no objection into numbers and a sentence."""
    value, accountant = epsilon(claim.event, delta)
    how: str = "closed form of Gaussian DP, exact" if accountant == "exact" else accountant
    if integer_curve(claim.event) is not None:
        twin = math.sqrt(sum(count / noise_multiplier(leaf) ** 2 for leaf, count in leaves(claim.event)))
        whole, all_orders = (epsilon_of(gaussian_curve(1 / twin, orders), delta, orders) for orders in (ORDERS, ALL_ORDERS))
        how += (
            f" at whole orders ≥ 2, which the bound on Skellam noise is for; Gaussian noise of that size {whole:.5g} by RDP at "
            f"these orders, {all_orders:.5g} at all orders, {gaussian_dp_epsilon(twin, delta):.5g} exactly"
        )
    viewer = claim.viewer if claim.viewer and adversary == "server" else VIEWER[adversary]
    return Guarantee(
        epsilon=value,
        delta=delta,
        adversary=adversary,
        viewer=viewer,
        unit=claim.unit,
        adjacency=claim.adjacency,
        sampling=claim.sampling,
        accountant=accountant,
        sentence=(
            f"ε = {value:.5g} at δ = {delta:g} for each {claim.unit} against {viewer}, over the whole training. "
            f"Adjacency: {claim.adjacency}. Sampling: {claim.sampling}. Accountant: {how}. Simulation-grade noise."
        ),
        claim=claim,
    )


def no_guarantee(delta: float, adversary: Adversary, viewer: str, reasons: Sequence[str]) -> Guarantee:
    """ε = ∞, and why."""
    return Guarantee(
        epsilon=math.inf,
        delta=delta,
        adversary=adversary,
        viewer=viewer,
        unit="none",
        adjacency="none",
        sampling="none",
        accountant="none",
        sentence=f"ε = ∞ against {viewer}: {'; '.join(reasons)}.",
    )
