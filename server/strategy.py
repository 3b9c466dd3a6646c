"""The server's side of a federation: broadcast, collect, aggregate, step."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from flwr.app import RecordDict

from defenses.channel.ckks import CKKSAggregation
from defenses.channel.enclave import SimulatedEnclave
from defenses.channel.secure_aggregation import SecureAggregation
from server.active import tampered
from server.ask import ask, find_clients
from server.ckks import ckks_channel
from server.curious import CuriousGrid
from server.enclave import enclave_channel
from server.secure import secure_channel
from simulator import progress, wire
from simulator.aggregate import mean_update
from simulator.defense import Defense, ServerContext
from simulator.errors import FederationError, WireError
from simulator.network import network, tensors
from simulator.rng import secret_stream, stream
from simulator.types import Broadcast, Tensors, Upload
from simulator.world import World

Collect = Callable[[CuriousGrid, World, Mapping[int, int], Sequence[int], Broadcast], tuple[list[Upload], dict[int, str]]]
"""One round: from the cohort and what it is sent to what the server learns, and who was lost and why."""


@dataclass
class Losses:
    """Who was lost in which round and why; kept in the transcript as it happens."""

    grid: CuriousGrid
    entries: list[tuple[int, int, str]] = field(default_factory=list)

    def add(self, round: int, lost: Mapping[int, str]) -> None:
        """Note the lost clients of a round."""
        for client, reason in sorted(lost.items()):
            self.entries.append((round, client, reason))
            self.grid.record_lost(round, client, reason)


def run_rounds(grid: CuriousGrid, world: World) -> tuple[str, dict[str, Any]]:
    """Run every round of the world; return how it ended (``ok`` or ``degraded``) and what it cost.

    Raises:
        FederationError: fewer than ``min_clients`` answered in some round.
    """
    federation = world.federation
    schema = world.data.load().schema
    parameters, buffers = tensors(network(world.architecture, schema, world.training, world.seed))
    nodes = introduce(grid, federation.clients, federation.timeout_seconds)
    losses, started = Losses(grid), _cpu_seconds()
    with opened(world) as collect:
        for round in range(1, federation.rounds + 1):
            broadcast = Broadcast(round, tampered(world, parameters, round), buffers, world.training)
            uploads, lost = collect(grid, world, nodes, cohort(world, round), broadcast)
            losses.add(round, lost)
            answered = sum(len(upload.senders) for upload in uploads)
            if answered < federation.min_clients:
                raise FederationError(
                    f"clients that answered must be ≥ {federation.min_clients}, got {answered} in round {round}. "
                    f"{' '.join(lost.values())} See the transcript."
                )
            parameters, buffers = step(world, broadcast, uploads)
            progress.tick("rounds", round, federation.rounds, f"{answered} clients")
    grid.record_released(federation.rounds, parameters, buffers)
    messages = sum(len(cohort(world, round)) for round in range(1, federation.rounds + 1))
    facts = {
        "upload_bytes": grid.upload_bytes / messages,
        "download_bytes": grid.download_bytes / messages,
        "server_seconds": (_cpu_seconds() - started) / federation.rounds,
        "lost": len(losses.entries),
    }
    return ("degraded" if losses.entries else "ok"), facts


def _cpu_seconds() -> float:
    """Of this thread and of processes that it started and that have ended, as an enclave's; clients run elsewhere."""
    ended = os.times()
    return time.thread_time() + ended.children_user + ended.children_system


def opened(world: World) -> AbstractContextManager[Collect]:
    """How this world's server collects, in the clear or through its channel, which lives as long as the run.

    Raises:
        FederationError: a channel that has no server's side here.
    """
    if world.channel is None:
        return nullcontext(collect_uploads)
    channels: Mapping[type[Defense], Callable[[], AbstractContextManager[Collect]]] = {
        SecureAggregation: secure_channel,
        CKKSAggregation: ckks_channel,
        SimulatedEnclave: lambda: enclave_channel(world),
    }
    if type(world.channel) not in channels:
        raise FederationError(f"channel must be one of {[kind.name for kind in channels]}, got {world.channel.name!r}. Use one of them.")
    return channels[type(world.channel)]()


def introduce(grid: CuriousGrid, expected: int, timeout: float) -> dict[int, int]:
    """Ask every node which client it is; return the node id of each client.

    Raises:
        FederationError: a node did not answer, or two claim to be the same client.
    """
    ids = find_clients(grid, expected, timeout)
    answers = ask(grid, {node: node for node in ids}, wire.HELLO, {node: RecordDict() for node in ids}, round=0, timeout=timeout)
    if answers.lost:
        raise FederationError(
            f"every node must say who it is, got none from {len(answers.lost)}: {' '.join(answers.lost.values())} Check its log."
        )
    clients = {wire.hello_client(content, -1): node for node, content in answers.contents.items()}
    if sorted(clients) != list(range(expected)):
        raise FederationError(f"clients must be 0 to {expected - 1}, got {sorted(clients)}. Check partition-id in the node configuration.")
    return clients


def cohort(world: World, round: int) -> list[int]:
    """The clients of a round, drawn by the server without replacement."""
    size, clients = world.federation.cohort_size, world.federation.clients
    return sorted(torch.randperm(clients, generator=stream(world.seed, "cohort", round))[:size].tolist())


def collect_uploads(
    grid: CuriousGrid, world: World, nodes: Mapping[int, int], clients: Sequence[int], broadcast: Broadcast
) -> tuple[list[Upload], dict[int, str]]:
    """Ask each client for its update in the clear; return the usable uploads, and why the others are not."""
    content = wire.pack_broadcast(broadcast)
    contents = {client: content.copy() for client in clients}
    answers = ask(grid, nodes, wire.TRAIN, contents, round=broadcast.round, timeout=world.federation.timeout_seconds)
    uploads, lost = [], dict(answers.lost)
    for client, content in answers.contents.items():
        try:
            uploads.append(wire.unpack_upload(content, client, broadcast))
        except WireError as error:
            lost[client] = f"client {client} sent what cannot be used: {error}"
    return uploads, lost


def step(world: World, broadcast: Broadcast, uploads: Sequence[Upload]) -> tuple[Tensors, Tensors]:
    """The next model: the mean update, through the server-side defenses, along the learning rates."""
    update, means = mean_update(uploads)
    answered = sum(len(upload.senders) for upload in uploads)
    rng = secret_stream(world.seed, world.secret, "server-defense", broadcast.round)
    context = ServerContext(broadcast.round, answered, rng, broadcast.buffers)
    for defense in world.defenses:
        update, means = defense.on_aggregate(update, context), defense.on_mean_buffers(means, context)
    rate = world.federation.server_learning_rate
    scale = rate if update.kind == "delta" else -rate * broadcast.training.learning_rate
    parameters = {name: tensor + scale * update.tensors[name] for name, tensor in broadcast.parameters.items()}
    return parameters, {**broadcast.buffers, **means}
