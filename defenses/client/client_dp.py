"""Client-level differential privacy at the client: the whole update is clipped, then noised, before it leaves.

    ũ = clip_S(u) + N(0, z²S²·I)

Source: clipping of McMahan et al., 2018, arXiv:1710.06963; the Gaussian mechanism of Dwork and Roth, 2014, appendix A, applied by each
client to its own upload.
Deviations: ε comes from the exact curve of Gaussian noise, not from the textbook σ = S·√(2 ln(1.25/δ))/ε, which does not hold for ε > 1.
Hook: ``on_update``.

The claim, against the server and everybody behind it: unit client, adjacency zero-out, sensitivity S, one release a round. The server
draws the cohort, so that sampling of clients is no secret to it and amplifies nothing.

What it protects: all that one client holds, from the server and from everybody behind it, without trust in either: within ε and δ its
upload could as well have been noise around 0. No knowledge of the adversary's changes that, and the ceiling says how many records it can
name at most.

What it does not protect: that a client took part, how many records it holds, and the replacement of one client's data by another's
at the same ε (the sensitivity is then 2S). Noise is float32 from torch's generator: simulation grade, not safe against
floating-point attacks (Mironov, 2012).
Broken by: nothing that it claims to stop; at a large ε candidate_identification names the record among known candidates, as the ceiling
beside it allows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from dp_accounting import GaussianDpEvent, SelfComposedDpEvent

from defenses.client.clip import clip_to_norm, clipping_of_the_record, require_clip_norm
from defenses.client.gaussian_noise import add_gaussian, require_noise_multiplier
from defenses.refusal import batch_norm_in_train_mode
from simulator.defense import Claim, ClientContext, Defense
from simulator.registry import register
from simulator.types import Update
from simulator.world import World


def gaussian_upload_claim(world: World, noise_multiplier: float) -> Claim:
    """What one clipped and noised upload a round is worth over the whole training."""
    return Claim(
        event=SelfComposedDpEvent(GaussianDpEvent(noise_multiplier), world.federation.rounds),
        adversary="server",
        unit="client",
        adjacency="zero-out (the client's update is replaced by 0; replacing one client by another doubles the sensitivity)",
        sampling="cohort drawn by the server; no amplification",
    )


@register("defenses", "client_dp")
@dataclass(frozen=True)
class ClientDP(Defense):
    """Clips the whole update and adds noise at the client: ε for everything a client holds.

    Attributes:
        clip_norm: S, largest L2 norm of an update; inf disables and then allows no noise.
        noise_multiplier: z, standard deviation of the noise in units of S.
    """

    clip_norm: float = 1.0
    noise_multiplier: float = 1.0

    def __post_init__(self) -> None:
        require_clip_norm(self.clip_norm)
        require_noise_multiplier(self.noise_multiplier, self.clip_norm)

    def refuses(self, world: World) -> str | None:
        """Refuse BatchNorm in train mode: its running statistics would leave beside the update, without noise."""
        return batch_norm_in_train_mode(world, self.name)

    def noise_std(self, world: World) -> float:
        """z·S."""
        return self.noise_multiplier * self.clip_norm if self.noise_multiplier else 0.0

    def clipping_and_noise(self, batch: int, *, alone: bool) -> tuple[float, float] | None:
        """S and z·S, where the update is one record's."""
        bound = clipping_of_the_record(self.clip_norm, alone=alone)
        return None if bound is None else (bound, self.noise_multiplier * bound if self.noise_multiplier else 0.0)

    def on_update(self, update: Update, context: ClientContext) -> Update:
        """Clip, then add noise."""
        clipped = clip_to_norm(update.tensors, self.clip_norm)
        if not self.noise_multiplier:
            return replace(update, tensors=clipped)
        return replace(update, tensors=add_gaussian(clipped, self.noise_multiplier * self.clip_norm, context.rng))

    def claim(self, world: World, records_held: Sequence[int]) -> Claim | None:
        """One Gaussian release a round; none without noise."""
        return gaussian_upload_claim(world, self.noise_multiplier) if self.noise_multiplier else None
