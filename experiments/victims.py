"""Victims without a federation: the observation that one round would leave, from the simulator's own local training.

For claims and benchmarks, which need many uploads and no server. What a real run records is the same to the bit
(``tests/experiments/test_claims.py``); this is only the shorter way there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from simulator.adversary import Knowledge
from simulator.aggregate import weighted_mean
from simulator.dataset import take
from simulator.models.dropout import drawn_masks, masks_from
from simulator.models.latent import drawn_noise, noise_from
from simulator.network import floating, tensors
from simulator.rng import stream
from simulator.training import batch_indices, local_update, rounded
from simulator.types import Batch, Broadcast, LocalTraining, Observation, Schema, Tensors, Update, Upload


@dataclass(frozen=True)
class Victim:
    """One upload under attack with the truth behind it, which only the scoring may read."""

    view: Observation
    knowledge: Knowledge
    truth: Batch


def victim(
    model: nn.Module,
    schema: Schema,
    clients: Sequence[Batch],
    recipe: LocalTraining,
    *,
    seed: int = 0,
    state: tuple[Tensors, Tensors] | None = None,
    labels: Literal["none", "counts", "exact"] = "none",
    public: Batch | None = None,
) -> Victim:
    """The upload of one client, or the weighted mean over several, and what its attacker knows.

    Args:
        model: the architecture in the mode that the recipe states (:func:`simulator.network.network`).
        schema: of the records.
        clients: what each sender trains on.
        recipe: of the local training.
        seed: of the order in which a client of FedAvg takes its records.
        state: parameters and buffers that are broadcast; the model's own if left out.
        labels: what the attacker is told of them, as in the threat model.
        public: records that the attacker holds.
    """
    parameters, buffers = state or tensors(model)
    updates, after = [], []
    for number, batch in enumerate(clients):
        order = [torch.arange(len(batch))]
        if recipe.algorithm == "fedavg":
            order = batch_indices(len(batch), recipe, stream(seed, "order", number, 1))
        masks, noise = (stream(seed, purpose, "", number, 1) for purpose in ("dropout", "latent"))
        with masks_from(drawn_masks(masks)), noise_from(drawn_noise(noise)):
            update, left = local_update(model, parameters, buffers, [take(batch, indices) for indices in order], recipe)
        updates.append(rounded(update, recipe).tensors)
        after.append(floating(left))
    sizes = [len(batch) for batch in clients]
    kind: Literal["gradient", "delta"] = "delta" if recipe.algorithm == "fedavg" else "gradient"
    upload = Upload(frozenset(range(len(clients))), Update(kind, weighted_mean(updates, sizes)), weighted_mean(after, sizes), sum(sizes))
    truth = Batch(torch.cat([batch.inputs for batch in clients]), torch.cat([batch.labels for batch in clients]))
    knowledge = Knowledge(
        model=model,
        schema=schema,
        training=recipe,
        num_examples=sum(sizes),
        labels=truth.labels.clone() if labels == "exact" else None,
        label_counts=torch.bincount(truth.labels, minlength=schema.num_classes) if labels != "none" else None,
        public=public,
    )
    return Victim(Observation(Broadcast(1, parameters, floating(buffers), recipe), (upload,)), knowledge, truth)


def trained(model: nn.Module, records: Batch, *, steps: int, batch_size: int, learning_rate: float, seed: int) -> tuple[Tensors, Tensors]:
    """Parameters and buffers after plain SGD on ``records``: a model that is past its first round."""
    recipe = LocalTraining(algorithm="fedavg", batch_size=batch_size, steps=steps, learning_rate=learning_rate)
    parameters, buffers = tensors(model)
    order = batch_indices(len(records), recipe, stream(seed, "pretraining"))
    update, after = local_update(model, parameters, buffers, [take(records, indices) for indices in order], recipe)
    return {name: parameters[name] + change for name, change in update.tensors.items()}, after
