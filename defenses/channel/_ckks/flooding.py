"""The noise on a decrypted sum: one sum has one noise, whoever decrypts it and however often, so that asking again averages nothing away.

    seed = HMAC-SHA256(key = SHA-256(label | secret key), ciphertexts)        noise = N(0, σ²) of PCG64(seed)

Source: Li, Micciancio, Schultz and Sorrell, 2022, eprint 2022/816, for σ (:meth:`defenses.channel._ckks.scheme.Scheme.flooding`); a
    randomized algorithm made deterministic by a PRF of its input is folklore (Goldreich, 1986; RFC 6979 for signatures).
Deviations: PCG64 in float64: simulation grade.
"""

from __future__ import annotations

import hashlib
import hmac

import numpy as np

from defenses.channel._vectors import Reals

_LABEL = b"fedpeek ckks flooding"


def noise(secret: bytes, ciphertexts: bytes, numbers: int, *, std: float) -> Reals:
    """Gaussian noise of standard deviation ``std`` that belongs to these ciphertexts; all who hold the secret key draw the same.

    Args:
        secret: the secret context as its maker handed it over; the server does not have it.
        ciphertexts: of the sum that is told.
        numbers: in it.
        std: in the unit of the sum.
    """
    seed = hmac.digest(hashlib.sha256(_LABEL + secret).digest(), ciphertexts, "sha256")
    rng = np.random.Generator(np.random.PCG64(int.from_bytes(seed, "little")))
    return np.asarray(rng.normal(0.0, std, numbers))
