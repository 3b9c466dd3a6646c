"""The sealed channel from a client into the SIMULATED enclave: X25519, HKDF-SHA256, AES-256-GCM.

A client takes a fresh key pair for each upload, so every symmetric key seals one message and its nonce may be constant.
"""

from __future__ import annotations

import struct

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from simulator.errors import ProtocolAbort

KEY_BYTES = 32
OVERHEAD_BYTES = KEY_BYTES + 16
"""What sealing adds: the client's public key and the tag."""
_NONCE = bytes(12)
_PLACE = struct.Struct("<QQ")


def seal(content: bytes, *, enclave_key: bytes, run: bytes, round: int, client: int) -> bytes:
    """The content, readable by the enclave alone and only as this client's upload of this round of this run."""
    own = X25519PrivateKey.generate()
    public = own.public_key().public_bytes_raw()
    key = _derived(own, enclave_key, run, public, enclave_key)
    return public + AESGCM(key).encrypt(_NONCE, content, run + _PLACE.pack(round, client))


def open_(blob: bytes, *, private: X25519PrivateKey, run: bytes, round: int, client: int) -> bytes:
    """The inverse of :func:`seal`, inside the enclave.

    Raises:
        ProtocolAbort: altered, or sealed for another enclave, run or round, or by another client.
    """
    public = blob[:KEY_BYTES]
    try:
        key = _derived(private, public, run, public, private.public_key().public_bytes_raw())
        return AESGCM(key).decrypt(_NONCE, blob[KEY_BYTES:], run + _PLACE.pack(round, client))
    except (InvalidTag, ValueError) as error:
        raise ProtocolAbort(f"blob must be client {client}'s of round {round}, unaltered, got another. Leave it out.") from error


def _derived(private: X25519PrivateKey, peer: bytes, run: bytes, client_key: bytes, enclave_key: bytes) -> bytes:
    shared = private.exchange(X25519PublicKey.from_public_bytes(peer))
    return HKDF(hashes.SHA256(), KEY_BYTES, salt=run, info=b"fedpeek enclave" + client_key + enclave_key).derive(shared)
