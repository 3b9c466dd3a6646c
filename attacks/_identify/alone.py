"""The update that each candidate would have caused by itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attacks._dropout import layers as dropping_layers
from attacks._gradient import noise_level
from attacks._matching.latents import bottlenecks, prepare_told
from attacks._matching.simulate import Victim, flat
from simulator.adversary import Knowledge
from simulator.models.dropout import drawn_masks, masks_from
from simulator.models.latent import drawn_noise, noise_from
from simulator.training import GradientRule, local_update, mean_gradient, per_example_gradients
from simulator.types import Batch, Observation, Tensors

CHUNK_MB = 64
"""Memory of what is computed at once beside what is kept."""


def rows_of(batch: Batch, rows: Int[Tensor, " rows"]) -> Batch:
    """Some records of a batch, with their targets."""
    return Batch(batch.inputs[rows], batch.labels[rows], None if batch.targets is None else batch.targets[rows])


def chunks(count: int, coordinates: int) -> tuple[Int[Tensor, " rows"], ...]:
    """The places of ``count`` updates, in runs of which each fits into the memory of a chunk twice."""
    return torch.split(torch.arange(count), max(1, CHUNK_MB * 2**20 // (8 * coordinates)))


def prepared(view: Observation, knowledge: Knowledge, pool: Batch) -> Victim:
    """The upload made ready, with labels in place, whichever, so that none are recovered: every candidate has its own."""
    told = knowledge if knowledge.labels is not None else replace(knowledge, labels=pool.labels[: knowledge.num_examples])
    return prepare_told(view, told)


def path(view: Observation, knowledge: Knowledge, victim: Victim) -> tuple[Tensors, ...]:
    """About where each local step of a client with several records began: on the straight line that its delta says.

    There every record had its gradient taken, beside those of the others; by itself a record would have led elsewhere. Empty of one step,
    of one record, whose own way is the true one, and of what does not tell the way: a mean over senders, or more noise than delta.
    """
    steps = len(victim.order)
    if steps < 2 or knowledge.num_examples < 2 or len(view.upload.senders) > 1 or noise_level(view, knowledge) > 1:
        return ()
    moved = {name: victim.target[a:b].view_as(victim.parameters[name]) for name, (a, b) in zip(victim.names, victim.spans, strict=True)}
    still = {name: tensor for name, tensor in victim.parameters.items() if name not in moved}
    return tuple(still | {name: victim.parameters[name] + step / steps * by for name, by in moved.items()} for step in range(steps))


def each_alone(
    victim: Victim, pool: Batch, record_clip: float, way: tuple[Tensors, ...] = (), *, draws: int, rng: torch.Generator
) -> Iterator[Float[Tensor, "some coordinates"]]:
    """The update that each candidate would cause if it were the only record, a chunk at a time, averaged over what the model draws.

    ``way`` is where the gradients of local steps are taken, see :func:`path`; empty follows the candidate's own.
    """
    random = bool(bottlenecks(victim.model) or dropping_layers(victim.model))
    masks, noise = drawn_masks(rng), drawn_noise(rng)
    for rows in chunks(len(pool), len(victim.target)):
        some = rows_of(pool, rows)
        if not random:
            yield alone(victim, some, record_clip, way)
            continue
        with masks_from(masks), noise_from(noise):
            total = alone(victim, some, record_clip, way) / draws
            for _ in range(draws - 1):
                total += alone(victim, some, record_clip, way) / draws
        yield total


def alone(victim: Victim, pool: Batch, record_clip: float, way: tuple[Tensors, ...] = ()) -> Float[Tensor, "candidates coordinates"]:
    """The update of each, under one draw of the model's randomness."""
    recipe, found = victim.recipe, []
    if recipe.algorithm == "fedsgd":
        each = per_example_gradients(victim.model, victim.parameters, victim.buffers, pool, label_smoothing=recipe.label_smoothing)
        return clipped(torch.cat([each[name].detach().flatten(1) for name in victim.names], 1), record_clip)
    clips = record_clip < float("inf")
    rule = clipping(recipe.label_smoothing, record_clip) if clips else partial(mean_gradient, label_smoothing=recipe.label_smoothing)
    for place in range(len(pool)):
        steps = [rows_of(pool, torch.tensor([place]))] * len(victim.order)
        led = along(way, rule) if way else rule
        update, _ = local_update(victim.model, victim.parameters, victim.buffers, steps, recipe, led)
        found.append(flat(update.tensors, victim.names).detach())
    return torch.stack(found)


def along(way: tuple[Tensors, ...], rule: GradientRule) -> GradientRule:
    """The rule at the points of a path, step by step, wherever the steps themselves lead."""
    points = iter(way)

    def at(model: torch.nn.Module, _: Tensors, buffers: Tensors, batch: Batch) -> tuple[Tensors, Tensors]:
        return rule(model, next(points), buffers, batch)

    return at


def clipped(rows: Float[Tensor, "*rows coordinates"], limit: float) -> Float[Tensor, "*rows coordinates"]:
    """Each row scaled down to a norm."""
    return rows if limit == float("inf") else rows * (limit / rows.norm(dim=-1, keepdim=True).clamp(min=limit))


def clipping(smoothing: float, limit: float) -> GradientRule:
    """The gradient rule of one record that clips it."""

    def rule(model: torch.nn.Module, parameters: Tensors, buffers: Tensors, batch: Batch) -> tuple[Tensors, Tensors]:
        each = per_example_gradients(model, parameters, buffers, batch, label_smoothing=smoothing)
        size = torch.stack([tensor.square().sum() for tensor in each.values()]).sum().sqrt()
        return {name: tensor[0] * (limit / size.clamp(min=limit)) for name, tensor in each.items()}, buffers

    return rule
