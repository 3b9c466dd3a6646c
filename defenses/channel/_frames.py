"""Byte strings in a row, each behind its length: how the parties of a channel write to each other. Nothing in it is executable."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from simulator.errors import ProtocolAbort

_COUNT = struct.Struct("<I")
_SIZE = struct.Struct("<Q")


def pack(parts: Sequence[bytes]) -> bytes:
    """The parts as one byte string; no two rows of parts give the same."""
    return _COUNT.pack(len(parts)) + b"".join(_SIZE.pack(len(part)) + part for part in parts)


def unpack(data: bytes, *, count: int, largest: int, origin: str) -> list[bytes]:
    """The parts of a byte string that must hold exactly ``count`` of at most ``largest`` bytes each.

    Raises:
        ProtocolAbort: it holds another number of parts, a longer one, or ends elsewhere than it says.
    """
    held = _COUNT.unpack_from(data)[0] if len(data) >= _COUNT.size else 0
    if held != count:
        raise ProtocolAbort(f"message from {origin} must hold {count} parts, got {held}. Discard it.")
    parts, start = [], _COUNT.size
    for _ in range(count):
        size = _SIZE.unpack_from(data, start)[0] if start + _SIZE.size <= len(data) else largest + 1
        start += _SIZE.size
        if size > largest or start + size > len(data):
            raise ProtocolAbort(f"parts from {origin} must be at most {largest} bytes and whole, got one that is not. Discard it.")
        parts.append(data[start : start + size])
        start += size
    if start != len(data):
        raise ProtocolAbort(f"message from {origin} must end after {count} parts, got {len(data) - start} bytes more. Discard it.")
    return parts
