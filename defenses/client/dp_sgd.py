"""DP-SGD: every record's gradient is clipped, and every local step adds noise; the record-level mechanism.

    g = (1/B)·(Σⱼ clip_C(∇ⱼ) + N(0, z²C²·I)),    B the expected batch size

Source: Abadi et al., 2016, arXiv:1607.00133, Algorithm 1.
Deviations: none known with ``training.sampling = "poisson"``. With shuffled batches, the default and what most code runs, the claim
uses no amplification by sampling (Chua et al., 2024, arXiv:2403.17673): each release that a record enters counts in full. Effect, for
z = 1, 100 records, batches of 10 and 100 rounds: ε = 17.9 shuffled, 7.0 Poisson (δ = 1e-5; ``pytest tests/defenses/test_poisson.py``).
Hook: ``on_gradient``, at every local step.

The claim, against the server and everybody behind it: unit record, adjacency zero-out, sensitivity C. What a client does with its
noisy gradients (momentum, local steps, the difference of parameters) is post-processing.

- Shuffled: a record enters at most T = ``world.participations(n)`` releases, n the records that its client holds; the other releases do
  not depend on it. T does not grow with n, so the claim is made for the client that holds the fewest.
- Poisson: a record enters each of T releases with probability q = batch_size/n, and nobody but its client learns of the draw: the
  upload states the expected number of examples, an empty batch uploads noise, and the draw is keyed with the world's secret. The claim
  takes q of the client with the fewest records and T of the one with the most local steps. An attack is measured on a record that *was*
  drawn, which q does not make rarer: its ceiling counts that round's local steps in full, as if its batches had held the record.

What it protects: each single record, from the server and from everybody behind it, without trust in either: within ε and δ the client's
uploads could as well have been computed with that record's gradients left out. The ceiling in a report is how often this lets any attack
name the record among N equally likely ones; it does not bound PSNR.

What it does not protect: the number of records held (zero-out leaves it as it is), which client takes part, a person with several
records (their ε adds up), and statistics of the population; under Poisson sampling, how long a step takes, which tells of its batch.
Noise is float32 from torch's generator: simulation grade, not safe against floating-point attacks (Mironov, 2012), and drawn from the
world's seed and secret, which the drivers hand to both apps: a deployment must draw it at the client instead.
Broken by: nothing that it claims to stop; with z of about 0.1 a guess among known candidates still names the record (its ceiling is then
near 1), and with less of it pictures come back, too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from dp_accounting import ComposedDpEvent, DpEvent, GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from jaxtyping import Float
from torch import Tensor

from defenses.client.clip import require_clip_norm
from defenses.client.gaussian_noise import add_gaussian, require_noise_multiplier
from defenses.refusal import batch_norm
from simulator.defense import Claim, ClientContext, Defense
from simulator.registry import register
from simulator.types import Tensors
from simulator.world import World


def per_record_norms(per_example: Tensors) -> Float[Tensor, " batch"]:
    """The L2 norm of each record's gradient, over all parameters together."""
    by_parameter = [torch.linalg.vector_norm(tensor.flatten(1), dim=1) for tensor in per_example.values()]
    norms: Tensor = torch.linalg.vector_norm(torch.stack(by_parameter), dim=0)
    return norms


def clipped_sum(per_example: Tensors, clip_norm: float) -> Tensors:
    """Σⱼ ∇ⱼ·min(1, clip_norm/‖∇ⱼ‖); one record changes it by at most ``clip_norm``.

    A gradient whose norm is not finite counts as 0: scaled, it would be NaN, which no noise covers and everybody sees.
    """
    if math.isinf(clip_norm):
        return {name: tensor.sum(0) for name, tensor in per_example.items()}
    norms = per_record_norms(per_example)
    scale = (clip_norm / norms.clamp(min=clip_norm)).nan_to_num(0)  # ≤ 1, and no division by zero for a zero gradient
    kept = norms.isfinite()
    return {
        name: torch.einsum("b,b...->...", scale, torch.where(kept.view(-1, *[1] * (tensor.dim() - 1)), tensor, 0))
        for name, tensor in per_example.items()
    }


