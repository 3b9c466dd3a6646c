"""Homomorphic aggregation and the SIMULATED enclave over Flower messages: who sees what, who may leave, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tenseal
import torch
from flwr.app import RecordDict
from safetensors.torch import load_file

from attacks._gradient import noise_level
from clients import ckks as ckks_client
from clients.ckks import ckks_reply
from clients.enclave import enclave_reply
from clients.local import local_upload
from clients.private import splits
from defenses.channel._ckks import cipher as cipher_module
from defenses.channel._ckks.cipher import Cipher
from defenses.channel._enclave.policy import measurement
from defenses.channel._enclave.program import Enclave
from defenses.channel._enclave.quote import TCB, Quote, hardware_key, signed
from defenses.channel._vectors import flat, largest_upload
from defenses.channel.ckks import CKKSAggregation
from defenses.channel.enclave import SimulatedEnclave
from experiments import spec
from experiments.collude import reduced
from experiments.disclose import architecture, disclose
from experiments.facts import rounding_error
from experiments.refusals import check
from server import ckks as ckks_server
from server import enclave as enclave_server
from simulator import config, wire
from simulator.adversary import ThreatModel
from simulator.errors import FederationError, ProtocolAbort, SpecError
from simulator.network import network, tensors
from simulator.transcript import LINES, Record
from simulator.types import Broadcast, Tensors, Upload
from simulator.world import World
from tests.federations import equal, federate, misbehaving, without_flower, world

CKKS: dict[str, Any] = {"name": "ckks_aggregation", "degree": 4096, "modulus_bits": [60, 49], "scale_bits": 40, "flooding_bits": 0}
"""Small ciphertexts, for speed; the default is :data:`FULL`."""
FULL = {"name": "ckks_aggregation"}
ENCLAVE = {"name": "simulated_enclave"}
ERROR = {"ckks_aggregation": 1e-6, "simulated_enclave": 1e-7}
CASES: dict[str, dict[str, Any]] = {
    "fedsgd": {},
    "fedavg, unequal clients": {
        "training": {"algorithm": "fedavg", "batch_size": 64},
        "federation": {"clients": 5, "rounds": 1, "partition": "dirichlet", "alpha": 0.5},
    },
    "batchnorm": {"model": {"name": "resnet20", "width": 2}, "training": {"batch_size": 4}},
    "bfloat16": {"training": {"upload_dtype": "bfloat16"}},
}


def of(channel: dict[str, Any], **settings: Any) -> World:
    return world(**{"model": {"name": "linear"}, "federation": {"clients": 4, "rounds": 1}, "defenses": [channel], **settings})


def plain_uploads(of: World, broadcast: Broadcast) -> list[Upload]:
    model = network(of.model, of.data.load().schema, of.training, of.seed)
    return [local_upload(of, model, broadcast, client) for client in range(of.federation.clients)]


def mean_over(uploads: list[Upload], part: Callable[[Upload], Tensors], name: str) -> torch.Tensor:
    total = sum(upload.num_examples for upload in uploads)
    return sum((u.num_examples * part(u)[name].double() for u in uploads), torch.zeros(())) / total


def assert_mean(got: Upload, uploads: list[Upload], tolerance: float) -> None:
    assert got.senders == frozenset().union(*(upload.senders for upload in uploads))
    assert got.num_examples == sum(upload.num_examples for upload in uploads)
    for name, tensor in got.update.tensors.items():
        assert torch.allclose(tensor.double(), mean_over(uploads, lambda u: u.update.tensors, name), rtol=1e-6, atol=tolerance)
    for name, tensor in got.buffers.items():
        assert torch.allclose(tensor.double(), mean_over(uploads, lambda u: u.buffers, name), rtol=1e-6, atol=tolerance)


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
@pytest.mark.parametrize("channel", [CKKS, ENCLAVE], ids=["ckks", "enclave"])
def test_server_learns_the_weighted_mean(channel: dict[str, Any], settings: dict[str, Any], tmp_path: Path) -> None:
    it = of(channel, **settings)
    (seen,) = federate(it, tmp_path / "t").observations
    assert_mean(seen.upload, plain_uploads(it, seen.broadcast), ERROR[channel["name"]])


@pytest.mark.parametrize("bits", [30, 70])
def test_default_parameters_and_their_noise_keep_the_error_that_they_state(bits: int, tmp_path: Path) -> None:
    it = of({**FULL, "flooding_bits": bits})
    (seen,) = federate(it, tmp_path / "t").observations
    uploads, channel = plain_uploads(it, seen.broadcast), it.channel
    assert isinstance(channel, CKKSAggregation)
    numbers = channel.length(seen.broadcast.parameters, seen.broadcast.buffers)
    sent = flat(seen.upload.update.tensors)
    stated = channel.error_rms(it, senders=4, num_examples=4, numbers=numbers, rms=float(np.sqrt((sent**2).mean())))  # as a run states it
    wanted = np.concatenate([mean_over(uploads, lambda u: u.update.tensors, name).flatten() for name in sorted(seen.upload.update.tensors)])
    error = sent - wanted
    rms = np.sqrt((error**2).mean())
    if bits == 30:
        assert stated < 1e-8
        assert rms < 3 * np.hypot(stated, 2**-25 * np.abs(wanted).max())  # float32 at the end
    else:  # the noise alone
        assert rms == pytest.approx(stated, rel=0.1)


@pytest.mark.parametrize(("channel", "tolerance"), [(CKKS, 0.08), ({**FULL, "secret_key": "server"}, 0.08), (ENCLAVE, 0)])
def test_bytes_of_an_upload_are_those_of_the_formula(channel: dict[str, Any], tolerance: float, tmp_path: Path) -> None:
    it = of(channel, model={"name": "mlp"}, federation={"clients": 3, "rounds": 2})
    record = federate(it, tmp_path / "t")
    numbers = sum(tensor.numel() for tensor in record.observations[0].broadcast.parameters.values())
    assert it.channel is not None
    assert it.channel.upload_bytes(numbers, it) == pytest.approx(record.end["upload_bytes"], rel=tolerance)


@pytest.mark.parametrize("channel", [CKKS, ENCLAVE], ids=["ckks", "enclave"])
def test_two_rounds_train_as_plain_function_calls_do(channel: dict[str, Any], tmp_path: Path) -> None:
    federation = {"clients": 5, "rounds": 3, "cohort": 3}
    record = federate(of(channel, federation=federation), tmp_path / "t")
    wanted, _ = without_flower(of(channel, federation=federation))
    assert record.end["status"] == "ok"
    assert record.released is not None
    for name, tensor in record.released[0].items():
        assert torch.allclose(tensor, wanted[name], atol=3e-6)


def bodies(directory: Path) -> list[bytes]:
    """All bytes of all tensors of the transcript, and its lines."""
    found = [tensor.contiguous().numpy().tobytes() for path in directory.glob("*.safetensors") for tensor in load_file(path).values()]
    return [*found, (directory / LINES).read_bytes()]


def test_nothing_that_crosses_holds_an_upload_or_the_secret_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[bytes, bytes]] = []

    def generate(scheme: Any) -> tuple[bytes, bytes]:
        made.append(cipher_module.generate(scheme))
        return made[-1]

    monkeypatch.setattr(ckks_client, "generate", generate)
    monkeypatch.setattr(ckks_server, "generate", generate)
    for channel in (CKKS, ENCLAVE):
        it, out = of(channel), tmp_path / channel["name"]
        record = federate(it, out)
        uploads = plain_uploads(it, record.observations[0].broadcast)
        own = [flat(upload.update.tensors) for upload in uploads]
        needles = [vector.astype(kind)[start : start + 64].tobytes() for vector in own for kind in ("<f4", "<f8") for start in (0, 300)]
        crossed = bodies(out)
        assert not any(needle in body for needle in needles for body in crossed)
        blobs = [body for body in crossed if len(body) > 4 * len(own[0]) and LINES.encode() not in body]
        assert len(blobs) >= 4
        events = [json.loads(line) for line in (out / LINES).read_text().splitlines()]
        assert [event["senders"] for event in events if event["kind"] == "upload"] == [[0, 1, 2, 3]]
    ((public, secret),) = made
    crossed = bodies(tmp_path / "ckks_aggregation")
    assert any(public[100:1000] in body for body in crossed)
    kept = secret[200:2000]
    assert kept not in public
    assert not any(kept in body for body in crossed)


def test_pipe_to_the_enclave_carries_no_upload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crossed: list[bytes] = []
    send = enclave_server.pipe.send
    monkeypatch.setattr(enclave_server.pipe, "send", lambda pipe, parts: (crossed.extend(parts), send(pipe, parts))[-1])
    it = of(ENCLAVE)
    (seen,) = federate(it, tmp_path / "t").observations
    needles = [flat(u.update.tensors).astype(kind)[:16].tobytes() for u in plain_uploads(it, seen.broadcast) for kind in ("<f4", "<f8")]
    assert sum(map(len, crossed)) > 4 * 4 * 650
    assert not any(needle in part for needle in needles for part in crossed)


@pytest.mark.parametrize("whose", ["colluder", "server"])
def test_with_the_key_the_server_sees_every_upload_and_training_goes_on_as_before(whose: str, tmp_path: Path) -> None:
    federation = {"clients": 4, "rounds": 2}
    open_, closed = (federate(of({**CKKS, "secret_key": key}, federation=federation), tmp_path / key) for key in (whose, "clients"))
    for seen in open_.observations:
        assert [sorted(upload.senders) for upload in seen.uploads] == [[0], [1], [2], [3]]
        for got, wanted in zip(seen.uploads, plain_uploads(of(CKKS, federation=federation), seen.broadcast), strict=True):
            assert_mean(got, [wanted], ERROR["ckks_aggregation"])
    assert open_.released is not None
    assert closed.released is not None
    assert all(torch.allclose(tensor, closed.released[0][name], atol=1e-6) for name, tensor in open_.released[0].items())


def leaving(stage: str, who: int) -> Any:
    def act(client: int, request: Any, answer: Callable[[], Any]) -> Any:
        if client == who and wire.unpack_stage(request.content)[0] == stage:
            raise RuntimeError("gone")
        return answer()

    return misbehaving(act)


@pytest.mark.parametrize(
    ("channel", "stage", "who", "senders"),
    [
        (CKKS, "advertise", 2, {0, 1, 3}), (CKKS, "make", 0, {1, 2, 3}), (CKKS, "hold", 2, {0, 1, 3}), (CKKS, "encrypt", 2, {0, 1, 3}),
        (CKKS, "decrypt", 0, {0, 1, 2, 3}), (ENCLAVE, "nonce", 2, {0, 1, 3}), (ENCLAVE, "seal", 2, {0, 1, 3}),
    ],
)  # fmt: skip
def test_client_may_leave_at_every_stage(channel: dict[str, Any], stage: str, who: int, senders: set[int], tmp_path: Path) -> None:
    it = of(channel)
    record = federate(it, tmp_path / "t", leaving(stage, who))
    (seen,) = record.observations
    assert record.end["status"] == "degraded"
    assert [client for _, client, _ in record.lost] == [who]
    assert f"(stage {stage})" in record.lost[0][2]
    assert_mean(seen.upload, [u for u in plain_uploads(it, seen.broadcast) if u.senders <= senders], ERROR[channel["name"]])


def test_client_lost_in_the_set_up_stays_out_and_one_lost_later_comes_back(tmp_path: Path) -> None:
    federation = {"clients": 4, "rounds": 3}

    def losing(stage: str) -> list[int]:
        left: list[str] = []

        def act(client: int, request: Any, answer: Callable[[], Any]) -> Any:
            if client == 2 and wire.unpack_stage(request.content)[0] == stage and not left:
                left.append(stage)
                raise RuntimeError("gone")
            return answer()

        record = federate(of(CKKS, federation=federation), tmp_path / stage, misbehaving(act))
        return [len(seen.upload.senders) for seen in record.observations]

    assert losing("hold") == [3, 3, 3]
    assert losing("encrypt") == [3, 4, 4]


@pytest.mark.parametrize(
    ("channel", "stage", "reason"),
    [
        (CKKS, "encrypt", r"ckks_aggregation stopped in round 1: ciphertexts must be of ≥ 2 clients, got \[3\]"),
        (CKKS, "make", "clients with keys must be ≥ 2"),
        (CKKS, "decrypt", "must be decrypted by one of its senders"),
        (ENCLAVE, "seal", "simulated_enclave stopped in round 1: contributors must be ≥ 3 by policy, got 1"),
    ],
)
def test_too_few_clients_stop_the_run_and_no_aggregate_is_told(channel: dict[str, Any], stage: str, reason: str, tmp_path: Path) -> None:
    def act(client: int, request: Any, answer: Callable[[], Any]) -> Any:
        if (client < 3 or stage == "decrypt") and wire.unpack_stage(request.content)[0] == stage:
            raise RuntimeError("gone")
        return answer()

    with pytest.raises(FederationError, match=reason):
        federate(of(channel), tmp_path / "t", misbehaving(act))
    assert '"kind": "upload"' not in (tmp_path / "t" / LINES).read_text()


def answering(stage: str, who: int, forge: Callable[[bytes], bytes]) -> Any:
    def act(client: int, request: Any, answer: Callable[[], Any]) -> Any:
        message = answer()
        if client == who and wire.unpack_stage(request.content)[0] == stage:
            return wire.reply(wire.pack_stage(stage, forge(wire.unpack_stage(message.content)[1])), request)
        return message

    return misbehaving(act)


@pytest.mark.parametrize(
    ("channel", "stage", "forge", "senders"),
    [
        (CKKS, "encrypt", lambda data: data[:-5], {0, 2, 3}),
        (CKKS, "encrypt", lambda data: data[:4] + b"\xff" * 8 + data[12:], {0, 2, 3}),
        (CKKS, "make", lambda data: data[:100], {0, 1, 2, 3}),
        (ENCLAVE, "seal", lambda data: data[:-1] + bytes([data[-1] ^ 1]), {0, 2, 3}),
        (ENCLAVE, "seal", lambda data: b"", {0, 2, 3}),
        (ENCLAVE, "nonce", lambda data: bytes(16), {0, 2, 3}),
    ],
)
def test_what_cannot_be_used_is_left_out(
    channel: dict[str, Any], stage: str, forge: Callable[[bytes], bytes], senders: set[int], tmp_path: Path
) -> None:
    it = of(channel)
    (seen,) = federate(it, tmp_path / "t", answering(stage, 1, forge)).observations
    assert_mean(seen.upload, [u for u in plain_uploads(it, seen.broadcast) if u.senders <= senders], ERROR[channel["name"]])


@pytest.mark.parametrize("borrowed", ["an earlier round", "another client"])
def test_blob_of_another_round_or_client_is_refused_by_the_enclave(borrowed: str, tmp_path: Path) -> None:
    kept: dict[int, bytes] = {}

    def act(client: int, request: Any, answer: Callable[[], Any]) -> Any:
        message = answer()
        stage, payload, _ = wire.unpack_stage(message.content)
        if stage != "seal":
            return message
        if client == 2 and (borrowed == "another client" or 2 in kept):
            return wire.reply(wire.pack_stage(stage, kept[1 if borrowed == "another client" else 2]), request)
        kept[client] = payload
        return message

    record = federate(of(ENCLAVE, federation={"clients": 4, "rounds": 2}), tmp_path / "t", misbehaving(act))
    rounds = [1, 2] if borrowed == "another client" else [2]
    assert [(round, client) for round, client, _ in record.lost] == [(round, 2) for round in rounds]
    assert all(f"client 2's of round {round}, unaltered" in reason for round, _, reason in record.lost)


@pytest.mark.parametrize(
    ("launch", "reason"),
    [
        (lambda real: lambda policy, key, run: real(replace(policy, min_contributors=2), key, run), "another policy runs there"),
        (lambda real: lambda policy, key, run: real(replace(policy, length=policy.length + 1), key, run), "another policy runs there"),
        (lambda real: lambda policy, key, run: real(policy, bytes(32), run), "signed by the SIMULATED hardware"),
        (lambda real: lambda policy, key, run: real(policy, key, run, debug=True), "debug mode"),
        (lambda real: lambda policy, key, run: real(policy, key, run, tcb=0), "microcode"),
        (lambda real: lambda policy, key, run: real(policy, key, bytes(16)), "of this federation"),
    ],
    ids=["lower policy", "other layout", "forged quote", "debug", "old microcode", "other run"],
)
def test_clients_send_nothing_to_an_enclave_that_is_not_theirs(
    launch: Any, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(enclave_server, "EnclaveProcess", launch(enclave_server.EnclaveProcess))
    with pytest.raises(FederationError, match=reason):
        federate(of(ENCLAVE), tmp_path / "t")


def test_run_is_what_the_clients_world_says_and_not_what_the_server_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A genuine, fresh quote of an enclave of another federation, whose seed alone differs; the server means it to be of this one."""
    it, other = of(ENCLAVE), of(ENCLAVE, seed=1)
    assert len({SimulatedEnclave.run(one) for one in (it, other, of(ENCLAVE, secret="x"), of(ENCLAVE, federation={"rounds": 2}))}) == 4
    assert SimulatedEnclave.run(it) == SimulatedEnclave.run(of(ENCLAVE))
    started: list[World] = []
    process = enclave_server.EnclaveProcess

    def launch(policy: Any, key: bytes, run: bytes) -> Any:
        started.append(other)
        return process(policy, key, SimulatedEnclave.run(other))

    monkeypatch.setattr(enclave_server, "EnclaveProcess", launch)
    with pytest.raises(FederationError, match="of this federation"):
        federate(it, tmp_path / "t")
    assert started


