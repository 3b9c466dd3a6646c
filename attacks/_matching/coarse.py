"""Small records behind pruned, rounded or signed updates, where public ones are held: what :mod:`attacks._matching.linearized` is for."""

from __future__ import annotations

import time
from dataclasses import replace
from math import prod
from typing import Literal

import torch
from torch import nn

from attacks._dropout import layers as dropping_layers
from attacks._matching.defended import grid
from attacks._matching.latents import bottlenecks
from attacks._matching.linearized import Mechanism, of_class, rebuilt
from attacks._matching.simulate import Victim, prepare, unroll_length
from simulator.adversary import Knowledge, Reconstruction
from simulator.types import Observation

Kind = Literal["exact", "signs", "rounded"]

KINDS: dict[str, Kind] = {"random_pruning": "exact", "sign_sgd": "signs", "qsgd": "rounded"}

FEWEST = 64
"""Public records below which there is no covariance to speak of."""

LARGEST = 256
"""Pixels up to which beliefs are sampled: the samples must be a few times as many."""

ROUNDS = 12
"""Rounds, at most: rounding and signs settle in 5 to 8."""

PER_PIXEL = 4
"""Samples for each pixel."""


def kind_of(view: Observation, knowledge: Knowledge) -> Kind | None:
    """Which likelihood fits; None where this is not for the view: other defenses, several records, rounds or steps, large pictures."""
    names = [name for name, _ in knowledge.defenses]
    alone = len(view.upload.senders) == 1 and knowledge.num_examples == 1 and unroll_length(view, knowledge) == 1
    if not alone or len(names) != 1 or names[0] not in KINDS or knowledge.training.optimizer != "sgd":
        return None
    pixels, size = prod(knowledge.schema.shape), sum(tensor.numel() for tensor in view.upload.update.tensors.values())
    if knowledge.public is None or len(knowledge.public) < FEWEST or pixels > LARGEST or 4 * PER_PIXEL * pixels * size > 2**28:
        return None
    random = bool(dropping_layers(knowledge.model)) or bool(bottlenecks(knowledge.model))
    normed = any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in knowledge.model.modules())
    return None if random or normed else KINDS[names[0]]


def mechanism(victim: Victim, kind: Kind, knowledge: Knowledge) -> tuple[Victim, Mechanism]:
    """The victim and what its upload says, at the scale of the update."""
    settings = knowledge.defenses[0][1]
    if settings.get("rescaled"):
        victim = replace(victim, target=victim.target * (1 - float(str(settings["pruned"]))))
    target, steps = victim.target, torch.ones_like(victim.target)
    if kind == "rounded":
        steps = torch.cat([grid(target[a:b], int(str(settings["bucket"]))) for a, b in victim.spans])
    seen = target != 0 if kind == "exact" else torch.ones_like(target, dtype=torch.bool)
    return victim, Mechanism(kind, target.sign() if kind == "signs" else target, seen, steps)


def sampled(view: Observation, knowledge: Knowledge, kind: Kind, *, rng: torch.Generator, seconds: float, task: str) -> Reconstruction:
    """The mean of the belief about one record; its objective is the standard deviation that it claims for a pixel."""
    assert knowledge.public is not None
    began = time.perf_counter()
    victim, seen = mechanism(prepare(view, knowledge), kind, knowledge)
    samples = max(256, PER_PIXEL * prod(victim.shape))
    prior = of_class(knowledge.public, int(victim.labels[0]))
    belief, whole = rebuilt(victim, seen, prior, rounds=ROUNDS, samples=samples, seconds=seconds, rng=rng, task=task)
    return Reconstruction(
        inputs=belief.mean.float().view(1, *victim.shape),
        labels=victim.labels,
        objective=float(belief.covariance.diagonal().mean().sqrt()),
        certificate=("",),
        seconds=time.perf_counter() - began,
        converged=whole,
    )
