"""Attacks that do what no attack should, for the tests of the process that they run in. By dotted path; not registered."""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from simulator.adversary import Knowledge, Reconstruction
from simulator.types import Observation

ROOT = Path(__file__).parents[2]
MARKER = 31337
"""The world's seed in the tests: whoever has it has the truth."""


class _Willing:
    def supports(self, view: Observation, knowledge: Knowledge) -> str | None:
        return None


def _blank(knowledge: Knowledge, records: int = 0) -> Reconstruction:
    count = records or knowledge.num_examples
    return Reconstruction(torch.full((count, *knowledge.schema.shape), 0.5), torch.zeros(count, dtype=torch.int64))


@dataclass(frozen=True)
class Prying(_Willing):
    """Looks for the truth wherever it might be, and reports what it found as the reason of its failure."""

    run: str = ""

    def __call__(self, view: Observation, knowledge: Knowledge, *, rng: torch.Generator) -> Reconstruction:
        tries: dict[str, Callable[[], Any]] = {
            **{f"import {name}": lambda name=name: bool(importlib.import_module(name)) for name in (
                "clients.private", "experiments.trial", "server.curious", "defenses.accounting", "simulator.world", "simulator.data",
                "simulator.dataset", "simulator.wire", "simulator.engine", "simulator.transcript",
            )},
            "source of clients.private": lambda: len((ROOT / "clients" / "private.py").read_text()),
            "run the source of clients.private": lambda: bool(exec(compile((ROOT / "clients/private.py").open().read(), "x", "exec"), {})),
            "images in memory": lambda: _images(knowledge),
            "world in memory": lambda: [type(item).__name__ for item in gc.get_objects() if type(item).__name__ in ("World", "Victim", "Splits")],
            "modules": lambda: [name for name in sys.modules if name.split(".")[0] in ("clients", "server", "experiments", "defenses", "flwr")],
            "environment": lambda: sorted(set(os.environ) - {"PATH", "HOME", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR", "LD_LIBRARY_PATH"}),
            "command line": lambda: [word for word in sys.argv if word],
            "own directory": lambda: os.listdir("."),
            "descriptors": lambda: sorted(os.readlink(f"/proc/self/fd/{fd}").split(":")[0] for fd in os.listdir("/proc/self/fd") if _open(fd)),
            "spec in the parent's directory": lambda: _secret(Path(f"/proc/{os.getppid()}/cwd")),
            "spec of the run": lambda: _secret(Path(self.run)),
            "pictures of the run": lambda: [path.read_bytes() for path in Path(self.run).glob("reconstructions/*")],
            "transcript of the run": lambda: len((Path(self.run) / "transcript").read_bytes()),
            "files of the run": lambda: os.listdir(self.run),
            "parent's environment": lambda: len(Path(f"/proc/{os.getppid()}/environ").read_bytes()),
            "parent's memory": lambda: _memory(os.getppid()),
            "data set that ships with a package": lambda: _digits(),
            "another process": lambda: subprocess.run(["cat", f"{self.run}/spec.toml"], capture_output=True, check=True).stdout,
            "fork": lambda: _fork(),
        }  # fmt: skip
        found = {}
        for what, attempt in tries.items():
            try:
                found[what] = str(attempt())
            except (ImportError, PermissionError) as error:
                found[what] = f"refused: {type(error).__name__[0]}"
            except OSError as error:
                found[what] = repr(error)
        Path("report.json").write_text(json.dumps(found))  # its own directory is there to be used
        raise RuntimeError(Path("report.json").read_text())


def _images(knowledge: Knowledge) -> int:
    shape, known = knowledge.schema.shape, {id(knowledge.public)}
    tensors = [item for item in gc.get_objects() if issubclass(type(item), torch.Tensor) and id(item) not in known]  # wakes no lazy module
    return sum(tensor.shape[-3:] == torch.Size(shape) for tensor in tensors)


def _open(fd: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{fd}")


def _secret(directory: Path) -> str:
    return next((line for line in (directory / "spec.toml").read_text().splitlines() if "secret" in line), "none")


def _memory(process: int) -> int:
    with open(f"/proc/{process}/mem", "rb") as memory:
        return len(memory.read(1))


def _fork() -> int:
    child = os.fork()
    if not child:
        os._exit(0)
    return os.waitpid(child, 0)[0]


def _digits() -> int:
    from sklearn.datasets import load_digits

    return len(load_digits().images)


@dataclass(frozen=True)
class Dying(_Willing):
    """Takes its process with it on the upload of one client, in one of several ways."""

    how: str = "exit"
    client: int = 1

    def __call__(self, view: Observation, knowledge: Knowledge, *, rng: torch.Generator) -> Reconstruction:
        if self.client in view.upload.senders:
            die(self.how)
        return _blank(knowledge)


@dataclass(frozen=True)
class DyingTogether(_Willing):
    """Dies where it takes many victims at once, but not one by one."""

    def __call__(self, view: Observation, knowledge: Knowledge, *, rng: torch.Generator) -> Reconstruction:
        return _blank(knowledge)

    def many(self, views: Any, knowledge: Any, *, rngs: Any) -> list[Reconstruction]:
        os._exit(5)


def die(how: str) -> None:
    if how == "exit":
        os._exit(7)
    if how == "segfault":
        ctypes.string_at(0)
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "closes the pipe":
        time.sleep(0.2)  # until the thread that waits for jobs is in its read: it would end the process at a closed pipe
        os.closerange(3, 64)
        time.sleep(600)
    for fd in range(3, 64):  # speaks out of turn
        try:
            os.write(fd, {"shouts": b"\x00" * 7 + b"\x04oops", "announces a terabyte": (1 << 40).to_bytes(8, "big")}[how])
        except OSError:
            continue


@dataclass(frozen=True)
class Garbage(_Willing):
    """Answers what is no answer."""

    what: str = ""

    def __call__(self, view: Observation, knowledge: Knowledge, *, rng: torch.Generator) -> Reconstruction:
        good = _blank(knowledge)
        assert good.inputs is not None
        answers: dict[str, Callable[[], Any]] = {
            "nothing": lambda: None,
            "text": lambda: "the image",
            "wrong shape": lambda: replace(good, inputs=torch.zeros(1, 3, 4, 4)),
            "no records": lambda: Reconstruction(good.inputs[:0], good.labels[:0]),
            "many guesses": lambda: _blank(knowledge, 10 * knowledge.num_examples),
            "huge": lambda: Reconstruction(torch.zeros(knowledge.num_examples, 1).expand(-1, 1 << 28), good.labels),
            "labels as floats": lambda: replace(good, labels=good.labels.float()),
            "labels missing": lambda: replace(good, labels=None),  # type: ignore[arg-type]
            "integers for images": lambda: replace(good, inputs=good.inputs.long()),
            "another's time": lambda: replace(good, seconds=1e6),
            "negative time": lambda: replace(good, seconds=-1.0),
            "certificates for others": lambda: replace(good, certificate=("exact",) * 77),
            "objective is text": lambda: replace(good, objective="low"),  # type: ignore[arg-type]
            "nan": lambda: replace(good, inputs=torch.full_like(good.inputs, torch.nan)),
            "infinite": lambda: replace(good, inputs=torch.full_like(good.inputs, float("inf"))),
            "out of range": lambda: replace(good, inputs=torch.full_like(good.inputs, -3e38)),
            "sparse": lambda: replace(good, inputs=good.inputs.to_sparse()),
            "terminal codes": lambda: replace(good, certificate=("\x1b[2Jexact",) * len(good.labels)),
        }
        if self.what == "raises":
            raise ValueError("\x1b[2J" + "x" * 100_000)
        return answers[self.what]()  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Careless(_Willing):
    """Draws from the global generators and keeps a memory between victims."""

    def __call__(self, view: Observation, knowledge: Knowledge, *, rng: torch.Generator) -> Reconstruction:
        return replace(_blank(knowledge), inputs=torch.rand(knowledge.num_examples, *knowledge.schema.shape))


@dataclass(frozen=True)
class Endless(_Willing):
    """Never answers; leaves a file in its own directory, for whoever waits until it is at work."""

    def __call__(self, view: Observation, knowledge: Knowledge, *, rng: torch.Generator) -> Reconstruction:
        Path("busy").touch()
        while True:
            torch.rand(100).sum()
