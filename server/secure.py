"""The server's side of secure aggregation over Flower messages: four stages, clients may leave at each of them."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence

import numpy as np
from flwr.app import RecordDict
from flwr.serverapp import Grid

from defenses.channel._secagg.masking import word_type
from defenses.channel._secagg.server import SecAggServer
from defenses.channel.secure_aggregation import SecureAggregation, ideal_sum
from server.ask import ask
from server.curious import CuriousGrid
from simulator import wire
from simulator.errors import FederationError, ProtocolAbort, WireError
from simulator.types import Broadcast, Upload
from simulator.world import World


def collect_aggregate(
    grid: CuriousGrid, world: World, nodes: Mapping[int, int], clients: Sequence[int], broadcast: Broadcast
) -> tuple[list[Upload], dict[int, str]]:
    """Run the channel over the cohort; return the one upload that the server learns, and who left at which stage and why.

    Raises:
        FederationError: fewer clients than the threshold went through a stage.
    """
    channel = world.channel
    assert isinstance(channel, SecureAggregation)
    lost: dict[int, str] = {}
    try:
        collect = _by_protocol if channel.mode == "protocol" else _by_trusted_party
        total, senders = collect(grid, world, channel, nodes, clients, broadcast, lost)
        upload = channel.decode(
            total, kind="delta" if broadcast.training.algorithm == "fedavg" else "gradient", template=broadcast.parameters,
            buffer_template=broadcast.buffers, senders=senders, cohort=len(clients), max_examples=channel.largest_upload(world),
        )  # fmt: skip
    except ProtocolAbort as error:
        for client, reason in sorted(lost.items()):
            grid.record_lost(broadcast.round, client, reason)
        raise FederationError(f"secure aggregation stopped in round {broadcast.round}: {error} {' '.join(lost.values())}") from error
    grid.record_aggregate(upload)
    return [upload], lost


def _by_protocol(
    grid: CuriousGrid, world: World, channel: SecureAggregation, nodes: Mapping[int, int], clients: Sequence[int],
    broadcast: Broadcast, lost: dict[int, str],
) -> tuple[np.ndarray, frozenset[int]]:  # fmt: skip
    """The real thing: every stage is a message to each client that is still there."""
    parameters = channel.parameters(
        run_id=secrets.token_hex(16), round=broadcast.round, clients=clients, template=broadcast.parameters, buffers=broadcast.buffers
    )
    server = SecAggServer(parameters)

    def stage(name: str, payloads: Mapping[int, bytes]) -> dict[int, bytes]:
        sent = broadcast if name == "mask" else None
        contents = {client: wire.pack_stage(name, payload, sent) for client, payload in payloads.items()}
        return _answers(grid, world, nodes, contents, broadcast.round, lost, name)

    keys = stage("advertise", {client: parameters.to_bytes() for client in clients})
    shares = stage("share", server.receive_advertise(keys))
    masked = stage("mask", server.receive_share(shares))
    opened = stage("unmask", server.receive_mask(masked))
    return server.receive_unmask(opened)


def _by_trusted_party(
    grid: CuriousGrid, world: World, channel: SecureAggregation, nodes: Mapping[int, int], clients: Sequence[int],
    broadcast: Broadcast, lost: dict[int, str],
) -> tuple[np.ndarray, frozenset[int]]:  # fmt: skip
    """The ideal functionality: a trusted party beneath the tap adds the vectors up, and the server is told the sum."""
    grid.record_broadcast(broadcast)
    contents = {client: wire.pack_stage("ideal", b"", broadcast) for client in clients}
    vectors = _answers(grid.trusted_party, world, nodes, contents, broadcast.round, lost, "ideal")
    if len(vectors) < channel.threshold_for(len(clients)):
        raise ProtocolAbort(f"senders must be ≥ {channel.threshold_for(len(clients))}, got {len(vectors)}.")
    grid.upload_bytes += sum(map(len, vectors.values()))
    word = word_type(channel.bits_for(len(clients)))
    return ideal_sum({client: np.frombuffer(vector, word) for client, vector in vectors.items()}), frozenset(vectors)


def _answers(
    grid: Grid, world: World, nodes: Mapping[int, int], contents: Mapping[int, RecordDict], round: int, lost: dict[int, str], name: str
) -> dict[int, bytes]:
    """The payloads that came back, by client; who did not answer is lost at this stage."""
    answers = ask(grid, nodes, wire.SECAGG, contents, round=round, timeout=world.federation.timeout_seconds)
    lost.update({client: f"{reason} (stage {name})" for client, reason in answers.lost.items()})
    payloads = {}
    for client, content in answers.contents.items():
        try:
            payloads[client] = wire.unpack_stage(content)[1]
        except WireError as error:
            lost[client] = f"client {client} sent what cannot be used (stage {name}): {error}"
    return payloads
