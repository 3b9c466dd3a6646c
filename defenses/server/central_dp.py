"""Central differential privacy: clients clip their updates, the server adds noise to the mean.

    at the client:  u ← clip_S(u)        at the server:  mean(u) + N(0, (z·S/n)²·I),    n the clients that answered

Source: DP-FedAvg with a fixed-size cohort, McMahan et al., 2018, arXiv:1710.06963; Geyer, Klein and Nabi, 2017, arXiv:1712.07557.
Deviations: the mean is weighted by the clients' numbers of examples, so one client may move it by more than S/n; the claim counts that
as less noise (:func:`weighted_noise_multiplier`). Where a channel or the upload's number format rounds after clipping, a client may move
the mean by more, which the claim pays for too (:func:`rounding`). Where a channel has no room for a coordinate as long as the norm, so that
whether a client is in the mean would depend on its update, the world is refused (:func:`cramped`). No amplification is claimed for
cohorts that an outsider does not know.
Hooks: ``on_update`` (clipping, at the client) and ``on_aggregate`` (noise, after the observation was taken).

The server's hook sees only the aggregate, and clipping *that* would not bound what one client contributes. So clipping happens at
each client before the mean; the server sees clipped updates without noise.

What it protects: all that one client holds, from outsiders who see the released models alone: within ε and δ these could as well have
come about without its update. It trusts the server, which is the adversary here.

What it does not protect: **anything against this server** (ε = ∞), which has recorded the uploads before it adds noise; secure
aggregation does not help, the exact sum is no noisier. From outsiders: that a client took part and how many records it holds, which the
weights and ε itself use (zero-out); one client's data in the place of another's, at the same ε. Noise is
float32 from torch's generator: simulation grade, not safe against floating-point attacks (Mironov, 2012).
Broken by: every attack, at this server: what it recorded is clipped, which changes the length of an update and not its direction.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dp_accounting import GaussianDpEvent, SelfComposedDpEvent

from defenses.channel._secagg.refusal import tail
from defenses.channel.ckks import CKKSAggregation
from defenses.channel.secure_aggregation import SecureAggregation
from defenses.client.client_dp import ClientDP
from defenses.client.clip import Clip, clip_to_norm, clipping_of_the_record, require_clip_norm
from defenses.client.distributed_dp import MARGIN
from defenses.client.gaussian_noise import GaussianNoise, add_gaussian, require_noise_multiplier
from defenses.client.laplace_noise import LaplaceNoise
from defenses.client.local_dp import LocalDP
from defenses.refusal import batch_norm_in_train_mode
from simulator.defense import Claim, ClientContext, Defense, ServerContext, overrides
from simulator.network import network
from simulator.registry import register
from simulator.types import Update
from simulator.world import World

KEEPS_THE_BOUND = (Clip, GaussianNoise, LaplaceNoise, ClientDP, LocalDP)
"""What may act on an update after it was clipped: it adds independent noise or makes the update shorter."""

FORMATS = {"float32": (0.0, 0.0), "float16": (2.0**-11, 2.0**-25), "bfloat16": (2.0**-8, 0.0)}
"""By how much rounding to a number format moves a number at most: relatively, and at least where numbers are subnormal."""


def weighted_noise_multiplier(
    noise_multiplier: float, examples: Sequence[int], answering: Sequence[int], *, longer: float = 0.0, beside: float = 0.0
) -> float:
    """The noise on a weighted mean in units of the most that one client moves it, for the worst cohort.

    The noise is z·S/n and the client with the largest share w of the examples moves the mean by w·S, so the ratio is z/(n·w).
    The worst cohort joins the largest client to the n − 1 smallest; with equal numbers of examples the ratio is z.

    Args:
        noise_multiplier: z.
        examples: of each client.
        answering: the numbers n of clients that may answer.
        longer: by how much, relatively, rounding makes an update longer.
        beside: what rounding adds to the sum whatever the client's weight, in units of S times one example.
    """
    ordered = sorted(examples)
    moved = (n * (ordered[-1] / (ordered[-1] + sum(ordered[: n - 1])) * (1 + longer) + beside / sum(ordered[:n])) for n in answering)
    return noise_multiplier / max(moved)


def coordinates_of(world: World) -> int:
    """Numbers in an update."""
    model = network(world.architecture, world.data.load().schema, world.training, world.seed)
    return sum(parameter.numel() for parameter in model.parameters())


def rounding(world: World, clip_norm: float) -> tuple[float, float]:
    """By how much rounding after clipping makes an update longer: relatively, and beside its weight in units of clip_norm × 1 example.

    The words of secure aggregation round each of d coordinates of the weighted update by less than a step of the grid: a vector of at
    most √d steps.
    """
    coordinates = coordinates_of(world)
    unit, smallest = FORMATS[world.training.upload_dtype]
    longer, channel = unit + smallest * math.sqrt(coordinates) / clip_norm, world.channel
    if not isinstance(channel, SecureAggregation) or channel.mode == "plain":
        return longer, 0.0
    return longer, channel.grid(world, coordinates) * math.sqrt(coordinates) / clip_norm * channel.largest_upload(world)


def after(mechanism: Defense, world: World) -> tuple[Defense, ...]:
    """The defenses that act after it."""
    return world.defenses[world.defenses.index(mechanism) + 1 :] if mechanism in world.defenses else ()


def cramped(mechanism: Defense, clip_norm: float, world: World) -> str | None:
    """Why a client might have to leave because of its update, which an outsider would see in the mean and no claim counts; or None.

    A channel that works on words leaves out who has a coordinate beyond their range. One coordinate may be as long as the whole update,
    and noise that is added after clipping comes on top: it goes beyond its :func:`tail` in 1e-15 of all coordinates, far below any δ.
    """
    need, channel = clip_norm * (1 + MARGIN) + tail(after(mechanism, world), world), world.channel
    if isinstance(channel, CKKSAggregation):
        what, room, do = "numbers that ckks_aggregation takes", channel.scheme.largest / world.federation.cohort_size, "Lower scale_bits"
    elif isinstance(channel, SecureAggregation) and channel.mode != "plain":
        what, room = "clip_range of secure_aggregation", channel.range_for(world, coordinates_of(world))
        do = f"Set clip_range = {math.ceil(need * 1e3) / 1e3:.10g}"
    else:
        return None
    if need <= room:
        return None
    return (
        f"{what} must be ≥ {need:.4g} for {mechanism.name} with updates of norm {clip_norm:g} and the noise after it, got {room:.4g}: a "
        f"client with a larger coordinate leaves, and that it did would tell of its data. {do}, or lower clip_norm."
    )


def blurred(mechanism: Defense, world: World) -> str | None:
    """Why rounding to the upload's number format is not bounded by the clip norm, or None: it takes its share of the noise, too."""
    noise = next((defense for defense in after(mechanism, world) if defense.noise_std(world)), None)
    if noise is None or (dtype := world.training.upload_dtype) == "float32":
        return None
    return (
        f"upload_dtype must be float32 for {mechanism.name} with noise after it, got {dtype} and {noise.name}: update and noise are "
        f"rounded together, so that a client moves the mean by more than that. Use float32, or put {noise.name} before {mechanism.name}."
    )


