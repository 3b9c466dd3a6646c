"""Envelopes: what one client sends another through the server, readable and alterable by neither the server nor a third client."""

from __future__ import annotations

import struct

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from defenses.channel._secagg.keys import KEY_BYTES
from defenses.channel._secagg.parameters import Parameters
from defenses.channel._secagg.shamir import SHARE_BYTES
from simulator.errors import ProtocolAbort

CONTENT_BYTES = 2 * SHARE_BYTES
"""A share of the sender's seed, then a share of what its pairwise masks come from."""
ENVELOPE_BYTES = CONTENT_BYTES + 16


def seal(key: bytes, content: bytes, *, parameters: Parameters, tag: bytes, sender: int, receiver: int) -> bytes:
    """AES-256-GCM; both ends share one key for two messages, so the nonce names the direction."""
    return AESGCM(key).encrypt(_nonce(parameters, sender, receiver), content, _context(tag, sender, receiver))


def open_(key: bytes, envelope: bytes, *, parameters: Parameters, tag: bytes, sender: int, receiver: int) -> bytes:
    """The content that ``sender`` sealed for ``receiver`` in this run.

    Raises:
        ProtocolAbort: altered, or sealed by another client, for another, or in another run.
    """
    try:
        return AESGCM(key).decrypt(_nonce(parameters, sender, receiver), envelope, _context(tag, sender, receiver))
    except InvalidTag as error:
        raise ProtocolAbort(f"envelope from client {sender} must be authentic, got one that is not. Leave this run.") from error


def locked_bytes(peers: int) -> int:
    """Bytes of a lock around so many pair keys: a count, a row of client and key for each, and the tag."""
    return 4 + peers * (8 + KEY_BYTES) + 16


def lock(key: bytes, content: bytes, *, tag: bytes, owner: int) -> bytes:
    """Keep ``content`` under a key that is drawn for it alone, at the server, until the key is reconstructed."""
    return AESGCM(key).encrypt(bytes(12), content, _context(tag, owner, owner))


def unlock(key: bytes, locked: bytes, *, tag: bytes, owner: int) -> bytes:
    """The content that ``owner`` locked.

    Raises:
        ProtocolAbort: altered, or the key is not the one that it was locked with.
    """
    try:
        return AESGCM(key).decrypt(bytes(12), locked, _context(tag, owner, owner))
    except InvalidTag as error:
        raise ProtocolAbort(f"pair keys of client {owner} must open, got a key that does not fit. A share is corrupt: abort.") from error


def _nonce(parameters: Parameters, sender: int, receiver: int) -> bytes:
    return struct.pack("<III", parameters.points[sender], parameters.points[receiver], 0)


def _context(tag: bytes, sender: int, receiver: int) -> bytes:
    return tag + struct.pack("<QQ", sender, receiver)