def asked_to_seal(it: World, enclave: Enclave, state: RecordDict, round: int = 1) -> tuple[Any, RecordDict]:
    """The model, and what asks client 0 for its sealed upload: its own nonce in a quote of this enclave."""
    model = network(it.model, it.data.load().schema, it.training, it.seed)
    assert isinstance(it.channel, SimulatedEnclave)
    nonce = wire.unpack_stage(enclave_reply(it, model, 0, wire.pack_stage("nonce", b""), state))[1]
    quote = Quote(
        debug=False, tcb=TCB, measurement=measurement(it.channel.policy(it, *tensors(model))), enclave_key=enclave.public_key,
        nonce=nonce, run=it.channel.run(it),
    )  # fmt: skip
    payload = signed(quote, hardware_key(it.seed, it.secret))
    return model, wire.pack_stage("seal", payload, Broadcast(round, *tensors(model), it.training))


def launched(it: World) -> Enclave:
    """An enclave of this federation, with keys of its own."""
    assert isinstance(it.channel, SimulatedEnclave)
    return Enclave(it.channel.policy(it, *tensors(network(it.model, it.data.load().schema, it.training, it.seed))), it.channel.run(it))


def test_nonce_is_good_for_one_quote() -> None:
    it, state = of(ENCLAVE), RecordDict()
    enclave = launched(it)
    model, asked = asked_to_seal(it, enclave, state)
    enclave.receive(1, 0, wire.unpack_stage(enclave_reply(it, model, 0, asked, state))[1])
    with pytest.raises(ProtocolAbort, match="stage must be nonce, then seal"):
        enclave_reply(it, model, 0, asked, state)


