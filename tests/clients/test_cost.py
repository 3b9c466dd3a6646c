"""What a round costs is noted at the client and stays there; what the server counts is what crossed."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from clients.cost import FILE, noted, seconds_of_a_round
from server import strategy
from tests.federations import federate, world


def burn(seconds: float) -> None:
    started = time.thread_time()
    while time.thread_time() - started < seconds:
        pass


def test_the_cost_of_a_round_is_the_median_over_clients_of_all_their_messages(tmp_path: Path) -> None:
    settings = {"out-dir": str(tmp_path)}
    for client, stages in ((0, [0.01, 0.01]), (1, [0.03]), (2, [0.2])):
        for seconds in stages:
            with noted(settings, client, "1"):
                burn(seconds)
    with noted(settings, 0, "0"):  # the greeting is no round
        burn(0.01)
    assert seconds_of_a_round(tmp_path) == pytest.approx(0.03, rel=0.2)


def test_nothing_is_noted_without_a_directory_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for settings in ({}, {"out-dir": ""}, {"out-dir": "."}, {"out-dir": str(tmp_path / "missing")}):
        with noted(settings, 0, "1"):
            pass
    assert not list(tmp_path.iterdir())
    assert seconds_of_a_round(tmp_path) is None


def test_bytes_and_seconds_of_a_federation(tmp_path: Path) -> None:
    """Float32 parameters both ways, by hand; the server never sees what its clients note."""
    of = world(federation={"clients": 3, "rounds": 2}, model={"name": "mlp", "hidden": [8]})
    record = federate(of, tmp_path)
    size = 4 * (64 * 8 + 8 + 8 * 10 + 10) + 4 * 128  # Flower sends each of four tensors in NumPy's format, whose header has 128 bytes
    assert record.end["upload_bytes"] == size
    assert record.end["download_bytes"] == size
    assert 0 < record.end["server_seconds"] < 5
    assert seconds_of_a_round(tmp_path) is not None
    assert len((tmp_path / FILE).read_text().splitlines()) == 3 * 3  # a greeting and two rounds
    assert "seconds" not in (tmp_path / "transcript.jsonl").read_text().replace("timeout_seconds", "").replace("server_seconds", "")


def test_what_the_enclave_worked_counts_as_the_servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a process of its own, in which Python and NumPy alone take a tenth of a second to start."""
    of = world(federation={"clients": 3, "rounds": 1}, defenses=["simulated_enclave"])
    whole = federate(of, tmp_path / "whole").end["server_seconds"]
    monkeypatch.setattr(strategy, "_cpu_seconds", time.thread_time)
    assert whole > federate(of, tmp_path / "host").end["server_seconds"] + 0.05