@register("defenses", "dp_sgd")
@dataclass(frozen=True)
class DPSGD(Defense):
    """Clips every record's gradient and adds noise at every local step (DP-SGD): ε for each record.

    Attributes:
        clip_norm: C, largest L2 norm of one record's gradient; inf disables and then allows no noise.
        noise_multiplier: z, standard deviation of the noise on the sum of clipped gradients in units of C.
    """

    per_example: ClassVar[bool] = True

    clip_norm: float = 1.0
    noise_multiplier: float = 1.0

    def __post_init__(self) -> None:
        require_clip_norm(self.clip_norm)
        require_noise_multiplier(self.noise_multiplier, self.clip_norm)

    def refuses(self, world: World) -> str | None:
        """Refuse a second per-example defense, and BatchNorm: under it a record has no gradient of its own."""
        if (count := sum(defense.per_example for defense in world.defenses)) > 1:
            return f"defenses with per-example gradients must be at most 1, got {count}. Keep dp_sgd or the other."
        return batch_norm(world, self.name)

    def noise_std(self, world: World) -> float:
        """z·C/B of one gradient; of a delta at most as many times the learning rate as there are local steps, momentum's reach included."""
        if not self.noise_multiplier:
            return 0.0
        recipe = world.training
        std = self.noise_multiplier * self.clip_norm / max(1, recipe.batch_size)
        if recipe.algorithm == "fedsgd":
            return std
        records = len(world.data.load().records) // world.federation.clients
        steps = recipe.local_steps(records)
        if recipe.optimizer == "adam":
            return recipe.learning_rate * steps  # whatever the noise is, Adam scales its steps to about the learning rate
        return std * recipe.learning_rate * math.sqrt(steps) / (1 - min(recipe.momentum, 0.99))

    def clipping_and_noise(self, batch: int, *, alone: bool) -> tuple[float, float] | None:
        """C and z·C on the sum, of which the record's clipped gradient is one term, however many there are."""
        return self.clip_norm, self.noise_multiplier * self.clip_norm if self.noise_multiplier else 0.0

    def on_gradient(self, per_example: Tensors, context: ClientContext) -> Tensors:
        """Sum the clipped gradients, add noise once, divide by the expected batch size."""
        total = clipped_sum(per_example, self.clip_norm)
        if self.noise_multiplier:
            total = add_gaussian(total, self.noise_multiplier * self.clip_norm, context.rng)
        return {name: tensor / context.batch_size for name, tensor in total.items()}

    def claim(self, world: World, records_held: Sequence[int]) -> Claim | None:
        """T Gaussian releases for the record that is used most often, each sampled if the schedule is; none without noise."""
        if not self.noise_multiplier:
            return None
        holding = [held for held in records_held if held]  # a client with no record has none to protect
        fewest, recipe = min(holding), world.training
        release: DpEvent = GaussianDpEvent(self.noise_multiplier)
        times, sampling = world.participations(fewest), "fixed schedule, known to the server; no amplification"
        attacked: DpEvent | None = None
        if recipe.sampling == "poisson":
            rate, times = recipe.sampling_rate(fewest), max(world.participations(held) for held in holding)
            sampling = f"Poisson, q = {rate:.4g} at each local step, drawn by the client in secret"
            if rate < 1:
                sampled, steps = PoissonSampledDpEvent(rate, release), times // world.federation.rounds
                attacked = SelfComposedDpEvent(release, steps)
                if times > steps:
                    attacked = ComposedDpEvent([attacked, SelfComposedDpEvent(sampled, times - steps)])
                release = sampled
        return Claim(
            event=SelfComposedDpEvent(release, times),
            adversary="server",
            unit="record",
            adjacency="zero-out (the record's gradient is replaced by 0)",
            sampling=sampling,
            attacked=attacked,
        )
