"""A client's round, whole: private batch → hooks → update → upload."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import count

from torch import nn

from clients.private import held_by, private_batches, records_held, splits, stated_examples
from simulator import training
from simulator.defense import ClientContext, Defense, Pool, Private, overrides
from simulator.errors import BroadcastRefused
from simulator.models.dropout import drawn_masks, masks_from
from simulator.models.latent import drawn_noise, noise_from
from simulator.network import floating
from simulator.rng import secret_stream
from simulator.types import Batch, Broadcast, LocalTraining, Tensors, Upload
from simulator.world import World


def local_upload(world: World, model: nn.Module, broadcast: Broadcast, client: int) -> Upload:
    """Train on the private batches of this round as the broadcast says, with every client-side defense in its place.

    Raises:
        BroadcastRefused: a defense does not trust the model, or the recipe is not the federation's, with which guarantees are counted.
    """
    if broadcast.training != world.training:
        raise BroadcastRefused(f"the recipe must be the federation's {world.training}, got {broadcast.training}. Send that one.")
    # a transcript keeps tensors by name, and noise is drawn tensor after tensor: what is computed again must draw in the model's order
    broadcast = replace(broadcast, parameters={name: broadcast.parameters[name] for name, _ in model.named_parameters()})
    batches = private_batches(world, client, broadcast.round)
    rng = secret_stream(world.seed, world.secret, "defense", client, broadcast.round)
    recipe = broadcast.training
    expected = recipe.size_of_batch(records_held(world)[client]) if recipe.sampling == "poisson" else len(batches[0])
    lasting = secret_stream(world.seed, world.secret, "lasting defense", client)
    context = ClientContext(client, broadcast.round, expected, rng, lasting=lasting, buffers=broadcast.buffers)
    shape = tuple(batches[0].inputs.shape[1:])
    for defense in world.defenses:
        if (reason := defense.on_broadcast(broadcast, model, shape, context)) is not None:
            raise BroadcastRefused(f"{defense.name} refuses this model: {reason}.")
    batches = encoded(world, batches, context)
    private = Private(model, broadcast, tuple(batches))
    rule = gradient_rule(world.defenses, context, private, recipe)
    masks = drawn_masks(secret_stream(world.seed, world.secret, "dropout", client, broadcast.round))
    noise = drawn_noise(secret_stream(world.seed, world.secret, "latent", client, broadcast.round))
    with masks_from(masks), noise_from(noise):
        update, buffers = training.local_update(model, broadcast.parameters, broadcast.buffers, batches, recipe, rule)
    for defense in world.defenses:
        known = told(defense, context, private)
        buffers, update = defense.on_buffers(buffers, update, known), defense.on_update(update, known)
    update = training.rounded(update, recipe)  # last: what defenses add is rounded with the rest
    return Upload(frozenset({client}), update, floating(buffers), stated_examples(world, client, broadcast.round))


def encoded(world: World, batches: Sequence[Batch], context: ClientContext) -> list[Batch]:
    """The batches as the defenses want them trained on; an empty one, which Poisson sampling may draw, stays empty."""
    acting = [defense for defense in world.defenses if overrides(defense, "on_batch")]
    if acting:
        parts = splits(world)
        context = replace(context, pool=Pool(held_by(world, context.client), parts.public, parts.schema.num_classes))
    for defense in acting:
        batches = [defense.on_batch(batch, context) if len(batch) else batch for batch in batches]
    return list(batches)


def told(defense: Defense, context: ClientContext, private: Private) -> ClientContext:
    """The context as this defense gets it: with what is private only if it says that it needs it."""
    return replace(context, private=private) if defense.looks_again else context


def gradient_rule(defenses: Sequence[Defense], context: ClientContext, private: Private, recipe: LocalTraining) -> training.GradientRule:
    """The gradient of one local step as the defenses make it: per example first, then as a whole.

    Under Poisson sampling it is divided by the expected size of a batch, and an empty one has one, too.
    """
    each = [defense for defense in defenses if defense.per_example]
    poisson = recipe.sampling == "poisson"
    steps = count(1)

    def rule(model: nn.Module, parameters: Tensors, buffers: Tensors, batch: Batch) -> tuple[Tensors, Tensors]:
        now = replace(context, step=next(steps))
        if each:
            (defense,) = each  # experiments.refusals refuses two: after the first there are no per-example gradients left
            apart = training.per_example_gradients(model, parameters, buffers, batch, label_smoothing=recipe.label_smoothing)
            gradient: Tensors = defense.on_gradient(apart, now)
        else:
            mean = partial(training.sampled_gradient, expected=context.batch_size) if poisson else training.settled_gradient
            gradient, buffers = mean(model, parameters, buffers, batch, label_smoothing=recipe.label_smoothing)
        for defense in defenses:
            gradient = defense.on_step(gradient, told(defense, now, private))
        return gradient, buffers

    return rule
