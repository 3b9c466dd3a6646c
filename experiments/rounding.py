"""How far what secure aggregation shows is from the exact mean: measured, because a coarse rounding would be an undeclared defense."""

from __future__ import annotations

import torch

from clients.local import local_upload
from defenses.channel.secure_aggregation import SecureAggregation
from simulator.network import network
from simulator.types import Observation
from simulator.world import World


def rounding_error(world: World, channel: SecureAggregation, observation: Observation) -> float | None:
    """Rms difference, per coordinate of the update, between the aggregate and the mean in float64 of what its senders computed.

    None where nothing is rounded. Under distributed DP it is the expected rounding error, since the difference is noise.
    """
    (upload,) = observation.uploads
    if channel.mode == "plain":
        return None
    if channel.noised(world):
        return channel.rounding_rms(
            cohort=world.federation.cohort_size, senders=len(upload.senders), num_examples=upload.num_examples,
            max_examples=channel.largest_upload(world),
            limit=channel.range_for(world, sum(tensor.numel() for tensor in upload.update.tensors.values())),
        )  # fmt: skip
    model = network(world.architecture, world.data.load().schema, world.training, world.seed)
    own = [local_upload(world, model, observation.broadcast, client) for client in sorted(upload.senders)]
    total = sum(each.num_examples for each in own)
    differences = [
        got.double() - torch.stack([each.num_examples * each.update.tensors[name].double() for each in own]).sum(0) / total
        for name, got in upload.update.tensors.items()
    ]
    return float(torch.cat([difference.flatten() for difference in differences]).square().mean().sqrt())
