"""Homomorphic encryption: the server adds up what it cannot read, and a client decrypts the sum.

    client i: c_i = Enc_pk(w_i·update_i | w_i·buffers_i | w_i | 1), w_i = n_i / max_examples        server: c = Σ c_i
    one client: Dec_sk(c) + N(0, σ²) → the server divides by Σ w_i

Source: CKKS of Cheon, Kim, Kim and Song, 2017, eprint 2016/421, in the RNS form of Cheon et al., 2018, eprint 2018/931, as Microsoft
    SEAL and TenSEAL (Benaissa et al., 2021, arXiv:2104.03152) implement it; as aggregation for federated learning: Jin et al., 2023,
    "FedML-HE", arXiv:2303.10837. Noise before a decrypted sum is told: Li and Micciancio, 2021, eprint 2020/1533, and Li, Micciancio,
    Schultz and Sorrell, 2022, eprint 2022/816.
Deviations:
    - FedML-HE encrypts the most sensitive weights only; here all that a client uploads is encrypted, its number of examples, too;
    - a key authority is replaced by a client: the lowest one makes the keys and hands the secret key to the others through the server,
      sealed (X25519, HKDF-SHA256, AES-256-GCM); no signatures, which an active server would make necessary;
    - the noise is a PRF of the secret key and the ciphertexts (_ckks/flooding.py): one sum has one noise, whoever is asked and however
      often, so that a second client that is asked because the first was lost tells the server nothing new;
    - ``flooding_bits`` = b bounds the divergence that the error leaves over the whole training by 2^−b
      (:meth:`defenses.channel._ckks.scheme.Scheme.flooding`), with Gaussian noise on the decrypted numbers, in float64: simulation
      grade. For finding the key that costs the server about b bits of work (Li et al., 2022); telling two sets of uploads apart gains
      it at most 2^(−(b + 1)/2).
    The error counts float64's own rounding in the encoding, a share of the numbers: of a sum above root mean square 1, as BatchNorm's
    running variances may be, the noise grows with it (:meth:`CKKSAggregation.flooding`).
    Effect on the aggregate: :meth:`CKKSAggregation.error_rms`, printed with a run. Measured over 8 clients, values of standard
    deviation 0.01: the sum's rms error is 3.5e-9 with 60, 40, 60 and scale 2^40 (2.7e-9 of its norm at most), 3.4e-15 with the
    default and 7.8e-8 with its noise over 10 rounds of 1e5 parameters; the formula says 3.5e-9, 3.4e-15 and 7.8e-8.
Hook: the channel. It turns k uploads with one sender each into one upload with k senders. The model that is released, and so the mean,
    is the server's to see, as under secure aggregation; it never holds the secret key.

Ciphertexts are random, so that their bytes differ from run to run and with them the last digits of the aggregate: two runs of one
world, on whichever drivers, agree within a few ``error_rms``, never to the bit. A client that is lost during the set-up cannot take
part in this run any more; one that is lost before its upload is left out of that round; if the client that is asked to decrypt is lost,
or tells what cannot be a sum, the next is asked. Before keys are made, whose public key is no key, or somebody else's, is left out. A
client that makes keys for other parameters than the world's, or such as nobody can use, is passed over, and the next makes them; one that
seals garbage to some and not to all makes those leave.

What it protects: each client's own update, from the server, which adds ciphertexts that it cannot read and is told the sum: by the
hardness of lattice problems, if no client colludes: at 128 bits as long as no sum is told; once sums are told, what is shown is b =
``flooding_bits`` bits (30) against finding the key, and a gain of at most 2^(−(b + 1)/2) in telling two sets of uploads apart. No
differential privacy: the sum is told as it is.

What it does not protect: the mean itself, as under secure aggregation; who takes part and when; Σ n_i; the run, which a client ends
that encrypts what is no update, unnamed; **anything at all once a single
client colludes**: all clients hold the one secret key, and the server holds all ciphertexts, of this and of all earlier rounds.
``secret_key`` shows that view: the server decrypts each upload by itself. Against a server that deviates: nothing; it may send one
upload for decryption where the sum belongs (the client refuses one that says it holds fewer than two, which a multiple does not), and
by adding an encryption of 0 it may be told a sum anew. A client tells one sum a round: n·T tellings at most, not T, which is log2 n of b.
**Without flooding, not even against a server that only listens**: CKKS decrypts to the message plus its error, and two sums that are
told at full precision solve for the secret key by linear algebra (IND-CPA^D). ``tests/defenses/test_ckks.py`` finds every coefficient
of it so, in a tenth of a second. Flooding is what is known against it: an exact solver fails under any noise, so that its failing shows
nothing, and the b bits are a bound by the divergence alone. This holds for any protocol that returns a decrypted mean as
it is. Ciphertexts may be altered; nothing proves who encrypted.
Broken by: every attack on the aggregate (large-batch inversion, disaggregation over rounds); with the key, by every attack on an upload.

Cost: up 32 bytes per parameter for each data prime of 60 bits, down once more for the one client that decrypts, which sends 8 bytes
    back; once a run each client gets the public context and the sealed secret key. Measured on one core over 1e5 parameters and 8
    clients (CPU time; bytes of the upload per parameter | µs per parameter: encrypt, add one upload, decrypt | the two keys):
    60, 60, 60 (default)     65.6 B, 16 times float32 | 1.3, 0.04, 0.33 | 0.39 + 0.20 MB
    60, 40, 60, scale 2^40   58.8 B                   | 1.2, 0.04, 0.37 | 0.36 + 0.18 MB; with 30 bits of flooding its error is 0.08
    N = 4096, 60, 49, 2^40   32.2 B                   | 0.9, 0.03, 0.16 | 0.12 + 0.06 MB; with 30 bits of flooding its error is 0.04
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from defenses.channel._ckks.cipher import missing
from defenses.channel._ckks.handover import KEY_BYTES
from defenses.channel._ckks.scheme import LARGEST_ERROR, Scheme
from defenses.channel._vectors import Reals, cut, flat, largest_upload, length
from simulator.defense import Defense
from simulator.errors import ProtocolAbort
from simulator.registry import register
from simulator.types import Tensors, Update, Upload

if TYPE_CHECKING:
    from simulator.world import World

FACTS = 2
"""Numbers behind the update and the buffers: the client's weight, and a 1 that counts the senders."""
TYPICAL_RMS = 1.0
"""Root mean square of the numbers up to which errors are stated, unless said otherwise: above all updates, below some running variances."""
CORRUPT = 0.25
"""How far a number that must be whole may lie from it."""


