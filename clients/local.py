"""A client's round, whole: private batch → hooks → update → upload."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import count

from torch import nn

from clients.private import private_batches, private_record_ids
from simulator import training
from simulator.defense import ClientContext, Defense, Private, overrides
from simulator.errors import BroadcastRefused
from simulator.models.dropout import drawn_masks, masks_from
from simulator.network import floating
from simulator.rng import stream
from simulator.types import Batch, Broadcast, LocalTraining, Tensors, Upload
from simulator.world import World


def local_upload(world: World, model: nn.Module, broadcast: Broadcast, client: int) -> Upload:
    """Train on the private batches of this round as the broadcast says, with every client-side defense in its place.

    Raises:
        BroadcastRefused: a defense does not trust the model.
    """
    batches = private_batches(world, client, broadcast.round)
    rng = stream(world.seed, "defense", world.secret, client, broadcast.round)
    context = ClientContext(client, broadcast.round, len(batches[0]), rng)
    for defense in world.defenses:
        if (reason := defense.on_broadcast(broadcast, model, batches[0], context)) is not None:
            raise BroadcastRefused(f"{defense.name} refuses this model: {reason}.")
    for defense in world.defenses:
        batches = [defense.on_batch(batch, context) for batch in batches]
    private = Private(model, broadcast, tuple(batches))
    rule = gradient_rule(world.defenses, context, private, broadcast.training)
    masks = drawn_masks(stream(world.seed, "dropout", world.secret, client, broadcast.round))
    with masks_from(masks):
        update, buffers = training.local_update(model, broadcast.parameters, broadcast.buffers, batches, broadcast.training, rule)
    for defense in world.defenses:
        update = defense.on_update(update, told(defense, context, private))
    update = training.rounded(update, broadcast.training)  # last: what defenses add is rounded with the rest
    examples = len(private_record_ids(world, client, broadcast.round))
    return Upload(frozenset({client}), update, floating(buffers), examples)


def told(defense: Defense, context: ClientContext, private: Private) -> ClientContext:
    """The context as this defense gets it: with what is private only if it says that it needs it."""
    return replace(context, private=private) if defense.looks_again else context


def gradient_rule(
    defenses: Sequence[Defense], context: ClientContext, private: Private, recipe: LocalTraining
) -> training.GradientRule | None:
    """The gradient of one local step as the defenses make it: per example first, then as a whole; None where none of them acts on it."""
    each = [defense for defense in defenses if defense.per_example]
    if not each and not any(overrides(defense, "on_step") for defense in defenses):
        return None
    steps = count(1)

    def rule(model: nn.Module, parameters: Tensors, buffers: Tensors, batch: Batch) -> tuple[Tensors, Tensors]:
        now = replace(context, step=next(steps))
        if each:
            (defense,) = each  # experiments.spec refuses two: after the first there are no per-example gradients left
            apart = training.per_example_gradients(model, parameters, buffers, batch, label_smoothing=recipe.label_smoothing)
            gradient: Tensors = defense.on_gradient(apart, now)
        else:
            gradient, buffers = training.mean_gradient(model, parameters, buffers, batch, label_smoothing=recipe.label_smoothing)
        for defense in defenses:
            gradient = defense.on_step(gradient, told(defense, now, private))
        return gradient, buffers

    return rule
