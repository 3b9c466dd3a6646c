"""Identities against an active server: who signed which keys, and which survivors (Ed25519, RFC 8032).

Every honest client knows the public key of every other one beforehand, from a directory that the server cannot alter (a PKI): the
setting ``identities``, with each client's own private key in the environment variable FEDPEEK_IDENTITY of its process. Left empty, a
simulation derives all of them from the world's seed and secret, which all its processes know, the server's among them: that shows the
protocol and its cost, and is no protection against who holds the world.

Source: Bonawitz et al. (2017), CCS, eprint 2017/281, the underlined parts: signed key advertisements, and the consistency check in which
    a client opens shares only for survivors that t clients have signed. With 2t > n + c for c corrupt clients (t > 2n/3 and
    c < n/3 in the paper), two sets of survivors cannot both gather t signatures, since an honest client signs one only.
Deviations: a signature of keys covers the parameters too (run, round, clients, threshold), so that one from another round is worth nothing;
    the server checks signatures, too, which protects nobody from it: one client with a bad signature is left out instead of making every
    honest one leave.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from defenses.channel._secagg.messages import pack_clients, pack_fields
from simulator.errors import ProtocolAbort

if TYPE_CHECKING:
    from simulator.world import World

SIGNATURE_BYTES = 64
_KEYS, _SURVIVORS = b"fedpeek secagg keys", b"fedpeek secagg survivors"


@dataclass(frozen=True, repr=False)
class Identity:
    """A client's signing key, and everybody's public keys by client.

    Attributes:
        private: raw Ed25519 private key of this client.
        directory: raw Ed25519 public key of each client.
    """

    private: bytes
    directory: Mapping[int, bytes]

    def sign_keys(self, digest: bytes, client: int, public: bytes) -> bytes:
        """Sign the own public keys for the aggregation that ``digest`` names."""
        return self._sign(pack_fields(_KEYS, digest, pack_clients([client]), public))

    def sign_survivors(self, tag: bytes, survivors: Iterable[int]) -> bytes:
        """Sign the one set of survivors that this client was told; ``tag`` names the run and all its keys."""
        return self._sign(pack_fields(_SURVIVORS, tag, pack_clients(survivors)))

    def _sign(self, message: bytes) -> bytes:
        return Ed25519PrivateKey.from_private_bytes(self.private).sign(message)


def check_keys(directory: Mapping[int, bytes], digest: bytes, client: int, public: bytes, signature: bytes) -> None:
    """Check that ``client`` made these keys for this aggregation.

    Raises:
        ProtocolAbort: another key, another round, another client, or no signature at all.
    """
    if not _verifies(directory, client, signature, pack_fields(_KEYS, digest, pack_clients([client]), public)):
        raise ProtocolAbort(f"keys of client {client} must be signed by it for this round, got others. Leave this run.")


def check_survivors(directory: Mapping[int, bytes], tag: bytes, survivors: Iterable[int], client: int, signature: bytes) -> None:
    """Check that ``client`` was told the same survivors.

    Raises:
        ProtocolAbort: it was told others, or in another round.
    """
    if not _verifies(directory, client, signature, pack_fields(_SURVIVORS, tag, pack_clients(survivors))):
        raise ProtocolAbort(f"client {client} must have signed the same survivors, got another signature. Leave this run.")


def _verifies(directory: Mapping[int, bytes], client: int, signature: bytes, message: bytes) -> bool:
    if client not in directory:
        return False
    try:
        Ed25519PublicKey.from_public_bytes(directory[client]).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


def directory(world: World, given: Sequence[str]) -> dict[int, bytes]:
    """Everybody's public signature keys: as given in hexadecimal, or derived for a simulation."""
    if given:
        return {client: bytes.fromhex(key) for client, key in enumerate(given)}
    return {client: public_of(simulated(world, client)) for client in range(world.federation.clients)}


def simulated(world: World, client: int) -> bytes:
    """A client's signing key in a simulation."""
    return derived_private(hashlib.sha256(f"{world.seed}|{world.secret}".encode()).digest(), client)


def derived_private(secret: bytes, client: int) -> bytes:
    """A signing key for a simulation, from what all its processes know: it shows the protocol, and keeps nobody out who has the world."""
    return HKDF(hashes.SHA256(), 32, salt=None, info=b"fedpeek simulated identity" + client.to_bytes(8, "big")).derive(secret)


def public_of(private: bytes) -> bytes:
    """The raw public key that belongs to a raw signing key."""
    return Ed25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()
