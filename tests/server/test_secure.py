"""Secure aggregation over Flower messages: the server learns the sum and nothing of any one client's update."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from clients.local import local_upload
from simulator import wire
from simulator.errors import FederationError
from simulator.network import network
from simulator.transcript import LINES
from simulator.types import Broadcast
from simulator.world import World
from tests.federations import equal, federate, misbehaving, world

SECURE = [{"name": "secure_aggregation"}]
COHORT = {"clients": 6, "rounds": 1}
CASES = {
    "fedsgd": {},
    "fedavg, unequal clients": {
        "training": {"algorithm": "fedavg", "batch_size": 64},
        "federation": {**COHORT, "partition": "dirichlet", "alpha": 0.5},
    },
    "batchnorm": {"model": {"name": "resnet20", "width": 4}, "training": {"batch_size": 4}},
}


def secure(mode: str = "protocol", **settings) -> World:
    return world(**{"federation": COHORT, "defenses": [{"name": "secure_aggregation", "mode": mode}], **settings})


def plain_uploads(of: World, broadcast: Broadcast) -> list:
    model = network(of.model, of.data.load().schema, of.training, of.seed)
    return [local_upload(of, model, broadcast, client) for client in range(of.federation.clients)]


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_protocol_and_quantized_show_the_same_bits_and_they_are_the_weighted_mean(settings: dict, tmp_path: Path) -> None:
    of = secure(**settings)
    (real,) = federate(of, tmp_path / "real").observations
    (quantized,) = federate(secure("quantized", **settings), tmp_path / "quantized").observations
    assert equal(real, quantized)
    uploads = plain_uploads(of, real.broadcast)
    total = sum(upload.num_examples for upload in uploads)
    assert real.upload.senders == frozenset(range(6))
    assert real.upload.num_examples == total
    for name, got in real.upload.update.tensors.items():
        mean = sum(u.num_examples * u.update.tensors[name].double() for u in uploads) / total
        assert torch.allclose(got.double(), mean, atol=1e-6)
    for name, got in real.upload.buffers.items():
        mean = sum(u.num_examples * u.buffers[name].double() for u in uploads) / total
        assert torch.allclose(got.double(), mean, atol=1e-4)


@pytest.mark.parametrize("mode", ["protocol", "quantized"])
def test_no_clients_own_update_is_in_the_transcript(mode: str, tmp_path: Path) -> None:
    of = secure(mode)
    record = federate(of, tmp_path / "t")
    uploads = plain_uploads(of, record.observations[0].broadcast)
    own = [np.concatenate([t.flatten().numpy() for t in u.update.tensors.values()]) for u in uploads]
    seen = 0
    for path in (tmp_path / "t").glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            body = tensor.numpy().tobytes()
            assert not any(update.tobytes()[: 4 * 256] in body for update in own)
            if tensor.dtype == torch.uint8 and len(body) > 4 * own[0].size:  # a masked vector
                seen += 1
                words = np.frombuffer(body[-len(body) // 4 * 4 :][: 4 * own[0].size], np.uint32).astype(float)
                assert max(abs(np.corrcoef(words, update)[0, 1]) for update in own) < 0.08
                assert "update" not in name
    assert seen == (6 if mode == "protocol" else 0)
    events = [json.loads(line) for line in (tmp_path / "t" / LINES).read_text().splitlines()]
    assert [event["senders"] for event in events if event["kind"] == "upload"] == [[0, 1, 2, 3, 4, 5]]
    assert not any("num-examples" in json.dumps(event) for event in events)


@pytest.mark.parametrize(("stage", "senders"), [("advertise", 5), ("share", 5), ("mask", 5), ("unmask", 6)])
def test_client_may_leave_at_every_stage(stage: str, senders: int, tmp_path: Path) -> None:
    def act(client, request, answer):
        if client == 4 and wire.unpack_stage(request.content)[0] == stage:
            raise RuntimeError("gone")
        return answer()

    of = secure()
    record = federate(of, tmp_path / "t", misbehaving(act))
    (observation,) = record.observations
    assert len(observation.upload.senders) == senders
    assert record.end["status"] == "degraded"
    assert [client for _, client, _ in record.lost] == [4]
    assert f"(stage {stage})" in record.lost[0][2]
    uploads = [upload for upload in plain_uploads(of, observation.broadcast) if upload.senders <= observation.upload.senders]
    for name, got in observation.upload.update.tensors.items():
        mean = sum(upload.update.tensors[name].double() for upload in uploads) / senders
        assert torch.allclose(got.double(), mean, atol=1e-6)


@pytest.mark.parametrize("stage", ["advertise", "share", "mask"])
def test_client_whose_reply_was_lost_takes_part_again_in_the_next_round(stage: str, tmp_path: Path) -> None:
    def act(client, request, answer):
        message = answer()  # the client acted: its key material is there, only its reply does not arrive
        if client == 4 and wire.unpack_stage(request.content)[0] == stage and not lost:
            lost.append(stage)
            raise RuntimeError("gone")
        return message

    lost: list[str] = []
    record = federate(secure(federation={**COHORT, "rounds": 3}), tmp_path / "t", misbehaving(act))
    assert [len(observation.upload.senders) for observation in record.observations] == [5, 6, 6]


def test_why_a_client_left_stays_with_it_whatever_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from clients import secure as client_side

    def train(*_):
        raise ValueError("cannot train on a record with label 7")

    monkeypatch.setattr(client_side, "local_upload", train)
    with pytest.raises(FederationError) as caught:
        federate(secure(), tmp_path / "t")
    assert "label 7" not in str(caught.value) + (tmp_path / "t" / LINES).read_text()


def test_too_few_clients_stop_the_run_with_the_stage_and_no_aggregate(tmp_path: Path) -> None:
    def act(client, request, answer):
        if client >= 4 and wire.unpack_stage(request.content)[0] == "mask":
            raise RuntimeError("gone")
        return answer()

    with pytest.raises(FederationError, match=r"secure aggregation stopped in round 1: .*threshold = 5.*got 4"):
        federate(secure(), tmp_path / "t", misbehaving(act))


def test_client_refuses_to_upload_in_the_clear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from server import strategy

    monkeypatch.setattr(strategy, "opened", lambda world: nullcontext(strategy.collect_uploads))  # a server that forgot the protocol
    with pytest.raises(FederationError, match="got a request for a plain upload. Refused"):
        federate(secure(), tmp_path / "t")


def test_client_refuses_a_lower_threshold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from defenses.channel.secure_aggregation import SecureAggregation
    from server import secure as server_side

    original = SecureAggregation.parameters
    monkeypatch.setattr(
        server_side.SecureAggregation, "parameters", lambda self, **kw: replace(original(self, **kw), threshold=4) if kw["run_id"] else None
    )
    # both sides share the class in one process, so the client's own view is restored for its own call
    from clients import secure as client_side

    monkeypatch.setattr(client_side, "_agreed", _strict(original, client_side._agreed))
    with pytest.raises(FederationError, match="stopped in round 1"):
        federate(secure(), tmp_path / "t")


def _strict(parameters, agreed):
    from unittest.mock import patch

    from defenses.channel.secure_aggregation import SecureAggregation

    def check(*args):
        with patch.object(SecureAggregation, "parameters", parameters):
            return agreed(*args)

    return check


def test_a_private_number_out_of_range_stays_with_the_client(tmp_path: Path) -> None:
    of = world(federation=COHORT, defenses=[{"name": "secure_aggregation", "clip_range": 1e-4}])
    with pytest.raises(FederationError) as caught:
        federate(of, tmp_path / "t")
    assert "left secure aggregation" in str(caught.value)
    lost = [json.loads(line) for line in (tmp_path / "t" / LINES).read_text().splitlines() if '"kind": "lost"' in line]
    assert [event["reason"] for event in lost] == [
        f"client {c} failed: ProtocolAbort: left secure aggregation (stage mask)" for c in range(6)
    ]
