"""Keys and ciphertexts as bytes: protobuf of TenSEAL around SEAL's own format, checked on the way in; never pickle."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np

from defenses.channel import _frames
from defenses.channel._ckks.scheme import Scheme
from defenses.channel._vectors import Reals
from simulator.errors import ProtocolAbort

INSTALL = "pip install 'fedpeek[ckks]'"
REFUSED = (ValueError, RuntimeError, TypeError, OverflowError)
"""What TenSEAL raises on bytes that are not what they should be."""
CONTEXT_BYTES = 1 << 24
"""The most that a serialized context may take: 0.4 MB with a public key at degree 8192."""


def missing() -> str | None:
    """Why there is no CKKS here, or None."""
    if find_spec("tenseal") is not None:
        return None
    return f"ckks_aggregation must have the package tenseal, got none. Run {INSTALL}, on a Python for which tenseal has a wheel."


def _tenseal() -> Any:
    if (reason := missing()) is not None:
        raise ProtocolAbort(reason)
    import tenseal  # takes 0.1 s, and not everybody has it
    import tenseal.sealapi  # gives ciphertexts their attributes

    return tenseal


def generate(scheme: Scheme) -> tuple[bytes, bytes]:
    """A fresh key pair: (public context with the public key, secret context with the secret key alone)."""
    tenseal = _tenseal()
    context = tenseal.context(tenseal.SCHEME_TYPE.CKKS, scheme.degree, coeff_mod_bit_sizes=list(scheme.modulus_bits))
    context.global_scale = 2.0**scheme.scale_bits
    keep = {"save_galois_keys": False, "save_relin_keys": False}
    public = context.serialize(save_public_key=True, save_secret_key=False, **keep)
    return public, context.serialize(save_public_key=False, save_secret_key=True, **keep)


class Cipher:
    """One party's context: encrypts and adds with the public one, decrypts with the secret one.

    Args:
        scheme: what the context must be made for.
        context: as :func:`generate` gives it.

    Raises:
        ProtocolAbort: it is no context, or one of another scheme.
    """

    def __init__(self, scheme: Scheme, context: bytes) -> None:
        self.scheme = scheme
        if len(context) > CONTEXT_BYTES:
            raise ProtocolAbort(f"context must be at most {CONTEXT_BYTES} bytes, got {len(context)}. Refuse these keys.")
        try:
            self._context = _tenseal().context_from(context)
            scale, held = self._context.global_scale, self._context.seal_context().data.key_context_data().parms()
            kind, degree, primes = held.scheme().name, held.poly_modulus_degree(), [prime.value() for prime in held.coeff_modulus()]
        except REFUSED as error:
            raise ProtocolAbort(f"context must be readable, got {error}. Refuse these keys.") from error
        if scale != 2.0**scheme.scale_bits:
            raise ProtocolAbort(f"context must have scale 2^{scheme.scale_bits}, got {scale:g}. Refuse these keys.")
        if kind != "CKKS" or (degree, primes) != (scheme.degree, _primes(scheme)):
            raise ProtocolAbort(
                f"context must be of CKKS with degree {scheme.degree} and the primes of {list(scheme.modulus_bits)} bits, got "
                f"{kind} with degree {degree} and {[prime.bit_length() for prime in primes]} bits. Refuse these keys."
            )

    @property
    def holds_secret_key(self) -> bool:
        """Whether it can decrypt."""
        return bool(self._context.has_secret_key())

    @property
    def holds_public_key(self) -> bool:
        """Whether it can encrypt."""
        return bool(self._context.has_public_key())

    def encrypt(self, values: Reals, summands: int = 1) -> bytes:
        """The numbers in ciphertexts of N/2 each, the last one filled up with zeros; up to ``summands`` such vectors may be added.

        Raises:
            ProtocolAbort: a number is so large that a sum could wrap.
        """
        if values.size and not float(np.abs(values).max()) < (most := self.scheme.largest / summands):
            raise ProtocolAbort(f"numbers must be below {most:g} for a sum of {summands}, got a larger one. Lower scale_bits.")
        slots = self.scheme.slots
        padded = np.zeros(self.scheme.chunks(values.size) * slots)
        padded[: values.size] = values
        tenseal = _tenseal()
        return _frames.pack([tenseal.ckks_vector(self._context, part.tolist()).serialize() for part in padded.reshape(-1, slots)])

    def load(self, data: bytes, length: int, *, origin: str) -> list[Any]:
        """The ciphertexts of a vector of ``length`` numbers.

        Raises:
            ProtocolAbort: another number of them, another size, scale or level, or bytes that are no ciphertext of this context.
        """
        scheme, tenseal = self.scheme, _tenseal()
        parts = _frames.unpack(data, count=scheme.chunks(length), largest=scheme.ciphertext_bytes, origin=origin)
        found = []
        for part in parts:
            try:
                vector = tenseal.ckks_vector_from(self._context, part)
                inner = vector.ciphertext()
                shape = [(one.size(), one.poly_modulus_degree(), one.coeff_modulus_size(), one.scale) for one in inner]
            except REFUSED as error:
                raise ProtocolAbort(f"ciphertext from {origin} must be one of this context, got {error}. Discard it.") from error
            wanted = (2, scheme.degree, len(scheme.modulus_bits) - 1, 2.0**scheme.scale_bits)
            if vector.size() != scheme.slots or shape != [wanted]:
                raise ProtocolAbort(f"ciphertext from {origin} must be fresh and hold {scheme.slots} numbers, got {shape}. Discard it.")
            found.append(vector)
        return found

    def total(self, vectors: Sequence[Sequence[Any]]) -> bytes:
        """The sum of several vectors, added in their ciphertexts: needs no secret key."""
        sums = []
        for column in zip(*vectors, strict=True):
            added = column[0].copy()
            for other in column[1:]:
                added += other
            sums.append(added.serialize())
        return _frames.pack(sums)

    def decrypt(self, data: bytes, length: int, *, origin: str) -> Reals:
        """The ``length`` numbers in ciphertexts.

        Raises:
            ProtocolAbort: as :meth:`load`, or there is no secret key.
        """
        if not self.holds_secret_key:
            raise ProtocolAbort("decrypting must have the secret key, got a public context. Ask a client that holds it.")
        values = np.concatenate([np.array(vector.decrypt()) for vector in self.load(data, length, origin=origin)])
        return np.asarray(values[:length])


def _primes(scheme: Scheme) -> list[int]:
    """The primes that every party computes for itself out of the degree and the sizes."""
    return [prime.value() for prime in _tenseal().sealapi.CoeffModulus.Create(scheme.degree, list(scheme.modulus_bits))]
