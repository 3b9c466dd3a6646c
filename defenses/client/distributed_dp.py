"""Distributed differential privacy: every client adds a share of the noise, and only the sum, which is all the server sees, holds enough.

    at each client, on the grid of secure aggregation:  round(clip_S(u)) + Skellam(z²S²/h)        h the fewest honest clients in a sum
    in the sum:                                         Σ round(clip_S(u)) + Skellam(≥ z²S²)

Source: the Skellam mechanism, Agarwal, Kairouz and Liu, 2021, arXiv:2110.04995, algorithm 1; conditional rounding of Kairouz, Liu and
Steinke, 2021, arXiv:2102.06387, algorithm 1.
Deviations: no random rotation, since the server would have to turn it back before it looks: the range of the words is for a coordinate
as large as the whole clip norm, so that the same number of bits gives a coarser grid. Effect on ε at z = 1, 20 bits, 100 clients and
the smallest ``clip_range`` that is accepted, against a central Gaussian, **both by Rényi DP**: + 0.05 % for 62 006 coordinates, + 0.6 %
for 10⁶, + 6.5 % for 1.1·10⁷, where 24 bits give + 0.03 %; at clip_range = 8 the grid is 7 times as coarse: + 2 % and + 31 %. No tight
accountant is known for Skellam sums: at z = 1 and one round Rényi DP says 4.75 where a Gaussian's exact ε is 4.38, printed beside it.
Noise is calibrated to the fewest honest clients that a sum may hold; with more, there is more noise than claimed.
Hooks: ``on_update`` (clipping), ``longest_rounded`` and ``integer_noise`` (on the words, inside secure aggregation).

The claim, against the server and up to ``colluding`` clients that tell it their noise: unit client, adjacency zero-out, sensitivity S
after rounding, one release a round. It needs secure aggregation, in mode ``protocol``, or ``quantized`` for a trusted party that adds
up: one client's share alone gives z/√h. On the complete graph fewer colluders than can open others' uploads together, on a k-regular one
no more than the share ``corrupt`` that it is certified for. The server draws the cohort, so that sampling of clients amplifies nothing.
The weights n_i / max_examples shrink what a client adds and not its noise: with unequal n_i the mean is noisier than z says. ε is for the
fewest honest clients that a sum may hold; where all answer it is lower than printed, since the noise of all is in the sum.

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
from defenses.channel.secure_aggregation import SecureAggregation
from defenses.client.clip import clip_to_norm, require_clip_norm
from defenses.client.gaussian_noise import require_noise_multiplier
from defenses.distributed import SkellamDpEvent, l1_of, rounded_norm
from defenses.refusal import batch_norm_in_train_mode
from simulator.defense import Claim, ClientContext, Defense, Role, overrides
from simulator.network import network
from simulator.registry import register
from simulator.types import Update
from simulator.world import World

MARGIN = 1e-6
"""By how much, relatively, float32 may leave an update longer than the clip norm."""
REACH = 8
"""Standard deviations of noise in the sum for which the words must have room."""
LARGEST_VARIANCE = 2.0**44
"""Of one client's noise, in squared units of the grid. numpy's Poisson numbers are built from floats: above 2^46 their spread is off, and
above 2^53 all are even, so that the sum's parity is the secret's."""


def skellam(variance: float, shape: tuple[int, ...], rng: torch.Generator) -> npt.NDArray[np.int64]:
    """Independent Skellam integers, symmetric about 0: the difference of two Poisson numbers of mean ``variance``/2."""
    numpy_rng = np.random.default_rng(int(torch.randint(2**62, (1,), generator=rng)))
    return np.asarray(numpy_rng.poisson(variance / 2, shape) - numpy_rng.poisson(variance / 2, shape), np.int64)


def bounded(world: World, channel: SecureAggregation) -> bool:
    """Whether something less than all records bounds what a client trains on."""
    return bool(channel.max_examples or (world.training.algorithm == "fedsgd" and world.training.batch_size))


@register("defenses", "distributed_dp")
@dataclass(frozen=True)
class DistributedDP(Defense):
    """Adds each client's share of integer noise inside secure aggregation: ε against the server for less noise than client_dp.

    Attributes:
        clip_norm: S, largest L2 norm of an update.
        noise_multiplier: z, standard deviation in units of S of the noise that a sum of the fewest honest clients holds.
        colluding: clients, at most, that tell the server their noise.
    """

    role: ClassVar[Role] = "clip"

    clip_norm: float = 1.0
    noise_multiplier: float = 1.0
    colluding: int = 0

    def __post_init__(self) -> None:
        require_clip_norm(self.clip_norm)
        require_noise_multiplier(self.noise_multiplier, self.clip_norm)
        if self.colluding < 0:
            raise ValueError(f"colluding must be ≥ 0, got {self.colluding}. 0 is a server without accomplices.")

    def refuses(self, world: World) -> str | None:
        """Refuse worlds without the words of secure aggregation, or where these have no room or no room to spare for the noise."""
        channel, n = world.channel, world.federation.cohort_size
        if not isinstance(channel, SecureAggregation) or channel.mode == "plain":
            got = (
                channel.name if channel is not None and not isinstance(channel, SecureAggregation) else "plain sums" if channel else "none"
            )
            return f"channel must be secure_aggregation on integers for distributed_dp, got {got}. Use its mode 'protocol' or 'quantized'."
        if n < 2 or channel.plan_for(n) is None:
            return None  # secure aggregation says so itself
        plan = channel.plan_for(n)
        assert plan is not None
        if plan.complete and self.colluding >= (most := most_corrupt(n, plan.threshold, active=channel.active)):
            return f"colluding must be below the {most} clients that can open others' uploads together, got {self.colluding}. Lower it."
        if not plan.complete and self.colluding > plan.corrupt:
            return (
                f"colluding must be ≤ {plan.corrupt}, the clients that the k-regular graph of secure_aggregation is certified against, got "
                f"{self.colluding}. Raise its corrupt, or lower colluding."
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
        if (need := self.clip_norm + REACH * self.share(world) / math.sqrt(n)) > channel.clip_range:
            return (
                f"clip_range of secure_aggregation must be ≥ {need:.4g} for updates of norm {self.clip_norm:g} and their noise, got "
                f"{channel.clip_range:g}. Set clip_range = {need:.4g}; more coarsens the grid."
            )
        if (self.share(world) / channel.grid(world)) ** 2 > LARGEST_VARIANCE:
            chosen = "" if channel.bits else " (bits = 0 takes them without noise in mind)"
            return (
                f"bits of secure_aggregation must leave a client's noise a variance of at most 2^44 steps², got {channel.bits_for(n)} bits"
                f"{chosen}. Set bits = 20 or 24; noise covers the rounding."
            )
        return batch_norm_in_train_mode(world, self.name)

    def quorum(self, world: World) -> int:
        """The fewest clients that a sum holds: with fewer, secure aggregation opens nothing.

        The server ends a run with fewer than ``min_clients`` only after it has seen the sum.
        """
        assert isinstance(world.channel, SecureAggregation)
        return world.channel.quorum_for(world.federation.cohort_size)

    def honest(self, world: World) -> int:
        """h: the fewest of them that keep their noise to themselves."""
        return self.quorum(world) - self.colluding

    def share(self, world: World) -> float:
        """Standard deviation of one client's noise, z·S/√h, in the update's unit."""
        return self.noise_multiplier * self.clip_norm / math.sqrt(self.honest(world)) if self.noise_multiplier else 0.0

    def noise_std(self, world: World) -> float:
        """One client's share."""
        return self.share(world) if isinstance(world.channel, SecureAggregation) else 0.0

    def on_update(self, update: Update, context: ClientContext) -> Update:
        """Clip; the noise is added later, to the words."""
        return replace(update, tensors=clip_to_norm(update.tensors, self.clip_norm))

    def longest_rounded(self, world: World, coordinates: int) -> float:
        """The norm that the noise is calibrated to."""
        assert isinstance(world.channel, SecureAggregation)
        return rounded_norm(self.clip_norm * (1 + MARGIN) / world.channel.grid(world), coordinates)

    def integer_noise(self, world: World, shape: tuple[int, ...], rng: torch.Generator) -> npt.NDArray[np.int64] | None:
        """This client's share."""
        assert isinstance(world.channel, SecureAggregation)
        return skellam((self.share(world) / world.channel.grid(world)) ** 2, shape, rng)

    def claim(self, world: World, records_held: Sequence[int]) -> Claim | None:
        """One Skellam release a round; none without noise, or without the channel that hides the shares."""
        if not self.noise_multiplier or self.refuses(world) is not None:
            return None
        assert isinstance(world.channel, SecureAggregation)
        model = network(world.architecture, world.data.load().schema, world.training, world.seed)
        coordinates = sum(parameter.numel() for parameter in model.parameters())
        l2, variance = self.longest_rounded(world, coordinates), (self.noise_multiplier * self.clip_norm / world.channel.grid(world)) ** 2
        return Claim(
            event=SelfComposedDpEvent(SkellamDpEvent(l2, l1_of(l2, coordinates), variance), world.federation.rounds),
            adversary="server",
            unit="client",
            adjacency=(
                "zero-out (the client's update is replaced by 0 in the sum; "
                f"{self.honest(world)} honest clients in it at least, {self.colluding} colluding at most)"
            ),
            sampling="cohort drawn by the server; no amplification",
            viewer=(
                f"the honest-but-curious server, which sees the sum of the uploads alone, and {self.colluding} clients that collude with it"
                + ("" if world.channel.mode == "protocol" else ", given a trusted party that adds up (mode quantized)")
            ),
        )
