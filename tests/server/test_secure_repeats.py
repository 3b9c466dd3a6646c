"""A server that asks again, in other words, for what it had: clients answer a round once, and only as their own world has it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
from flwr.app import RecordDict
from torch import nn

from clients.secure import RING, secagg_reply
from defenses.channel._secagg import graph
from defenses.channel._secagg.keyring import KeyRing, unpack_advert
from defenses.channel._secagg.messages import pack_fields
from defenses.channel._secagg.parameters import Parameters
from defenses.channel._secagg.server import SecAggServer
from defenses.channel.secure_aggregation import SecureAggregation
from simulator import wire
from simulator.errors import ProtocolAbort
from simulator.network import network, tensors
from simulator.types import Broadcast
from tests.federations import world

N = 4
SETUPS: dict[str, dict[str, Any]] = {"each round": {}, "active": {"active": True}, "once": {"setup": "once"}}


class Play:
    """All clients' replies and states, asked by a server without Flower."""

    def __init__(self, clients: int = N, rounds: int = 3, cohort: int = N, **settings: Any) -> None:
        self.world = world(
            model={"name": "linear"}, federation={"clients": clients, "rounds": rounds, "cohort": cohort},
            defenses=[{"name": "secure_aggregation", **settings}],
        )  # fmt: skip
        self.model: nn.Module = network(self.world.model, self.world.data.load().schema, self.world.training, self.world.seed)
        self.states = {client: RecordDict() for client in range(clients)}
        self.adverts: dict[int, bytes] = {}

    @property
    def channel(self) -> SecureAggregation:
        assert isinstance(self.world.channel, SecureAggregation)
        return self.world.channel

    def ask(self, stage: str, sent: Mapping[int, bytes], round: int = 0) -> dict[int, bytes]:
        broadcast = Broadcast(round, *tensors(self.model), self.world.training) if round else None
        return {
            client: wire.unpack_stage(
                secagg_reply(self.world, self.model, client, wire.pack_stage(stage, payload, broadcast), self.states[client])
            )[1]
            for client, payload in sent.items()
        }

    def parameters(self, round: int, clients: Sequence[int] = range(N)) -> Parameters:
        return self.channel.parameters(
            run_id=os.urandom(4).hex(), round=round, rounds=self.world.federation.rounds, clients=clients, seed=os.urandom(32),
            max_examples=self.channel.largest_upload(self.world), template=dict(self.model.named_parameters()), buffers=dict(self.model.named_buffers()),
        )  # fmt: skip

    def start(self, parameters: Parameters) -> tuple[SecAggServer, dict[int, bytes]]:
        """The server and the clients' shares."""
        server = SecAggServer(parameters)
        if not parameters.standing:
            adverts = self.ask("advertise", dict.fromkeys(parameters.clients, parameters.to_bytes()))
            return server, self.ask("share", server.receive_advertise(adverts))
        for client in parameters.clients:
            if client not in self.adverts:
                self.adverts[client] = unpack_advert(self.ask("advertise", {client: b""})[client], client)
        rosters = server.use_keys({client: self.adverts[client] for client in parameters.clients})
        return server, self.ask("share", {client: pack_fields(parameters.to_bytes(), roster) for client, roster in rosters.items()})

    def play(self, parameters: Parameters, model_of: int = 0) -> int:
        """One aggregation; how many numbers its sum has."""
        server, shares = self.start(parameters)
        survivors = server.receive_mask(self.ask("mask", server.receive_share(shares), model_of or parameters.round))
        if parameters.active:
            survivors = server.receive_sign(self.ask("sign", survivors))
        return len(server.receive_unmask(self.ask("unmask", survivors))[0])


@pytest.mark.parametrize("settings", SETUPS.values(), ids=SETUPS)
def test_a_round_is_summed_once(settings: dict[str, Any]) -> None:
    """Round 1 over clients 0 to 3, then over 0 to 2 and 4: the difference would be that of two clients, and with one more sum one's."""
    play = Play(clients=5, **settings)
    play.play(play.parameters(1))
    for again in (play.parameters(1), play.parameters(1, (0, 1, 2, 4))):
        with pytest.raises(ProtocolAbort, match="left secure aggregation"):
            play.play(again)
    assert play.play(play.parameters(2, (0, 1, 2, 4)))
    with pytest.raises(ProtocolAbort, match="left secure aggregation"):
        play.play(play.parameters(1, (1, 2, 3, 4)))  # client 3 did not answer round 2, but 1