@register("defenses", "ckks_aggregation")
@dataclass(frozen=True)
class CKKSAggregation(Defense):
    """Homomorphic encryption (CKKS): the server adds ciphertexts; one colluding client, who holds the key, undoes it.

    Attributes:
        degree: N of the ring; a ciphertext holds N/2 numbers.
        modulus_bits: sizes of the primes of the coefficient modulus, the last for keys only; few make small ciphertexts.
        scale_bits: digits behind the binary point; the error falls with it.
        flooding_bits: b of the noise that the decrypting client adds before it tells the sum: all told sums together are within a
            divergence of 2^−b of sums without CKKS's error; 0 adds none, which lets the server solve for the secret key.
        secret_key: who can use it: the ``clients`` alone; the server too, because one client is a ``colluder``; or the ``server``,
            because it made the keys.
    """

    channel: ClassVar[bool] = True

    degree: int = 8192
    modulus_bits: tuple[int, ...] = (60, 60, 60)
    scale_bits: int = 60
    flooding_bits: int = 30
    secret_key: Literal["clients", "colluder", "server"] = "clients"

    def __post_init__(self) -> None:
        _ = self.scheme
        if not 0 <= self.flooding_bits <= 128:
            raise ValueError(f"flooding_bits must be in 0..128, got {self.flooding_bits}. The default is 30; 0 is no noise.")

    @property
    def scheme(self) -> Scheme:
        """The parameters of CKKS."""
        return Scheme(degree=self.degree, modulus_bits=self.modulus_bits, scale_bits=self.scale_bits)

    def refuses(self, world: World) -> str | None:
        """Refuse a Python without TenSEAL, cohorts that cannot be hidden in, and noise that would be a defense by itself."""
        if (reason := missing()) is not None:
            return reason
        cohort = world.federation.cohort_size
        if cohort < 2:
            return f"cohort must be ≥ 2 for ckks_aggregation, got {cohort}. The sum over one client is its update."
        if self.scheme.largest <= cohort:  # each client adds a 1 that counts it
            return (
                f"cohort must be below {self.scheme.largest:g}, where a sum wraps with these primes at scale_bits = {self.scale_bits}, got "
                f"{cohort}. Lower scale_bits or add a prime."
            )
        smallest = self.scheme.flooding(cohort, world.federation.rounds, self.flooding_bits)
        if smallest > LARGEST_ERROR:
            return (
                f"flooding_bits must leave an error ≤ {LARGEST_ERROR:g}, got {smallest:.1e} with {self.flooding_bits} at "
                f"scale_bits = {self.scale_bits}. Lower it, or use modulus_bits = [60, 60, 60] and scale_bits = 60."
            )
        return None

    def upload_bytes(self, numbers: int, world: World) -> float:
        """The ciphertexts, a client's share of the one decrypted sum, and of the keys that are made once."""
        federation, scheme, values = world.federation, self.scheme, numbers + FACTS
        made_by_client = self.secret_key != "server"
        keys = scheme.public_key_bytes * (1 + (federation.clients - 1) / 2) if made_by_client else 0.0
        once = (keys + KEY_BYTES * federation.clients) / (federation.cohort_size * federation.rounds)
        return scheme.coded_bytes(values) + 8 * values / federation.cohort_size + once

    def length(self, parameters: Tensors, buffers: Tensors) -> int:
        """Numbers in the vector that a client encrypts."""
        return length(parameters, buffers) + FACTS

    def flooding(self, world: World, numbers: int, *, rms: float = TYPICAL_RMS) -> float:
        """Standard deviation of the noise on each of the ``numbers`` of a decrypted sum, every round's counted.

        Args:
            rms: root mean square of the sum's numbers, taken up to a power of two and to :data:`TYPICAL_RMS` at least: each client that
                decrypts the sum gets the same, and it says no more than the sum does.
        """
        level = max(TYPICAL_RMS, 2.0 ** math.ceil(math.log2(rms))) if rms > 0 else TYPICAL_RMS
        return self.scheme.flooding(world.federation.cohort_size, numbers * world.federation.rounds, self.flooding_bits, rms=level)

    def error_rms(self, world: World, *, senders: int, num_examples: int, numbers: int, rms: float = TYPICAL_RMS) -> float:
        """Expected rms error of one coordinate of the mean update, in the update's unit: print it with a run.

        ``rms`` is the root mean square of the mean's own numbers, buffers among them.
        """
        shrunk = num_examples / largest_upload(world)
        return math.hypot(self.scheme.error(senders, rms=rms * shrunk), self.flooding(world, numbers, rms=rms * shrunk)) / shrunk

    def encode(self, upload: Upload, *, max_examples: int) -> Reals:
        """What a client encrypts.

        Raises:
            ProtocolAbort: a number is not finite, or n_i is out of bounds. The message stays with the client.
        """
        if not 1 <= upload.num_examples <= max_examples:
            raise ProtocolAbort(f"num_examples must be in [1, {max_examples}], got one outside. Check the public bound.")
        weight = upload.num_examples / max_examples
        return np.concatenate((weight * flat(upload.update.tensors, upload.buffers), [weight, 1.0]))

    def decode(
        self, total: Reals, *, kind: Literal["gradient", "delta"], parameters: Tensors, buffers: Tensors,
        senders: frozenset[int], max_examples: int,
    ) -> Upload:  # fmt: skip
        """The upload in a decrypted sum over ``senders``: means weighted by n_i, and Σ n_i.

        Raises:
            ProtocolAbort: a sum of another length or of other clients, or one that no senders' vectors can have.
        """
        if total.shape != (self.length(parameters, buffers),) or not np.isfinite(total).all():
            raise ProtocolAbort(f"sum must be {self.length(parameters, buffers)} finite numbers, got {total.size}. Abort the round.")
        count, examples = float(total[-1]), float(total[-2]) * max_examples
        whole = max(abs(count - round(count)), abs(examples - round(examples))) < CORRUPT
        if not whole or round(count) != len(senders) or not len(senders) <= round(examples) <= len(senders) * max_examples:
            raise ProtocolAbort(
                f"sum must be of {len(senders)} senders with {len(senders)} to {len(senders) * max_examples} examples, "
                f"got {count:.3g} with {examples:.3g}. It is corrupt: abort the round."
            )
        tensors, means = cut(total[:-FACTS] / total[-2], parameters, buffers)
        return Upload(senders, Update(kind, tensors), means, round(examples))
