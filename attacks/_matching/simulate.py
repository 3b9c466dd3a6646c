"""The attacker's own run of the client's recipe on dummy records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from attacks._gradient import local_steps, records_per_sender
from attacks._layers import all_buffers
from attacks._matching.objective import flat
from attacks.update.labels import known_or_recovered
from simulator.adversary import Knowledge
from simulator.training import local_update
from simulator.types import Batch, LocalTraining, Observation, Tensors

Span = tuple[int, int]


@dataclass(frozen=True)
class Victim:
    """One upload made ready for matching.

    Attributes:
        model: the architecture; victims that share the object can be matched in one go.
        parameters: at the broadcast.
        buffers: all buffers of the model, at their broadcast values.
        names: the tensors of the update, in the order in which ``target`` holds them.
        target: the observed update.
        labels: known or recovered.
        shape: (channel, height, width) of a record.
        recipe: what the client is assumed to have run.
        order: (first, end) of the records of each local step, as assumed by the attacker.
    """

    model: nn.Module
    parameters: Tensors
    buffers: Tensors
    names: tuple[str, ...]
    target: Float[Tensor, " coordinates"]
    labels: Int[Tensor, " batch"]
    shape: tuple[int, int, int]
    recipe: LocalTraining
    order: tuple[Span, ...]

    @property
    def kin(self) -> tuple[object, ...]:
        """Victims of equal kin differ only in tensor values."""
        return id(self.model), self.model.training, self.names, self.shape, len(self.labels), self.recipe, self.order


def assumed_order(records: int, recipe: LocalTraining, senders: int) -> tuple[Span, ...]:
    """The records of each local step: in the order of the dummies, every epoch alike.

    The client shuffles and the attacker cannot know how; the dummies have no order of their own, so only the second epoch on is
    wrong. Several senders are simulated as one client with all their records whose batches are as many times larger: the same
    number of steps, and for one step exactly the weighted mean of the senders' gradients (except under train-mode BatchNorm,
    where joint batch statistics are assumed). For more steps it approximates the mean of paths by the path of the mean.
    """
    steps = local_steps(recipe, -(-records // senders))
    size = min(recipe.batch_size * senders or records, records) if recipe.algorithm == "fedavg" else records
    epoch = [(start, min(start + size, records)) for start in range(0, records, size)]
    return tuple(epoch[step % len(epoch)] for step in range(steps))


def prepare(view: Observation, knowledge: Knowledge) -> Victim:
    """Make one upload ready for matching."""
    update, recipe = view.upload.update, knowledge.training
    recipe = replace(recipe, algorithm="fedsgd" if update.kind == "gradient" else "fedavg")
    names = tuple(name for name in view.broadcast.parameters if name in update.tensors)
    return Victim(
        model=knowledge.model,
        parameters={name: tensor.detach() for name, tensor in view.broadcast.parameters.items()},
        buffers=all_buffers(knowledge.model, view.broadcast),
        names=names,
        target=flat(update.tensors, names).detach(),
        labels=known_or_recovered(view, knowledge),
        shape=knowledge.schema.shape,
        recipe=recipe,
        order=assumed_order(knowledge.num_examples, recipe, len(view.upload.senders)),
    )


def simulate(
    model: nn.Module,
    parameters: Tensors,
    buffers: Tensors,
    inputs: Float[Tensor, "batch channel height width"],
    labels: Int[Tensor, " batch"],
    *,
    recipe: LocalTraining,
    order: Sequence[Span],
    names: Sequence[str],
) -> Float[Tensor, " coordinates"]:
    """The update that the recipe makes of these records, flat; differentiable in the inputs."""
    batches = [Batch(inputs[first:end], labels[first:end]) for first, end in order]
    update, _ = local_update(model, parameters, buffers, batches, recipe)
    return flat(update.tensors, names)


def unroll_length(view: Observation, knowledge: Knowledge) -> int:
    """Local steps that the simulation of this upload takes."""
    if view.upload.update.kind == "gradient":
        return 1
    return local_steps(replace(knowledge.training, algorithm="fedavg"), records_per_sender(view, knowledge))


def casted(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    """Floating-point tensors in another precision; integers as they are."""
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
