"""What one client may send through the tap, the books of the server, and a homomorphic sum, over real Flower messages."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, RecordDict

from clients.local import local_upload
from clients.private import records_held, stated_examples
from defenses.channel._vectors import largest_upload
from defenses.channel.enclave import SimulatedEnclave
from defenses.channel.secure_aggregation import SecureAggregation
from experiments.refusals import check
from experiments.spec import Experiment
from server import ckks as server_ckks
from simulator import config, wire
from simulator.errors import BroadcastRefused, FederationError, ProtocolAbort, SpecError
from simulator.network import network, tensors
from simulator.transcript import LINES
from simulator.types import Broadcast, Update, Upload
from simulator.world import World
from tests.federations import federate, misbehaving, world
from tests.server.test_malformed_replies import CKKS, FAULTS, forging, payload
from tests.simulator.test_arrays import STRANGE

HOSTILE = ("an archive", "a header without an end", "a type that is empty", "a shape beyond all memory", "long doubles", "wide complex")


def events(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / LINES).read_text().splitlines()]


@pytest.mark.parametrize("channel", [None, "secure_aggregation"])
def test_an_array_that_no_parser_takes_costs_its_sender_the_round_and_nobody_else(channel: str | None, tmp_path: Path) -> None:
    """The tap writes it down as bytes, whatever NumPy's and safetensors' parsers make of it."""

    def act(client: int, request: Message, answer: Callable[[], Message]) -> Message:
        message, round = answer(), int(request.metadata.group_id)
        if client != 5 or round > len(HOSTILE) or (channel and wire.unpack_stage(request.content)[0] != "mask"):
            return message
        array = Array(dtype="float32", shape=(10,), stype="numpy.ndarray", data=STRANGE[HOSTILE[round - 1]])
        records = {name: ArrayRecord({"head.bias": array}) for name in (wire.UPDATE, wire.BUFFERS)}
        facts = message.content.config_records.get(wire.FACTS)
        return wire.reply(RecordDict({**records, **({wire.FACTS: facts} if facts else {})}), request)

    rounds = len(HOSTILE) + 1
    of = world(model={"name": "linear"}, federation={"clients": 6, "rounds": rounds}, defenses=[channel] if channel else [])
    record = federate(of, tmp_path / "t", misbehaving(act))
    assert [(round, client) for round, client, _ in record.lost] == [(round, 5) for round in range(1, rounds)]
    for round, seen in enumerate(record.observations, 1):
        assert len(frozenset().union(*(upload.senders for upload in seen.uploads))) == (6 if round == rounds else 5)


def test_every_message_of_a_protocol_is_filed_under_its_own_round(tmp_path: Path) -> None:
    """Also what precedes the round's broadcast, the keys: a kept round is kept whole, and of another only the digests."""
    federation = {"clients": 4, "rounds": 2, "record_rounds": [2]}
    federate(world(model={"name": "linear"}, federation=federation, defenses=["secure_aggregation"]), tmp_path / "t")
    found = [event for event in events(tmp_path / "t") if event["kind"] == "received" and event.get("stage", {}).get("stage") == "advertise"]
    assert [event["round"] for event in found] == [1] * 4 + [2] * 4
    assert ["file" in event for event in found] == [False] * 4 + [True] * 4


def test_who_fails_to_decrypt_has_still_uploaded(tmp_path: Path) -> None:
    """A server that holds the key saw the upload before its sender answered something else."""
    of = world(model={"name": "linear"}, federation={"clients": 3, "rounds": 1}, defenses=[{**CKKS, "secret_key": "server"}])
    record = federate(of, tmp_path / "t", forging("decrypt", {1: {0: FAULTS["garbage"]}}))
    assert [client for _, client, _ in record.lost] == [0]
    assert [upload.senders for upload in record.observations[0].uploads] == [frozenset({client}) for client in range(3)]


def test_a_sum_that_two_clients_tell_alike_and_that_is_none_is_not_their_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def corrupt(*_: object) -> Upload:
        raise ProtocolAbort("number of senders must be 3, got 3.5.")

    monkeypatch.setattr(server_ckks, "_decoded", corrupt)
    of = world(model={"name": "linear"}, federation={"clients": 3, "rounds": 1}, defenses=[CKKS])
    with pytest.raises(FederationError, match=r"a sum that clients \[0, 1, 2\] tell alike and that is none .*One of \[0, 1, 2\] encrypted something"):
        federate(of, tmp_path / "t")
    assert not [event for event in events(tmp_path / "t") if event["kind"] == "lost"]


