"""What the server received, on disk: append-only, hash-chained, safetensors and JSON lines, never pickle.

``transcript.jsonl`` holds one event a line, chained (:mod:`simulator.chain`). Each line carries the SHA-256 of the tensor file that belongs
to it, too, so that an altered, reordered or missing piece is found, with its round. Without an ``end`` event it was cut short.
"""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from safetensors.numpy import save as save_arrays
from safetensors.torch import load, save
from torch import Tensor

from simulator.chain import GENESIS, SCHEMA, sealed, verified
from simulator.errors import TranscriptError
from simulator.events import Arrays, broadcast_of, model_of, upload_of
from simulator.types import Broadcast, Observation, Tensors, Upload

LINES = "transcript.jsonl"
END, CUT = "end", "cut short"
IN_FLIGHT = 32  # events that may wait to be written: bounds the memory that a slow disk can cost


class Transcript:
    """Writes events, in order, in a thread of its own; whoever holds it can only append.

    Hashing and writing overlap with the federation, which waits when :data:`IN_FLIGHT` events are behind: no more than those can be
    lost to a kill, and none to an error, since :meth:`close` writes them all.

    Args:
        directory: created if it is not there; must not hold a transcript yet.
        keep_rounds: rounds whose tensors are kept; empty keeps all. Of the others the digests stay.
        keep_models: rounds whose broadcast is kept in any case, as a model to be tested.

    Raises:
        TranscriptError: the directory holds a transcript already.
    """

    def __init__(
        self, directory: Path, header: Mapping[str, Any], keep_rounds: tuple[int, ...] = (), keep_models: Sequence[int] = ()
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        if (directory / LINES).exists():
            raise TranscriptError(f"{directory} must not hold a transcript yet, got one. Choose another directory.")
        self._directory, self._keep, self._models = directory, frozenset(keep_rounds), frozenset(keep_models)
        self._lines: BinaryIO = (directory / LINES).open("ab")
        self._previous, self._count = GENESIS, 0
        self._waiting: queue.Queue[tuple[str, int, Mapping[str, Any], Tensors | Arrays]] = queue.Queue(IN_FLIGHT)
        self._failure: Exception | None = None
        threading.Thread(target=self._serve, daemon=True, name="fedpeek-transcript").start()
        self.append("header", 0, {"schema": SCHEMA, **header})

    def append(self, kind: str, round: int, facts: Mapping[str, Any], tensors: Tensors | Arrays | None = None) -> None:
        """Add one event; its tensors must not change any more.

        Raises:
            TranscriptError: an earlier event could not be written.
        """
        self._check()
        self._waiting.put((kind, round, facts, tensors or {}))

    def _check(self) -> None:
        if self._failure is not None:
            raise TranscriptError(
                f"transcript must be writable, got {self._failure!r} in {self._directory}. Free space or choose another --out."
            )

    def _serve(self) -> None:
        while True:
            event = self._waiting.get()
            try:
                if self._failure is None:  # after a failure the chain is broken: nothing may follow
                    self._write(*event)
            except Exception as error:  # raised again by the next append or settle
                self._failure = error
            finally:
                self._waiting.task_done()
            if event[0] == END:
                return

    def _write(self, kind: str, round: int, facts: Mapping[str, Any], tensors: Tensors | Arrays) -> None:
        event: dict[str, Any] = {"event": self._count, "kind": kind, "round": round, **facts}
        if tensors:
            body = _serialized(tensors() if callable(tensors) else tensors)
            event["sha256"] = hashlib.sha256(body).hexdigest()
            kept = not self._keep or round in self._keep or kind == "released"
            if kind == "broadcast" and round in self._models and not kept:
                event["model_only"] = kept = True
            if kept:
                event["file"] = f"{self._count:06d}.safetensors"
                (self._directory / event["file"]).write_bytes(body)
        line, self._previous = sealed(event, self._previous)
        self._lines.write(line)
        self._lines.flush()
        self._count += 1

    def close(self, status: str, facts: Mapping[str, Any] | None = None) -> None:
        """Seal the transcript: ``ok``, ``degraded`` (clients were lost) or ``failed``."""
        self.append(END, 0, {"status": status, **(facts or {})})
        self._waiting.join()
        self._lines.close()
        self._check()


@dataclass(frozen=True)
class Record:
    """A transcript, read and verified.

    Attributes:
        header: public facts of the federation: model, schema of a record, defenses and their settings.
        observations: the kept rounds, in order; uploads ordered by client.
        released: the model after the last round.
        models: every kept model, by the rounds that it has been trained for: what the next round broadcasts.
        lost: (round, client, reason) of every answer that did not come or was refused.
        end: how the federation ended, and what it cost; its status is :data:`CUT` where nobody wrote it.
        missing: what a transcript that was cut short lacks, as a sentence; empty if it is whole.
        damaged: a sentence for every tensor file that is gone or altered: what was in it, which is left out, and why.
    """

    header: Mapping[str, Any]
    observations: tuple[Observation, ...]
    released: tuple[Tensors, Tensors] | None
    lost: tuple[tuple[int, int, str], ...]
    end: Mapping[str, Any]
    missing: str = ""
    damaged: tuple[str, ...] = ()
    models: Mapping[int, tuple[Tensors, Tensors]] = field(default_factory=dict)

    def observation(self, round: int) -> Observation:
        """The observation of ``round``.

        Raises:
            TranscriptError: the round was not kept.
        """
        for observation in self.observations:
            if observation.broadcast.round == round:
                return observation
        kept = [observation.broadcast.round for observation in self.observations]
        raise TranscriptError(f"round must be one of the recorded {kept}, got {round}. Choose one of them or record it.")


def read(directory: Path, *, whole: bool = True) -> Record:
    """Read a transcript, checking every hash.

    Args:
        directory: of the transcript.
        whole: refuse one that was cut short or has a damaged tensor file; else take the rounds before the one in which it ends, and
            every observation whose files are as they were written.

    Raises:
        TranscriptError: there is none, it has another schema, it was truncated, its chain of events was altered, or nothing can be read;
            the message names the round.
    """
    if not (directory / LINES).is_file():
        raise TranscriptError(f"transcript must be a directory with {LINES}, got {directory}. Run `fedpeek run` first.")
    events = verified(directory / LINES, half_is_none=not whole)
    last = max((int(event["round"]) for event in events), default=0)
    missing = ""
    if not events or events[-1]["kind"] != END:
        complete = any(event["kind"] == "released" for event in events)
        kept = [event for event in events if event["round"] < last or complete]
        if whole or not any(event["kind"] == "broadcast" for event in kept):
            raise TranscriptError(
                f"transcript must end with an end event, got one cut short in round {last}. Run it again or with --resume."
            )
        missing = f"the transcript was cut short in round {last}: that round and later ones are missing"
        if complete:
            missing = f"the transcript was cut short after round {last}: how the federation ended is missing"
        events = [*kept, {"event": len(kept), "kind": END, "round": 0, "status": CUT}]
    try:
        return replace(_parse(directory, events, whole), missing=missing)
    except (KeyError, TypeError, ValueError) as error:
        raise TranscriptError(
            f"events must have the fields of schema {SCHEMA}, got {error!r}. Use the fedpeek version that wrote it."
        ) from error


def _parse(directory: Path, events: list[dict[str, Any]], whole: bool) -> Record:
    broadcasts: dict[int, Broadcast] = {}
    uploads: dict[int, list[Upload]] = {}
    models: dict[int, tuple[Tensors, Tensors]] = {}
    released: tuple[Tensors, Tensors] | None = None
    lost = [(event["round"], event["client"], event["reason"]) for event in events if event["kind"] == "lost"]
    refused = {(round, client) for round, client, _ in lost}
    damaged = []
    for event in events:
        if "file" not in event:
            continue
        round = int(event["round"])
        try:
            tensors = _tensors(directory, event)
        except TranscriptError as error:
            if whole:
                raise
            damaged.append(f"{_content(event)}: damaged: {error}")
            continue
        if event["kind"] == "broadcast":
            models[round - 1] = model_of(tensors)
            if not event.get("model_only"):
                broadcasts[round] = broadcast_of(event, tensors)
        elif event["kind"] == "upload" and (
            event.get("accepted") or len(event["senders"]) > 1 or (round, event["senders"][0]) not in refused
        ):
            uploads.setdefault(round, []).append(upload_of(event, tensors))
        elif event["kind"] == "released":
            released = models[round] = model_of(tensors)
    observations = tuple(
        Observation(broadcasts[round], tuple(sorted(uploads.get(round, []), key=lambda upload: min(upload.senders))))
        for round in sorted(broadcasts)
    )
    if not observations and damaged:
        raise TranscriptError(f"transcript must hold a broadcast that can be read, got none. {damaged[0]}")
    return Record(events[0], observations, released, tuple(lost), events[-1], damaged=tuple(damaged), models=models)


def _content(event: Mapping[str, Any]) -> str:
    """Which observations are lost with the tensors of an event."""
    if event["kind"] == "upload":
        return f"round {event['round']}, client {', '.join(map(str, sorted(event['senders'])))}"
    return f"round {event['round']}, every client" if event["kind"] == "broadcast" else f"the {event['kind']} model"


def _tensors(directory: Path, event: Mapping[str, Any]) -> dict[str, Tensor]:
    path = directory / Path(event["file"]).name
    body = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(body).hexdigest() != event["sha256"]:
        state = "an altered" if body else "no"
        raise TranscriptError(f"{event['file']} of round {event['round']} must match its digest, got {state} file. Record it again.")
    return dict(sorted(load(body).items()))  # safetensors gives them in an order that differs from process to process


def _serialized(found: Mapping[str, Any]) -> bytes:
    """Tensors or NumPy arrays as safetensors, in the number format in which they came."""
    if all(isinstance(value, Tensor) for value in found.values()):
        return save({name: tensor.detach().contiguous() for name, tensor in found.items()})
    return save_arrays(dict(found))
