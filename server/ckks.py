"""The server's side of homomorphic aggregation over Flower messages: relays keys that it cannot read, adds ciphertexts."""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from defenses.channel import _frames
from defenses.channel._ckks import handover
from defenses.channel._ckks.cipher import CONTEXT_BYTES, Cipher, generate
from defenses.channel._vectors import Reals, largest_upload
from defenses.channel.ckks import CKKSAggregation
from server.ask import ask, payloads
from server.curious import CuriousGrid
from simulator import wire
from simulator.errors import FederationError, ProtocolAbort
from simulator.types import Broadcast, Upload
from simulator.world import World

Lost = dict[int, str]


@dataclass
class Keys:
    """What the server has of the run's keys.

    Attributes:
        cipher: the public context.
        holders: the clients that hold the secret key.
        secret: the secret context, where someone gave it away; else None.
        lost: the clients that failed during the set-up.
    """

    cipher: Cipher
    holders: frozenset[int]
    secret: Cipher | None
    lost: Lost = field(default_factory=dict)


@contextmanager
def ckks_channel() -> Iterator[Any]:
    """Collects by homomorphic aggregation; the keys live as long as the channel."""
    made: list[Keys] = []

    def collect(
        grid: CuriousGrid, world: World, nodes: Mapping[int, int], clients: Sequence[int], broadcast: Broadcast
    ) -> tuple[list[Upload], Lost]:
        """One round: the one upload that the server learns, and who was lost at which stage and why."""
        lost: Lost = {}
        try:
            if not made:
                made.append(set_up(grid, world, nodes, broadcast.round))
            lost |= {client: reason for client, reason in made[0].lost.items() if client in clients}
            return [aggregate(grid, world, nodes, clients, broadcast, made[0], lost)], lost
        except ProtocolAbort as error:
            for client, reason in sorted(lost.items()):
                grid.record_lost(broadcast.round, client, reason)
            raise FederationError(f"ckks_aggregation stopped in round {broadcast.round}: {error} {' '.join(lost.values())}") from error

    yield collect


def set_up(grid: CuriousGrid, world: World, nodes: Mapping[int, int], round: int) -> Keys:
    """Let a client make the keys and hand the secret one to all others.

    Raises:
        ProtocolAbort: fewer than two clients hold it in the end.
    """
    channel, run = _channel(world), secrets.token_bytes(16)
    lost: Lost = {}

    def stage(name: str, asked: Mapping[int, bytes]) -> dict[int, bytes]:
        contents = {client: wire.pack_stage(name, payload) for client, payload in asked.items()}
        return payloads(ask(grid, nodes, wire.CHANNEL, contents, round=round, timeout=world.federation.timeout_seconds), name, lost)

    roster = dict[int, bytes]()
    for client, key in stage("advertise", dict.fromkeys(nodes, run)).items():
        if (reason := handover.why_unusable(client, key, set(roster.values()))) is None:
            roster[client] = key
        else:
            lost[client] = f"client {client} sent what cannot be used (stage advertise): {reason}"
    cipher, secret, holders = None, b"", frozenset[int]()
    if channel.secret_key == "server":
        private, own_key = handover.key_pair()
        public, secret = generate(channel.scheme)
        sealed = {c: handover.seal(secret, private=private, peer=key, run=run, public_context=public) for c, key in roster.items()}
        cipher = Cipher(channel.scheme, public)
        holders = frozenset(stage("hold", {c: _frames.pack([own_key, public, envelope]) for c, envelope in sealed.items()}))
    while channel.secret_key != "server" and len(holders) < 2 <= len(roster):
        maker = min(roster)
        answer = stage("make", {maker: handover.pack_roster(roster)})
        maker_key = roster.pop(maker)  # makes keys once; if others cannot use them, the next one makes other ones
        try:
            if maker not in answer:
                continue
            cipher, public, envelopes = _made(channel, answer[maker], roster, maker)
            before = dict(lost)
            held = stage("hold", {client: _frames.pack([maker_key, public, envelope]) for client, envelope in envelopes.items()})
            if not held:
                lost = before  # not all of them are broken: it is what they got
                raise ProtocolAbort(f"keys must be taken by ≥ 1 of clients {sorted(roster)}, got none that could use them. Leave it out.")
            holders = frozenset(held) | {maker}
        except ProtocolAbort as error:
            lost[maker] = f"client {maker} sent what cannot be used (stage make): {error}"
    if cipher is None or len(holders) < 2:
        raise ProtocolAbort(f"clients with keys must be ≥ 2, got {sorted(holders)}. {' '.join(lost.values())}")
    if channel.secret_key == "colluder":
        told = stage("collude", {min(holders): b""})
        if len(told) != 1:
            raise ProtocolAbort(f"the colluding client must answer, got nothing from client {min(holders)}. Run it again.")
        (secret,) = told.values()
    return Keys(cipher, holders, Cipher(channel.scheme, secret) if secret else None, lost)