def test_two_who_tell_the_same_lie_are_passed_over_like_one(tmp_path: Path) -> None:
    of = world(model={"name": "linear"}, federation={"clients": 3, "rounds": 1}, defenses=[CKKS])
    lie = payload(lambda data: np.full(len(data) // 8, np.nan).tobytes())
    record = federate(of, tmp_path / "t", forging("decrypt", {1: {0: lie, 1: lie}}))
    assert [client for _, client, _ in record.lost] == [0, 1]
    assert record.observations[0].upload.senders == frozenset(range(3))


def test_a_sum_beyond_what_the_model_holds_is_none(tmp_path: Path) -> None:
    """Finite in the float64 that crosses, infinite in the float32 of the model."""

    def huge(data: bytes) -> bytes:
        numbers = np.frombuffer(data, "<f8").copy()
        numbers[1] = 1e300
        return numbers.tobytes()

    of = world(model={"name": "linear"}, federation={"clients": 3, "rounds": 1}, defenses=[CKKS])
    record = federate(of, tmp_path / "t", forging("decrypt", {1: {0: payload(huge)}}))
    assert [client for _, client, _ in record.lost] == [0]
    assert record.released is not None
    assert all(tensor.isfinite().all() for tensor in record.released[0].values())


def test_what_passes_beneath_the_tap_costs_its_bytes_down_as_well(tmp_path: Path) -> None:
    def down(name: str, *defenses: Any) -> float:
        of = world(model={"name": "linear"}, federation={"clients": 4, "rounds": 1}, defenses=list(defenses))
        return float(federate(of, tmp_path / name).end["download_bytes"])

    model = down("clear")
    assert model > 4 * 650
    for mode in ("plain", "quantized"):
        assert down(mode, {"name": "secure_aggregation", "mode": mode}) == model


@pytest.mark.parametrize(
    ("federation", "training"),
    [
        ({"clients": 6}, {"algorithm": "fedavg", "batch_size": 8}),
        ({"clients": 7}, {"batch_size": 0}),
        ({"clients": 6}, {"algorithm": "fedavg", "batch_size": 8, "drop_last": True}),
        ({"clients": 6}, {"algorithm": "fedavg", "batch_size": 8, "steps": 3}),
        ({"clients": 6}, {"batch_size": 4}),
    ],
)
def test_the_public_bound_on_examples_is_what_who_holds_most_states(federation: dict[str, Any], training: dict[str, Any]) -> None:
    """All of a noisy mean's weights are n_i over it: a bound above all n_i is noise that nobody asked for."""
    of = world(federation=federation, training=training, split={"test": 0.3, "public": 0.1})
    assert largest_upload(of) == max(stated_examples(of, client, 1) for client in range(of.federation.clients))
    uneven = world(federation={**federation, "partition": "dirichlet"}, training=training, split={"test": 0.3, "public": 0.1})
    assert largest_upload(uneven) >= max(stated_examples(uneven, client, 1) for client in range(of.federation.clients))
    assert sum(records_held(uneven)) >= largest_upload(uneven)


def test_words_too_narrow_for_all_examples_are_refused_before_the_run() -> None:
    federation, training = {"clients": 100, "partition": "dirichlet"}, {"algorithm": "fedavg", "batch_size": 8}
    channel = SecureAggregation(bits=16)
    of = world(federation=federation, training=training, defenses=[{"name": "secure_aggregation", "bits": 16}])
    assert "max_examples must be ≥ 1 and below 2^16 / 100 clients" in str(channel.refuses(of))
    assert SecureAggregation().refuses(world(federation=federation, training=training, defenses=["secure_aggregation"])) is None


def test_identities_of_clients_that_the_run_starts_itself_are_refused() -> None:
    """Each finds its private key in its own environment, and those of one run share theirs."""
    keys = [f"{place:064x}" for place in range(1, 6)]
    table = {"data": "digits", "model": "linear", "federation": {"clients": 5}, "attacks": ["random_guess"]}
    arms = [{"name": "none"}, {"name": "sum", "defenses": [{"name": "secure_aggregation", "active": True, "identities": keys}]}]
    with pytest.raises(SpecError, match="identities must be empty where `fedpeek run` starts the clients, got 5"):
        check(config.build(Experiment, table | {"arms": arms}))


def test_with_noise_inside_an_update_that_is_not_finite_is_sealed_as_none_and_nobody_leaves() -> None:
    """Whether a client takes part is public, so that it must not depend on its data where (ε, δ) is claimed."""

    def upload(value: float) -> Upload:
        return Upload(frozenset({0}), Update("gradient", {"w": torch.tensor([1.0, value])}), {}, 2)

    noisy, seed = SimulatedEnclave(noise_multiplier=1.0, clip_norm=1.0), bytes(32)
    zeros = Upload(frozenset({0}), Update("gradient", {"w": torch.zeros(2)}), {}, 2)
    for value in (float("nan"), float("inf")):
        assert noisy.encode(upload(value), seed) == noisy.encode(zeros, seed)
        with pytest.raises(ProtocolAbort, match="upload must be finite"):
            SimulatedEnclave().encode(upload(value), seed)


def test_a_client_trains_by_the_federations_recipe_alone() -> None:
    """Its guarantee counts that recipe: a shuffled batch in a Poisson world would be divided by the size that must not be known."""
    of = world(training={"batch_size": 4, "sampling": "poisson"})
    other: World = world(training={"batch_size": 4})
    model = network(of.architecture, of.data.load().schema, of.training, of.seed)
    with pytest.raises(BroadcastRefused, match="the recipe must be the federation's"):
        local_upload(of, model, Broadcast(1, *tensors(model), other.training), 0)
