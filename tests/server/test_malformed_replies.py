"""A reply that cannot be used costs its own client and nobody else, at every stage of every protocol, over real Flower messages."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tenseal
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

from defenses.channel import _frames
from defenses.channel._ckks.cipher import generate
from defenses.channel._ckks.scheme import Scheme
from defenses.channel._points import FIELD
from defenses.channel._secagg import messages
from server import ask
from simulator import wire
from simulator.errors import FederationError
from simulator.transcript import LINES, Record
from tests.federations import federate, misbehaving, world

Forge = Callable[[str, bytes, Mapping[str, bytes]], RecordDict]
"""A reply's content out of the stage, what the client would have answered, and what others and earlier rounds answered."""


def payload(change: Callable[[bytes], bytes]) -> Forge:
    return lambda stage, data, _: wire.pack_stage(stage, change(data))


FAULTS: dict[str, Forge] = {
    "too short": payload(lambda data: data[:-1]),
    "too long": payload(lambda data: data + b"x"),
    "empty": payload(lambda data: b""),
    "garbage": payload(lambda data: os.urandom(max(len(data), 1))),
    "no record": lambda stage, data, _: RecordDict(),
    "no payload": lambda stage, data, _: RecordDict({"stage": ConfigRecord({"stage": stage})}),
    "a number as payload": lambda stage, data, _: RecordDict({"stage": ConfigRecord({"stage": stage, "payload": 10**12})}),
    "a record of arrays": lambda stage, data, _: RecordDict({"stage": ArrayRecord([np.zeros(2)])}),
    "another stage": lambda stage, data, _: wire.pack_stage("other", data),
}
REPLAYED: dict[str, Forge] = {"of the round before": lambda stage, data, seen: wire.pack_stage(stage, seen["own, before"])}
HEAD = messages.HEADER_BYTES


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many small stages: what takes time is waiting for the next look at the mail."""
    monkeypatch.setattr(ask, "POLL_SECONDS", 0.001)


def non_canonical(point: bytes) -> bytes:
    """Another writing of the same point."""
    return (int.from_bytes(point, "little") | 1 << 255).to_bytes(32, "little")


KEYS: dict[str, Forge] = {
    "point of low order": payload(lambda data: data[:HEAD] + bytes(32) + data[HEAD + 32 :]),
    "point in another writing": payload(lambda data: data[:HEAD] + non_canonical(data[HEAD : HEAD + 32]) + data[HEAD + 32 :]),
    "a neighbor's keys": lambda stage, data, seen: wire.pack_stage(stage, seen["neighbor's"]),
    "another signature": payload(lambda data: data[:-1] + bytes([data[-1] ^ 1])),
}
STAGES: dict[str, tuple[dict[str, Forge], bool]] = {
    "advertise": (FAULTS | REPLAYED | KEYS, False),
    "share": (FAULTS | REPLAYED, False),
    "mask": (FAULTS | REPLAYED, False),
    "sign": (FAULTS | REPLAYED | {"another signature": KEYS["another signature"]}, True),
    "unmask": (FAULTS | REPLAYED, True),
}
"""By stage of secure aggregation: what may come, and whether a client that fails there is in the sum all the same."""


def forging(stage: str, faults: Mapping[int, Mapping[int, Forge]]) -> ClientApp:
    """The client app, in which some clients answer a stage of some rounds (by round, by client) with something else."""
    last: dict[int, bytes] = {}

    def act(client: int, request: Message, answer: Callable[[], Message]) -> Message:
        message, round = answer(), int(request.metadata.group_id)
        if wire.unpack_stage(request.content)[0] != stage:
            return message
        data = wire.unpack_stage(message.content)[1]
        seen = {"own, before": last.get(client, b""), "neighbor's": last.get(client - 1, b"")}
        last[client] = data
        forge = faults.get(round, {}).get(client)
        return message if forge is None else wire.reply(forge(stage, data, seen), request)

    return misbehaving(act)


def assert_lost(record: Record, stage: str, lost: list[tuple[int, int]]) -> None:
    """Each one, in its round, at this stage and by name, and nobody else."""
    assert [(round, client) for round, client, _ in record.lost] == lost
    for _, client, reason in record.lost:
        assert re.match(rf"client {client} sent what cannot be used \(stage {stage}\): .+", reason), reason


@pytest.mark.parametrize("faults_tried", ["own", pytest.param("all", marks=pytest.mark.slow)])
@pytest.mark.parametrize("stage", STAGES)
def test_secure_aggregation_loses_the_client_that_answers_something_else(stage: str, faults_tried: str, tmp_path: Path) -> None:
    """One round for each fault, against an active server, which has all stages; the client takes part again in the next.

    The fast ones leave out what one function finds out for all stages of all channels; with CKKS all are tried.
    """
    forges, counted = STAGES[stage]
    if faults_tried == "own":
        forges = {name: forge for name, forge in forges.items() if name not in FAULTS or name == "garbage"}
    rounds = len(forges) + 2
    channel = {"name": "secure_aggregation", "active": True}
    of = world(model={"name": "linear"}, federation={"clients": 6, "rounds": rounds}, defenses=[channel])
    faults = {round: {5: forge} for round, forge in enumerate(forges.values(), 2)}
    record = federate(of, tmp_path / "t", forging(stage, faults))
    assert_lost(record, stage, [(round, 5) for round in faults])
    for round, seen in enumerate(record.observations, 1):
        assert seen.upload.senders == frozenset(range(6) if counted or round not in faults else range(5))
        assert seen.upload.num_examples == len(seen.upload.senders)


def test_keys_that_outlive_a_round_lose_the_client_that_answers_something_else(tmp_path: Path) -> None:
    channel = {"name": "secure_aggregation", "setup": "once"}
    of = world(model={"name": "linear"}, federation={"clients": 6, "rounds": 4}, defenses=[channel])
    faults = {1: {5: KEYS["point in another writing"]}, 2: {5: KEYS["a neighbor's keys"]}, 3: {5: FAULTS["garbage"]}}
    record = federate(of, tmp_path / "t", forging("advertise", faults))
    assert_lost(record, "advertise", [(1, 5), (2, 5), (3, 5)])
    assert [len(seen.upload.senders) for seen in record.observations] == [5, 5, 5, 6]


CKKS: dict[str, Any] = {"name": "ckks_aggregation", "degree": 4096, "modulus_bits": [60, 49], "scale_bits": 40, "flooding_bits": 0}
SMALL = Scheme(degree=4096, modulus_bits=(60, 49), scale_bits=40)


@pytest.mark.parametrize("stage", ["encrypt", "decrypt"])
def test_ckks_loses_the_client_that_answers_something_else(stage: str, tmp_path: Path) -> None:
    """The lowest client is asked to decrypt first; what it tells may have the right length and still be no sum."""
    forges = FAULTS if stage == "decrypt" else {**FAULTS, "of another scheme": payload(lambda data: _frames.pack([bytes(100)]))}
    of = world(model={"name": "linear"}, federation={"clients": 3, "rounds": len(forges)}, defenses=[CKKS])
    record = federate(of, tmp_path / "t", forging(stage, {round: {0: forge} for round, forge in enumerate(forges.values(), 1)}))
    assert_lost(record, stage, [(round, 0) for round in range(1, len(forges) + 1)])
    assert {seen.upload.senders for seen in record.observations} == {frozenset({0, 1, 2} if stage == "decrypt" else {1, 2})}


def test_ckks_set_up_leaves_out_who_has_no_usable_key(tmp_path: Path) -> None:
    """All faults at once: a bad key in the roster would stop whoever makes the keys, and so all of them, one after the other."""
    forges = [
        *(forge for name, forge in FAULTS.items() if name != "garbage"),  # 32 random bytes are a key
        payload(lambda data: bytes(32)),
        payload(lambda data: non_canonical(data)),
        payload(lambda data: FIELD.to_bytes(32, "little")),
    ]
    copier = len(forges) + 1
    bad = {**dict(enumerate(forges)), copier: KEYS["a neighbor's keys"]}
    of = world(model={"name": "linear"}, federation={"clients": copier + 2, "rounds": 1}, defenses=[CKKS])
    record = federate(of, tmp_path / "t", forging("advertise", {1: bad}))
    assert_lost(record, "advertise", [(1, client) for client in bad])
    assert record.observations[0].upload.senders == frozenset({copier - 1, copier + 1})


def other_keys(data: bytes, public: bytes) -> bytes:
    """What the key maker answered, with another public context."""
    count = int.from_bytes(data[:4], "little")
    return _frames.pack([public, *_frames.unpack(data, count=count, largest=1 << 24, origin="it")[1:]])


def with_everything(scheme: Scheme) -> bytes:
    context = tenseal.context(tenseal.SCHEME_TYPE.CKKS, scheme.degree, -1, list(scheme.modulus_bits))
    context.global_scale = 2.0**scheme.scale_bits
    made: bytes = context.serialize(save_public_key=True, save_secret_key=True, save_galois_keys=False, save_relin_keys=False)
    return made


def test_ckks_set_up_goes_on_with_the_next_key_maker(tmp_path: Path) -> None:
    """Each key maker in its turn answers something else: also keys for other moduli than the world's, and such as fit no envelope."""
    forges = [
        *FAULTS.values(),
        payload(lambda data: other_keys(data, generate(Scheme(degree=4096, modulus_bits=(59, 50), scale_bits=40))[0])),
        payload(lambda data: other_keys(data, generate(Scheme(degree=8192, modulus_bits=(60, 60), scale_bits=40))[0])),
        payload(lambda data: other_keys(data, generate(Scheme(degree=4096, modulus_bits=(60, 49), scale_bits=39))[0])),
        payload(lambda data: other_keys(data, generate(SMALL)[1])),
        payload(lambda data: other_keys(data, with_everything(SMALL))),
        payload(lambda data: other_keys(data, generate(SMALL)[0])),  # right, but nobody can open the envelopes beside it
    ]
    bad = dict(enumerate(forges))
    of = world(model={"name": "linear"}, federation={"clients": len(bad) + 3, "rounds": 1}, defenses=[CKKS])
    record = federate(of, tmp_path / "t", forging("make", {1: bad}))
    assert_lost(record, "make", [(1, client) for client in bad])
    assert record.observations[0].upload.senders == frozenset(range(len(bad), len(bad) + 3))


