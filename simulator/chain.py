"""Lines that cannot be altered, reordered or taken out unseen: each carries its own digest and the SHA-256 of the line before it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

from simulator.errors import TranscriptError

SCHEMA = 1
GENESIS = "0" * 64
"""In the place of a line before the first."""


def sealed(event: Mapping[str, Any], previous: str) -> tuple[bytes, str]:
    """Return an event as the line that follows the one whose SHA-256 is ``previous``, and the SHA-256 of this one."""
    content = {**event, "previous": previous}
    content["digest"] = _digest(content)  # so that the last line, which nothing follows, is protected like the others
    line = json.dumps(content, sort_keys=True, allow_nan=False).encode() + b"\n"
    return line, hashlib.sha256(line).hexdigest()


def verified(path: Path, *, half_is_none: bool) -> list[dict[str, Any]]:
    """Return all events of a file of such lines; a last line that was cut off counts as none if ``half_is_none``.

    Raises:
        TranscriptError: it has another schema, or its chain is broken; the message names the round.
    """
    events: list[dict[str, Any]] = []
    previous, round = GENESIS, 0
    lines = path.read_bytes().splitlines(keepends=True)
    for place, line in enumerate(lines):
        try:
            event = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            event = None
        if not _is_event(event) or event["previous"] != previous or event["event"] != len(events):
            if half_is_none and place == len(lines) - 1 and not line.endswith(b"\n"):
                break
            raise TranscriptError(
                f"transcript must be unaltered, got a broken chain at event {len(events)}, round {round}. Record it again."
            )
        if not events and event.get("schema") != SCHEMA:
            raise TranscriptError(f"transcript schema must be {SCHEMA}, got {event.get('schema')}. Use the fedpeek version that wrote it.")
        previous, round = hashlib.sha256(line).hexdigest(), max(round, int(event["round"]))
        events.append(event)
    return events


def _is_event(event: Any) -> TypeGuard[dict[str, Any]]:
    """Whether a line is one of ours, and unaltered in itself."""
    required = {"event": int, "round": int, "kind": str, "previous": str, "digest": str}
    fits = isinstance(event, dict) and all(isinstance(event.get(name), kind) for name, kind in required.items())
    return fits and event["digest"] == _digest(event)


def _digest(event: Mapping[str, Any]) -> str:
    content = {name: value for name, value in event.items() if name != "digest"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
