"""A SIMULATED attested enclave: clients seal their uploads to a process that adds them up, and the server gets the mean, with noise.

    nonce → quote{measurement, debug, microcode, enclave key, nonce, run} signed by the hardware → client verifies, then seals
    inside: open → clip_S each → Σ w_i·u_i + N(0, (z·S)²·I) → one mean a round over at least k clients        w_i = n_i / max_examples

**SIMULATED: there is no hardware.** An ordinary process plays the enclave and its chip; whoever owns the account can read its memory,
and the key that signs quotes follows from the run's secret. What is real: the process boundary, the measurement (SHA-256 over the code
that runs inside, the versions that it rests on, and the policy), the quote and its checks, the sealed channel, the release policy. So
the mode shows what a server behind a sound enclave would see, and no more.

Source: remote attestation as in Intel SGX (Costan and Devadas, 2016, eprint 2016/086) with the policy bound to the measurement, as in
    Google's confidential federated computations (Eichner et al., 2024, arXiv:2404.10764). Central DP inside: McMahan et al., 2018,
    arXiv:1710.06963. Primitives: Ed25519, X25519, HKDF-SHA256, AES-256-GCM with run, round and client as associated data.
Deviations: no certificate chain, one quote for each client and round, no sealed storage: an enclave that restarts has a new key and
    has forgotten what it released, so that clients seal to the first one only, and once for each round. The noise comes from seeds
    that the contributors seal in, not from a chip, so that equal worlds give equal bits. It lies on the weighted sum, whose weights
    are at most 1, so that z is exact for every cohort; where n_i is far below ``max_examples`` the mean is noisier than
    ``central_dp``'s at the same z. Without noise: the mean in float64, no deviation.
What a client checks before it seals, in this order: the hardware's signature, its own fresh nonce, the run (a hash of the world that it
holds itself, seed and secret included: the host's word for it would compare the host with itself), debug mode, microcode, and the
measurement of code and policy; then that the enclave is the one of its first upload and the round a new one.
Hook: the channel. It turns k uploads with one sender each into one upload with k senders.

The claim, with noise: against the server that hosts the enclave and sees nothing before the noise is added, if the enclave is sound;
against who sees the uploads inside, ε = ∞. Unit client, adjacency zero-out, as many releases as the policy allows. A client lost before
its blob arrives is left out; below ``min_contributors`` nothing is released and the run ends.

What it protects: each client's own update, from a server that cannot look into a sound enclave: it sees the mean over at least
``min_contributors`` clients alone. With noise also what the mean tells of any one client, by ε and δ. Here the enclave is SIMULATED, so
that it protects nobody, but shows what one would.

What it does not protect: anything, against who can open a real enclave (side channels, physical access, broken attestation keys): out
of the model. The mean itself where there is no noise; who takes part and when; Σ n_i and, with noise, all n_i count as public. A server
that deviates can seal uploads of its own making and so single out a client: contributors are counted, not authenticated. With noise it
is simulation grade (Mironov, 2012).
Broken by: without noise every attack on the aggregate, as under secure aggregation; with noise none is expected beyond its ε.

Cost: up 4 bytes per parameter + 84 bytes for each client and round (36 of head, 48 of seal) and a nonce of 16; down one quote of 163
    bytes. CPU time of client and server is measured in every run and printed under "Cost" in its report; that of
    the enclave's own process, its start included, with the server's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from dp_accounting import GaussianDpEvent, SelfComposedDpEvent

from defenses.channel._enclave.policy import Policy
from defenses.channel._enclave.program import HEAD_BYTES, Release, contribution
from defenses.channel._enclave.quote import NONCE_BYTES, run_of
from defenses.channel._enclave.sealing import OVERHEAD_BYTES
from defenses.channel._vectors import cut, flat, largest_upload, length
from defenses.client.clip import clip_to_norm, require_clip_norm
from defenses.client.gaussian_noise import require_noise_multiplier
from defenses.refusal import batch_norm_in_train_mode
from simulator.config import dump, standard
from simulator.defense import Claim, Defense
from simulator.errors import ProtocolAbort
from simulator.registry import register
from simulator.types import Tensors, Update, Upload

if TYPE_CHECKING:
    from simulator.world import World


@register("defenses", "simulated_enclave")
@dataclass(frozen=True)
class SimulatedEnclave(Defense):
    """A SIMULATED attested enclave sums sealed uploads, clips and adds noise inside: no hardware stands behind it.

    Attributes:
        min_contributors: fewer in a round, and nothing is released; 0 means ⌊2n/3⌋ + 1 of the cohort.
        clip_norm: S, L2 norm to which the enclave clips each update before it adds noise; without noise it does not clip.
        noise_multiplier: z, standard deviation of the noise on the weighted sum of updates in units of S; 0 adds none.
    """

    channel: ClassVar[bool] = True

    min_contributors: int = 0
    clip_norm: float = 1.0
    noise_multiplier: float = 0.0

    def __post_init__(self) -> None:
        if self.min_contributors < 0 or self.min_contributors == 1:
            raise ValueError(f"min_contributors must be 0 or ≥ 2, got {self.min_contributors}. The mean over one is its update.")
        require_clip_norm(self.clip_norm)
        require_noise_multiplier(self.noise_multiplier, self.clip_norm)

    def refuses(self, world: World) -> str | None:
        """Refuse cohorts below the policy, and BatchNorm's statistics beside noise: they are released without."""
        cohort = world.federation.cohort_size
        if cohort < 2:
            return f"cohort must be ≥ 2 for simulated_enclave, got {cohort}. The mean over one client is its update."
        if self.min_contributors > cohort:
            return f"min_contributors must be ≤ the cohort of {cohort}, got {self.min_contributors}. Lower it."
        return batch_norm_in_train_mode(world, self.name) if self.noise_multiplier else None

    @staticmethod
    def run(world: World) -> bytes:
        """The federation's name, which both ends compute from the world that they hold."""
        return run_of(json.dumps(standard(dump(world)), sort_keys=True))

    def upload_bytes(self, numbers: int, world: World) -> float:
        """The sealed vector in float32 and the nonce."""
        return 4 * numbers + HEAD_BYTES + OVERHEAD_BYTES + NONCE_BYTES

    def policy(self, world: World, parameters: Tensors, buffers: Tensors) -> Policy:
        """The configuration that this world implies; every client computes it for itself, and the enclave is measured with it."""
        cohort = world.federation.cohort_size
        return Policy(
            min_contributors=self.min_contributors or 2 * cohort // 3 + 1, releases=world.federation.rounds,
            max_examples=largest_upload(world), update_length=length(parameters), length=length(parameters, buffers),
            clip_norm=self.clip_norm, noise_multiplier=self.noise_multiplier,
        )  # fmt: skip

    def encode(self, upload: Upload, seed: bytes) -> bytes:
        """What a client seals; with noise an update that is not finite is 0, as a clipped one is: to leave would tell of the data.

        Raises:
            ProtocolAbort: a number is NaN or infinite, without noise.
        """
        if self.noise_multiplier and not all(tensor.isfinite().all() for tensor in upload.update.tensors.values()):
            upload = self.as_summed(upload)
        return contribution(upload.num_examples, seed, flat(upload.update.tensors, upload.buffers).astype(np.float32))

    def as_summed(self, upload: Upload) -> Upload:
        """A client's upload as it enters the sum: clipped where there is noise."""
        if not self.noise_multiplier:
            return upload
        return replace(upload, update=replace(upload.update, tensors=clip_to_norm(upload.update.tensors, self.clip_norm)))

    def decode(self, release: Release, *, kind: Literal["gradient", "delta"], parameters: Tensors, buffers: Tensors) -> Upload:
        """The upload that the server sees.

        Raises:
            ProtocolAbort: a mean of another length, or of no examples.
        """
        if not release.contributors or release.num_examples < len(release.contributors):
            raise ProtocolAbort(f"release must be over ≥ 1 client and example, got {release.num_examples} examples. Abort the round.")
        update, means = cut(release.mean, parameters, buffers)
        return Upload(frozenset(release.contributors), Update(kind, update), means, release.num_examples)

    def claim(self, world: World, records_held: Sequence[int]) -> Claim | None:
        """One Gaussian release a round, against the server, too; none without noise."""
        if not self.noise_multiplier:
            return None
        return Claim(
            event=SelfComposedDpEvent(GaussianDpEvent(self.noise_multiplier), world.federation.rounds),
            adversary="server",
            unit="client",
            adjacency="zero-out (the client's update is replaced by 0 inside the SIMULATED enclave, on whose soundness the claim rests)",
            sampling="cohort drawn by the server; no amplification",
            viewer=(
                "the honest-but-curious server, which hosts a SIMULATED enclave that is sound, and sees one noised mean a round and who is "
                "in it, but no upload"
            ),
        )
