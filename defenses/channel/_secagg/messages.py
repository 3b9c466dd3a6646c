"""How the parties write to each other: a fixed header, then raw words, 64-byte keys, or a table of fixed-width rows.

Every list of clients is a table in ascending order of client id. A table that repeats a client, is out of order, or does not end
where it says is refused, so that two parties can never read one message in two ways. There is nothing executable in a message.
"""

from __future__ import annotations

import enum
import operator
import struct
from collections.abc import Iterable, Mapping

from simulator.errors import ProtocolAbort

MAGIC = b"fpsa"
VERSION = 2
_HEADER = struct.Struct("<4sBB2x8s")
_COUNT = struct.Struct("<I")
_CLIENT = struct.Struct("<Q")
_SIZE = struct.Struct("<Q")


class Kind(enum.IntEnum):
    """What a message carries; odd kinds go up to the server, even ones come down."""

    KEYS = 1
    ROSTER = 2
    SHARES = 3
    ENVELOPES = 4
    MASKED = 5
    SURVIVORS = 6
    OPENED = 7
    SIGNED = 9
    SIGNATURES = 10


HEADER_BYTES = _HEADER.size
"""16, a multiple of the word size, so that the words of a masked vector are aligned when they are read in place."""


def frame(kind: Kind, digest: bytes, body: bytes | memoryview) -> bytes:
    """Put the header before ``body``; ``digest`` names the run, so that a late message of another one is recognized."""
    return b"".join((_HEADER.pack(MAGIC, VERSION, kind, digest[:8]), body))


def unframe(message: bytes, kind: Kind, digest: bytes, *, origin: str) -> memoryview:
    """Return the body of a message of ``kind``.

    Raises:
        ProtocolAbort: not a message of this protocol, of this version, of this run, or of this kind.
    """
    if not isinstance(message, bytes) or len(message) < HEADER_BYTES:
        got = f"{len(message)} bytes" if isinstance(message, bytes) else type(message).__name__
        raise ProtocolAbort(f"message from {origin} must be ≥ {HEADER_BYTES} bytes, got {got}. Send what the other side returned.")
    magic, version, got_kind, got_digest = _HEADER.unpack_from(message)
    if (magic, version) != (MAGIC, VERSION):
        raise ProtocolAbort(f"message from {origin} must be {MAGIC!r} version {VERSION}, got {magic!r} {version}. Update that party.")
    if got_digest != digest[:8]:
        raise ProtocolAbort(f"message from {origin} must be of run {digest[:8].hex()}, got {got_digest.hex()}. Discard stale ones.")
    if got_kind != kind:
        raise ProtocolAbort(f"message from {origin} must be {kind.name}, got kind {got_kind}. Call the stages in order.")
    return memoryview(message)[HEADER_BYTES:]


def pack_table(rows: Mapping[int, bytes]) -> bytes:
    """Write rows of one width, each behind its client id, in ascending order."""
    return _COUNT.pack(len(rows)) + b"".join(_CLIENT.pack(client) + rows[client] for client in sorted(rows))


def unpack_table(data: bytes | memoryview, *, width: int, origin: str) -> dict[int, bytes]:
    """Read a table whose rows are ``width`` bytes.

    Raises:
        ProtocolAbort: truncated, too long, or clients repeated or out of order.
    """
    count = _COUNT.unpack_from(data)[0] if len(data) >= _COUNT.size else 0
    wanted = _COUNT.size + count * (_CLIENT.size + width)
    if len(data) != wanted:
        raise ProtocolAbort(f"table from {origin} must be {wanted} bytes, got {len(data)}. Discard it.")
    flat = struct.unpack_from("<" + f"Q{width}s" * count, data, _COUNT.size)
    clients = flat[::2]
    if any(map(operator.ge, clients, clients[1:])):
        raise ProtocolAbort(f"clients in a table from {origin} must be distinct and ascending, got {list(clients)}. Discard it.")
    return dict(zip(clients, flat[1::2], strict=True))


def pack_clients(clients: Iterable[int]) -> bytes:
    """Write a set of clients: a table of empty rows."""
    return pack_table(dict.fromkeys(clients, b""))


def unpack_clients(data: bytes | memoryview, *, origin: str) -> tuple[int, ...]:
    """Read a set of clients, ascending.

    Raises:
        ProtocolAbort: as :func:`unpack_table`.
    """
    return tuple(unpack_table(data, width=0, origin=origin))


def pack_fields(*fields: bytes) -> bytes:
    """Concatenate fields, each behind its length, so that no two lists of fields give the same bytes."""
    return b"".join(_SIZE.pack(len(field)) + field for field in fields)


def unpack_fields(data: bytes, count: int, *, origin: str) -> list[bytes]:
    """The inverse of :func:`pack_fields` for exactly ``count`` fields.

    Raises:
        ProtocolAbort: the lengths do not add up to the data.
    """
    fields, start = [], 0
    for _ in range(count):
        size = _SIZE.unpack_from(data, start)[0] if start + _SIZE.size <= len(data) else len(data)
        start += _SIZE.size + size
        fields.append(data[start - size : start])
    if start != len(data):
        raise ProtocolAbort(f"data from {origin} must hold {count} length-prefixed fields, got {len(data)} bytes that do not. Discard it.")
    return fields