def test_client_seals_to_one_enclave_and_once_for_each_round() -> None:
    """A restarted enclave has forgotten what it released."""
    it, state = of(ENCLAVE, federation={"clients": 4, "rounds": 3}), RecordDict()
    first, other = launched(it), launched(it)

    def seal(enclave: Enclave, round: int) -> bytes:
        model, asked = asked_to_seal(it, enclave, state, round)
        return wire.unpack_stage(enclave_reply(it, model, 0, asked, state))[1]

    first.receive(1, 0, seal(first, 1))
    with pytest.raises(ProtocolAbort, match=r"round must be in 2\.\.3, each answered once, got 1"):
        seal(first, 1)
    with pytest.raises(ProtocolAbort, match="enclave must be the one of the first upload"):
        seal(other, 2)
    first.receive(2, 0, seal(first, 2))
    with pytest.raises(ProtocolAbort, match=r"round must be in 3\.\.3, each answered once, got 4"):
        seal(first, 4)


def test_quote_is_good_for_one_client_and_one_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attest, kept = enclave_server.EnclaveProcess.attest, []

    def replay(self: Any, nonce: bytes) -> bytes:
        kept.append(attest(self, nonce))
        return kept[0]

    monkeypatch.setattr(enclave_server.EnclaveProcess, "attest", replay)
    with pytest.raises(FederationError, match="by policy, got 1.*client 1 failed.*stale or a replay"):
        federate(of(ENCLAVE), tmp_path / "t")


