"""What each arm cost, one line an arm: bytes on the wire and by formula, milliseconds of client and server, peak memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from experiments.report import values
from experiments.report.headline import name
from experiments.report.values import lookup, number


@dataclass(frozen=True)
class Cost:
    """One arm's cost as text, of one client and one round unless it says otherwise."""

    defense: str
    upload: str
    formula: str
    download: str
    client: str
    server: str
    memory: str
    least_memory: str
    training: str

    @property
    def short(self) -> str:
        """What the main table has room for."""
        return f"↑{values.NBSP}{self.upload} ↓{values.NBSP}{self.download}"


def lines(rows: Sequence[Mapping[str, object]]) -> dict[str, Cost]:
    """Return the cost of each arm, by its name, in order; what was not measured is an em dash."""
    found: dict[str, Cost] = {}
    for row in rows:
        found.setdefault(name(row, "defense"), _cost(row))
    return found


def _cost(row: Mapping[str, object]) -> Cost:
    found = {key: number(lookup(row, "cost", key)) for key in KEYS}
    upload = found["upload_bytes"]
    return Cost(
        defense=name(row, "defense"),
        upload=values.size(number(row.get("upload_bytes")) if upload is None else upload),
        formula=values.size(found["upload_bytes_formula"]),
        download=values.size(found["download_bytes"]),
        client=values.duration(found["client_seconds"]),
        server=values.duration(found["server_seconds"]),
        memory=values.size(found["peak_bytes"]),
        least_memory=values.size(found["memory_bytes_formula"]),
        training=values.duration(number(row.get("train_seconds"))),
    )


KEYS = ("upload_bytes", "upload_bytes_formula", "download_bytes", "client_seconds", "server_seconds", "peak_bytes", "memory_bytes_formula")
