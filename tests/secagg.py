"""Rehearsals of secure aggregation without Flower: all parties in one process, with what crosses between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from hypothesis import strategies as st

from defenses.channel._secagg import identity
from defenses.channel._secagg.client import SecAggClient
from defenses.channel._secagg.keyring import KeyRing, unpack_advert
from defenses.channel._secagg.masking import Words, word_type
from defenses.channel._secagg.parameters import Parameters
from defenses.channel._secagg.server import SecAggServer

STAGES = ("advertise", "share", "mask", "unmask")


@dataclass
class Rehearsal:
    """One aggregation with everything that crossed the wire."""

    total: Words
    senders: frozenset[int]
    sent: dict[str, dict[int, bytes]] = field(default_factory=dict)
    received: dict[str, dict[int, bytes]] = field(default_factory=dict)


def make_parameters(n: int, length: int = 8, *, threshold: int = 0, bits: int = 32, run_id: str = "test", **more: Any) -> Parameters:
    clients = tuple(7 * i + 3 for i in range(n))
    return Parameters(
        run_id=run_id, clients=clients, threshold=threshold or 2 * n // 3 + 1, length=length, bits=bits, **{"round": 1, **more}
    )


def random_vectors(parameters: Parameters, seed: int = 0) -> dict[int, Words]:
    draw, word = np.random.default_rng(seed), word_type(parameters.bits)
    high = (1 << parameters.bits) - 1
    return {client: draw.integers(0, high, parameters.length, dtype=word, endpoint=True) for client in parameters.clients}


def people_of(parameters: Parameters) -> dict[int, identity.Identity]:
    """Everybody's identity, where the parameters ask for one."""
    private = {client: identity.derived_private(b"test", client) for client in parameters.clients if parameters.active}
    directory = {client: identity.public_of(key) for client, key in private.items()}
    return {client: identity.Identity(key, directory) for client, key in private.items()}


def stages_of(parameters: Parameters) -> list[str]:
    """What the parties go through."""
    return [*(() if parameters.standing else ("advertise",)), "share", "mask", *(("sign",) if parameters.active else ()), "unmask"]


def start(
    parameters: Parameters, rings: Mapping[int, KeyRing] | None = None
) -> tuple[SecAggServer, dict[int, SecAggClient], dict[int, bytes]]:
    """All parties before their first stage, and what the server sends for it."""
    server, people = SecAggServer(parameters), people_of(parameters)
    rings = rings or ({client: KeyRing.fresh() for client in parameters.clients} if parameters.standing else {})
    parties = {
        client: SecAggClient(parameters, client, identity=people.get(client), ring=rings.get(client)) for client in parameters.clients
    }
    inbox = dict.fromkeys(parameters.clients, b"")
    if parameters.standing:
        inbox = server.use_keys({client: unpack_advert(rings[client].advertise(), client) for client in parameters.clients})
    return server, parties, inbox


def rehearse(
    parameters: Parameters,
    vectors: Mapping[int, Words],
    *,
    lost: Mapping[str, set[int]] | None = None,
    restart: bool = False,
    tamper: Callable[[str, int, bytes], bytes] = lambda stage, client, message: message,
    rings: Mapping[int, KeyRing] | None = None,
) -> Rehearsal:
    """Run all stages; ``lost`` names who drops out before a stage, ``restart`` saves and restores every client between stages."""
    server, saved, inbox = start(parameters, rings)
    log, stages = Rehearsal(np.zeros(0, np.uint32), frozenset()), stages_of(parameters)
    for stage in stages:
        replies = {}
        for client in sorted(set(inbox) - (lost or {}).get(stage, set())):
            party = saved[client]
            if restart:
                party = SecAggClient.from_bytes(party.to_bytes(), identity=party.identity)
            message = tamper(stage, client, inbox[client])
            arguments = () if stage == "advertise" else (message, vectors[client]) if stage == "mask" else (message,)
            replies[client] = getattr(party, stage)(*arguments)
            saved[client] = party
        log.sent[stage] = replies
        outcome = getattr(server, f"receive_{stage}")(replies)
        if stage == "unmask":
            log.total, log.senders = outcome
        else:
            inbox = log.received[stages[stages.index(stage) + 1]] = outcome
    return log


def up_to(stage: str, parameters: Parameters, vectors: Mapping[int, Words]) -> tuple[dict[int, SecAggClient], dict[int, bytes]]:
    """All clients about to enter ``stage``, with what the server sent them for it."""
    server, parties, inbox = start(parameters)
    stages = stages_of(parameters)
    for done in stages[: stages.index(stage)]:
        arguments = {client: () if done == "advertise" else (inbox[client],) for client in parties}
        if done == "mask":
            arguments = {client: (inbox[client], vectors[client]) for client in parties}
        inbox = getattr(server, f"receive_{done}")({client: getattr(party, done)(*arguments[client]) for client, party in parties.items()})
    return parties, inbox


def expected_sum(vectors: Mapping[int, Words], senders: frozenset[int], bits: int) -> list[int]:
    """The sum in Python's integers, which share no code with numpy's wrap-around."""
    return [sum(int(vectors[client][i]) for client in senders) % (1 << bits) for i in range(len(next(iter(vectors.values()))))]


def chi_squared(data: bytes) -> float:
    """Pearson's statistic of the bytes against uniformity: mean 255, standard deviation 22.6."""
    counts = np.bincount(np.frombuffer(data, np.uint8), minlength=256)
    return float(((counts - len(data) / 256) ** 2).sum() / (len(data) / 256))


@st.composite
def drop_outs(draw: st.DrawFn, parameters: Parameters, most: int) -> dict[str, set[int]]:
    """Clients that drop out before each stage, ``most`` in all."""
    order = draw(st.permutations(parameters.clients))
    cuts = sorted(draw(st.lists(st.integers(0, most), min_size=len(STAGES), max_size=len(STAGES))))
    return {stage: set(order[start:stop]) for stage, start, stop in zip(STAGES, [0, *cuts], cuts, strict=False)}


def assert_exact_sum(parameters: Parameters, lost: Mapping[str, set[int]], seed: int) -> tuple[dict[int, Words], Rehearsal]:
    """Rehearse with random vectors; who drops out before unmasking has sent its vector, and counts."""
    vectors = random_vectors(parameters, seed)
    result = rehearse(parameters, vectors, lost=lost, restart=bool(seed % 2))
    senders = frozenset(parameters.clients).difference(*(lost.get(stage, set()) for stage in ("advertise", "share", "mask")))
    assert result.senders == senders
    assert result.total.tolist() == expected_sum(vectors, senders, parameters.bits)
    return vectors, result
