"""The two drivers that start from an app bundle, as ``flwr run`` does: Flower's simulation engine, and a deployment on loopback.

Each federation has a SuperLink of its own, in a scratch folder of its own; nothing is written to the user's home, nothing is
installed, no telemetry is sent. The SuperLink and the SuperNodes listen on 127.0.0.1. Ray does as it likes: it **listens on all
interfaces**, in clear text, but gets a token for the occasion and turns away whoever comes without it; and it asks the cloud's
metadata address where it is.
"""

from __future__ import annotations

import http.client
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from os import cpu_count
from pathlib import Path
from typing import Any

import tomli_w

from simulator import fab
from simulator.engine import read_world
from simulator.errors import FederationError, SpecError, TranscriptError
from simulator.processes import POLL_SECONDS, Processes, free_ports
from simulator.transcript import LINES

START_UP_SECONDS = 300.0
"""From nothing to the first message: up to a minute with Ray on two busy cores."""
QUESTIONS = 6
"""Messages that a client answers in a round, at most: the stages of secure aggregation."""
LONGEST_SCRATCH = 40
"""Characters of the scratch folder's path that leave room for Ray's sockets below it (107 in all on Linux)."""
TAIL_LINES = 25
NO_RUN = "no run"


def run_simulation(run_config: dict[str, Any], clients: int, out: Path) -> None:
    """Run the apps on Flower's simulation engine: every client is a virtual node, served by a pool of Ray workers.

    Args:
        run_config: what both apps read as ``context.run_config``.
        clients: number of nodes.
        out: where the server writes its transcript.

    Raises:
        SpecError: Ray is not installed.
        TranscriptError: ``out`` holds a transcript already.
        FederationError: the federation did not get to its end; the message names the reason and the logs.
    """
    if find_spec("ray") is None:
        raise SpecError("driver simulation must have Ray, got none. Run `pip install 'fedpeek[simulation]'` or use the driver inprocess.")
    workers = min(clients, cpu_count() or 1)  # more would take 0.7 GB of memory each and idle
    federation = f"num-supernodes={clients} client-resources-num-cpus=1 client-resources-num-gpus=0.0 init-args-num-cpus={workers}"
    with _processes("simulation", out) as processes:
        (port,) = free_ports(1)
        superlink = _start_superlink(processes, port, "--simulation")
        _flwr_run(processes, superlink, port, run_config, "--federation-config", federation)


def run_deployment(run_config: dict[str, Any], clients: int, out: Path) -> None:
    """Run the apps on a SuperLink with one SuperNode for each client, each a process with its own home, on loopback.

    Flower starts a process for every message, which costs seconds: meant for few clients and rounds. Arguments and errors are
    those of :func:`run_simulation`, without Ray.
    """
    with _processes("deployment", out) as processes:
        port, *node_ports = free_ports(1 + clients)
        superlink = _start_superlink(processes, port)
        for client, node_port in enumerate(node_ports):
            identity = f"partition-id={client} num-partitions={clients}"
            address = ["--superlink", f"127.0.0.1:{port}", "--host", "127.0.0.1", "--port", str(node_port)]
            processes.start(f"supernode-{client}", ["flower-supernode", "--insecure", *address, "--node-config", identity])
        _flwr_run(processes, superlink, port, run_config)


@contextmanager
def _processes(driver: str, out: Path) -> Iterator[Processes]:
    """Processes in a new scratch folder, which is removed afterwards, unless the federation failed: then it keeps the logs."""
    if (out / LINES).exists():
        raise TranscriptError(f"{out} must not hold a transcript yet, got one. Choose another directory.")
    base = tempfile.gettempdir()
    scratch = Path(tempfile.mkdtemp(prefix="fedpeek-", dir=base if len(base) < LONGEST_SCRATCH else "/tmp")).resolve()
    try:
        with Processes(scratch) as processes:
            yield processes
    except _Failure as failure:
        raise FederationError(
            f"federation on the driver {driver} must get to its end, got {_reason(out) or failure} "
            f"Read the logs in {scratch}; what was recorded is in {out}."
        ) from None
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    shutil.rmtree(scratch, ignore_errors=True)


