"""The federation in process: the same numbers as without Flower, whatever clients do, and a tap that changes nothing."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord

from clients.private import private_records
from simulator import inprocess, wire
from simulator.errors import FederationError
from simulator.transcript import LINES, read
from tests.federations import federate, misbehaving, without_flower, world

WORLDS = {
    "fedsgd": {},
    "fedavg": {"training": {"algorithm": "fedavg", "epochs": 2, "batch_size": 16, "momentum": 0.9, "weight_decay": 0.01}},
    "sampled, non-iid": {"federation": {"rounds": 3, "cohort": 2, "partition": "dirichlet", "alpha": 0.3}},
    "adam, clipped, fedprox, smoothed, half": {
        "training": {
            "algorithm": "fedavg", "optimizer": "adam", "learning_rate": 0.01, "batch_size": 16, "max_grad_norm": 1.0, "proximal": 0.1,
            "label_smoothing": 0.1, "drop_last": True, "upload_dtype": "float16",
        },
        "federation": {"partition": "quantity"},
    },
    "batchnorm": {"model": {"name": "resnet20", "width": 4}, "training": {"batch_size": 8}},
    "noise": {"defenses": [{"name": "dp_sgd", "clip_norm": 1.0, "noise_multiplier": 1.0}]},
    "central noise": {"defenses": [{"name": "central_dp", "clip_norm": 1.0, "noise_multiplier": 1.0}]},
}


@pytest.mark.parametrize("settings", WORLDS.values(), ids=WORLDS)
def test_federation_under_the_tap_trains_the_same_model_to_the_bit_as_plain_function_calls(settings: dict, tmp_path: Path) -> None:
    of = world(**settings)
    released = federate(of, tmp_path / "t").released
    assert released is not None
    for got, expected in zip(released, without_flower(of), strict=True):
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_no_reply_carries_inputs_or_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replies: list[Message] = []
    original = inprocess._through_the_wire

    def spy(message: Message) -> Message:
        replies.append(message)
        return original(message)

    monkeypatch.setattr(inprocess, "_through_the_wire", spy)
    of = world(training={"batch_size": 4})
    federate(of, tmp_path / "t")
    uploads = [m for m in replies if m.metadata.message_type == wire.TRAIN and m.metadata.reply_to_message_id]
    assert len(uploads) == 8
    secrets = [private_records(of, client, round) for client in range(4) for round in (1, 2)]
    for message in uploads:
        assert set(message.content) == {"update", "buffers", "facts"}
        assert set(message.content.config_records["facts"]) == {"kind", "num-examples"}
        for record in message.content.array_records.values():
            for array in record.values():
                body = array.numpy().tobytes()
                for batch in secrets:
                    assert not any(image.numpy().tobytes() in body for image in batch.inputs)
                    assert batch.labels.numpy().tobytes() not in body


def _nan(message: Message) -> Message:
    name, array = next(iter(message.content.array_records["update"].items()))
    message.content.array_records["update"][name] = Array(np.full_like(array.numpy(), np.nan))
    return message


def _wrong_shape(message: Message) -> Message:
    name, array = next(iter(message.content.array_records["update"].items()))
    message.content.array_records["update"][name] = Array(array.numpy()[..., :-1].copy())
    return message


def _wrong_name(message: Message) -> Message:
    arrays = message.content.array_records["update"]
    message.content["update"] = ArrayRecord({f"{name}x": array for name, array in arrays.items()})
    return message


TAMPERED = {"NaN": (_nan, "must be finite"), "shape": (_wrong_shape, "must be ("), "name": (_wrong_name, "must have the model's names")}


@pytest.mark.parametrize(("tamper", "reason"), TAMPERED.values(), ids=TAMPERED)
def test_client_that_sends_what_cannot_be_used_is_named_and_the_run_goes_on(tamper, reason: str, tmp_path: Path) -> None:
    app = misbehaving(lambda client, _, answer: tamper(answer()) if client == 2 else answer())
    record = federate(world(), tmp_path / "t", app)
    assert record.end["status"] == "degraded"
    assert [(round, client) for round, client, _ in record.lost] == [(1, 2), (2, 2)]
    assert all("client 2" in text and reason in text for _, _, text in record.lost)
    assert [min(upload.senders) for upload in record.observations[0].uploads] == [0, 1, 3]


def _text(message: Message) -> Message:
    name, _ = next(iter(message.content.array_records["update"].items()))
    message.content.array_records["update"][name] = Array(np.array(["a", "b"]))
    return message


def _no_facts(message: Message) -> Message:
    del message.content["facts"]
    message.content["metrics"] = MetricRecord({"loss": float("nan")})
    message.content["more"] = ConfigRecord({"parts": [b"a", b"b"], "rate": float("inf")})
    return message


@pytest.mark.parametrize("tamper", [_text, _no_facts])
def test_reply_that_is_no_upload_at_all_is_recorded_and_named(tamper, tmp_path: Path) -> None:
    record = federate(world(), tmp_path / "t", misbehaving(lambda client, _, answer: tamper(answer()) if client == 2 else answer()))
    assert record.end["status"] == "degraded"
    assert [(round, client) for round, client, _ in record.lost] == [(1, 2), (2, 2)]
    assert len(record.observations[1].uploads) == 3


def test_what_crosses_beside_an_upload_is_recorded(tmp_path: Path) -> None:
    def act(client, request, answer):
        message = answer()
        message.content["metrics"] = MetricRecord({"loss": 0.25})
        return message

    federate(world(federation={"rounds": 1}), tmp_path / "t", misbehaving(act))
    events = [json.loads(line) for line in (tmp_path / "t" / LINES).read_text().splitlines()]
    uploads = [event for event in events if event["kind"] == "upload"]
    assert [event["beside"]["metrics"] for event in uploads] == [{"loss": 0.25}] * 4


def test_transcript_says_which_client_got_which_model(tmp_path: Path) -> None:
    federate(world(federation={"rounds": 1, "cohort": 2}), tmp_path / "t")
    events = [json.loads(line) for line in (tmp_path / "t" / LINES).read_text().splitlines()]
    sent = [event for event in events if event["kind"] == "sent" and event["type"] == wire.TRAIN]
    assert len(sent) == 2
    assert {event["model"] for event in sent} == {"the broadcast"}


def test_noise_is_keyed_by_the_secret_and_victims_are_not(tmp_path: Path) -> None:
    """Small seeds can be guessed from the initial weights; the noise must not follow from them."""
    noisy = {"defenses": [{"name": "dp_sgd", "clip_norm": 1.0, "noise_multiplier": 1.0}], "federation": {"rounds": 1}}
    runs = [federate(world(secret=secret, **noisy), tmp_path / secret).observations[0].uploads[0] for secret in ("a", "b")]
    assert not torch.equal(*(run.update.tensors["head.bias"] for run in runs))
    assert torch.equal(*(private_records(world(secret=secret), 0, 1).inputs for secret in ("a", "b")))


def test_client_that_raises_is_named_with_its_reason(tmp_path: Path) -> None:
    def act(client, request, answer):
        if client == 1:
            raise RuntimeError("disk on fire")
        return answer()

    record = federate(world(), tmp_path / "t", misbehaving(act))
    assert record.end["status"] == "degraded"
    assert "disk on fire" in record.lost[0][2]
    assert len(record.observations[1].uploads) == 3


def test_client_that_hangs_is_given_up_after_the_timeout(tmp_path: Path) -> None:
    def act(client, request, answer):
        if client == 0:
            time.sleep(30)
        return answer()

    started = time.monotonic()
    record = federate(world(federation={"rounds": 1, "timeout_seconds": 1.0}), tmp_path / "t", misbehaving(act))
    assert time.monotonic() - started < 15
    assert record.lost == ((1, 0, "client 0 did not answer within 1 s"),)
    assert [min(upload.senders) for upload in record.observations[0].uploads] == [1, 2, 3]


def test_too_few_answers_stop_the_run_and_keep_what_was_recorded(tmp_path: Path) -> None:
    def act(client, request, answer):
        if client > 0 and wire.round_of(request) == 2:
            raise RuntimeError("gone")
        return answer()

    with pytest.raises(FederationError, match=r"must be ≥ 3, got 1 in round 2"):
        federate(world(federation={"min_clients": 3}), tmp_path / "t", misbehaving(act))
    record = read(tmp_path / "t")
    assert record.end["status"] == "failed"
    assert len(record.observations[0].uploads) == 4


def test_only_recorded_rounds_keep_their_tensors(tmp_path: Path) -> None:
    record = federate(world(federation={"rounds": 3, "record_rounds": [2]}), tmp_path / "t")
    assert [observation.broadcast.round for observation in record.observations] == [2]
    assert record.released is not None
    assert (tmp_path / "t" / LINES).read_text().count('"sha256"') == 3 * 5 + 1


def test_last_models_are_kept_to_be_tested_and_are_no_observations(tmp_path: Path) -> None:
    every = federate(world(federation={"rounds": 4}), tmp_path / "every")
    record = federate(world(federation={"rounds": 4, "record_rounds": [2], "record_models": 2}), tmp_path / "t")
    assert [observation.broadcast.round for observation in record.observations] == [2]
    assert sorted(record.models) == [1, 3, 4]
    for number, (parameters, _) in record.models.items():
        assert all(torch.equal(tensor, every.models[number][0][name]) for name, tensor in parameters.items())


def test_transcript_header_holds_no_seed(tmp_path: Path) -> None:
    record = federate(world(seed=987654321), tmp_path / "t")
    assert "987654321" not in (tmp_path / "t" / LINES).read_text()
    assert "seed" not in record.header


def test_a_setting_may_be_infinite(tmp_path: Path) -> None:
    """What the transcript and the apps are told is standard JSON, which has no infinity of its own."""
    of = world(defenses=[{"name": "clip", "clip_norm": "inf"}], federation={"timeout_seconds": float("inf")})
    record = federate(of, tmp_path)
    assert record.header["defenses"][0]["clip_norm"] == "inf"
    assert record.end["status"] == "ok"
