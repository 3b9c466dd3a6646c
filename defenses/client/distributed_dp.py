"""Distributed differential privacy: every client adds a share of the noise, and only the sum, which is all the server sees, holds enough.

    at each client, on the grid of secure aggregation:  round(R·clip_S(u)) + Skellam(z²S²/h)       h the fewest honest clients in a sum
    in the sum, which the server turns back by R⁻¹:     Σ round(R·clip_S(u)) + Skellam(≥ z²S²)      R a public random rotation

Source: the Skellam mechanism, Agarwal, Kairouz and Liu, 2021, arXiv:2110.04995, algorithm 1; rotation and conditional rounding of
Kairouz, Liu and Steinke, 2021, arXiv:2102.06387, algorithm 1.
Deviations: the rotation pads nothing (_secagg/rotation.py). Words have room for √(2·ln(2 / wrap_chance)) standard deviations of a
coordinate of the sum, 7.5 by default, where the papers take 4, and for every rounding at its worst; one bit more makes up for it. ε at
z = 1, against a central Gaussian's, **both by Rényi DP**, 100 clients: for 1.12·10⁷ coordinates + 0.05 % at 20 bits and + 12 % at 16, for
62 006 + 0.001 % and + 0.1 %. At 4 deviations and without drop-outs it is the papers' ε from 16 bits on, to 0.04 %. Where
``rotate = false``, the range must hold a coordinate as long as the update: at the smallest ``clip_range`` that is accepted + 6.5 % at 20
bits and 1.12·10⁷ (claims ``distributed-dp-*``). No tight accountant is known for Skellam sums: at z = 1 and one round Rényi DP says 4.75
where a Gaussian's exact ε is 4.38, printed beside it. The bound is for whole orders from 2 on, and the comparison above does not show what
that costs, since both are at these: from z/√rounds = 0.2 down the best order lies below 2. Over 60 rounds ε at z = 1.5 is 36.8, where a
Gaussian's is 36.7 at all orders and 34.6 exactly; at z = 0.5 it is 250, beside 192 and 185; at z = 0.1 6010, beside 3368 and 3329. Such an
ε holds, and says less for the mechanism than is true of it.
Hooks: ``on_update`` (clipping), and inside secure aggregation ``rotation``, ``word_range``, ``longest_rounded`` and ``integer_noise``.

A coordinate of the sum that leaves the words' range wraps around it: that costs utility, rarely (``wrap_chance``, over the rotation's
signs and the noise), and no privacy, since the norm is bounded after rounding, whatever wraps, and all after the noise is post-processing.
The rotation is no secret: the server's view is the sum turned back, with as much noise on each coordinate; it shows all that the sum does.

The claim, against the server and up to ``colluding`` clients that tell it their noise: unit client, adjacency zero-out, sensitivity S
after rounding, one release a round. It needs secure aggregation, in mode ``protocol``, or ``quantized`` for a trusted party that adds
up: one client's share alone gives z/√h. On the complete graph fewer colluders than can open others' uploads together, on a k-regular one
no more than the share ``corrupt`` that it is certified for. The server draws the cohort, so that sampling of clients amplifies nothing.
The weights n_i / max_examples shrink what a client adds and not its noise: with unequal n_i the mean is noisier than z says. ε is for the
fewest honest clients that a sum may hold; where all answer it is lower than printed, since the noise of all is in the sum.

What it protects: all that one client holds, from the server with up to ``colluding`` clients and from whoever sees the models later:
within ε and δ the sum could as well hold 0 in the place of its update. The honest clients' shares of noise are on the sum together, so
that the mean is about as noisy as under ``central_dp``, and the server need not be trusted with it.

What it does not protect: who takes part and how many records all hold together; against a server that lies about who dropped out,
beyond what secure aggregation itself detects. Noise is a difference of two Poisson numbers of numpy's generator, seeded by the world:
exact integers, so that floating-point attacks (Mironov, 2012) find nothing, but not cryptographic.
Broken by: nothing that it claims to stop; a server that colludes with more clients than ``colluding`` sees a sum with less noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from dp_accounting import SelfComposedDpEvent

from defenses.channel._secagg.graph import most_corrupt
from defenses.channel._secagg.rotation import transformed
from defenses.channel.secure_aggregation import SecureAggregation
from defenses.client.clip import clip_to_norm, require_clip_norm
from defenses.client.gaussian_noise import require_noise_multiplier
from defenses.distributed import LARGEST_VARIANCE, SkellamDpEvent, l1_of, reach, rounded_norm, skellam
from defenses.refusal import batch_norm_in_train_mode
from simulator.defense import Claim, ClientContext, Defense, Role, overrides
from simulator.network import network
from simulator.registry import register
from simulator.rng import stream
from simulator.types import Update
from simulator.world import World

MARGIN = 1e-6
"""By how much, relatively, float32 may leave an update longer than the clip norm."""
REACH = 8
"""Standard deviations of noise in the sum for which the words must have room where nothing is rotated."""
LARGEST_CHANCE = 1e-3
"""Of a coordinate to wrap: room for 3.9 standard deviations, beyond which 1e-4 of a Gaussian's numbers add 0.6 % to its variance."""