def undone(mechanism: Defense, world: World) -> str | None:
    """Why a bound on each client's update would not bound what it adds to the mean, or the mean is released before the noise."""
    name, recipe = mechanism.name, world.training
    place = world.defenses.index(mechanism) if mechanism in world.defenses else len(world.defenses)
    for defense in after(mechanism, world):
        if overrides(defense, "on_update") and not defense.channel and type(defense) not in KEEPS_THE_BOUND:
            return f"{name} must be the last to change the update's norm, got {defense.name!r} after it. Put {name} after it."
    for defense in world.defenses[:place]:
        if overrides(defense, "on_aggregate"):
            return f"{name} must be the first to change the aggregate, got {defense.name!r} before it. Put {name} before it."
    if recipe.sampling == "shuffled" and recipe.drop_last and (recipe.epochs > 1 or recipe.steps):
        return (
            f"drop_last must be false for {name} over more than one epoch, got true: how many records enter a round, and so the "
            "weights of the mean, would be random. Use drop_last = false, or epochs = 1 and steps = 0."
        )
    return batch_norm_in_train_mode(world, name)


def mean_claim(
    world: World, records_held: Sequence[int], noise_multiplier: float, adjacency: str, *, rounded: tuple[float, float] = (0.0, 0.0)
) -> Claim:
    """What a noised mean of clipped updates a round is worth to outsiders, whoever answers; ``rounded`` as in :func:`rounding`."""
    federation = world.federation
    examples = [world.training.examples_in_round(held) for held in records_held if held]
    largest = min(federation.cohort_size, len(examples))
    answering = range(max(1, min(federation.min_clients, largest)), largest + 1)
    longer, beside = rounded
    worth = weighted_noise_multiplier(noise_multiplier, examples, answering, longer=longer, beside=beside)
    return Claim(
        event=SelfComposedDpEvent(GaussianDpEvent(worth), federation.rounds),
        adversary="outsider",
        unit="client",
        adjacency=adjacency,
        sampling="every cohort taken as known; no amplification",
    )


@register("defenses", "central_dp")
@dataclass(frozen=True)
class CentralDP(Defense):
    """Clips at the clients and adds noise to the mean at the server: protects from outsiders, not from this server.

    Attributes:
        clip_norm: S, largest L2 norm of one client's update.
        noise_multiplier: z, standard deviation of the noise on the sum of updates in units of S.
    """

    clip_norm: float = 1.0
    noise_multiplier: float = 1.0

    def __post_init__(self) -> None:
        require_clip_norm(self.clip_norm)
        require_noise_multiplier(self.noise_multiplier, self.clip_norm)

    def refuses(self, world: World) -> str | None:
        """Refuse what undoes the clipping or makes clients leave, and BatchNorm in train mode: its statistics leave without noise."""
        if (reason := undone(self, world)) is not None or not self.noise_multiplier:
            return reason
        return cramped(self, self.clip_norm, world) or blurred(self, world)

    def clipping_and_noise(self, batch: int, *, alone: bool) -> tuple[float, float] | None:
        """Clipping alone, where the update is one record's: the noise comes after the server has seen it."""
        bound = clipping_of_the_record(self.clip_norm, alone=alone)
        return None if bound is None else (bound, 0.0)

    def on_update(self, update: Update, context: ClientContext) -> Update:
        """Clip, at the client."""
        return replace(update, tensors=clip_to_norm(update.tensors, self.clip_norm))

    def on_aggregate(self, update: Update, context: ServerContext) -> Update:
        """Add noise to the mean over the clients that answered."""
        if not self.noise_multiplier:
            return update
        sigma = self.noise_multiplier * self.clip_norm / context.cohort
        return replace(update, tensors=add_gaussian(update.tensors, sigma, context.rng))

    def claim(self, world: World, records_held: Sequence[int]) -> Claim | None:
        """One Gaussian release a round, against outsiders only; none without noise."""
        adjacency = "zero-out (the client's update is replaced by 0 before the mean)"
        if not self.noise_multiplier:
            return None
        return mean_claim(world, records_held, self.noise_multiplier, adjacency, rounded=rounding(world, self.clip_norm))