def _made(channel: CKKSAggregation, answer: bytes, roster: Collection[int], maker: int) -> tuple[Cipher, bytes, dict[int, bytes]]:
    """The public context that a client made, as it is and as bytes, and the envelopes for the others.

    Raises:
        ProtocolAbort: it is of another scheme, cannot encrypt, or holds what would let the server decrypt.
    """
    public, *sealed = _frames.unpack(answer, count=1 + len(roster), largest=CONTEXT_BYTES, origin=f"client {maker}")
    cipher = Cipher(channel.scheme, public)
    if cipher.holds_secret_key or not cipher.holds_public_key:
        raise ProtocolAbort("public context must hold the public key and not the secret one, got another. Refuse these keys.")
    return cipher, public, dict(zip(sorted(roster), sealed, strict=True))


def aggregate(
    grid: CuriousGrid, world: World, nodes: Mapping[int, int], clients: Sequence[int], broadcast: Broadcast, keys: Keys, lost: Lost
) -> Upload:
    """Collect ciphertexts, add them up, and let a client decrypt the sum.

    Raises:
        ProtocolAbort: fewer than two ciphertexts, or nobody decrypts.
    """
    channel, timeout, round = _channel(world), world.federation.timeout_seconds, broadcast.round
    numbers = channel.length(broadcast.parameters, broadcast.buffers)
    contents = {client: wire.pack_stage("encrypt", b"", broadcast) for client in clients if client in keys.holders}
    answers = payloads(ask(grid, nodes, wire.CHANNEL, contents, round=round, timeout=timeout), "encrypt", lost)
    vectors = {}
    for client, data in answers.items():
        try:
            vectors[client] = keys.cipher.load(data, numbers, origin=f"client {client}")
        except ProtocolAbort as error:
            lost[client] = f"client {client} sent what cannot be used (stage encrypt): {error}"
    if len(vectors) < 2:
        raise ProtocolAbort(f"ciphertexts must be of ≥ 2 clients, got {sorted(vectors)}. A sum over one would show its upload.")
    total = keys.cipher.total(list(vectors.values()))
    upload = _decrypted(grid, world, nodes, broadcast, total, frozenset(vectors), numbers, lost)
    if keys.secret is None:
        grid.record_aggregate(upload)
        return upload
    for client in vectors:  # what the server has beside the sum: each upload by itself
        own = keys.secret.decrypt(answers[client], numbers, origin=f"client {client}")
        grid.record_aggregate(_decoded(world, broadcast, own, frozenset({client})))
    return upload


def _decrypted(
    grid: CuriousGrid, world: World, nodes: Mapping[int, int], broadcast: Broadcast, total: bytes, senders: frozenset[int], numbers: int,
    lost: Lost,
) -> Upload:  # fmt: skip
    """The upload in the sum as the first client tells it that can, and whose numbers can be one.

    Raises:
        ProtocolAbort: nobody tells such a one; what several tell alike is then in the sum, and no fault of theirs.
    """
    told: dict[bytes, list[int]] = {}
    for client in sorted(senders):
        contents = {client: wire.pack_stage("decrypt", total, round=broadcast.round)}
        answers = ask(grid, nodes, wire.CHANNEL, contents, round=broadcast.round, timeout=world.federation.timeout_seconds)
        answer = payloads(answers, "decrypt", lost).get(client)
        if answer is None:
            continue
        try:
            if len(answer) != 8 * numbers:
                raise ProtocolAbort(f"decrypted sum must be {numbers} numbers of 8 bytes, got {len(answer)} bytes. Ask the next client.")
            told.setdefault(answer, []).append(client)
            return _decoded(world, broadcast, np.frombuffer(answer, "<f8").astype(np.float64), senders)
        except ProtocolAbort as error:
            lost[client] = f"client {client} sent what cannot be used (stage decrypt): {error}"
    alike = max(told.values(), key=len, default=[])
    if len(alike) > 1:
        reasons = [lost.pop(client) for client in alike]
        raise ProtocolAbort(
            f"ciphertexts must be of updates, got a sum that clients {alike} tell alike and that is none ({reasons[0]}) One of "
            f"{sorted(senders)} encrypted something else; which one, nobody can tell."
        )
    raise ProtocolAbort("the sum must be decrypted by one of its senders, got none that did.")


def _decoded(world: World, broadcast: Broadcast, total: Reals, senders: frozenset[int]) -> Upload:
    return _channel(world).decode(
        total, kind="delta" if broadcast.training.algorithm == "fedavg" else "gradient", parameters=broadcast.parameters,
        buffers=broadcast.buffers, senders=senders, max_examples=largest_upload(world),
    )  # fmt: skip


def _channel(world: World) -> CKKSAggregation:
    assert isinstance(world.channel, CKKSAggregation)
    return world.channel
