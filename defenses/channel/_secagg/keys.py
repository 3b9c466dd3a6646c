"""Key agreement and key derivation: X25519, then HKDF-SHA256 with one label for each use (RFC 7748, RFC 5869)."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Literal

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from defenses.channel._points import canonical
from simulator.errors import ProtocolAbort

KEY_BYTES = 32


def generate() -> tuple[bytes, bytes]:
    """A fresh key pair, raw: (private, public)."""
    private = X25519PrivateKey.generate()
    return private.private_bytes_raw(), private.public_key().public_bytes_raw()


def public_of(private: bytes) -> bytes:
    """The raw public key that belongs to a raw private key."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


class Agreement:
    """Derives the key shared with each peer from one own key pair; the private key is parsed once for all peers.

    Args:
        private: the raw private key.
        label: what the derived keys are for.
        run_tag: salt of every derived key: it names the round, so that keys that outlive a round give other ones in the next.
        known: secrets agreed on before, by the peer's public key; what is agreed on now is added. None remembers nothing.
    """

    def __init__(
        self, private: bytes, label: Literal["env", "pair"], run_tag: bytes, known: MutableMapping[bytes, bytes] | None = None
    ) -> None:
        self._private = X25519PrivateKey.from_private_bytes(private)
        self._public = self._private.public_key().public_bytes_raw()
        self._label: Literal["env", "pair"] = label
        self._run_tag = run_tag
        self._known: MutableMapping[bytes, bytes] = {} if known is None else known

    def key(self, peer: bytes) -> bytes:
        """The key shared with the owner of the raw public key ``peer``, who derives the same one.

        Raises:
            ProtocolAbort: ``peer`` is a point of low order, with which every secret would be all zero, or not the one writing of it.
        """
        if not canonical(peer):
            raise ProtocolAbort(f"public key must be below 2^255 - 19, got {peer.hex()}, another writing of a point. Leave this run.")
        if peer not in self._known:
            try:
                self._known[peer] = self._private.exchange(X25519PublicKey.from_public_bytes(peer))
            except ValueError as error:
                raise ProtocolAbort(f"public key must be a point of full order, got {peer.hex()}. Leave this run.") from error
        return derive(self._known[peer], self._label, self._run_tag, self._public, peer)


def derive(secret: bytes, label: Literal["env", "pair", "self"], run_tag: bytes, one: bytes, other: bytes) -> bytes:
    """HKDF-SHA256 to 32 bytes; the label and the sorted public keys of both ends keep every two uses apart."""
    info = label.encode() + min(one, other) + max(one, other)
    return HKDF(hashes.SHA256(), KEY_BYTES, salt=run_tag, info=info).derive(secret)


def self_mask_key(seed: bytes, run_tag: bytes, public: bytes) -> bytes:
    """The key of a client's own mask; ``public`` is its mask key, so that equal seeds would still give different masks."""
    return derive(seed, "self", run_tag, public, public)