def test_enclave_gives_equal_bits_in_equal_worlds_with_noise_and_without(tmp_path: Path) -> None:
    seen: dict[str, Record] = {}
    for name, settings in {"plain": {}, "noisy": {"noise_multiplier": 2.0, "clip_norm": 0.1}}.items():
        one, other = (federate(of({**ENCLAVE, **settings}, secret="a"), tmp_path / f"{name}{run}") for run in range(2))
        assert equal(one.observations[0], other.observations[0])
        seen[name] = one
    another = federate(of({**ENCLAVE, "noise_multiplier": 2.0, "clip_norm": 0.1}, secret="b"), tmp_path / "another")
    assert not equal(seen["noisy"].observations[0], another.observations[0])
    noisy = seen["noisy"].observations[0]
    spread = flat(noisy.upload.update.tensors)
    assert spread.std() == pytest.approx(2.0 * 0.1 / 4, rel=0.1)  # four clients of one example each, of at most one
    it = of({**ENCLAVE, "noise_multiplier": 2.0, "clip_norm": 0.1})
    knowledge = disclose(ThreatModel(), it, splits(it), splits(it).private, noisy.upload, architecture(it, splits(it)))
    assert noise_level(noisy, knowledge) == pytest.approx(1, abs=0.1), "what an attack expects is what is there"


