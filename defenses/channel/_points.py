"""Public keys of X25519 as bytes: one writing of each point, so that no two keys that differ are the same."""

from __future__ import annotations

FIELD = 2**255 - 19
"""Coordinates are below it; RFC 7748 reads larger ones modulo it and ignores the highest bit, so that a point has several writings."""


def canonical(key: bytes) -> bool:
    """Whether a raw public key is the one writing of its point."""
    return int.from_bytes(key, "little") < FIELD