def words(world: World) -> SecureAggregation:
    """The channel that the noise is for; a world without it is refused before."""
    assert isinstance(world.channel, SecureAggregation)
    return world.channel


def bounded(world: World, channel: SecureAggregation) -> bool:
    """Whether something less than all records bounds what a client trains on."""
    return bool(channel.max_examples or (world.training.algorithm == "fedsgd" and world.training.batch_size))


@register("defenses", "distributed_dp")
@dataclass(frozen=True)
class DistributedDP(Defense):
    """Adds each client's share of integer noise inside secure aggregation: ε against the server for less noise than client_dp.

    The module is long because its documentation is the defense's page, a third of it.

    Attributes:
        clip_norm: S, largest L2 norm of an update.
        noise_multiplier: z, standard deviation in units of S of the noise that a sum of the fewest honest clients holds.
        colluding: clients, at most, that tell the server their noise; −1 takes as many as the channel stands, ``corrupt`` of the cohort.
        rotate: turn the clipped update at random before it is rounded, so that words need room for a coordinate's share of its length and
            not for all of it; the range of the words is then for that, whatever ``clip_range``.
        wrap_chance: that a coordinate of a round's sum leaves that range and wraps, at most; utility is at stake, never ε. The papers'
            four standard deviations are 6.7e-4.
    """

    role: ClassVar[Role] = "clip"

    clip_norm: float = 1.0
    noise_multiplier: float = 1.0
    colluding: int = -1
    rotate: bool = True
    wrap_chance: float = 1e-12

    def __post_init__(self) -> None:
        require_clip_norm(self.clip_norm)
        require_noise_multiplier(self.noise_multiplier, self.clip_norm)
        if not 0 < self.wrap_chance <= LARGEST_CHANCE:
            raise ValueError(
                f"wrap_chance must be > 0 and ≤ {LARGEST_CHANCE:g}, got {self.wrap_chance}. One that wraps is off by the range."
            )
        if self.colluding < -1:
            raise ValueError(f"colluding must be ≥ 0, or −1, got {self.colluding}. 0 is a server alone, −1 the channel's share.")

    def refuses(self, world: World) -> str | None:
        """Refuse worlds without the words of secure aggregation, or where these have no room or no room to spare for the noise."""
        channel, n = world.channel, world.federation.cohort_size
        if not isinstance(channel, SecureAggregation) or channel.mode == "plain":
            got = (
                channel.name if channel is not None and not isinstance(channel, SecureAggregation) else "plain sums" if channel else "none"
            )
            return f"channel must be secure_aggregation on integers for distributed_dp, got {got}. Use its mode 'protocol' or 'quantized'."
        if n < 2 or (plan := channel.plan_for(n, world.federation.rounds)) is None:
            return None  # secure aggregation says so itself
        told = self.tolerated(world)
        if plan.complete and told >= (most := most_corrupt(n, plan.threshold, active=channel.active)):
            return f"colluding must be below the {most} clients that can open others' uploads together, got {told}. Lower it."
        if not plan.complete and told > plan.corrupt:
            return (
                f"colluding must be ≤ {plan.corrupt}, the clients that the k-regular graph of secure_aggregation is certified against, got "
                f"{told}. Raise its corrupt, or lower colluding."
            )
        if world.federation.partition != "iid" and not bounded(world, channel):
            return (
                f"max_examples of secure_aggregation must be set for distributed_dp with partition {world.federation.partition!r}, got 0: "
                f"weights are n_i / max_examples, and all {channel.largest_upload(world)} records as the bound shrink every update, not "
                "the noise. Set a public bound on one client's examples."
            )
        place = world.defenses.index(self) if self in world.defenses else len(world.defenses)
        for defense in world.defenses[place + 1 :]:
            if overrides(defense, "on_update") and not defense.channel:
                return (
                    f"distributed_dp must be the last to change the update, got {defense.name!r} after it: its noise is added to words. "
                    f"Put it after {defense.name}."
                )
        return (self.no_words(world) if self.rotate else self.no_room(world)) or batch_norm_in_train_mode(world, self.name)

    def no_words(self, world: World) -> str | None:
        """Why there is no range for rotated words, or None."""
        if math.isinf(self.clip_norm):
            return "clip_norm must be finite for distributed_dp that rotates, got inf: the words' range is for it. Set a clip_norm."
        if (most := words(world).scale_in(world).q_max) < 2:
            return f"bits of secure_aggregation must leave a client ≥ 2 steps either way, got {most} in this cohort. Set bits = 20 or 24."
        return None

    def no_room(self, world: World) -> str | None:
        """Why ``clip_range`` is not for updates as they are, or None."""
        channel = words(world)
        scale = channel.scale_in(world)
        if (need := self.least_range(world)) > channel.clip_range:
            return (
                f"clip_range of secure_aggregation must be ≥ {need:.4g} for updates of norm {self.clip_norm:g} and their noise, got "
                f"{channel.clip_range:g}. Set clip_range = {need:.4g}; more coarsens the grid."
            )
        if (self.share(world) / scale.step(channel.clip_range)) ** 2 > LARGEST_VARIANCE:
            chosen = "" if channel.bits else " (bits = 0 takes them without noise in mind)"
            return (
                f"bits of secure_aggregation must leave a client's noise a variance of at most 2^44 steps², got {scale.bits} bits"
                f"{chosen}. Set bits = 20 or 24; noise covers the rounding."
            )
        return None

    def least_range(self, world: World) -> float:
        """The smallest ``clip_range`` for updates that are not rotated: one coordinate may be as large as all."""
        return self.clip_norm + REACH * self.share(world) / math.sqrt(world.federation.cohort_size)

    def quorum(self, world: World) -> int:
        """The fewest clients that a sum holds: with fewer, secure aggregation opens nothing.

        The server ends a run with fewer than ``min_clients`` only after it has seen the sum.
        """
        return words(world).quorum_for(world.federation.cohort_size, world.federation.rounds)

    def honest(self, world: World) -> int:
        """h: the fewest of them that keep their noise to themselves."""
        return self.quorum(world) - self.tolerated(world)

    def tolerated(self, world: World) -> int:
        """Clients, at most, that tell the server their noise: one number for the masks of the channel and for the noise."""
        return words(world).foreseen(world.federation.cohort_size)[0] if self.colluding < 0 else self.colluding

    def share(self, world: World) -> float:
        """Standard deviation of one client's noise, z·S/√h, in the update's unit."""
        return self.noise_multiplier * self.clip_norm / math.sqrt(self.honest(world)) if self.noise_multiplier else 0.0

    def noise_std(self, world: World) -> float:
        """One client's share."""
        return self.share(world) if isinstance(world.channel, SecureAggregation) else 0.0

    def on_update(self, update: Update, context: ClientContext) -> Update:
        """Clip; the noise is added later, to the words."""
        return replace(update, tensors=clip_to_norm(update.tensors, self.clip_norm))

    def rotation(self, world: World, round: int) -> torch.Generator | None:
        """The same for all clients and the server, another one in each round, and no secret."""
        return stream(world.seed, "rotation", round) if self.rotate else None

    def word_range(self, world: World, coordinates: int) -> float | None:
        """Room for a rotated coordinate of the sum, beyond which it is with probability ``wrap_chance`` at most.

        A coordinate of the sum of n clipped updates is sub-Gaussian with variance (n·S)²/P over the rotation's signs, their noise has
        n·share², and rounding moves it by less than n steps. The grid is no finer than the noise can be drawn on.
        """
        if not self.rotate:
            return None
        most, n = words(world).scale_in(world).q_max, world.federation.cohort_size
        spread = math.hypot(self.clip_norm * (1 + MARGIN) / math.sqrt(transformed(coordinates)), self.share(world) / math.sqrt(n))
        room = reach(self.wrap_chance) * spread * most / (most - 1)
        return max(room, self.share(world) / math.sqrt(LARGEST_VARIANCE) * most)

    def longest_rounded(self, world: World, coordinates: int) -> float:
        """The norm that the noise is calibrated to."""
        return rounded_norm(self.clip_norm * (1 + MARGIN) / words(world).grid(world, coordinates), coordinates)

    def integer_noise(self, world: World, shape: tuple[int, ...], rng: torch.Generator) -> npt.NDArray[np.int64] | None:
        """This client's share."""
        return skellam((self.share(world) / words(world).grid(world, *shape)) ** 2, shape, rng)

    def release(self, world: World, coordinates: int) -> SkellamDpEvent:
        """What a round shows of a client, in steps of the grid: rounded and noised in as many coordinates, rotated or not."""
        l2, grid = self.longest_rounded(world, coordinates), words(world).grid(world, coordinates)
        return SkellamDpEvent(l2, l1_of(l2, coordinates), (self.noise_multiplier * self.clip_norm / grid) ** 2)

    def claim(self, world: World, records_held: Sequence[int]) -> Claim | None:
        """One Skellam release a round; none without noise, or without the channel that hides the shares."""
        if not self.noise_multiplier or self.refuses(world) is not None:
            return None
        model = network(world.architecture, world.data.load().schema, world.training, world.seed)
        coordinates = sum(parameter.numel() for parameter in model.parameters())
        return Claim(
            event=SelfComposedDpEvent(self.release(world, coordinates), world.federation.rounds),
            adversary="server",
            unit="client",
            adjacency=(
                "zero-out (the client's update is replaced by 0 in the sum; "
                f"{self.honest(world)} honest clients in it at least, {self.tolerated(world)} colluding at most)"
            ),
            sampling="cohort drawn by the server; no amplification",
            viewer=(
                "the honest-but-curious server, which sees the sum of the uploads alone, and "
                f"{self.tolerated(world)} clients that collude with it"
                + ("" if words(world).mode == "protocol" else ", given a trusted party that adds up (mode quantized)")
            ),
        )