def stage_of(it: World, name: str, payload: bytes, state: RecordDict, **facts: int) -> bytes:
    model = network(it.model, it.data.load().schema, it.training, it.seed)
    return wire.unpack_stage(ckks_reply(it, model, 0, wire.pack_stage(name, payload, **facts), state))[1]


def test_client_decrypts_no_upload_alone_and_gives_its_key_to_nobody() -> None:
    it, state = of(CKKS, federation={"clients": 4, "rounds": 3}), RecordDict()
    key = stage_of(it, "advertise", b"r" * 16, state)
    made = stage_of(it, "make", (0).to_bytes(8, "little") + key, state)
    channel, model = it.channel, network(it.model, it.data.load().schema, it.training, it.seed)
    assert isinstance(channel, CKKSAggregation)
    public = Cipher(channel.scheme, made[12:])
    broadcast = Broadcast(1, *tensors(model), it.training)
    vector = channel.encode(local_upload(it, model, broadcast, 0), max_examples=largest_upload(it))
    one = public.encrypt(vector)
    both = public.total([public.load(one, len(vector), origin="it")] * 2)
    assert np.allclose(np.frombuffer(stage_of(it, "decrypt", both, state, round=1)), 2 * vector, atol=1e-6)
    for name, payload, round in (("decrypt", both, 1), ("decrypt", one, 2), ("collude", b"", 2), ("strange", b"", 2)):
        with pytest.raises(ProtocolAbort, match="^left ckks_aggregation$"):
            stage_of(it, name, payload, state, round=round)
    stage_of(it, "decrypt", both, state, round=3)
    with pytest.raises(ProtocolAbort, match="^left ckks_aggregation$"):
        stage_of(it, "decrypt", both, state, round=4)  # the noise is for three rounds


