"""Secure aggregation over Flower messages: k-regular graph, active server, keys that outlive a round, and what each arm shows."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from flwr.app import RecordDict

from clients.local import local_upload
from clients.secure import private_vector, secagg_reply
from defenses.channel._secagg import identity, messages
from defenses.channel._secagg.encoding import ideal_sum
from defenses.channel._secagg.messages import Kind
from defenses.channel._secagg.parameters import Parameters
from defenses.channel._secagg.server import SecAggServer
from experiments.rounding import rounding_error
from simulator import wire
from simulator.aggregate import mean_update
from simulator.errors import FederationError, ProtocolAbort
from simulator.network import network, tensors
from simulator.transcript import LINES, Record
from simulator.types import Broadcast, Observation, Upload
from simulator.world import World
from tests.federations import federate, misbehaving, world

MANY = {"clients": 66, "rounds": 1}
"""Above 64, where the small-cohort guard ends: 46 neighbors, t = 24, and 3 of 66 may drop out."""


def secure(clients: int = 6, rounds: int = 1, **settings) -> World:
    more = {"model": {"name": "linear"}} if clients > 6 else {}
    return world(federation={"clients": clients, "rounds": rounds}, defenses=[{"name": "secure_aggregation", **settings}], **more)


def leaving(where: dict[str, set[int]]):
    """The client app, from which some clients are gone when they are asked for a stage."""

    def act(client, request, answer):
        if client in where.get(wire.unpack_stage(request.content)[0], ()):
            raise RuntimeError("gone")
        return answer()

    return misbehaving(act)


def uploads_of(of: World, observation: Observation) -> list[Upload]:
    model = network(of.model, of.data.load().schema, of.training, of.seed)
    return [local_upload(of, model, observation.broadcast, client) for client in sorted(observation.upload.senders)]


def assert_mean(of: World, observation: Observation, tolerance: float = 1e-6) -> None:
    update, _ = mean_update(uploads_of(of, observation))
    for name, got in observation.upload.update.tensors.items():
        torch.testing.assert_close(got, update.tensors[name], atol=tolerance, rtol=0)


def assert_exact(of: World, observation: Observation) -> None:
    """The very bits of the sum over the survivors' words, computed without the protocol."""
    model, cohort = network(of.model, of.data.load().schema, of.training, of.seed), of.federation.cohort_size
    senders, sent = observation.upload.senders, observation.broadcast
    words = {client: private_vector(of, model, client, sent, of.channel, cohort) for client in senders}
    wanted = of.channel.decode(
        ideal_sum(words, of.channel.bits_for(cohort, of.channel.largest_upload(of))), kind="gradient", template=sent.parameters,
        buffer_template=sent.buffers, senders=senders, cohort=cohort, max_examples=of.channel.largest_upload(of),
    )  # fmt: skip
    assert observation.upload.num_examples == wanted.num_examples
    assert all(torch.equal(observation.upload.update.tensors[name], tensor) for name, tensor in wanted.update.tensors.items())


def broadcast_of(of: World, model: torch.nn.Module) -> Broadcast:
    return Broadcast(1, *tensors(model), of.training)


def events(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / LINES).read_text().splitlines()]


def stages(directory: Path) -> Counter:
    return Counter(event["stage"]["stage"] for event in events(directory) if event["kind"] == "sent" and "stage" in event)


# --- the k-regular graph ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "senders"), [("advertise", 65), ("share", 65), ("mask", 65), ("unmask", 66)])
def test_client_may_leave_at_every_stage_of_a_k_regular_graph(stage: str, senders: int, tmp_path: Path) -> None:
    of = secure(66, graph="k-regular")
    record = federate(of, tmp_path / "t", leaving({stage: {11}}))
    assert record.end["status"] == "degraded"
    assert [client for _, client, _ in record.lost] == [11]
    assert len(record.observations[0].upload.senders) == senders
    assert_mean(of, record.observations[0])


