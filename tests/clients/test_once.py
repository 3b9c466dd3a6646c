"""A round is answered once: two answers to one round would carry the same noise, and their difference none."""

from __future__ import annotations

from pathlib import Path

import pytest
from flwr.app import RecordDict

from clients import app as client_module
from clients.once import answer_once
from simulator import engine, wire
from simulator.errors import ProtocolAbort
from simulator.inprocess import InProcessGrid
from simulator.network import network, tensors
from simulator.types import Broadcast
from tests.federations import world

NOISY = [{"name": "client_dp", "clip_norm": 1.0, "noise_multiplier": 1.0}]


def replies(defenses: list[dict[str, object]], rounds: list[int], tmp_path: Path) -> list[str]:
    """What client 0 answers to broadcasts of these rounds, each of another model: nothing if it answers, else why not."""
    of = world(defenses=defenses, federation={"clients": 2, "rounds": 3})
    grid = InProcessGrid(client_module.app, 2, engine.run_config(of, tmp_path))
    model = network(of.architecture, of.data.load().schema, of.training, of.seed)
    parameters, buffers = tensors(model)
    said = []
    for place, round in enumerate(rounds):
        sent = {name: tensor + 0.01 * place for name, tensor in parameters.items()}
        content = wire.pack_broadcast(Broadcast(round, sent, buffers, of.training))
        message = grid.create_message(content, wire.TRAIN, next(iter(grid.get_node_ids())), str(round), ttl=60.0)
        (answer,) = grid.send_and_receive([message])
        said.append(answer.error.reason or "" if answer.has_error() else "")
    return said


def test_a_second_model_of_a_round_gets_no_answer(tmp_path: Path) -> None:
    first, again, earlier, later, beyond = replies(NOISY, [2, 2, 1, 3, 4], tmp_path)
    assert (first, later) == ("", "")
    assert "round must be in 3..3, each answered once, got 2" in again
    assert "got 1. Refused" in earlier
    assert "got 4. Refused" in beyond


def test_the_note_is_made_before_there_is_an_answer() -> None:
    state, of = RecordDict(), world()
    answer_once(of, 1, state)
    with pytest.raises(ProtocolAbort, match="each answered once, got 1"):
        answer_once(of, 1, state)
    answer_once(of, 2, state)