@pytest.mark.parametrize(
    ("channel", "stage", "reason"),
    [
        ({"name": "secure_aggregation"}, "advertise", r"key advertisements must be ≥ threshold = 5 of 6 clients, got 4"),
        ({"name": "secure_aggregation"}, "share", r"key shares must be ≥ threshold = 5 of 6 clients, got 4"),
        ({"name": "secure_aggregation"}, "mask", r"masked vectors must be ≥ threshold = 5 of 6 clients, got 4"),
        ({"name": "secure_aggregation", "active": True}, "sign", r"signatures must be ≥ threshold = 5 of 6 clients, got 4"),
        ({"name": "secure_aggregation"}, "unmask", r"opened shares must be ≥ threshold = 5 of 6 clients, got 4"),
        (CKKS, "encrypt", r"ciphertexts must be of ≥ 2 clients, got \[0\]"),
        (CKKS, "decrypt", r"must be decrypted by one of its senders"),
    ],
)
def test_too_many_of_them_end_the_run_without_an_aggregate(channel: dict[str, Any], stage: str, reason: str, tmp_path: Path) -> None:
    few = {"encrypt": range(1, 6), "decrypt": range(6)}.get(stage, range(2))
    of = world(model={"name": "linear"}, federation={"clients": 6, "rounds": 1}, defenses=[channel])
    with pytest.raises(FederationError, match=reason):
        federate(of, tmp_path / "t", forging(stage, {1: dict.fromkeys(few, FAULTS["garbage"])}))
    lines = (tmp_path / "t" / LINES).read_text()
    assert '"kind": "upload"' not in lines
    assert lines.count(f"(stage {stage})") >= len(few)