def test_a_client_that_is_made_to_forget_its_keys_remembers_the_round() -> None:
    play = Play(setup="once")
    play.play(play.parameters(1))
    play.adverts.clear()  # asked to advertise again, it makes a new ring
    with pytest.raises(ProtocolAbort, match="left secure aggregation"):
        play.play(play.parameters(1))
    play.play(play.parameters(2))


@pytest.mark.parametrize("settings", SETUPS.values(), ids=SETUPS)
def test_the_model_is_of_the_round_that_the_keys_are_for(settings: dict[str, Any]) -> None:
    play = Play(**settings)
    with pytest.raises(ProtocolAbort, match="left secure aggregation"):
        play.play(play.parameters(2), model_of=1)
    assert play.play(play.parameters(3))


@pytest.mark.parametrize("settings", SETUPS.values(), ids=SETUPS)
def test_a_round_that_broke_before_anything_was_sent_may_be_tried_again(settings: dict[str, Any]) -> None:
    play = Play(**settings)
    play.start(play.parameters(1))
    if play.channel.setup == "each round":
        assert play.play(play.parameters(1))
    assert play.play(play.parameters(2))


@pytest.mark.parametrize("mode", ["quantized", "plain"])
def test_the_trusted_party_too_gets_a_round_once(mode: str) -> None:
    play = Play(mode=mode)

    def asked(round: int) -> None:
        broadcast = Broadcast(round, *tensors(play.model), play.world.training)
        secagg_reply(play.world, play.model, 0, wire.pack_stage(mode, b"", broadcast), play.states[0])

    asked(1)
    asked(2)
    for round in (1, 2, 4):
        with pytest.raises(ProtocolAbort, match="left secure aggregation"):
            asked(round)


@pytest.mark.parametrize(
    ("cohort", "settings"), [*((N, settings) for settings in SETUPS.values()), (70, {"graph": "k-regular"})], ids=[*SETUPS, "k-regular"]
)
@pytest.mark.parametrize(
    ("round", "clients"),
    [
        (4, range), (0, range), (1, lambda n: (*range(n - 1), n + 1)), (1, lambda n: range(n - 1)), (1, lambda n: range(n + 1)),
        (1, lambda n: range(5000)),
    ],
    ids=["a round too late", "no round", "a stranger", "few", "many", "very many"],
)  # fmt: skip
def test_clients_and_rounds_are_those_of_the_world(
    round: int, clients: Callable[[int], Sequence[int]], cohort: int, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    play = Play(clients=cohort + 1, cohort=cohort, **settings)
    parameters, solved = play.parameters(round, clients(cohort)), []
    for name in ("solve", "certify"):
        planning = getattr(graph, name)
        monkeypatch.setattr(graph, name, lambda *sizes, planning=planning, **more: (solved.append(sizes), planning(*sizes, **more))[-1])
    payload, stage = parameters.to_bytes(), "advertise"
    if parameters.standing:
        play.ask("advertise", {0: b""})
        payload, stage = pack_fields(payload, b""), "share"
    with pytest.raises(ProtocolAbort, match="left secure aggregation"):
        play.ask(stage, {0: payload})
    planned = {clients for clients, *_ in solved}
    assert planned == ({cohort} if round != 1 else set()), "nobody plans a graph for as many as a server names"


def test_a_server_that_goes_on_making_up_peers_does_not_fill_a_clients_state() -> None:
    play = Play(clients=5, rounds=40, setup="once")
    sizes = []
    for round in range(1, 31):
        for client in (1, 2, 3):  # new peers in each round, as far as client 0 can tell
            play.adverts.pop(client, None)
        play.play(play.parameters(round))
        sizes.append(len(bytes(play.states[0].config_records[RING]["ring"])))  # type: ignore[arg-type]
    ring = KeyRing.from_bytes(bytes(play.states[0].config_records[RING]["ring"]))  # type: ignore[arg-type]
    assert len(ring.mask_secrets) <= 2 * 5 + N
    assert max(sizes) < 3000
