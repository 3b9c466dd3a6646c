"""The drivers: one world, the same bits on all three; isolation, failures, and no process left behind."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from flwr.cli.build import build_fab_from_disk

from clients.app import app as client_app
from server.app import app as server_app
from simulator import config, engine, fab, superlink, transcript
from simulator.errors import FederationError, SpecError, TranscriptError
from simulator.processes import Processes, free_ports
from simulator.world import World
from tests.federations import equal

CLIENTS, ROUNDS = 4, 2
BATCHNORM: dict[str, Any] = {
    "data": {"name": "synthetic", "records": 200, "size": 8},
    "model": "resnet20",
    "federation": {"clients": CLIENTS, "rounds": ROUNDS},
    "training": {"algorithm": "fedavg", "batch_size": 16},
}
HALF: dict[str, Any] = BATCHNORM | {
    "training": {"algorithm": "fedavg", "batch_size": 16, "optimizer": "adam", "learning_rate": 0.01, "upload_dtype": "bfloat16"},
}
SMALL: dict[str, Any] = BATCHNORM | {"model": {"name": "mlp", "hidden": [16]}, "training": {"batch_size": 2}}

FAILING = """
import os
from dataclasses import dataclass

from simulator.defense import Defense


@dataclass(frozen=True)
class Raises(Defense):
    def on_update(self, update, context):
        if (context.client, context.round) == (2, 2):
            raise RuntimeError("this client has had enough")
        return update


@dataclass(frozen=True)
class Dies(Defense):
    def on_update(self, update, context):
        if (context.client, context.round) == (2, 2):
            os._exit(3)
        return update
"""


@pytest.fixture
def sandbox(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An own home and an own folder for temporary files, with a short path; afterwards no process may be left."""
    folder = Path(tempfile.mkdtemp(prefix="fp-", dir="/tmp"))
    for name in ("home", "tmp", "plugins"):
        (folder / name).mkdir()
    monkeypatch.setenv("HOME", str(folder / "home"))
    elsewhere = SimpleNamespace(gettempdir=lambda: str(folder / "tmp"), mkdtemp=tempfile.mkdtemp)
    monkeypatch.setattr(superlink, "tempfile", elsewhere)  # not for torch, which remembers where it put its cache
    monkeypatch.syspath_prepend(str(folder / "plugins"))
    (folder / "plugins" / "failing_defense.py").write_text(FAILING)
    yield folder
    assert not Processes(folder).alive()
    assert not list((folder / "home").iterdir()), "something was written to the user's home"
    sys.modules.pop("failing_defense", None)
    shutil.rmtree(folder)


def run(settings: dict[str, Any], driver: engine.Driver, out: Path) -> transcript.Record:
    engine.run(config.build(World, settings), out, server_app, client_app, driver)
    return transcript.read(out)


def scratches(sandbox: Path) -> list[Path]:
    return list((sandbox / "tmp").glob("fedpeek-*"))


def same_model(left: transcript.Record, right: transcript.Record) -> bool:
    assert left.released is not None
    assert right.released is not None
    return all(
        mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
        for mine, theirs in zip(left.released, right.released, strict=True)
    )


def test_the_bundle_holds_our_code_and_nothing_else(tmp_path: Path) -> None:
    bundle = build_fab_from_disk(fab.stage(tmp_path / "app"))
    names = set(zipfile.ZipFile(io.BytesIO(bundle)).namelist())
    code = {str(path.relative_to(fab.ROOT)) for package in fab.PACKAGES for path in (fab.ROOT / package).rglob("*.py")}
    assert names == code | {"pyproject.toml", ".info/CONTENT"}
    assert {"server/app.py", "clients/app.py", "defenses/__init__.py", "simulator/data/synthetic.py"} <= names
    assert len(bundle) < 10 * 2**20


def test_the_checkout_and_the_staged_app_are_the_same_app() -> None:
    pyproject = tomllib.loads((fab.ROOT / "pyproject.toml").read_text())
    assert fab.manifest() == pyproject["tool"]["flwr"]["app"]


