"""What an upload says about the gradient, whichever kind it is."""

from __future__ import annotations

from math import isfinite

import torch

from simulator.adversary import Knowledge
from simulator.types import LocalTraining, Observation, Tensors

PER_RECORD = ("dp_sgd",)
CLIPPING = ("clip", "client_dp", "central_dp", *PER_RECORD)
"""Defenses that scale an update, or each record's gradient, down to a norm which is a setting of theirs."""


def local_steps(recipe: LocalTraining, records: int) -> int:
    """How many local steps one client with this many records takes in a round."""
    if recipe.algorithm == "fedsgd":
        return 1
    size = min(recipe.batch_size or records, records)
    return recipe.steps or recipe.epochs * -(-records // size)


def records_per_sender(view: Observation, knowledge: Knowledge) -> int:
    """Records of one sender, assuming that the senders of an aggregate hold equally many."""
    return -(-knowledge.num_examples // len(view.upload.senders))


def steps_taken(view: Observation, knowledge: Knowledge) -> int:
    """Local steps behind the upload; 1 for a gradient."""
    if view.upload.update.kind == "gradient":
        return 1
    return local_steps(knowledge.training, records_per_sender(view, knowledge))


def mean_gradient(view: Observation, knowledge: Knowledge) -> Tensors:
    """The gradient, averaged over the local steps behind the upload.

    Exact for a gradient and for a delta of one step. For more steps it is the average of the gradients along the client's path,
    later steps counting less under momentum: gradient t of T moves the parameters by lr·(1 + m + … + m^(T−t)). Weight decay is
    subtracted as if the parameters had stayed at the broadcast.
    """
    update = view.upload.update
    if update.kind == "gradient":
        return update.tensors
    recipe, steps = knowledge.training, steps_taken(view, knowledge)
    reach = recipe.learning_rate * sum(sum(recipe.momentum**k for k in range(steps - t)) for t in range(steps))
    parameters = view.broadcast.parameters
    return {name: -tensor / reach - recipe.weight_decay * parameters[name] for name, tensor in update.tensors.items()}


def maybe_clipped(view: Observation, knowledge: Knowledge) -> bool:
    """Whether a clipping that the adversary knows of may have scaled the upload by a factor that it does not know.

    One sender's whole update keeps its scale when its norm is below the clip norm. Of records clipped one by one, and of an
    aggregate of clipped updates, the norm tells nothing.
    """
    limits = [(name, float(str(settings["clip_norm"]))) for name, settings in knowledge.defenses if name in CLIPPING]
    if len(view.upload.senders) > 1 or any(name in PER_RECORD for name, _ in limits):
        return any(isfinite(limit) for _, limit in limits)
    norm = torch.stack([tensor.double().square().sum() for tensor in view.upload.update.tensors.values()]).sum().sqrt()
    return any(norm > (1 - 1e-4) * limit for _, limit in limits)


def not_finite(view: Observation) -> str | None:
    """The reason to refuse an upload that holds NaN or infinity."""
    bad = [name for name, tensor in view.upload.update.tensors.items() if not bool(torch.isfinite(tensor).all())]
    return f"the update must be finite, got NaN or infinity in {', '.join(bad)}" if bad else None