@pytest.mark.slow
def test_clients_leave_at_all_stages_of_one_round_and_the_transcript_names_the_certificate(tmp_path: Path) -> None:
    of = secure(66, graph="k-regular")
    record = federate(of, tmp_path / "t", leaving({"advertise": {1}, "share": {2}, "mask": {3}, "unmask": {4, 5, 6, 7, 8}}))
    assert record.observations[0].upload.senders == frozenset(range(66)) - {1, 2, 3}
    assert_mean(of, record.observations[0])
    assert_exact(of, record.observations[0])
    facts = {event["stage"]["graph"] for event in events(tmp_path / "t") if event.get("stage", {}).get("graph")}
    assert facts == {"46-regular graph of 66, t = 24: security 41.0 bits with 13 colluding, correctness certain with 3 dropped out, in one round"}


def test_more_drop_outs_than_certified_stop_the_run(tmp_path: Path) -> None:
    with pytest.raises(FederationError, match=r"stopped in round 1: .*quorum = 63 of 66 clients, got 62"):
        federate(secure(66, graph="k-regular"), tmp_path / "t", leaving({"advertise": {1}, "share": {2}, "mask": {3, 4}}))


def test_client_refuses_a_graph_that_is_not_certified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that asks for fewer neighbors than the clients' own world implies."""
    original = wire.pack_stage

    def thinned(stage, payload, broadcast=None, **facts):
        if stage == "advertise" and facts:
            payload = replace(Parameters.from_bytes(payload), degree=8, threshold=5).to_bytes()
        return original(stage, payload, broadcast, **facts)

    monkeypatch.setattr(wire, "pack_stage", thinned)
    with pytest.raises(FederationError, match=r"stopped in round 1: key advertisements .*got 0"):
        federate(secure(66, graph="k-regular"), tmp_path / "t")


# --- an active server ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stage", "senders"), [("advertise", 5), ("share", 5), ("mask", 5), ("sign", 6), ("unmask", 6)])
def test_client_may_leave_at_every_stage_against_an_active_server(stage: str, senders: int, tmp_path: Path) -> None:
    of = secure(active=True)
    record = federate(of, tmp_path / "t", leaving({stage: {4}}))
    assert len(record.observations[0].upload.senders) == senders
    assert_mean(of, record.observations[0])
    assert_exact(of, record.observations[0])
    assert set(stages(tmp_path / "t")) == {"advertise", "share", "mask", "sign", "unmask"}


def test_two_sets_of_survivors_over_messages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server tells half of the clients that client 0 is gone: nobody opens anything."""
    original = SecAggServer.receive_mask

    def lie(self, replies):
        inbox = original(self, replies)
        self._directory = {}  # and does not look at the signatures, which would give its own lie away
        without = messages.frame(Kind.SURVIVORS, self.parameters.digest, messages.pack_clients(self.parameters.clients[1:]))
        return {client: without if client > 2 else message for client, message in inbox.items()}

    monkeypatch.setattr(SecAggServer, "receive_mask", lie)
    with pytest.raises(FederationError, match=r"opened shares must be ≥ threshold = 5 of 6 clients, got 0"):
        federate(secure(active=True), tmp_path / "active")
    assert not any(event["kind"] == "upload" for event in events(tmp_path / "active"))


def test_replaced_key_over_messages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = SecAggServer.use_keys

    def replace_one(self, rows):
        return original(self, {**rows, 3: bytes(range(64)) + rows[3][64:]})

    monkeypatch.setattr(SecAggServer, "use_keys", replace_one)
    with pytest.raises(FederationError, match=r"key shares must be ≥ threshold = 5 of 6 clients, got 0"):
        federate(secure(active=True), tmp_path / "t")


def test_replayed_signatures_over_messages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the second round the server hands out the keys of the first, with their signatures."""
    original, seen = SecAggServer.use_keys, []

    def replay(self, rows):
        seen.append(dict(rows))
        return original(self, {**rows, 3: seen[0][3]})

    monkeypatch.setattr(SecAggServer, "use_keys", replay)
    with pytest.raises(FederationError, match=r"stopped in round 2: key shares must be ≥ threshold = 5 of 6 clients, got 0"):
        federate(secure(rounds=2, active=True), tmp_path / "t")
    assert len(seen) == 2