def test_client_takes_no_keys_that_do_not_fit() -> None:
    from defenses.channel import _frames
    from defenses.channel._ckks import handover

    it, state = of(CKKS), RecordDict()
    assert isinstance(it.channel, CKKSAggregation)
    (public, secret), (other, _) = (cipher_module.generate(it.channel.scheme) for _ in range(2))
    context = tenseal.context(tenseal.SCHEME_TYPE.CKKS, 4096, -1, [60, 49])
    context.global_scale = 2.0**40
    open_ = context.serialize(save_public_key=True, save_secret_key=True, save_galois_keys=False, save_relin_keys=False)
    private, mine = handover.key_pair()
    place = {"private": private, "run": b"r" * 16}

    def hold(context: bytes, content: bytes, sealed_for: bytes) -> None:
        peer = stage_of(it, "advertise", b"r" * 16, state)
        envelope = handover.seal(content, peer=peer, public_context=sealed_for, **place)
        stage_of(it, "hold", _frames.pack([mine, context, envelope]), state)

    hold(public, secret, public)
    for case in (
        (other, secret, other),
        (other, secret, public),
        (public, b"no key", public),
        (secret, secret, secret),
        (open_, open_, open_),
    ):
        with pytest.raises(ProtocolAbort, match="^left ckks_aggregation$"):
            hold(*case)


