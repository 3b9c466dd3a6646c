"""The pipe between the host and the SIMULATED enclave: messages of several parts, each announced by its length."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import BinaryIO

from defenses.channel import _frames

LARGEST = 1 << 32
"""Bytes of one part at most."""
PLACE = struct.Struct("<QQ")
"""Round and client of a request."""
_SIZE = struct.Struct("<Q")


def send(pipe: BinaryIO, parts: Sequence[bytes]) -> None:
    """Write one message."""
    data = _frames.pack(parts)
    pipe.write(_SIZE.pack(len(data)) + data)
    pipe.flush()


def receive(pipe: BinaryIO, count: int) -> list[bytes] | None:
    """Read one message of ``count`` parts; None where the other side is gone.

    Raises:
        ProtocolAbort: it has another number of parts.
    """
    head = pipe.read(_SIZE.size)
    if len(head) < _SIZE.size:
        return None
    size = _SIZE.unpack(head)[0]
    data = pipe.read(size)
    return _frames.unpack(data, count=count, largest=LARGEST, origin="the pipe") if len(data) == size else None
