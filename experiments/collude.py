"""Clients that collude with the server: it knows what they sent, and takes it out of every aggregate that they are in.

They follow the protocol and tell the server afterwards, so that neither drop-out nor a lower threshold betrays them. What is left
of a sum over n clients with c of them is the sum over the n − c others: c = n − 1 undoes secure aggregation. So do c ≥ t, who can open
every other client's secrets to the server, which would then see each upload by itself: more than is shown here, and refused
(:func:`understated`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from clients.local import local_upload
from clients.secure import private_vector
from defenses.channel._secagg.graph import most_corrupt
from defenses.channel.enclave import SimulatedEnclave
from defenses.channel.secure_aggregation import SecureAggregation
from simulator.rng import stream
from simulator.types import Broadcast, Observation, Tensors, Update, Upload
from simulator.world import World


def colluders(world: World, count: int) -> frozenset[int]:
    """The clients that collude, the same in every round and arm: the first ``count`` of a shuffled list."""
    order = torch.randperm(world.federation.clients, generator=stream(world.seed, "colluders"))
    return frozenset(order[:count].tolist())


def reduced(observation: Observation, world: World, model: nn.Module, known: frozenset[int]) -> Observation:
    """The observation as the server has it with their help: their own uploads, which are no victims, are gone from it."""
    uploads = []
    for upload in observation.uploads:
        own = sorted(upload.senders & known)
        if len(own) == len(upload.senders):
            continue
        told = [told_by(client, world, model, observation.broadcast) for client in own]
        uploads.append(without(upload, told) if told else upload)
    return replace(observation, uploads=tuple(uploads))


def understated(world: World, count: int) -> str | None:
    """Why so many colluders show the server more than :func:`reduced` does, or None (must be / got / do)."""
    channel, federation = world.channel, world.federation
    if not isinstance(channel, SecureAggregation) or channel.mode == "plain":
        return None
    n = federation.cohort_size
    plan = channel.plan_for(n, federation.rounds)
    if plan is None:
        return None  # secure aggregation says so itself
    limit = most_corrupt(n, plan.threshold, active=channel.active) if plan.complete else plan.corrupt + 1
    in_a_cohort = range(max(0, count - (federation.clients - n)), min(count, n) + 1)
    if not any(limit <= c < n - 1 for c in in_a_cohort):  # of n clients without n − 1 one is left: the sum is its upload
        return None
    with_whom = f"threshold = {plan.threshold}" if plan.complete else f"the {plan.degree}-regular graph certified for {plan.corrupt}"
    alone = f" or {n - 1}" if federation.clients == n else ""
    return (
        f"threat.colluding must be below {limit}{alone} in a cohort of {n} with {with_whom}"
        f"{' against an active server' if channel.active else ''}, got {count}. So many can open the others' uploads one by one, of which "
        "an experiment would show the mean: attack the arm without a channel instead, or raise threshold or corrupt."
    )


def told_by(client: int, world: World, model: nn.Module, broadcast: Broadcast) -> Upload:
    """What a colluding client sent, as it entered the sum: with its own noise and its own rounding, which it knows."""
    channel, cohort = world.channel, world.federation.cohort_size
    upload = local_upload(world, model, broadcast, client)
    if isinstance(channel, SimulatedEnclave):
        return channel.as_summed(upload)
    if not isinstance(channel, SecureAggregation) or str(channel.mode) == "plain":
        return upload
    return channel.decode(
        private_vector(world, model, client, broadcast, channel, cohort),
        kind=upload.update.kind, template=broadcast.parameters, buffer_template=broadcast.buffers, senders=frozenset({client}),
        cohort=cohort, max_examples=channel.largest_upload(world), noisy=channel.noised(world),
        limit=channel.range_for(world, sum(tensor.numel() for tensor in upload.update.tensors.values())),
        rotation=channel.rotation_for(world, broadcast.round),
    )  # fmt: skip


def without(aggregate: Upload, parts: Sequence[Upload]) -> Upload:
    """The mean over the senders that are left, weighted by their numbers of examples."""
    left = aggregate.num_examples - sum(part.num_examples for part in parts)

    def rest(mean: Tensors, others: Sequence[Tensors]) -> Tensors:
        whole = {name: aggregate.num_examples * tensor.double() for name, tensor in mean.items()}
        for part, tensors in zip(parts, others, strict=True):
            whole = {name: whole[name] - part.num_examples * tensors[name].double() for name in whole}
        return {name: (tensor / left).to(mean[name].dtype) for name, tensor in whole.items()}

    return Upload(
        senders=aggregate.senders - frozenset[int]().union(*(part.senders for part in parts)),
        update=Update(aggregate.update.kind, rest(aggregate.update.tensors, [part.update.tensors for part in parts])),
        buffers=rest(aggregate.buffers, [part.buffers for part in parts]),
        num_examples=left,
    )
