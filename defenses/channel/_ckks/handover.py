"""How the secret key gets from the client that made it to the others, through a server that must not read it.

X25519, HKDF-SHA256 and AES-256-GCM; every key pair is used for one run, so that the nonce may be constant.
"""

from __future__ import annotations

import hashlib
import itertools
import struct
from collections.abc import Mapping, Set

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from defenses.channel._points import canonical
from simulator.errors import ProtocolAbort

KEY_BYTES = 32
_ROW = struct.Struct(f"<Q{KEY_BYTES}s")
_NONCE = bytes(12)


def key_pair() -> tuple[bytes, bytes]:
    """A fresh X25519 key pair, raw: (private, public)."""
    private = X25519PrivateKey.generate()
    return private.private_bytes_raw(), private.public_key().public_bytes_raw()


def seal(secret: bytes, *, private: bytes, peer: bytes, run: bytes, public_context: bytes) -> bytes:
    """The secret context for the owner of the public key ``peer``, bound to the run and to the public context."""
    return AESGCM(_key(private, peer, run)).encrypt(_NONCE, secret, hashlib.sha256(public_context).digest())


def open_(envelope: bytes, *, private: bytes, peer: bytes, run: bytes, public_context: bytes) -> bytes:
    """The inverse of :func:`seal`.

    Raises:
        ProtocolAbort: altered, of another run or for another client, or beside another public context.
    """
    try:
        return AESGCM(_key(private, peer, run)).decrypt(_NONCE, envelope, hashlib.sha256(public_context).digest())
    except InvalidTag as error:
        raise ProtocolAbort("key envelope must be authentic, got one that is not. Leave this run.") from error


def _key(private: bytes, peer: bytes, run: bytes) -> bytes:
    try:
        own = X25519PrivateKey.from_private_bytes(private)
        shared = own.exchange(X25519PublicKey.from_public_bytes(peer))
    except ValueError as error:
        raise ProtocolAbort(f"public key must be a point of full order of {KEY_BYTES} bytes, got {peer.hex()}. Leave this run.") from error
    mine = own.public_key().public_bytes_raw()
    return HKDF(hashes.SHA256(), KEY_BYTES, salt=run, info=b"fedpeek ckks key" + min(mine, peer) + max(mine, peer)).derive(shared)


def why_unusable(client: int, key: bytes, others: Set[bytes]) -> str | None:
    """What is wrong with a client's public key, which would stop whoever seals to it; None if it may enter the roster."""
    if len(key) != KEY_BYTES:
        return f"public key of client {client} must be {KEY_BYTES} bytes, got {len(key)}. Leave that client out."
    if not canonical(key):
        return f"public key of client {client} must be below 2^255 - 19, got another writing of a point. Leave that client out."
    if key in others:
        return f"public key of client {client} must be one that nobody else has, got another's. Leave that client out."
    try:
        X25519PrivateKey.generate().exchange(X25519PublicKey.from_public_bytes(key))
    except ValueError:
        return f"public key of client {client} must be a point of full order, got {key.hex()}. Leave that client out."
    return None


def pack_roster(roster: Mapping[int, bytes]) -> bytes:
    """Public keys by client, in ascending order.

    Raises:
        ProtocolAbort: a key of another length.
    """
    for client, key in roster.items():
        if len(key) != KEY_BYTES:
            raise ProtocolAbort(f"public key of client {client} must be {KEY_BYTES} bytes, got {len(key)}. Leave that client out.")
    return b"".join(_ROW.pack(client, roster[client]) for client in sorted(roster))


def unpack_roster(data: bytes) -> dict[int, bytes]:
    """The inverse of :func:`pack_roster`.

    Raises:
        ProtocolAbort: truncated, or clients repeated or out of order.
    """
    if len(data) % _ROW.size:
        raise ProtocolAbort(f"roster must be rows of {_ROW.size} bytes, got {len(data)} bytes. Discard it.")
    rows = list(_ROW.iter_unpack(data))
    if any(first >= second for (first, _), (second, _) in itertools.pairwise(rows)):
        raise ProtocolAbort("clients of a roster must be distinct and ascending, got others. Discard it.")
    return dict(rows)
