"""The server's side of secure aggregation over Flower messages: stages, and clients may leave at each of them."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
from flwr.app import RecordDict
from flwr.serverapp import Grid

from defenses.channel._secagg import graph, identity, keyring
from defenses.channel._secagg.encoding import ideal_sum
from defenses.channel._secagg.masking import unpack
from defenses.channel._secagg.messages import pack_fields
from defenses.channel._secagg.parameters import Parameters
from defenses.channel._secagg.server import SecAggServer, halves
from defenses.channel.secure_aggregation import SecureAggregation
from server.ask import ask, payloads
from server.curious import CuriousGrid
from simulator import wire
from simulator.aggregate import mean_update
from simulator.errors import FederationError, ProtocolAbort, WireError
from simulator.network import floating
from simulator.types import Broadcast, Tensors, Upload
from simulator.world import World


@contextmanager
def secure_channel() -> Iterator[Any]:
    """Secure aggregation for a whole run: keys that outlive a round are remembered from one to the next."""
    yield partial(collect_aggregate, advertised={})


def collect_aggregate(
    grid: CuriousGrid, world: World, nodes: Mapping[int, int], clients: Sequence[int], broadcast: Broadcast, *,
    advertised: dict[int, bytes],
) -> tuple[list[Upload], dict[int, str]]:  # fmt: skip
    """Run the channel over the cohort; return the one upload that the server learns, and who left at which stage and why.

    Args:
        grid: the tap.
        world: whose channel it is.
        nodes: Flower's node id of each client.
        clients: the cohort.
        broadcast: of this round.
        advertised: keys that outlive a round, by client; changed in place.

    Raises:
        FederationError: fewer clients than needed went through a stage.
    """
    channel = world.channel
    assert isinstance(channel, SecureAggregation)
    lost: dict[int, str] = {}
    try:
        if channel.mode == "plain":
            upload = _plain_mean(grid, world, channel, nodes, clients, broadcast, lost)
        else:
            if channel.mode == "protocol":
                total, senders = _by_protocol(grid, world, channel, nodes, clients, broadcast, lost, advertised)
            else:
                total, senders = _by_trusted_party(grid, world, channel, nodes, clients, broadcast, lost)
            upload = channel.decode(
                total, kind="delta" if broadcast.training.algorithm == "fedavg" else "gradient", template=broadcast.parameters,
                buffer_template=broadcast.buffers, senders=senders, cohort=len(clients), max_examples=channel.largest_upload(world),
                noisy=channel.noised(world), limit=channel.range_for(world, _floats(broadcast.parameters)),
                rotation=channel.rotation_for(world, broadcast.round),
            )  # fmt: skip
    except ProtocolAbort as error:
        for client, reason in sorted(lost.items()):
            grid.record_lost(broadcast.round, client, reason)
        raise FederationError(f"secure aggregation stopped in round {broadcast.round}: {error} {' '.join(lost.values())}") from error
    grid.record_aggregate(upload)
    return [upload], lost


def _by_protocol(
    grid: CuriousGrid, world: World, channel: SecureAggregation, nodes: Mapping[int, int], clients: Sequence[int],
    broadcast: Broadcast, lost: dict[int, str], advertised: dict[int, bytes],
) -> tuple[np.ndarray, frozenset[int]]:  # fmt: skip
    """The real thing: every stage is a message to each client that is still there."""
    parameters = channel.parameters(
        run_id=secrets.token_hex(16), round=broadcast.round, rounds=world.federation.rounds, clients=clients,
        max_examples=channel.largest_upload(world), template=broadcast.parameters, buffers=broadcast.buffers,
        seed=secrets.token_bytes(graph.SEED_BYTES),
    )  # fmt: skip
    directory = identity.directory(world, channel.identities) if channel.active else {}
    server, plan = SecAggServer(parameters, directory), str(channel.plan_for(len(clients), world.federation.rounds))

    def stage(name: str, sent: Mapping[int, bytes]) -> dict[int, bytes]:
        model = broadcast if name == "mask" else None
        facts = {"graph": plan} if name in ("advertise", "share") else {}  # in the transcript: what is certified of this round
        contents = {client: wire.pack_stage(name, payload, model, **facts) for client, payload in sent.items()}
        answers = _answers(grid, world, nodes, contents, broadcast.round, lost, name)
        if name == "advertise" and parameters.standing:
            return answers  # not for this round in particular
        usable, bad = server.usable(answers)
        lost.update(_unusable(bad, name))
        return usable

    if parameters.standing:
        rosters = _standing_keys(parameters, server, stage, advertised, lost)
    else:
        rosters = server.receive_advertise(stage("advertise", {client: parameters.to_bytes() for client in clients}))
    shares = stage("share", rosters)
    for client in rosters.keys() - shares.keys():  # perhaps it lost its keys: ask for new ones the next time
        advertised.pop(client, None)
    masked = stage("mask", server.receive_share(shares))
    survivors = server.receive_mask(masked)
    if parameters.active:
        survivors = server.receive_sign(stage("sign", survivors))
    return server.receive_unmask(stage("unmask", survivors))


def _unusable(bad: Mapping[int, str], stage: str) -> dict[int, str]:
    return {client: f"client {client} sent what cannot be used (stage {stage}): {reason}" for client, reason in bad.items()}


def _standing_keys(
    parameters: Parameters, server: SecAggServer, stage: Any, advertised: dict[int, bytes], lost: dict[int, str]
) -> dict[int, bytes]:
    """Ask those for keys who have not advertised in an earlier round; what to send for the next stage: parameters and roster."""
    unknown = [client for client in parameters.clients if client not in advertised]
    if unknown:
        for client, message in stage("advertise", dict.fromkeys(unknown, b"")).items():
            try:
                row = keyring.unpack_advert(message, client)
                server.check_keys(client, row, set[bytes]().union(*map(halves, advertised.values())))
            except ProtocolAbort as error:
                lost.update(_unusable({client: str(error)}, "advertise"))
            else:
                advertised[client] = row
    rosters = server.use_keys({client: advertised[client] for client in parameters.clients if client in advertised})
    return {client: pack_fields(parameters.to_bytes(), roster) for client, roster in rosters.items()}


def _by_trusted_party(
    grid: CuriousGrid, world: World, channel: SecureAggregation, nodes: Mapping[int, int], clients: Sequence[int],
    broadcast: Broadcast, lost: dict[int, str],
) -> tuple[np.ndarray, frozenset[int]]:  # fmt: skip
    """The ideal functionality: a trusted party beneath the tap adds the vectors up, and the server is told the sum."""
    grid.record_broadcast(broadcast)
    contents = {client: wire.pack_stage("quantized", b"", broadcast) for client in clients}
    grid.download_bytes += sum(map(wire.bytes_of, contents.values()))  # what passes beneath the tap costs all the same
    answers = _answers(grid.trusted_party, world, nodes, contents, broadcast.round, lost, "quantized")
    length = _floats(broadcast.parameters) + _floats(broadcast.buffers) + 1
    bits, vectors = channel.bits_for(len(clients), channel.largest_upload(world)), {}
    for client, data in answers.items():
        try:
            vectors[client] = unpack(data, length, bits)
        except ProtocolAbort as error:
            lost.update(_unusable({client: str(error)}, "quantized"))
    _check_quorum(world, channel, len(vectors), len(clients))
    grid.upload_bytes += sum(len(answers[client]) for client in vectors)
    return ideal_sum(vectors, bits), frozenset(vectors)


def _plain_mean(
    grid: CuriousGrid, world: World, channel: SecureAggregation, nodes: Mapping[int, int], clients: Sequence[int],
    broadcast: Broadcast, lost: dict[int, str],
) -> Upload:  # fmt: skip
    """The mean of what clients would upload in the clear, over a trusted party beneath the tap: averaging and nothing else."""
    grid.record_broadcast(broadcast)
    contents = {client: wire.pack_stage("plain", b"", broadcast) for client in clients}
    grid.download_bytes += sum(map(wire.bytes_of, contents.values()))
    answers = ask(grid.trusted_party, nodes, wire.CHANNEL, contents, round=broadcast.round, timeout=world.federation.timeout_seconds)
    lost.update({client: f"{reason} (stage plain)" for client, reason in answers.lost.items()})
    uploads = []
    for client, content in answers.contents.items():
        try:
            uploads.append(wire.unpack_upload(content, client, broadcast))
        except WireError as error:
            lost[client] = f"client {client} sent what cannot be used (stage plain): {error}"
    _check_quorum(world, channel, len(uploads), len(clients))
    update, buffers = mean_update(uploads)
    tensors = [tensor for upload in uploads for part in (upload.update.tensors, upload.buffers) for tensor in part.values()]
    grid.upload_bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return Upload(frozenset().union(*(u.senders for u in uploads)), update, buffers, sum(u.num_examples for u in uploads))


def _floats(tensors: Tensors) -> int:
    """How many numbers of them are summed."""
    return sum(tensor.numel() for tensor in floating(tensors).values())


def _check_quorum(world: World, channel: SecureAggregation, senders: int, cohort: int) -> None:
    if senders < (least := channel.quorum_for(cohort, world.federation.rounds)):
        raise ProtocolAbort(f"senders must be ≥ {least}, got {senders}.")


def _answers(
    grid: Grid, world: World, nodes: Mapping[int, int], contents: Mapping[int, RecordDict], round: int, lost: dict[int, str], name: str
) -> dict[int, bytes]:
    """The payloads that came back, by client; who did not answer is lost at this stage."""
    answers = ask(grid, nodes, wire.CHANNEL, contents, round=round, timeout=world.federation.timeout_seconds)
    return payloads(answers, name, lost)
