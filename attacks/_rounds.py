"""What several recorded rounds say about the same records: when a client takes the same ones again, and how far the model moved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from attacks._gradient import norm
from attacks._layers import all_buffers
from simulator.adversary import Knowledge
from simulator.training import mean_gradient
from simulator.types import Batch, Broadcast, LocalTraining, Observation

REHEARSED = 8
"""Random smooth pictures on which the change of a gradient between two models is measured."""


def redraws(recipe: LocalTraining, records: int) -> str | None:
    """The reason why a client with an upload of ``records`` need not take the same records in every round; None if it must.

    The recipe is the server's own: a full batch takes all that a client holds, and so do whole epochs of FedAvg. Fewer examples than
    the batch size are all that the client holds.
    """
    if recipe.algorithm == "fedsgd":
        if recipe.batch_size == 0 or records < recipe.batch_size:
            return None
        return f"each round must take the same records, got batches of batch_size = {recipe.batch_size} drawn anew. Use batch_size = 0"
    if recipe.steps == 0 and not (recipe.drop_last and recipe.batch_size):
        return None
    return "each round must take the same records, got FedAvg whose steps or drop_last leave some out. Use whole epochs"


def same_sender(view: Observation, knowledge: Knowledge) -> list[Observation]:
    """The other rounds with an upload of exactly the view's senders and as many records, narrowed to it, nearest round first."""
    wanted, found = view.upload, list[Observation]()
    for seen in knowledge.history:
        for place, upload in enumerate(seen.uploads):
            if (upload.senders, upload.num_examples, upload.update.kind) == (wanted.senders, wanted.num_examples, wanted.update.kind):
                found.append(seen.only(place))
    return sorted(found, key=lambda seen: abs(seen.broadcast.round - view.broadcast.round))


def drift(broadcasts: Sequence[Broadcast], reference: Broadcast) -> Float[Tensor, "rounds rounds"]:
    """Inner products of how far each broadcast model lies from the reference, in float64: the drift is no secret to the server."""
    moved = torch.zeros(len(broadcasts), len(broadcasts), dtype=torch.float64)
    for name, tensor in reference.parameters.items():  # tensor by tensor: all models at once can be large
        rows = torch.stack([(sent.parameters[name].double() - tensor.double()).flatten() for sent in broadcasts])
        moved += rows @ rows.T
    return moved


def change_of_gradient(knowledge: Knowledge, here: Broadcast, there: Broadcast, *, rng: torch.Generator) -> float:
    """How much a gradient changes from one model to another, relative to it: rehearsed on random pictures, the truth is not needed."""
    coarse = torch.rand(REHEARSED, knowledge.schema.shape[0], 4, 4, generator=rng)
    inputs = F.interpolate(coarse, size=knowledge.schema.shape[1:], mode="bilinear")
    labels = torch.randint(knowledge.schema.num_classes, (REHEARSED,), generator=rng)
    first, second = (
        mean_gradient(knowledge.model, sent.parameters, all_buffers(knowledge.model, sent), Batch(inputs, labels))[0]
        for sent in (here, there)
    )
    size = norm(first)
    return norm({name: second[name] - tensor for name, tensor in first.items()}) / size if size else 0.0


def of_round(knowledge: Knowledge, seen: Observation) -> Knowledge:
    """The knowledge about another round of the same records: their labels are the same, the recipe is that round's."""
    return replace(knowledge, training=seen.broadcast.training, history=())
