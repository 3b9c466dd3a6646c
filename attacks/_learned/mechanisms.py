"""The attacker's own model of what happens to an update between the gradient and the wire, on a stack of updates at once.

Two sources: the defenses that the adversary was told of, by name and settings (Kerckhoffs), and compression, which needs no telling:
zeros, equal magnitudes and a coarse grid show in the update itself. Randomness is the attacker's own. Noise that is added last is not
drawn here: its deviation is handed on, since an estimator that knows it averages over all noises at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import vmap

from attacks._gradient import clip_limit, number, share_of_noise
from attacks.modeled import IN_THE_VIEW, LATENT, LOSSY, NOISY_LATER, NOISY_SUMS
from simulator.adversary import Knowledge
from simulator.mechanisms.censor import orthogonal_update
from simulator.mechanisms.outpost import perturbed, risks
from simulator.mechanisms.qsgd import drawn_uniform, qsgd
from simulator.mechanisms.random_pruning import drawn_masks, masked
from simulator.mechanisms.top_k import top_k
from simulator.types import Observation, Tensors, Update

Stack = Float[Tensor, "pairs coordinates"]
Settings = Mapping[str, object]

FEWEST = 32
"""Coordinates below which a tensor's values show no pattern of compression."""

PRUNED = 0.5
"""Share of zeros from which on an update is taken for pruned, if simulated ones have half as many."""


@dataclass(frozen=True)
class Step:
    """One thing done to a client's whole update: scaled down to a norm, noised with this deviation, or a heuristic with its settings."""

    clip_norm: float = float("inf")
    sigma: float = 0.0
    heuristic: str = ""
    settings: Settings = field(default_factory=dict)


@dataclass(frozen=True)
class PerRecord:
    """What is done to each record's gradient: clipped to a norm, and the mean of a batch noised with ``sigma``/batch."""

    clip_norm: float
    sigma: float


@dataclass(frozen=True)
class Chain:
    """The defenses of one client, as the attacker simulates them.

    Attributes:
        record: on each record's gradient, at every local step; None for none.
        steps: on the whole update, in order, up to the last that is not noise.
        last: deviation of the noise that comes after everything else.
        unknown: names of defenses that are not simulated: those that change records, from whose uploads public records are then guessed.
    """

    record: PerRecord | None = None
    steps: tuple[Step, ...] = ()
    last: float = 0.0
    unknown: tuple[str, ...] = ()

    @property
    def heuristics(self) -> tuple[Step, ...]:
        """The heuristics among the steps."""
        return tuple(step for step in self.steps if step.heuristic)


def chain(view: Observation, knowledge: Knowledge) -> Chain:
    """What the adversary was told of the clients' defenses, in the order in which they act."""
    record, steps, unknown = None, list[Step](), list[str]()
    for name, settings in knowledge.defenses:
        if name == "dp_sgd":
            clip, times = number(settings, "clip_norm"), number(settings, "noise_multiplier")
            record = PerRecord(clip, times * clip if times else 0.0)
        elif name in ("clip", "client_dp"):
            steps.append(Step(clip_norm=number(settings, "clip_norm")))
            if name == "client_dp" and (times := number(settings, "noise_multiplier")):
                steps.append(Step(sigma=times * number(settings, "clip_norm")))
        elif name in NOISY_LATER:  # the server's noise comes after what it saw
            steps.append(Step(clip_norm=clip_limit(view, name, settings)))
        elif name in NOISY_SUMS:  # noise on the sum, of which each sender has its share
            steps.append(Step(clip_norm=clip_limit(view, name, settings)))
            steps.append(Step(sigma=share_of_noise(settings, len(view.upload.senders))))
        elif name == "gaussian_noise":
            steps.append(Step(sigma=number(settings, "sigma")))
        elif name == "laplace_noise":  # of equal variance: what is learned is linear in the update but for a correction
            steps.append(Step(sigma=2**0.5 * number(settings, "scale")))
        elif name == "local_dp":
            gaussian, times = settings["mechanism"] == "gaussian", number(settings, "noise_multiplier")
            if gaussian:
                steps.append(Step(clip_norm=number(settings, "clip_norm")))
            scale = 2 * times * number(settings, "clip_norm") if times else 0.0
            steps.append(Step(sigma=scale if gaussian else 2**0.5 * scale))
        elif name in LOSSY:
            steps.append(Step(heuristic=name, settings=settings))
        elif name not in (*IN_THE_VIEW, *LATENT):  # a latent is a part of the model, which is run as it is
            unknown.append(name)
    steps = [step for step in steps if step.sigma or isfinite(step.clip_norm) or step.heuristic]
    last = 0.0
    while steps and steps[-1].sigma:
        last = (last**2 + steps.pop().sigma ** 2) ** 0.5
    return Chain(record, tuple(steps), last, tuple(unknown))


def applied(steps: Sequence[Step], updates: Stack, rng: torch.Generator, *, parameters: Tensors, names: Sequence[str]) -> Stack:
    """The updates of these tensors after these steps, with randomness drawn from ``rng``."""
    for step in steps:
        if step.heuristic:
            parts = torch.split(updates, [parameters[name].numel() for name in names], dim=1)
            changed = heuristic(step, dict(zip(names, parts, strict=True)), rng, parameters)
            updates = torch.cat([changed[name] for name in names], 1)
        if isfinite(step.clip_norm):
            updates = updates * (step.clip_norm / updates.norm(dim=1, keepdim=True).clamp(min=step.clip_norm))
        if step.sigma:
            updates = updates + step.sigma * torch.randn(updates.shape, generator=rng)
    return updates


