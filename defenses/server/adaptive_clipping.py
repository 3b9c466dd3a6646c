"""Central differential privacy whose clipping norm follows a quantile of the updates' norms.

    at the client:  b = 1[‖u‖ ≤ C],  u ← clip_C(u)
    at the server:  mean(u) + N(0, (z_u·C/n)²·I),   b̃ = mean(b) + N(0, (σ_b/n)²),   C ← C·exp(−η·(b̃ − γ))

Source: Andrew, Thakkar, McMahan and Ramaswamy, 2021, arXiv:1905.03871, algorithm 1 and theorem 1: with z_u = (z⁻² − (2σ_b)⁻²)^(−1/2) the
update and the bit together cost what noise z on the update alone does, because b − ½ has the sensitivity ½.
Deviations: the cohort has a fixed size; means are weighted by numbers of examples, as in ``central_dp``, and the claim pays for it.
The norm and the bit travel as a buffer of the model, so that every channel carries them. ``bit_noise`` is absolute: n/20 for n = 100;
above n/5 it is refused. So are channels that round: the grid would stay while the norm shrinks.
Hooks: ``on_model`` (the number travels with the model), ``on_update`` and ``on_buffers`` (at the client), ``on_aggregate`` and
``on_mean_buffers`` (at the server, after the observation was taken).

What it protects: all that one client holds, from outsiders who see the released models and clipping norms alone: within ε and δ these
could as well have come about without its update and bit.

What it does not protect: **anything against this server** (ε = ∞), which has seen clipped updates and bits before it adds noise. From
outsiders: that a client took part and how many records it holds (zero-out); one client's data in the place of another's, at the same
ε. Noise is float32 from torch's generator: simulation grade, not safe
against floating-point attacks (Mironov, 2012).
Broken by: every attack, at the server: clipping changes the length of an update and not its direction.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from defenses.channel.secure_aggregation import SecureAggregation
from defenses.client.clip import clip_to_norm, global_norm, require_clip_norm
from defenses.client.gaussian_noise import add_gaussian, require_noise_multiplier
from defenses.server.central_dp import cramped, mean_claim, undone
from simulator.defense import Claim, ClientContext, Defense, Role, ServerContext
from simulator.models.clip_norm import CLIP_NORM, WithClipNorm
from simulator.registry import register
from simulator.types import Tensors, Update
from simulator.world import World

SMALLEST = 1e-30
"""Below this a norm stays where it is, so that it never becomes 0."""
LARGEST_BIT_NOISE = 0.2
"""Of the cohort: with more, a step of the norm is mostly noise; the paper has 0.05."""


def next_clip_norm(clip_norm: float, unclipped: float, *, target: float, rate: float) -> float:
    """C·exp(−rate·(unclipped − target)): the norm shrinks where more than ``target`` of the updates were shorter than it."""
    return max(SMALLEST, clip_norm * math.exp(-rate * (unclipped - target)))


@register("defenses", "adaptive_clipping")
@dataclass(frozen=True)
class AdaptiveClipping(Defense):
    """Central DP with a clipping norm that follows the updates' median: protects from outsiders, not from this server.

    Attributes:
        clip_norm: C of the first round.
        noise_multiplier: z, what update and bit together cost, as noise on the sum of updates in units of C; 0 adds no noise.
        target: γ, share of updates that should be shorter than C.
        rate: η of the geometric step.
        bit_noise: σ_b, standard deviation of the noise on the number of updates shorter than C; above z/2.
    """

    role: ClassVar[Role] = "clip"

    clip_norm: float = 0.1
    noise_multiplier: float = 1.0
    target: float = 0.5
    rate: float = 0.2
    bit_noise: float = 5.0

    def __post_init__(self) -> None:
        require_clip_norm(self.clip_norm)
        require_noise_multiplier(self.noise_multiplier, self.clip_norm)
        if math.isinf(self.clip_norm):
            raise ValueError("clip_norm must be finite for a norm that adapts, got inf. Start with 0.1.")
        if not 0 <= self.target <= 1:
            raise ValueError(f"target must be in [0, 1], got {self.target}. 0.5 is the median.")
        if not 0 < self.rate < math.inf:
            raise ValueError(f"rate must be > 0 and finite, got {self.rate}. The paper uses 0.2.")
        if self.noise_multiplier and not self.noise_multiplier / 2 < self.bit_noise < math.inf:
            raise ValueError(
                f"bit_noise must be > noise_multiplier/2 = {self.noise_multiplier / 2:g} and finite, got {self.bit_noise}: the bits alone "
                "would cost more than noise_multiplier allows. Use a twentieth of the cohort, or more."
            )

    @property
    def update_noise(self) -> float:
        """z_u: noise on the sum of updates in units of C; a little above z, to pay for the bits."""
        return (self.noise_multiplier**-2 - (2 * self.bit_noise) ** -2) ** -0.5 if self.noise_multiplier else 0.0

    def highest(self, world: World) -> float:
        """The largest norm that the training can reach: each round the bits may all say that it is too small, and their noise, too."""
        noise = 8 * self.bit_noise / world.federation.cohort_size
        return self.clip_norm * math.exp(min(500.0, self.rate * (self.target + noise) * world.federation.rounds))

    def refuses(self, world: World) -> str | None:
        """Refuse what undoes the clipping, a second of its kind, BatchNorm in train mode, bits drowned in noise, and what rounds."""
        if (count := sum(type(defense) is AdaptiveClipping for defense in world.defenses)) > 1:
            return f"adaptive_clipping must be there once, got {count}. Keep one."
        if (reason := undone(self, world)) is not None or not self.noise_multiplier:
            return reason
        if self.bit_noise > LARGEST_BIT_NOISE * world.federation.cohort_size:
            return (
                f"bit_noise must be at most {LARGEST_BIT_NOISE:g} of the cohort of {world.federation.cohort_size}, got {self.bit_noise:g}: "
                "the norm would follow the noise on the bits and not their share. Enlarge the cohort, or lower bit_noise."
            )
        if isinstance(channel := world.channel, SecureAggregation) and channel.mode != "plain":
            return (
                f"channel must not round for a norm that adapts, got {channel.name} in mode {channel.mode}: its grid stays where the norm "
                "shrinks, so that noise in units of the norm no longer covers a rounding. Use central_dp, or mode 'plain'."
            )
        if (reason := cramped(self, self.highest(world), world)) is not None:
            return reason
        if (got := world.training.upload_dtype) != "float32":
            return f"upload_dtype must be float32 for a norm that adapts, got {got}: it rounds after clipping. Use float32."
        return None

    def on_model(self, family: Any) -> Any:
        """The family with the norm among its buffers."""
        return WithClipNorm(family, self.clip_norm)

    def on_update(self, update: Update, context: ClientContext) -> Update:
        """Clip to the norm that was broadcast, at the client."""
        return replace(update, tensors=clip_to_norm(update.tensors, float(context.buffers[CLIP_NORM])))

    def on_buffers(self, buffers: Tensors, update: Update, context: ClientContext) -> Tensors:
        """Say whether the update was within the norm, in the place of the norm."""
        within = global_norm(update.tensors) <= context.buffers[CLIP_NORM]
        return {**buffers, CLIP_NORM: within.to(context.buffers[CLIP_NORM])}

    def on_aggregate(self, update: Update, context: ServerContext) -> Update:
        """Add noise to the mean over the clients that answered."""
        if not self.noise_multiplier:
            return update
        sigma = self.update_noise * float(context.buffers[CLIP_NORM]) / context.cohort
        return replace(update, tensors=add_gaussian(update.tensors, sigma, context.rng))

    def on_mean_buffers(self, means: Tensors, context: ServerContext) -> Tensors:
        """Turn the noised share of bits into the next norm."""
        noise = self.bit_noise / context.cohort * float(torch.randn((), generator=context.rng)) if self.noise_multiplier else 0.0
        share, norm = float(means[CLIP_NORM]) + noise, float(context.buffers[CLIP_NORM])
        after = next_clip_norm(norm, share, target=self.target, rate=self.rate)
        return {**means, CLIP_NORM: torch.full_like(context.buffers[CLIP_NORM], after)}

    def claim(self, world: World, records_held: Sequence[int]) -> Claim | None:
        """One Gaussian release of update and bit a round, against outsiders only; none without noise."""
        adjacency = "zero-out (the client's update and its bit − ½ are replaced by 0 before the means)"
        return mean_claim(world, records_held, self.noise_multiplier, adjacency) if self.noise_multiplier else None