@pytest.mark.parametrize("channel", [CKKS, ENCLAVE], ids=["ckks", "enclave"])
def test_why_a_client_left_stays_with_it(channel: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from clients import enclave as enclave_client

    def train(*_: Any) -> None:
        raise ValueError("cannot train on a record with label 7")

    monkeypatch.setattr(ckks_client, "local_upload", train)
    monkeypatch.setattr(enclave_client, "local_upload", train)
    with pytest.raises(FederationError, match=f"left {channel['name']}") as caught:
        federate(of(channel), tmp_path / "t")
    assert "label 7" not in str(caught.value) + (tmp_path / "t" / LINES).read_text()


@pytest.mark.parametrize("channel", [CKKS, ENCLAVE], ids=["ckks", "enclave"])
def test_client_refuses_to_upload_in_the_clear(channel: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from server import strategy

    monkeypatch.setattr(strategy, "opened", lambda world: nullcontext(strategy.collect_uploads))
    with pytest.raises(FederationError, match="got a request for a plain upload. Refused"):
        federate(of(channel), tmp_path / "t")


def test_client_without_a_channel_answers_no_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from server import strategy

    it = of(ENCLAVE)

    @contextmanager
    def opened(_: World) -> Iterator[Any]:
        with enclave_server.enclave_channel(it) as collect:
            yield lambda grid, world, *rest: collect(grid, it, *rest)

    monkeypatch.setattr(strategy, "opened", opened)
    with pytest.raises(FederationError, match="a stage of a channel that is not there. Refused"):
        federate(of(ENCLAVE, defenses=[]), tmp_path / "t")


def test_colluders_of_the_enclave_take_out_what_they_had_clipped_in_it(tmp_path: Path) -> None:
    it = of({**ENCLAVE, "noise_multiplier": 1e-6, "clip_norm": 0.05})
    (seen,) = federate(it, tmp_path / "t").observations
    assert isinstance(it.channel, SimulatedEnclave)
    model = network(it.model, it.data.load().schema, it.training, it.seed)
    left = reduced(seen, it, model, frozenset({0, 2})).upload
    wanted = [it.channel.as_summed(upload) for upload in plain_uploads(it, seen.broadcast) if upload.senders <= {1, 3}]
    assert float(np.linalg.norm(flat(wanted[0].update.tensors))) == pytest.approx(0.05, rel=1e-5)
    assert_mean(left, wanted, 1e-6)


def test_one_colluder_is_all_it_takes_to_undo_ckks_so_that_fewer_are_not_an_experiment(tmp_path: Path) -> None:
    table = {"data": "digits", "model": "linear", "federation": {"clients": 4}, "threat": {"colluding": 1}}
    for defense, refused in ((CKKS, True), ({**CKKS, "secret_key": "colluder"}, False), (ENCLAVE, False)):
        experiment = config.build(spec.Experiment, {**table, "arms": [{"name": "none"}, {"name": "it", "defenses": [defense]}]})
        if refused:
            with pytest.raises(SpecError, match=r"threat\.colluding must be 0 .* set secret_key = 'colluder'"):
                check(experiment)
        else:
            check(experiment)


def test_error_of_the_aggregate_is_reported_beside_it(tmp_path: Path) -> None:
    for key, reported in (("clients", True), ("server", False)):
        it = of({**CKKS, "secret_key": key})
        found = rounding_error(it, federate(it, tmp_path / key))
        assert (found == pytest.approx(it.channel.scheme.error(4) / 4)) if reported else found is None  # type: ignore[union-attr]


@pytest.mark.slow
@pytest.mark.parametrize("channel", [CKKS, ENCLAVE], ids=["ckks", "enclave"])
def test_rays_workers_see_the_same(channel: dict[str, Any], tmp_path: Path) -> None:
    from clients.app import app as client_app
    from server.app import app as server_app
    from simulator import engine
    from simulator.transcript import read

    it = of(channel, federation={"clients": 3, "rounds": 2})
    mine = federate(it, tmp_path / "mine")
    engine.run(it, tmp_path / "ray", server_app, client_app, "simulation")
    for one, other in zip(mine.observations, read(tmp_path / "ray").observations, strict=True):
        assert channel == CKKS or equal(one, other)  # ciphertexts are random
        assert all(torch.allclose(one.upload.update.tensors[n], t, atol=1e-6) for n, t in other.upload.update.tensors.items())
