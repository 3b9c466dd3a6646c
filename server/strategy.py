"""The server's side of a federation: broadcast, collect, aggregate, step."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from flwr.app import RecordDict

from server.active import tampered
from server.ask import ask, find_clients
from server.curious import CuriousGrid
from server.secure import collect_aggregate
from simulator import progress, wire
from simulator.aggregate import mean_update
from simulator.defense import ServerContext
from simulator.errors import FederationError, WireError
from simulator.network import network, tensors
from simulator.rng import stream
from simulator.types import Broadcast, Tensors, Upload
from simulator.world import World


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
    losses, started = Losses(grid), time.thread_time()
    collect = collect_uploads if world.channel is None else collect_aggregate
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
        "server_seconds": (time.thread_time() - started) / federation.rounds,  # clients run in other threads or processes
        "lost": len(losses.entries),
    }
    return ("degraded" if losses.entries else "ok"), facts


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
    contents = {client: wire.pack_broadcast(broadcast) for client in clients}
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
    context = ServerContext(broadcast.round, answered, stream(world.seed, "server-defense", world.secret, broadcast.round))
    for defense in world.defenses:
        update = defense.on_aggregate(update, context)
    rate = world.federation.server_learning_rate
    scale = rate if update.kind == "delta" else -rate * broadcast.training.learning_rate
    parameters = {name: tensor + scale * update.tensors[name] for name, tensor in broadcast.parameters.items()}
    return parameters, {**broadcast.buffers, **means}
