"""Outpost: some local steps, fewer and fewer, prune their gradient and add noise where it says most.

With probability 1/(1 + decay·i) in step i: in every tensor the share ``pruned`` of smallest coordinates becomes 0, and the share
``noised`` of coordinates with the largest empirical Fisher information g² gets noise N(0, (scale·min(Var(w), 1))²), Var(w) the
spread of the tensor's own weights.

Source: Wang, Hugh and Li, 2023, "More than Enough is Too Much: Adaptive Defenses against Gradient Leakage in Production Federated
Learning", IEEE INFOCOM, as its authors' code has it (Plato, examples/gradient_leakage_attacks); defaults are that code's.
Deviations: the authors' code computes the perturbed gradients and returns the others, so it defends nothing, and draws its noise
from a constant seed; ours perturbs, from the client's own randomness. The Fisher information is that of the step's gradient,
coordinate by coordinate, where the code averages over a tensor's first axis; the spread is that of the broadcast weights, where
the code takes those of the local step. Steps are counted over the training; iterations = "round" restarts in each round as the code does.
Hook: ``on_step``; reads the broadcast weights, not the private records.

What it protects: nothing is guaranteed. In the steps that it strikes, mostly early ones, the small coordinates are gone and the telling
ones noised, which costs gradient matching some dB (below).

What it does not protect: steps that it leaves alone. The adversary sees which ones those are from the zeros, and from the rank of the
head's gradient, and there are more of them the longer the training lasts. Coordinates below the cut of ``noised`` are exact. The noise
of a tensor whose weights are all alike (a new bias, a new norm layer) is 0. It makes no differential-privacy claim (ε = ∞).
Broken by: waiting. In round 1 of FedSGD it perturbs 89 % of the uploads, in round 100 7 %, and the others show all: digits, cnn of width 8
with 64 hidden units, one record, noised = 0.1, 0.4 and 0.8, round 1: each of 20 uploads is told apart, and the one that was left alone
exact and proven by ``r_gap`` (``pytest tests/defenses/test_heuristics_solved.py``). A perturbed upload
(decay = 0) gives inverting_gradients 16.6 dB, and 17.2 dB when it matches the support, each tensor in units of its size and its
noise, which the broadcast gives away; 21.4 dB without a defense, 13.5 dB for the mean picture
(``pytest --slow -s tests/defenses/test_heuristics_matched.py``: photos in 16×16, ConvNet at its initial weights, batches of one, labels
disclosed, mean of 8).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from defenses.client._private import private_of
from defenses.client.top_k import require_share
from simulator.defense import ClientContext, Defense
from simulator.mechanisms.outpost import perturbed, probability, risks
from simulator.registry import register
from simulator.types import Tensors
from simulator.world import World


@register("defenses", "outpost")
@dataclass(frozen=True)
class Outpost(Defense):
    """Prunes and noises the gradients of ever fewer local steps (Outpost); no guarantee.

    Attributes:
        decay: β, how fast the probability 1/(1 + β·i) to perturb step i falls; 0 perturbs every step.
        pruned: share of each tensor's coordinates that become 0 in a perturbed step.
        noised: φ, share of all coordinates that get noise in a perturbed step.
        scale: λ, deviation of the noise in units of the variance of the tensor's weights.
        iterations: whether steps are counted over the whole ``training`` or from 1 in each ``round``.
    """

    looks_again: ClassVar[bool] = True

    decay: float = 0.125
    pruned: float = 0.8
    noised: float = 0.4
    scale: float = 0.8
    iterations: Literal["training", "round"] = "training"

    def __post_init__(self) -> None:
        for name, none in (("decay", "perturbs every step"), ("scale", "adds no noise")):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be ≥ 0 and finite, got {getattr(self, name)}. 0 {none}.")
        require_share("pruned", self.pruned, "It is the share that becomes 0; something must stay.")
        if not 0 <= self.noised <= 1:
            raise ValueError(f"noised must be in [0, 1], got {self.noised}. It is the share of coordinates that get noise.")
        if self.iterations not in ("training", "round"):
            raise ValueError(f"iterations must be 'training' or 'round', got {self.iterations!r}. The default is 'training'.")

    def noise_std(self, world: World) -> float:
        """At most ``scale``, for weights of variance 1 or more; of a delta, that of all its steps."""
        recipe = world.training
        if recipe.algorithm == "fedsgd":
            return self.scale
        steps = recipe.local_steps(len(world.data.load().records) // world.federation.clients)
        return self.scale * recipe.learning_rate * math.sqrt(steps) / (1 - min(recipe.momentum, 0.99))

    def on_step(self, gradient: Tensors, context: ClientContext) -> Tensors:
        """Perturb the gradient, or by chance leave it.

        Raises:
            ValueError: the client's own data are not there.
        """
        private = private_of(context, self.name)
        before = (context.round - 1) * len(private.batches) if self.iterations == "training" else 0
        chance = float(torch.rand((), generator=context.rng))
        if chance >= probability(before + context.step, self.decay):
            return gradient
        normal = {name: torch.randn(tensor.shape, generator=context.rng).to(tensor) for name, tensor in gradient.items()}
        risk = risks(private.broadcast.parameters)
        return perturbed(gradient, risk, normal, pruned=self.pruned, noised=self.noised, scale=self.scale)
