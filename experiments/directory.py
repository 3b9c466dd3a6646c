"""The directory of a run: what lies in it, who may write there, and how it is mended after a kill."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import secrets
import shlex
import sys
import tomllib
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from experiments.result import ArmFacts, Trial
from simulator.errors import SpecError

SPEC, HOW, RESULTS, FACTS, TRANSCRIPTS, PICTURES = "spec.toml", "run.json", "results.jsonl", "facts.jsonl", "transcript", "reconstructions"
PACKAGES = ("fedpeek", "flwr", "torch", "torchvision", "numpy", "cryptography", "dp-accounting")
OURS = ("simulator", "clients", "server", "attacks", "defenses", "experiments")


def read_trials(out: Path) -> list[Trial]:
    """The trials in ``out``, those of unfinished tasks left out."""
    done = {(facts.arm, facts.seed) for facts in read_facts(out)}
    trials = [Trial.from_json(line) for line in _lines(out / RESULTS)]
    return [trial for trial in trials if (trial.arm, trial.seed) in done]


def read_facts(out: Path) -> list[ArmFacts]:
    """What each finished arm and seed claimed and cost."""
    return [ArmFacts.from_json(line) for line in _lines(out / FACTS)]


def secret_of(out: Path, resume: bool) -> str:
    """The secret of the run that is resumed, else a fresh one of 128 bits."""
    if resume and (out / SPEC).is_file():
        return str(tomllib.loads((out / SPEC).read_text(encoding="utf-8")).get("secret", ""))
    return secrets.token_hex(16)


def note_how(out: Path) -> list[str]:
    """Write down how the run was started, when, and with which versions: a report made later must not say its own.

    A run that is resumed with other versions, or another state of the source, has rows of both: that is kept beside the first, and returned
    as what differs.
    """
    now: dict[str, Any] = {"command": shlex.join(["fedpeek", *sys.argv[1:]]), "started": datetime.now(UTC).isoformat(timespec="seconds")}
    now["environment"] = environment()
    if not (out / HOW).exists():
        _write(out / HOW, json.dumps(now, indent=2) + "\n")
        return []
    how = json.loads((out / HOW).read_text(encoding="utf-8"))
    before = [how["environment"], *(later["environment"] for later in how.get("resumed", ()))]
    if now["environment"] not in before:
        _write(out / HOW, json.dumps(how | {"resumed": [*how.get("resumed", ()), now]}, indent=2) + "\n")
    return changes(how["environment"], now["environment"])


def changes(first: Mapping[str, str], then: Mapping[str, str]) -> list[str]:
    """What differs between two environments, in words; an environment of an older version may not say all."""
    return [f"{name} {first[name]}, then {then[name]}" for name in then if name in first and first[name] != then[name]]


def mixed(how: Mapping[str, Any]) -> list[str]:
    """What differs between the environments of a run's parts; empty if all of it was made by one."""
    return [change for later in how.get("resumed", ()) for change in changes(how["environment"], later["environment"])]


def environment() -> dict[str, str]:
    """What may change a number: versions, the source as it is, of which one version has many while it is worked on, and the processor."""
    return {
        "python": platform.python_version(), "platform": platform.platform(), **{name: version(name) for name in PACKAGES},
        "source": source_digest(), "cpu": cpu(),
    }  # fmt: skip


def cpu() -> str:
    """The processor's name: attacks with a budget of CPU seconds do as much as it does in these."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def source_digest() -> str:
    """The start of the SHA-256 of our packages' modules, by name."""
    digest = hashlib.sha256()
    for package in OURS:
        spec = find_spec(package)
        for root in spec.submodule_search_locations or () if spec else ():
            for path in sorted(Path(root).rglob("*.py")):
                digest.update(f"{package}/{path.relative_to(root).as_posix()}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def claim(out: Path, spec: str, resume: bool) -> None:
    """Make the directory and write the resolved spec, or find the same one there.

    Raises:
        SpecError: there is another run, or something else, or nothing to resume.
    """
    existing = out / SPEC
    if out.exists() and not out.is_dir():
        raise SpecError(f"--out must be a directory, got {out}, which is a file. Choose another name.")
    if resume:
        if not existing.is_file():
            raise SpecError(f"--resume must name a run, got {out} without {SPEC}. Leave out --resume to start one there.")
        if existing.read_text(encoding="utf-8") != spec:
            raise SpecError(
                f"--resume must go on with the same spec, got another than {existing}. Give the same options, or another --out."
            )
        return
    if out.exists() and any(out.iterdir()):
        advice = "Add --resume to go on with the run in it, or choose" if existing.is_file() else "Choose"
        raise SpecError(f"--out must be empty or new, got {out}. {advice} another directory.")
    try:
        out.mkdir(parents=True, exist_ok=True)
        existing.write_text(spec, encoding="utf-8")
    except OSError as error:
        raise SpecError(f"--out must be a directory that can be written, got {out} ({error}). Choose another.") from error


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Hold the directory: two runs that write into one would each drop what the other has under way. A killed run lets go.

    Raises:
        SpecError: another run holds it.
    """
    with (out / SPEC).open(encoding="utf-8") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SpecError(f"--out must be held by no other run, got {out}, where one is under way. Wait for it, or end it.") from None
        yield


def forget(out: Path, pending: Set[tuple[str, int]]) -> None:
    """Drop what is there of these arms and seeds: they were cut off between writing their trials and their facts, or are done again."""
    for name in (FACTS, RESULTS):  # facts first: trials without them do not count
        kept = [line for line in _lines(out / name) if (json.loads(line)["arm"], json.loads(line)["seed"]) not in pending]
        body = "".join(f"{line}\n" for line in kept)
        if (out / name).is_file() and (out / name).read_text(encoding="utf-8") != body:
            _write(out / name, body)


def _write(path: Path, body: str) -> None:
    """Write a file so that a kill leaves the old one or the new one."""
    new = path.with_name(f"{path.name}.new")
    new.write_text(body, encoding="utf-8")
    os.replace(new, path)


def _lines(path: Path) -> list[str]:
    """The whole lines of a file; a last one without its end was cut off by a kill."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [line.rstrip("\n") for line in lines if line.endswith("\n") and line.strip()]
