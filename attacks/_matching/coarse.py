"""Small records behind noisy, pruned, rounded or signed updates, where public ones are held: for :mod:`attacks._matching.linearized`."""

from __future__ import annotations

import time
from dataclasses import replace
from math import prod

import torch
from torch import nn

from attacks._dropout import layers as dropping_layers
from attacks._gradient import noise_level
from attacks._matching.defended import grid
from attacks._matching.evidence import Kind, Mechanism, of_class
from attacks._matching.latents import bottlenecks
from attacks._matching.linearized import rebuilt
from attacks._matching.simulate import Victim, prepare, unroll_length
from attacks._matching.stack import known_stack
from attacks.modeled import NOISY
from simulator.adversary import Knowledge, Reconstruction
from simulator.types import Observation

KINDS: dict[str, Kind] = {"top_k": "exact", "random_pruning": "exact", "sign_sgd": "signs", "qsgd": "rounded"}

BEFORE = ("clip", *NOISY)
"""Defenses that may come before one of those, or without: clipping, and noise on every coordinate."""

FAINT = 0.2
"""Laplace noise over the update's norm, below which descent on the absolute distance sees through it as well: ten digits, scale 0.001:
45.0 dB matched, 44.4 sampled and polished; scale 0.01: 24.2 matched, 27.7."""

FEWEST = 64
"""Public records below which there is no covariance to speak of."""

LARGEST = 256
"""Pixels up to which beliefs are sampled: the samples must be a few times as many."""

ROUNDS = 12
"""Rounds, at most: rounding and signs settle in 5 to 8, and polishing ends them where it explains the upload."""

PER_PIXEL = 4
"""Samples for each pixel."""


def kind_of(view: Observation, knowledge: Knowledge) -> Kind | None:
    """Which likelihood fits; None where this is not for the view: other defenses, several records, rounds or steps, large pictures."""
    names = [name for name, _ in knowledge.defenses]
    alone = len(view.upload.senders) == 1 and knowledge.num_examples == 1 and unroll_length(view, knowledge) == 1
    known = all(name in BEFORE for name in names[:-1]) and bool(names) and names[-1] in (*KINDS, *BEFORE)
    if not alone or not known or knowledge.training.optimizer != "sgd":
        return None
    pixels, size = prod(knowledge.schema.shape), sum(tensor.numel() for tensor in view.upload.update.tensors.values())
    if knowledge.public is None or len(knowledge.public) < FEWEST or pixels > LARGEST or 4 * PER_PIXEL * pixels * size > 2**28:
        return None
    random = bool(dropping_layers(knowledge.model)) or bool(bottlenecks(knowledge.model))
    normed = any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in knowledge.model.modules())
    if random or normed or (names[-1] in BEFORE and not known_stack(view, knowledge).distance.random):
        return None
    if names[-1] == "laplace_noise" and noise_level(view, knowledge) < FAINT:
        return None
    return KINDS.get(names[-1], "exact")


def mechanism(victim: Victim, kind: Kind, view: Observation, knowledge: Knowledge) -> tuple[Victim, Mechanism]:
    """The victim and what its upload says, at the scale of the update."""
    settings, before = knowledge.defenses[-1][1], replace(known_stack(view, knowledge).distance, levels=0, pruned=0.0)
    if settings.get("rescaled"):
        victim = replace(victim, target=victim.target * (1 - float(str(settings["pruned"]))))
    target, steps = victim.target, torch.ones_like(victim.target)
    if kind == "rounded":
        steps = torch.cat([grid(target[a:b], int(str(settings["bucket"]))) for a, b in victim.spans])
    seen = target != 0 if kind == "exact" and before.masked else torch.ones_like(target, dtype=torch.bool)
    noise = before.variances(target, victim.spans).sqrt()
    laplace = bool(before.laplace) and not before.sigma and kind == "exact"
    return victim, Mechanism(kind, target.sign() if kind == "signs" else target, seen, steps, noise, before.clip_norm, laplace)


def sampled(view: Observation, knowledge: Knowledge, kind: Kind, *, rng: torch.Generator, seconds: float, task: str) -> Reconstruction:
    """The mean of the belief about one record, or the mode near it; its objective is the deviation that the belief claims for a pixel."""
    assert knowledge.public is not None
    began = time.perf_counter()
    victim, seen = mechanism(prepare(view, knowledge), kind, view, knowledge)
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
