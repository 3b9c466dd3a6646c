"""Local differential privacy: whatever a client's data are, its update could as well have come from any other data.

    Gaussian:  ũ = clip₂(u, S) + N(0, (z·2S)²·I)        Laplace:  ũ = clip₁(u, S) + Lap(z·2S)^d

Source: the local model of Kasiviswanathan et al., 2011, arXiv:0803.0924, definition 2.2; the mechanisms of Dwork and Roth, 2014,
theorem 3.6 and appendix A, at the sensitivity 2S of replacing one clipped update by another.
Deviations: the whole model is one release, no coordinates are sampled; ε is over all rounds, by the exact curve of Gaussian
    noise or an upper bound for Laplace's.
Hook: ``on_update``.

The claim, against the server and everybody behind it: unit client, adjacency replace-one, one release a round. ``client_dp`` with the
same noise claims half the sensitivity under zero-out: the two figures are about different neighbors. The server draws the cohort, so
that sampling of clients is no secret to it and amplifies nothing.

What it protects: all that one client holds, from the server and from everybody behind it, without trust in either: within ε and δ its
update could as well have come from any other data, those of another client included; its number of records, which goes along, could not.
That says more than ``client_dp`` does, for noise twice as large at the same z.

The ceiling of a guess among candidates is lower than for that event: each clipped update is at most S, not 2S, from the update 0, so that
the guess is one at zero-out neighbors, with noise of 2z times their sensitivity.

What it does not protect: that a client took part, how many records it holds, and statistics of the population. Many coordinates
make the noise huge beside any update (its norm is z·2S·√d, Laplace's about z·2S·√(2d) at a smaller S), so that accuracy is lost at
every ε that says something. Noise from torch's generator is simulation grade, not safe against floating-point attacks (Mironov, 2012).
Broken by: nothing that it claims to stop; with small z a guess among known candidates, up to its ceiling.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from dp_accounting import GaussianDpEvent, LaplaceDpEvent, SelfComposedDpEvent
from torch import Tensor

from defenses.client.clip import clip_to_norm, clipping_of_the_record, require_clip_norm
from defenses.client.gaussian_noise import add_gaussian, require_noise_multiplier
from defenses.client.laplace_noise import add_laplace
from defenses.refusal import batch_norm_in_train_mode
from simulator.defense import Claim, ClientContext, Defense
from simulator.registry import register
from simulator.types import Tensors, Update
from simulator.world import World


def clip_to_l1(tensors: Tensors, clip_norm: float) -> Tensors:
    """Scale all tensors by min(1, clip_norm/‖·‖₁), the sum of all magnitudes in float64, or to 0 where that is not finite.

    A ``clip_norm`` of inf leaves them as they are.
    """
    if math.isinf(clip_norm):
        return tensors
    norm: Tensor = torch.stack([tensor.double().abs().sum() for tensor in tensors.values()]).sum()
    scale = (clip_norm / norm.clamp(min=clip_norm)).nan_to_num(0)
    return {name: (torch.where(norm.isfinite(), tensor, 0) * scale).to(tensor) for name, tensor in tensors.items()}


@register("defenses", "local_dp")
@dataclass(frozen=True)
class LocalDP(Defense):
    """Clips the update and adds noise for replacing it by any other: ε in the local model, for each client.

    Attributes:
        clip_norm: S, largest norm of an update: L2 for Gaussian noise, L1 for Laplace; inf disables and then allows no noise.
        noise_multiplier: z, standard deviation (Gaussian) or b (Laplace) of the noise in units of the sensitivity 2S. One Laplace
            release is (1/z, 0)-DP.
        mechanism: which noise.
    """

    clip_norm: float = 1.0
    noise_multiplier: float = 1.0
    mechanism: Literal["gaussian", "laplace"] = "gaussian"

    def __post_init__(self) -> None:
        require_clip_norm(self.clip_norm)
        require_noise_multiplier(self.noise_multiplier, self.clip_norm)
        if self.mechanism not in ("gaussian", "laplace"):
            raise ValueError(f"mechanism must be 'gaussian' or 'laplace', got {self.mechanism!r}. The default is 'gaussian'.")

    @property
    def scale(self) -> float:
        """z·2S."""
        return 2 * self.noise_multiplier * self.clip_norm if self.noise_multiplier else 0.0

    def refuses(self, world: World) -> str | None:
        """Refuse BatchNorm in train mode: its running statistics would leave beside the update, without noise."""
        return batch_norm_in_train_mode(world, self.name)

    def noise_std(self, world: World) -> float:
        """z·2S, times √2 for Laplace."""
        return self.scale * (math.sqrt(2) if self.mechanism == "laplace" else 1.0)

    def clipping_and_noise(self, batch: int, *, alone: bool) -> tuple[float, float] | None:
        """S and z·2S, where the update is one record's and the noise Gaussian."""
        bound = clipping_of_the_record(self.clip_norm, alone=alone)
        return None if bound is None or self.mechanism == "laplace" else (bound, self.scale)

    def on_update(self, update: Update, context: ClientContext) -> Update:
        """Clip, then add noise."""
        clip, add = (clip_to_norm, add_gaussian) if self.mechanism == "gaussian" else (clip_to_l1, add_laplace)
        clipped = clip(update.tensors, self.clip_norm)
        return replace(update, tensors=add(clipped, self.scale, context.rng) if self.scale else clipped)

    def claim(self, world: World, records_held: Sequence[int]) -> Claim | None:
        """One release a round; none without noise."""
        if not self.noise_multiplier:
            return None
        release, rounds = GaussianDpEvent if self.mechanism == "gaussian" else LaplaceDpEvent, world.federation.rounds
        return Claim(
            event=SelfComposedDpEvent(release(self.noise_multiplier), rounds),
            attacked=SelfComposedDpEvent(release(2 * self.noise_multiplier), rounds),
            adversary="server",
            unit="client",
            adjacency="replace-one (the client's update is replaced by any other, sensitivity 2·clip_norm)",
            sampling="cohort drawn by the server; no amplification",
        )
