"""A client's round, whole: private batch → hooks → update → upload."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from clients.private import private_batches, private_record_ids
from simulator import training
from simulator.defense import ClientContext, Defense
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
    rule = gradient_rule(world.defenses, context, broadcast.training)
    masks = drawn_masks(stream(world.seed, "dropout", world.secret, client, broadcast.round))
    with masks_from(masks):
        update, buffers = training.local_update(model, broadcast.parameters, broadcast.buffers, batches, broadcast.training, rule)
    for defense in world.defenses:
        update = defense.on_update(update, context)
    update = training.rounded(update, broadcast.training)  # last: what defenses add is rounded with the rest
    examples = len(private_record_ids(world, client, broadcast.round))
    return Upload(frozenset({client}), update, floating(buffers), examples)


def gradient_rule(defenses: Sequence[Defense], context: ClientContext, recipe: LocalTraining) -> training.GradientRule | None:
    """The gradient of one local step: the recipe's own (None), or what the per-example defense makes of per-example gradients."""
    acting = [defense for defense in defenses if defense.per_example]
    if not acting:
        return None
    (defense,) = acting  # experiments.spec refuses two: after the first there are no per-example gradients left

    def rule(model: nn.Module, parameters: Tensors, buffers: Tensors, batch: Batch) -> tuple[Tensors, Tensors]:
        each = training.per_example_gradients(model, parameters, buffers, batch, label_smoothing=recipe.label_smoothing)
        return defense.on_gradient(each, context), buffers

    return rule
