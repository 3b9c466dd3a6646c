"""The processes of one federation: started away from the user's folders, and stopped to the last grandchild.

Flower detaches its helpers and Ray starts its own, so a process group does not reach them all. Whatever carries the federation's
scratch folder in its environment is ours, and so are its children.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from simulator.fab import ROOT

PROC = Path("/proc")
STOP_SECONDS = 15.0
"""How long processes have to end after SIGTERM: Ray takes up to 11 s on two busy cores."""
POLL_SECONDS = 0.2


def free_ports(count: int) -> list[int]:
    """Ports on loopback that nobody listens on; they are held together, so that they differ."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]


def plugin_path() -> str:
    """This process's module search path, so that dotted paths in a world resolve in every process.

    Our own folder is left out: the apps shall run from their bundle, and Ray's workers would find the checkout first.
    """
    folders = [Path(entry or os.curdir).resolve() for entry in sys.path]
    return os.pathsep.join(str(folder) for folder in dict.fromkeys(folders) if folder != ROOT)


class Processes:
    """Child processes that see one scratch folder and nothing of the user's Flower or Ray.

    A context manager: leaving it, by whatever way, stops them all.

    Args:
        scratch: holds their homes, working directories and logs (``NAME.log``). Keep it short: Ray puts sockets below it, whose
            paths may have 107 characters.
    """

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self._started: list[subprocess.Popen[bytes]] = []
        scripts = os.pathsep.join([sysconfig.get_path("scripts"), str(Path(sys.executable).parent)])
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("FLWR_", "RAY_"))}
        self._environment = inherited | {
            "PATH": os.pathsep.join([scripts, os.environ.get("PATH", os.defpath)]),  # Flower starts its helpers by name
            "PYTHONPATH": plugin_path(),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "TMPDIR": str(scratch),
            "RAY_TMPDIR": str(scratch),
            "RAY_AUTH_MODE": "token",  # Ray listens on all interfaces and runs what it is sent
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "OMP_NUM_THREADS": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def place(self, name: str) -> dict[str, Any]:
        """Working directory and environment of the process ``name``, in the words of ``subprocess``; each has its own FLWR_HOME."""
        directory, home = self.scratch / name / "cwd", self.home(name)
        directory.mkdir(parents=True, exist_ok=True)
        home.mkdir(exist_ok=True)
        return {"cwd": directory, "env": self._environment | {"FLWR_HOME": str(home)}}

    def home(self, name: str) -> Path:
        """FLWR_HOME of the process ``name``."""
        return self.scratch / name / "home"

    def log(self, name: str) -> Path:
        """The file with all that the process ``name`` and its children print."""
        return self.scratch / f"{name}.log"

    def start(self, name: str, command: Sequence[str]) -> subprocess.Popen[bytes]:
        """Start a process in its own session, so that Ctrl-C reaches us first and we end it in order."""
        with self.log(name).open("wb") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, **self.place(name)
            )
        self._started.append(process)
        return process

    def stop(self) -> None:
        """End every process: SIGTERM to all, SIGKILL to those that are still there after a while."""
        for way in (signal.SIGTERM, signal.SIGKILL):
            deadline = time.monotonic() + STOP_SECONDS
            for pid in self.alive():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, way)
            while self.alive() and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)

    def alive(self) -> set[int]:
        """The ids of all our processes that still run; without /proc (not Linux) only of those that we started ourselves."""
        ours = {process.pid for process in self._started if process.poll() is None}
        parents = _parents()
        ours |= {pid for pid in parents if self._carries_mark(pid)}
        while more := {pid for pid, parent in parents.items() if parent in ours} - ours:
            ours |= more
        return ours - {os.getpid()}

    def _carries_mark(self, pid: int) -> bool:
        try:
            return f"={self.scratch}".encode() in (PROC / str(pid) / "environ").read_bytes()
        except OSError:  # it has just ended, or belongs to another user
            return False


def _parents() -> dict[int, int]:
    """The parent of every process that is not a zombie."""
    parents = {}
    for entry in PROC.glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]  # the name before it may hold anything
            if state != "Z":
                parents[int(entry.name)] = int(parent)
    return parents