def test_simulation_without_ray_is_refused_before_anything_starts(sandbox: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(superlink, "find_spec", lambda name: None)
    with pytest.raises(SpecError, match=r"pip install 'fedpeek\[simulation\]'"):
        run(SMALL, "simulation", sandbox / "out")
    assert not scratches(sandbox)


@pytest.mark.parametrize("driver", ["simulation", "deployment"])
def test_a_transcript_is_never_continued(sandbox: Path, driver: engine.Driver) -> None:
    (sandbox / "out").mkdir()
    (sandbox / "out" / transcript.LINES).write_text("")
    with pytest.raises(TranscriptError, match="Choose another directory"):
        run(SMALL, driver, sandbox / "out")
    assert not scratches(sandbox)


def test_processes_see_nothing_of_the_user(sandbox: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.1:6379")
    monkeypatch.setenv("FLWR_HOME", "/nowhere")
    first, second = (Processes(sandbox / "tmp").place(name) for name in ("first", "second"))
    environment = first["env"]
    assert "RAY_ADDRESS" not in environment
    assert Path(environment["FLWR_HOME"]).is_relative_to(sandbox / "tmp")
    assert environment["FLWR_HOME"] != second["env"]["FLWR_HOME"]
    assert first["cwd"] != second["cwd"]
    assert not list(first["cwd"].iterdir())
    wanted = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1"}
    wanted |= {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1", "RAY_TMPDIR": str(sandbox / "tmp")}
    assert wanted.items() <= environment.items()
    search = environment["PYTHONPATH"].split(os.pathsep)
    assert str(sandbox / "plugins") in search
    assert str(fab.ROOT) not in search


def test_detached_grandchildren_are_stopped(sandbox: Path) -> None:
    with Processes(sandbox / "tmp") as processes:
        processes.start("parent", ["sh", "-c", "setsid sleep 600 & exit"]).wait()
        processes.start("child", ["sh", "-c", "sleep 600 & sleep 600"])
        deadline = time.monotonic() + 30
        while len(processes.alive()) < 4 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(processes.alive()) == 4
    assert not processes.alive()


def test_free_ports_differ() -> None:
    assert len(set(free_ports(20))) == 20


@pytest.mark.slow
@pytest.mark.parametrize(("driver", "settings"), [("simulation", BATCHNORM), ("deployment", BATCHNORM), ("simulation", HALF)])
def test_every_driver_gives_the_same_bits(sandbox: Path, driver: engine.Driver, settings: dict[str, Any]) -> None:
    expected = run(settings, "inprocess", sandbox / "inprocess")
    got = run(settings, driver, sandbox / driver)
    assert expected.end["status"] == got.end["status"] == "ok"
    assert expected.header == got.header
    assert len(got.observations) == ROUNDS
    assert all(len(observation.uploads) == CLIENTS for observation in got.observations)
    assert all(equal(mine, theirs) for mine, theirs in zip(expected.observations, got.observations, strict=True))
    assert same_model(expected, got)
    assert not scratches(sandbox), "a success leaves no scratch folder"


@pytest.mark.slow
def test_a_client_that_raises_is_named(sandbox: Path) -> None:
    record = run(SMALL | {"defenses": ["failing_defense:Raises"]}, "simulation", sandbox / "out")
    assert record.end["status"] == "degraded"
    ((round, client, reason),) = record.lost
    assert (round, client) == (2, 2)
    assert "this client has had enough" in reason
    assert [len(observation.uploads) for observation in record.observations] == [CLIENTS, CLIENTS - 1]


@pytest.mark.slow
def test_a_dead_simulation_worker_ends_the_run(sandbox: Path) -> None:
    settings = SMALL | {"defenses": ["failing_defense:Dies"], "federation": {"clients": CLIENTS, "rounds": 3}}
    with pytest.raises(FederationError, match="dead one in round 2") as failure:
        run(settings, "simulation", sandbox / "out")
    (scratch,) = scratches(sandbox)
    assert str(scratch) in str(failure.value)
    assert "ActorDiedError" in (scratch / "run.log").read_text()
    record = transcript.read(sandbox / "out")
    assert record.end["status"] == "failed"
    assert len(record.observation(1).uploads) == CLIENTS


@pytest.mark.slow
def test_a_dead_client_of_a_deployment_is_named(sandbox: Path) -> None:
    patience = {"clients": CLIENTS, "rounds": ROUNDS, "timeout_seconds": 120}  # a SuperNode does not say that its client died
    record = run(SMALL | {"defenses": ["failing_defense:Dies"], "federation": patience}, "deployment", sandbox / "out")
    assert record.end["status"] == "degraded"
    assert [(round, client) for round, client, _ in record.lost] == [(2, 2)]
    assert [len(observation.uploads) for observation in record.observations] == [CLIENTS, CLIENTS - 1]


@pytest.mark.slow
def test_an_app_that_cannot_start_shows_its_log(sandbox: Path) -> None:
    gone = sandbox / "plugins" / "failing_defense.py"
    world = config.build(World, SMALL | {"defenses": ["failing_defense:Raises"]})
    gone.unlink()  # this process has imported it, the others cannot
    with pytest.raises(FederationError, match="No module named 'failing_defense'") as failure:
        engine.run(world, sandbox / "out", server_app, client_app, "simulation")
    assert "run.log ends with" in str(failure.value)


@pytest.mark.slow
def test_the_watchdog_ends_a_run_that_does_not(sandbox: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(superlink, "_most_seconds", lambda run_config: 4.0)
    with pytest.raises(FederationError, match="no end within 4 s"):
        run(SMALL, "simulation", sandbox / "out")


@pytest.mark.slow
def test_ctrl_c_leaves_no_process(sandbox: Path) -> None:
    script = f"""
        import sys, tempfile
        from pathlib import Path
        sys.path.insert(0, {str(fab.ROOT)!r})
        tempfile.tempdir = {str(sandbox / "tmp")!r}
        from clients.app import app as client_app
        from server.app import app as server_app
        from simulator import config, engine
        from simulator.world import World
        engine.run(config.build(World, {SMALL!r}), Path({str(sandbox / "out")!r}), server_app, client_app, "simulation")
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 300
    while not list((sandbox / "tmp").glob("*/ray/session_*")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.2)
    assert process.poll() is None, "it ended before Ray was up"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert b"KeyboardInterrupt" in errors
    assert not scratches(sandbox)