def heuristic(step: Step, stacks: Mapping[str, Stack], rng: torch.Generator, parameters: Tensors) -> dict[str, Stack]:
    """Stacks of flat tensors, pair by pair after one heuristic, each pair with randomness of its own.

    Soteria's own choice of features takes a backward pass for each; the whole weight is left out instead.
    """
    name, told = step.heuristic, step.settings
    draw = {key: torch.randn(stack.shape, generator=rng) for key, stack in stacks.items()} if name in ("outpost", "censor") else {}
    if name == "soteria":
        return {key: torch.zeros_like(stack) if key == f"{told['layer']}.weight" else stack for key, stack in stacks.items()}
    if name == "sign_sgd":
        return {key: stack.sign() for key, stack in stacks.items()}
    if name == "top_k":
        return dict(vmap(lambda update: top_k(update, number(told, "pruned")))(dict(stacks)))
    if name == "random_pruning":
        return masked(stacks, drawn_masks(stacks, number(told, "pruned"), rng))
    if name == "qsgd":
        levels, bucket = int(number(told, "levels")), int(number(told, "bucket"))
        return dict(
            vmap(lambda update, uniform: qsgd(update, uniform, levels=levels, bucket=bucket))(dict(stacks), drawn_uniform(stacks, rng))
        )
    if name == "censor":
        return dict(vmap(orthogonal_update)(draw, dict(stacks)))
    risk = risks({key: parameters[key] for key in stacks})
    pruned, noised, scale = (number(told, key) for key in ("pruned", "noised", "scale"))
    return dict(vmap(lambda update, normal: perturbed(update, risk, normal, pruned=pruned, noised=noised, scale=scale))(dict(stacks), draw))


@dataclass(frozen=True)
class Compressed:
    """How one tensor of an update was compressed.

    Attributes:
        kept: coordinates that are not zero, the largest ones; None where nothing was pruned.
        levels: steps of a uniform grid from 0 to the largest magnitude; 0 for no grid, 1 for signs alone.
    """

    kept: int | None = None
    levels: int = 0


def visible(update: Update, simulated: Mapping[str, Tensor]) -> dict[str, Compressed]:
    """What the values of an update show of compression, tensor by tensor, beside a few uncompressed ones of the attacker's own.

    Args:
        simulated: for each tensor a stack of simulated updates without compression.
    """
    counts = {name: int(tensor.count_nonzero()) for name, tensor in update.tensors.items()}
    size, nonzero = sum(tensor.numel() for tensor in update.tensors.values()), sum(counts.values())
    own = sum(float((simulated[name] != 0).double().mean()) * tensor.numel() for name, tensor in update.tensors.items())
    pruned = nonzero < (1 - PRUNED) * size and nonzero < own / 2
    grids = {name: grid(tensor) for name, tensor in update.tensors.items()}
    levels = max(grids.values())
    on_it = sum(tensor.numel() for name, tensor in update.tensors.items() if grids[name])
    if on_it > size / 2:  # one client, one grid, though a few values alone would not show it
        grids = {name: found or levels for name, found in grids.items()}
    each = {name: Compressed(counts[name] if pruned else None, grids[name]) for name in counts}
    return {name: how for name, how in each.items() if how != Compressed()}


def grid(tensor: Tensor) -> int:
    """Steps of the uniform grid on which a tensor's magnitudes lie, from 0 to the largest; 0 if they lie on none.

    A grid of more than 256 steps, or one that few values could hit by chance, is none.
    """
    values = tensor.float().abs().flatten()
    values = values[values > 0]
    if len(values) < FEWEST:
        return 0
    distinct = torch.unique(values)  # type: ignore[no-untyped-call]
    distinct = distinct[torch.cat([torch.ones(1, dtype=torch.bool), distinct.diff() > 1e-5 * distinct[-1]])]
    if len(distinct) == 1:
        return 1
    if len(distinct) > 256 or len(values) < 2 * len(distinct):
        return 0
    gap = float(torch.cat([distinct[:1], distinct.diff()]).min())
    steps = distinct / gap
    levels = round(float(steps[-1]))
    return levels if levels <= 256 and bool(((steps - steps.round()).abs() < 0.05).all()) else 0


def compressed(tensors: Float[Tensor, "pairs numel"], how: Compressed) -> Float[Tensor, "pairs numel"]:
    """A stack of flat tensors, each pruned to its largest coordinates and rounded to a grid like the observed one."""
    if how.kept is not None and how.kept < tensors.shape[1]:
        if not how.kept:
            return torch.zeros_like(tensors)
        limit = tensors.abs().topk(how.kept, dim=1).values[:, -1:]
        tensors = torch.where(tensors.abs() >= limit, tensors, 0.0)
    if how.levels == 1:
        return tensors.sign()
    if how.levels:
        step = tensors.abs().amax(1, keepdim=True) / how.levels
        return torch.where(step > 0, (tensors / step.clamp(min=1e-30)).round() * step, 0.0)
    return tensors


def unit_signs(tensors: Tensors, seen: Mapping[str, Compressed]) -> dict[str, Tensor]:
    """The update with magnitudes of 1 where only signs are left, whatever the client multiplied them by."""
    return {name: tensor.sign() if seen.get(name, Compressed()).levels == 1 else tensor for name, tensor in tensors.items()}