class _Failure(Exception):
    """What went wrong, with the end of the log that tells more."""

    def __init__(self, what: str, log: Path) -> None:
        lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
        super().__init__("\n".join([f"{what}; {log.name} ends with:", *lines[-TAIL_LINES:], ""]))


def _start_superlink(processes: Processes, port: int, *options: str) -> subprocess.Popen[bytes]:
    command = ["flower-superlink", "--insecure", "--isolation", "subprocess", "--host", "127.0.0.1", "--port", str(port)]
    superlink = processes.start("superlink", [*command, "--disable-runtime-dependency-installation", *options])
    deadline = time.monotonic() + START_UP_SECONDS
    while not _healthy(port):
        if superlink.poll() is not None:
            raise _Failure(f"a SuperLink that ended with exit code {superlink.returncode}", processes.log("superlink"))
        if time.monotonic() > deadline:
            raise _Failure(f"no SuperLink within {START_UP_SECONDS:g} s", processes.log("superlink"))
        time.sleep(POLL_SECONDS)
    return superlink


def _healthy(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == http.client.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _flwr_run(processes: Processes, superlink: subprocess.Popen[bytes], port: int, run_config: dict[str, Any], *options: str) -> None:
    """``flwr run`` the staged app and follow it to the end; the SuperLink tells how it ended, the exit code does not."""
    app = fab.stage(processes.scratch / "app")
    settings = processes.scratch / "run.toml"
    settings.write_text(tomli_w.dumps(run_config))
    place = processes.place("run")
    connection = {"address": f"127.0.0.1:{port}", "insecure": True}
    (processes.home("run") / "config.toml").write_text(tomli_w.dumps({"superlink": {"default": "fedpeek", "fedpeek": connection}}))

    seconds = _most_seconds(run_config)
    deadline = time.monotonic() + seconds
    run = processes.start("run", ["flwr", "run", str(app), "fedpeek", "--stream", "--run-config", str(settings), *options])
    status = ""
    while not status.startswith("finished"):
        if superlink.poll() is not None:
            raise _Failure(f"a SuperLink that ended with exit code {superlink.returncode}", processes.log("superlink"))
        if time.monotonic() > deadline:
            raise _Failure(f"no end within {seconds:g} s", processes.log("run"))
        if run.poll() is None:
            time.sleep(POLL_SECONDS)
        elif (status := _status(place)) == NO_RUN:
            raise _Failure(status, processes.log("run"))
    if status != "finished:completed":
        raise _Failure(status, processes.log("run"))


def _most_seconds(run_config: dict[str, Any]) -> float:
    """When the watchdog bites: every wait of the server may last as long as a client's answer may."""
    federation = read_world(run_config).federation
    return START_UP_SECONDS + federation.timeout_seconds * (2 + QUESTIONS * federation.rounds)


def _status(place: dict[str, Any]) -> str:
    """What the SuperLink says of its only run: ``running``, ``finished:completed``, ``finished:failed``, …"""
    command = ["flwr", "list", "fedpeek", "--format", "json"]
    try:
        listed = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=START_UP_SECONDS, check=False, **place)
        (run,) = json.loads(listed.stdout)["runs"]
        return str(run["status"])
    except (subprocess.TimeoutExpired, ValueError, KeyError, TypeError):
        return NO_RUN


def _reason(out: Path) -> str:
    """The reason in the last event of the server's transcript; empty if the server did not get to seal it."""
    path = out / LINES
    lines = path.read_bytes().splitlines() if path.is_file() else []
    try:
        event = json.loads(lines[-1]) if lines else {}
    except ValueError:  # cut short within a line
        return ""
    return str(event.get("reason", "")) if event.get("kind") == "end" else ""
