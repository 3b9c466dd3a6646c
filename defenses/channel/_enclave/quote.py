"""The quote: what the SIMULATED hardware signs, and what a client demands of it before it sends anything.

A quote is 99 bytes of statements and an Ed25519 signature of 64. A real one is signed by a key fused into the chip, with
a chain of certificates to its maker; here the key follows from the run's secret, so that whoever knows that can forge a quote.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from simulator.errors import ProtocolAbort

DOMAIN = b"fedpeek SIMULATED quote 1"
TCB = 1
"""Version of the SIMULATED hardware's microcode, the least that clients accept: a quote of an older one may come from a broken chip."""
NONCE_BYTES = RUN_BYTES = 16
_BODY = struct.Struct(f"<BH32s32s{NONCE_BYTES}s{RUN_BYTES}s")
QUOTE_BYTES = _BODY.size + 64


@dataclass(frozen=True, kw_only=True)
class Quote:
    """The statements of a quote.

    Attributes:
        debug: whether the host may read the enclave's memory.
        tcb: version of the hardware's microcode.
        measurement: of what runs inside.
        enclave_key: the enclave's X25519 public key, to which clients seal.
        nonce: the client's, for freshness.
        run: the federation's, so that no quote serves two; a client computes it for itself (:func:`run_of`).
    """

    debug: bool
    tcb: int
    measurement: bytes
    enclave_key: bytes
    nonce: bytes
    run: bytes

    def to_bytes(self) -> bytes:
        """What is signed."""
        return _BODY.pack(self.debug, self.tcb, self.measurement, self.enclave_key, self.nonce, self.run)


def run_of(world: str) -> bytes:
    """The name of the federation that this world describes, its seed and secret included.

    Whoever checks a quote must compute it: a name that the host tells, and that its enclave then states, compares the host with itself.
    Two runs of one world have the same name and the same numbers in them; the nonce keeps their quotes apart, and a client stays with the
    first enclave that it sealed to.
    """
    return hashlib.sha256(b"fedpeek SIMULATED enclave run" + world.encode()).digest()[:RUN_BYTES]


def hardware_key(seed: int, secret: str) -> bytes:
    """The private attestation key of the SIMULATED hardware of one run, raw."""
    return hashlib.sha256(f"fedpeek SIMULATED hardware|{seed}|{secret}".encode()).digest()


def hardware_root(key: bytes) -> bytes:
    """The public key that clients are born with, raw."""
    return Ed25519PrivateKey.from_private_bytes(key).public_key().public_bytes_raw()


def signed(quote: Quote, key: bytes) -> bytes:
    """The quote with the hardware's signature."""
    body = quote.to_bytes()
    return body + Ed25519PrivateKey.from_private_bytes(key).sign(DOMAIN + body)


def verified(data: bytes, *, root: bytes, allowed: frozenset[bytes], nonce: bytes, run: bytes) -> bytes:
    """The enclave's public key, if a client may seal to it.

    Args:
        data: the signed quote.
        root: the hardware's public key.
        allowed: measurements that the client trusts.
        nonce: what this client sent for this quote, and for no other.
        run: of the federation, as the client itself knows it.

    Raises:
        ProtocolAbort: the first thing that is not as it must be.
    """
    if len(data) != QUOTE_BYTES:
        raise ProtocolAbort(f"quote must be {QUOTE_BYTES} bytes, got {len(data)}. Send nothing.")
    body, signature = data[: _BODY.size], data[_BODY.size :]
    try:
        Ed25519PublicKey.from_public_bytes(root).verify(signature, DOMAIN + body)
    except InvalidSignature:
        raise ProtocolAbort("quote must be signed by the SIMULATED hardware, got another signature. Send nothing.") from None
    debug, *rest = _BODY.unpack(body)
    quote = Quote(debug=bool(debug), **dict(zip(("tcb", "measurement", "enclave_key", "nonce", "run"), rest, strict=True)))
    if quote.nonce != nonce:
        raise ProtocolAbort("quote must answer this client's own fresh nonce, got another: it is stale or a replay. Send nothing.")
    if quote.run != run:
        raise ProtocolAbort("quote must be of this federation, got one of another. Send nothing.")
    if quote.debug:
        raise ProtocolAbort("enclave must not be in debug mode, got one whose memory the host may read. Send nothing.")
    if quote.tcb < TCB:
        raise ProtocolAbort(f"microcode must be of version ≥ {TCB}, got {quote.tcb}. Send nothing until it is updated.")
    if quote.measurement not in allowed:
        raise ProtocolAbort(
            f"measurement must be one of {sorted(one.hex()[:16] for one in allowed)}, got {quote.measurement.hex()[:16]}: other code or "
            "another policy runs there. Send nothing."
        )
    return quote.enclave_key