def test_given_identities_need_their_private_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    private = [identity.derived_private(b"elsewhere", client) for client in range(6)]
    public = [identity.public_of(key).hex() for key in private]
    of = secure(active=True, identities=public)

    def act(client, request, answer):
        monkeypatch.setenv("FEDPEEK_IDENTITY", private[client if client != impostor else 0].hex())
        return answer()

    impostor = -1
    assert len(federate(of, tmp_path / "t", misbehaving(act)).observations[0].upload.senders) == 6
    impostor = 5
    record = federate(of, tmp_path / "u", misbehaving(act))
    assert record.observations[0].upload.senders == frozenset(range(5))


# --- keys that outlive a round ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_one_set_up_serves_many_rounds_with_the_same_bits(tmp_path: Path) -> None:
    once, each = secure(rounds=3, setup="once"), secure(rounds=3)
    seen = federate(once, tmp_path / "once")
    for one, other in zip(seen.observations, federate(each, tmp_path / "each").observations, strict=True):
        assert all(torch.equal(t, other.upload.update.tensors[name]) for name, t in one.upload.update.tensors.items())
    assert stages(tmp_path / "once") == {"advertise": 6, "share": 18, "mask": 18, "unmask": 18}
    assert stages(tmp_path / "each")["advertise"] == 18


@pytest.mark.slow
@pytest.mark.parametrize("graph", ["complete", "k-regular"])
def test_clients_leave_in_every_round_and_come_back(graph: str, tmp_path: Path) -> None:
    clients, leaves = 66 if graph == "k-regular" else 6, ["mask", "unmask", "share"]

    def act(client, request, answer):
        if client == 4 and leaves and wire.unpack_stage(request.content)[0] == leaves[0]:
            leaves.pop(0)
            raise RuntimeError("gone")
        return answer()

    of = secure(clients, rounds=4, setup="once", graph=graph)
    record = federate(of, tmp_path / "t", misbehaving(act))
    assert [len(observation.upload.senders) for observation in record.observations] == [clients - 1, clients, clients - 1, clients]
    assert_mean(of, record.observations[0])
    for observation in record.observations:
        assert_exact(of, observation)
    facts = {event["stage"]["graph"] for event in events(tmp_path / "t") if event.get("stage", {}).get("graph")}
    assert all(fact.endswith("over 4 rounds together") for fact in facts)


def test_a_client_that_lost_its_state_is_asked_for_new_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from clients import secure as client_side

    original, forgotten = client_side.secagg_reply, []

    def forget(world_, model, client, content, state):
        stage, _, _ = wire.unpack_stage(content)
        if client == 2 and stage == "share" and len(forgotten) < 2:
            forgotten.append(stage)
            if len(forgotten) == 2:
                state.pop(client_side.RING)
        return original(world_, model, client, content, state)

    from clients import app

    monkeypatch.setattr(app, "REPLIES", {kind: forget if reply is original else reply for kind, reply in app.REPLIES.items()})
    record: Record = federate(secure(rounds=3, setup="once"), tmp_path / "t")
    assert [len(observation.upload.senders) for observation in record.observations] == [6, 5, 6]
    assert stages(tmp_path / "t")["advertise"] == 7


# --- the arms --------------------------------------------------------------------------------------------------------------------------


def test_plain_shows_the_mean_without_rounding(tmp_path: Path) -> None:
    of = secure(mode="plain")
    record = federate(of, tmp_path / "t")
    (observation,) = record.observations
    update, _ = mean_update(uploads_of(of, observation))
    assert observation.upload.senders == frozenset(range(6))
    assert all(torch.equal(observation.upload.update.tensors[name], tensor) for name, tensor in update.tensors.items())
    assert sum(event["kind"] == "upload" for event in events(tmp_path / "t")) == 1
    rounded = federate(secure(mode="quantized"), tmp_path / "q").observations[0].upload.update.tensors
    assert any(not torch.equal(rounded[name], tensor) for name, tensor in update.tensors.items())


@pytest.mark.parametrize("mode", ["plain", "quantized"])
def test_trusted_party_loses_clients_too(mode: str, tmp_path: Path) -> None:
    record = federate(secure(mode=mode), tmp_path / "t", leaving({mode: {4}}))
    assert record.observations[0].upload.senders == frozenset(range(6)) - {4}
    assert_mean(secure(mode=mode), record.observations[0])
    with pytest.raises(FederationError, match="senders must be ≥ 5, got 4"):
        federate(secure(mode=mode), tmp_path / "u", leaving({mode: {3, 4}}))


