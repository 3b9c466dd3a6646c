"""What an update comes with: the number of its examples and BatchNorm's running statistics. ``threat.metadata = false`` withholds both.

An ablation of the adversary, which a federation could put into practice: clients that keep their statistics (FedBN, Li et al., 2021,
arXiv:2102.07623) and state no number. A lone sender's number becomes that of a client of average size, as far as the operator knows its
own population; the total behind a sum stays, since the mean is that sum divided by it. What the broadcast model holds stays, too.
"""

from __future__ import annotations

from dataclasses import replace

from clients.private import records_held
from simulator.network import network, tensors
from simulator.types import Observation
from simulator.world import World


def withheld(observation: Observation, world: World) -> Observation:
    """The observation without metadata."""
    usual = usual_examples(world)
    uploads = (
        replace(upload, buffers={}, num_examples=usual if len(upload.senders) == 1 else upload.num_examples)
        for upload in observation.uploads
    )
    return replace(observation, uploads=tuple(uploads))


def usual_examples(world: World) -> int:
    """The records behind the upload of a client of average size."""
    held = records_held(world)
    return world.training.examples_in_round(max(1, round(sum(held) / len(held))))


def cannot_be_withheld(world: World, *, labels: bool, rounds: bool) -> str | None:
    """Why an adversary without metadata would have it all the same, or None (must be / got / do).

    Args:
        labels: whether it is told labels or their counts, which a number of examples can be counted from.
        rounds: whether it may use all rounds: the next broadcast's statistics are the mean of the uploaded ones.
    """
    stated = {world.training.examples_in_round(held) for held in records_held(world)}
    if labels and stated != {usual_examples(world)}:
        return (
            f"must be true with threat.labels, got false: clients state {min(stated)} to {max(stated)} examples, and "
            "labels can be counted. Withhold the labels, or set training.batch_size"
        )
    if rounds and world.federation.rounds > 1 and _tracks(world):
        return (
            "must be true with threat.rounds = 'all' and running statistics, got false: each broadcast shows the mean of those before. "
            "Set threat.rounds = 'one', or drop BatchNorm"
        )
    return None


def _tracks(world: World) -> bool:
    """Whether the network has statistics that training moves."""
    if world.training.batch_norm != "train":
        return False
    _, buffers = tensors(network(world.architecture, world.data.load().schema, world.training, world.seed))
    return any(name.endswith("running_mean") for name in buffers)