def test_client_answers_the_arm_of_its_world_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that asks clients of the protocol for their words, or their plain uploads, gets nothing."""
    from server import secure as server_side

    for mode in ("quantized", "plain"):
        with monkeypatch.context() as patch:
            if mode == "plain":
                patch.setattr(
                    server_side, "_by_protocol",
                    lambda grid, world, channel, nodes, clients, broadcast, lost, _: server_side._plain_mean(
                        grid, world, channel, nodes, clients, broadcast, lost
                    ),
                )  # fmt: skip
            else:
                patch.setattr(server_side, "_by_protocol", lambda *args: server_side._by_trusted_party(*args[:-1]))
            with pytest.raises(FederationError, match="got 0"):
                federate(secure(), tmp_path / mode)


def test_client_of_a_trusted_party_answers_its_own_stage_only() -> None:
    of = secure(mode="quantized")
    model = network(of.model, of.data.load().schema, of.training, of.seed)
    for stage in ("plain", "advertise", "mask"):
        with pytest.raises(ProtocolAbort, match="left secure aggregation"):
            secagg_reply(of, model, 0, wire.pack_stage(stage, b"", broadcast_of(of, model)), RecordDict())
    secagg_reply(of, model, 0, wire.pack_stage("quantized", b"", broadcast_of(of, model)), RecordDict())


@pytest.mark.parametrize("bits", [16, 20, 24, 64])
def test_narrow_words_cost_what_they_say_and_both_arms_give_the_same_bits(bits: int, tmp_path: Path) -> None:
    seen = {}
    for mode in ("protocol", "quantized"):
        of = secure(mode=mode, bits=bits)
        record = federate(of, tmp_path / mode)
        seen[mode] = record.observations[0].upload.update.tensors
        words = sum(tensor.numel() for tensor in seen[mode].values()) + 1
        least = words * bits / 8
        assert least <= record.end["upload_bytes"] <= least + 1500
        formula = of.channel.upload_bytes(words - 1, of)
        assert record.end["upload_bytes"] == formula, (mode, bits)
    assert all(torch.equal(tensor, seen["quantized"][name]) for name, tensor in seen["protocol"].items())


@pytest.mark.parametrize("settings", [{"graph": "complete", "active": True}, {"graph": "complete", "setup": "once"}, {"mode": "plain"}])
def test_upload_costs_what_the_formula_says(settings: dict, tmp_path: Path) -> None:
    of = secure(**settings)
    record = federate(of, tmp_path / "t")
    words = sum(tensor.numel() for tensor in record.observations[0].upload.update.tensors.values())
    first = 80 if settings.get("setup") == "once" else 0  # the advertisement of the first round
    assert record.end["upload_bytes"] - first == (of.channel.upload_bytes(words, of) or 4 * words)


@pytest.mark.parametrize("mode", ["quantized", "plain"])
def test_rounding_error_is_measured_and_small_in_the_default_setting(mode: str, tmp_path: Path) -> None:
    of = secure(mode=mode)
    (observation,) = federate(of, tmp_path / "t").observations
    measured = rounding_error(of, of.channel, observation)
    if mode == "plain":
        assert measured is None
        return
    assert measured is not None
    flat = torch.cat([tensor.flatten() for tensor in observation.upload.update.tensors.values()]).double()
    assert 0 < measured <= 1e-4 * flat.std()
    noise = torch.randn(flat.shape, generator=torch.Generator().manual_seed(0)).double() * 1e-3  # an aggregate that is off by so much
    shifted, start = {}, 0
    for name, tensor in observation.upload.update.tensors.items():
        shifted[name] = tensor + noise[start : start + tensor.numel()].reshape(tensor.shape).float()
        start += tensor.numel()
    upload = replace(observation.upload, update=replace(observation.upload.update, tensors=shifted))
    assert rounding_error(of, of.channel, replace(observation, uploads=(upload,))) == pytest.approx(1e-3, rel=0.05)
    coarse = secure(mode=mode, bits=16)
    (rough,) = federate(coarse, tmp_path / "c").observations
    found = rounding_error(coarse, coarse.channel, rough)
    assert found is not None
    assert found > 1e-3 * flat.std()  # 16 bits of a range of ±8: it shows, beside the leakage
