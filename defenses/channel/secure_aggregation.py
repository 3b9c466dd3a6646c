"""Secure aggregation: the server sees the weighted mean over the cohort, and no client's own update.

Source: Bonawitz et al. (2017), "Practical Secure Aggregation for Privacy-Preserving Machine Learning", CCS, eprint 2017/281: double
    masking. X25519, HKDF-SHA256, AES-256-CTR masks, AES-256-GCM envelopes, Shamir over 2^256 + 297, Ed25519. Bell et al. (2020), CCS,
    eprint 2020/704 ("SecAgg+"): ``graph = "k-regular"``. Ma et al. (2023), "Flamingo", arXiv:2308.09883: ``setup = "once"``.
Deviations:
    - **the default adversary is a semi-honest server with up to t − 1 colluding clients** (complete graph), or with the share
      ``corrupt`` of them (k-regular, certified to 40 bits over all rounds of the run together); ``active`` adds the paper's signatures
      and consistency round, for whose identities see _secagg/identity.py: a simulation's are derived from the world, and keep nobody
      out who holds it;
    - envelopes are opened before the masked vector is sent, not after, so that an altered one aborts while nothing is at stake;
    - all keys are bound to a hash of the parameters and, on the complete graph, of all public keys;
    - the graph's bounds are ours (_secagg/graph.py), and so is the recovery under keys that outlive a round (_secagg/keyring.py);
    - the update is weighted by n_i before rounding, and n_i travels as the last word of the masked vector (quantization.py).
    Their effect on the aggregate: rounding alone, :meth:`SecureAggregation.rounding_rms`; it is measured and reported with a run because
    a coarse rounding would act as an undeclared defense.

Hook: the channel. It turns k uploads with one sender each into one upload with k senders. Three arms show what protects: ``plain``
(averaging: a trusted party adds up what clients would upload), ``quantized`` (averaging and rounding: it adds up the words, without
masks), ``protocol`` (and masking: all messages). The last two give the same bits.

Distributed DP adds its noise here: a defense that overrides ``Defense.integer_noise(world, shape, rng)`` returns int64 noise for the
update's coordinates, in units of the grid, :meth:`SecureAggregation.grid`; :meth:`SecureAggregation.encode` adds it to the rounded words
modulo 2^bits before they are masked, buffers and n_i stay without. ``clip_range`` is then no bound on a coordinate but the room:
senders' sums wrap beyond ±cohort·clip_range, or beyond what ``Defense.word_range`` asks for instead. The weight n_i / max_examples ≤ 1 is
in the words before the noise; a random rotation (``Defense.rotation``) precedes the rounding, and :meth:`decode` turns the mean back.

Against an active server (``active``; Bonawitz et al., 2017, section 6, whose bounds t > 2n/3 and c < n/3 are asked for; for the graph of
Bell et al., 2020, the server must be honest while keys are exchanged, so that it is refused here). Signed adverts: no key of the server's
in a client's place, with which it would read shares and know masks, and none of another round. The consistency round: no two sets of
survivors in a round, which would open both secrets of a client. Together: one sum a round, over ≥ t clients of which ≥ t − c are honest.
They do not protect: the result, which server and clients can falsify or prevent; who is in the sum, the server's choice; against more than
c clients of its own making, if it runs the directory; what a model made to leak puts into the sum; differences of two rounds' sums.

A client counts its own share of its own secrets, as in the paper. So any t survivors can finish, also where n − 1 others could not:
with the default threshold, a cohort of 2 or 3 works but tolerates no drop-out, one of 4 tolerates one.

What it protects: each client's own update, from the server and up to t − 1 colluding clients on the complete graph (``active``: from a
server that lies within the protocol and fewer than 2t − n colluders, too): they learn the sum over those who answered, and by the proof
of Bonawitz et al. nothing else that can be computed. It hides who of the cohort contributed what, the better the more honest clients are
in the sum, and has no ε.

What it does not protect: the mean itself, which is a large-batch update and can be attacked as one; anybody from t colluders on, whose
shares open every upload; a client which several means over different cohorts single out; who takes part, who drops out and when; Σ n_i;
coordinates that one client alone touches; unless ``active``, against a server that alters messages: nothing; active or not, against one
that sends different clients different models. A reply that is none costs its sender the round, nobody else; but who sends a false vector of
the right form spoils the sum, undetected, a false share of the right form ends the run, and who seals garbage for its peers makes them
leave. Nothing is clipped: without integer noise, who has a coordinate beyond ``clip_range`` (a buffer's, beyond ``buffer_range``) leaves
the round, which tells the server that one was so large; and the mean is over the others, so that a small range keeps outliers out: a
defense that nobody declared. ``clip`` before the channel with clip_norm < ``clip_range`` prevents both for updates, as a range large enough
does. Python erases no keys, nor has constant time.
Broken by: gradient inversion of the mean, which takes it as one batch (cocktail_party, sparse_factorization, inverting_gradients);
gradient_disaggregation, support_leak and label_owners over rounds; t colluding clients on the complete
graph, more than ``corrupt`` on a k-regular one (``colluding`` of the threat model shows fewer, and n − 1); imprint and trap_weights.

Cost: per client (k + 1)·d words of keystream, d·bits/8 + 131·k + about 200 bytes of upload (k = n − 1 on the complete graph); on the server
(senders + dropped · k) · d words. ``quantized`` shows the attacker the same view as ``protocol`` at no cost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from defenses.channel._secagg import cost, encoding
from defenses.channel._secagg import graph as graphs
from defenses.channel._secagg.masking import Words, packed_bytes
from defenses.channel._secagg.parameters import Parameters
from defenses.channel._secagg.quantization import Integers, Scale, floating
from defenses.channel._secagg.refusal import why_not
from defenses.channel._vectors import largest_upload
from simulator.defense import Defense, overrides
from simulator.errors import ProtocolAbort
from simulator.registry import register
from simulator.types import Tensors, Update, Upload

if TYPE_CHECKING:
    from simulator.world import World

REFERENCE_STD = 1e-3
"""Coordinate standard deviation of a typical update, at which the rounding error is judged."""
MAX_RELATIVE_ERROR = 1e-4
"""Rounding error, relative to the mean's standard deviation, up to which 32-bit words are chosen."""


@register("defenses", "secure_aggregation")
@dataclass(frozen=True)
class SecureAggregation(Defense):
    """Secure aggregation by double masking; see the module for its adversary and its limits.

    The module is long because its documentation is the defense's page, a quarter of it; what is computed lies in ``_secagg``, and what
    is left here are the settings and what each of them decides.

    Attributes:
        mode: ``protocol`` exchanges all messages; ``quantized`` sums the same words without masks, with bit-identical results;
            ``plain`` sums without rounding either.
        graph: ``complete``, or ``k-regular``, for cohorts above 64 in which fewer than n − 1 neighbors are certified; refused in others.
        degree: k of the k-regular graph; 0 takes the smallest pair (k, t) that is certified for ``corrupt`` and ``dropout``; with
            another, set ``threshold`` too: the pair is certified or refused.
        threshold: shares that reconstruct a secret; on the complete graph also the clients that every stage needs, above half of the
            cohort; 0 means ⌊2n/3⌋ + 1 there, which the paper asks for against an active server (a semi-honest one needs above half).
        corrupt: share of the cohort that may collude with the server, for the certificate; without one, the world is refused.
        dropout: share of the cohort that may drop out, likewise; on a k-regular graph the round ends if more do.
        active: stand against a server that alters messages: signed keys, signed survivors; the complete graph only.
        identities: Ed25519 public keys of all clients in hexadecimal, by client; empty derives them, for simulations.
        setup: ``each round`` agrees on fresh keys; ``once`` derives each round's from keys that outlive it.
        clip_range: largest magnitude of an update's coordinate, in the update's unit; above it a client leaves the round, which the
            server sees. Flower's default; where distributed_dp rotates, its own range takes this one's place.
        buffer_range: the same for floating-point buffers: BatchNorm's running variances exceed gradients by far.
        max_examples: public bound on any client's number of examples; 0 takes the caller's.
        bits: width of a word; 0 means 32 where rounding stays below 1e-4 of a mean update of std 1e-3 when clients hold half of
            ``max_examples`` each, or all of it where that is 1, else 64: 4 bytes a parameter up to 32 clients at ``clip_range`` = 8, 131
            at 2, 1052 at 0.25, and up to 65, 263 and 2104 with one example each. 16, 20 and 24 are for distributed DP, whose noise
            covers the rounding.
    """

    channel: ClassVar[bool] = True

    mode: Literal["protocol", "quantized", "plain"] = "protocol"
    graph: Literal["complete", "k-regular"] = "complete"
    degree: int = 0
    threshold: int = 0
    corrupt: float = 0.2
    dropout: float = 0.05
    active: bool = False
    identities: tuple[str, ...] = ()
    setup: Literal["each round", "once"] = "each round"
    clip_range: float = 8.0
    buffer_range: float = 1024.0
    max_examples: int = 0
    bits: Literal[0, 16, 20, 24, 32, 64] = 0

    def __post_init__(self) -> None:
        if self.threshold < 0:
            raise ValueError(f"threshold must be ≥ 0, got {self.threshold}. Use 0 for two thirds of the cohort.")
        if self.degree < 0 or (self.degree > 0 if self.graph == "complete" else (self.degree > 0) is not (self.threshold > 0)):
            raise ValueError(
                f"degree must be 0 on the complete graph, and be set together with threshold on a k-regular one, got {self.degree} and "
                f"threshold {self.threshold}, {self.graph}. Use 0 for the smallest certified pair."
            )
        if not (0 <= self.corrupt < 1 and 0 <= self.dropout < 1):
            raise ValueError(f"corrupt and dropout must be in [0, 1), got {self.corrupt} and {self.dropout}. They are shares.")
        if self.max_examples < 0:
            raise ValueError(f"max_examples must be ≥ 0, got {self.max_examples}. Use 0 to take the batch size.")
        for name, limit in (("clip_range", self.clip_range), ("buffer_range", self.buffer_range)):
            if not 0 < limit < math.inf:
                raise ValueError(f"{name} must be > 0 and finite, got {limit}. Use the largest magnitude that can occur.")

    def refuses(self, world: World) -> str | None:
        """Refuse cohorts that cannot be hidden in, and settings that cannot be met or do not protect."""
        return why_not(self, world)

    def plan_for(self, cohort: int, rounds: int) -> graphs.Plan | None:
        """The graph, the threshold and what is certified of them in cohorts of this size, over so many rounds together.

        None if no pair can be certified, or none below the complete graph where the graph is to be k-regular.
        """
        if self.graph == "complete":
            plan = self.complete_plan(cohort, rounds)
            return plan if plan.certified else None
        if not self.degree:
            found = graphs.solve(cohort, self.corrupt, self.dropout, rounds)
            return None if found is None or found.complete else found
        if self.degree % 2 or not 2 <= self.degree < cohort - 1 or not self.degree < 2 * self.threshold <= 2 * self.degree:
            return None
        plan = graphs.certify(cohort, self.degree, self.threshold, *self.foreseen(cohort), rounds=rounds)
        return plan if plan.certified else None

    def complete_plan(self, cohort: int, rounds: int) -> graphs.Plan:
        """The complete graph and what can be said of it, certified or not."""
        threshold = self.threshold or 2 * cohort // 3 + 1
        return graphs.certify(cohort, cohort - 1, threshold, *self.foreseen(cohort), rounds=rounds, active=self.active)

    def foreseen(self, cohort: int) -> tuple[int, int]:
        """Clients of a cohort that may collude, and that may drop out."""
        corrupt, dropped = (math.floor(fraction * cohort + 1e-9) for fraction in (self.corrupt, self.dropout))
        return corrupt, dropped

    def quorum_for(self, cohort: int, rounds: int) -> int:
        """Clients that must be in each of so many sums over a cohort of this size."""
        plan = self.plan_for(cohort, rounds)
        assert plan is not None  # refused before
        return plan.threshold if plan.complete else max(plan.threshold, cohort - plan.dropped)

    def bits_for(self, cohort: int, max_examples: int) -> int:
        """Width of a word in a cohort of this size; the setting ``max_examples`` has precedence over the caller's."""
        if self.bits:
            return self.bits
        most = min(2, self.max_examples or max_examples)  # one example each: half full, or full for certain where one is all they may have
        error = Scale(cohort=cohort, bits=32, max_examples=most).rms_error(self.clip_range, senders=cohort, num_examples=cohort)
        return 32 if error <= MAX_RELATIVE_ERROR * REFERENCE_STD / math.sqrt(cohort) else 64

    def scale_for(self, cohort: int, max_examples: int) -> Scale:
        """How reals become words in a cohort; the setting ``max_examples`` has precedence over the caller's."""
        return Scale(cohort=cohort, bits=self.bits_for(cohort, max_examples), max_examples=self.max_examples or max_examples)

    def range_for(self, world: World, coordinates: int) -> float:
        """The largest magnitude that words make room for, of an update of so many coordinates: ``clip_range``, or what a defense asks."""
        asked = [limit for defense in world.defenses if (limit := defense.word_range(world, coordinates)) is not None]
        return max(asked, default=self.clip_range)

    def scale_in(self, world: World) -> Scale:
        """How reals become words in this world."""
        return self.scale_for(world.federation.cohort_size, self.largest_upload(world))

    def grid(self, world: World, coordinates: int) -> float:
        """The distance of neighboring values of a coordinate of the n_i / max_examples-weighted update, in the update's unit."""
        return self.scale_in(world).step(self.range_for(world, coordinates))

    def rotation_for(self, world: World, round: int) -> torch.Generator | None:
        """Public randomness of a round by which updates are turned, set up anew for each who asks; None where no defense wants it."""
        asked = (defense.rotation(world, round) for defense in world.defenses)
        return next((rng for rng in asked if rng is not None), None)

    def noised(self, world: World) -> bool:
        """Whether a defense adds integer noise to the words."""
        return any(overrides(defense, "integer_noise") for defense in world.defenses)

    def largest_upload(self, world: World) -> int:
        """A public bound on any client's number of examples: the batch of FedSGD, else what an even deal or all records allow."""
        return self.max_examples or largest_upload(world)

    def parameters(
        self, *, run_id: str, round: int, rounds: int, clients: Sequence[int], max_examples: int, template: Tensors, buffers: Tensors,
        seed: bytes = b"",
    ) -> Parameters:  # fmt: skip
        """What the parties of one round agree on.

        Args:
            run_id: drawn for this aggregation.
            round: of the federation.
            rounds: that it has, over which the graphs are certified.
            clients: the invited cohort.
            max_examples: as in :meth:`encode`.
            template: gives shapes of the update.
            buffers: gives shapes of the buffers.
            seed: 32 bytes that draw the graph of this round, by the server; the complete graph needs none.

        Raises:
            ProtocolAbort: clients or threshold that the protocol forbids.
        """
        plan = self.plan_for(len(clients), rounds)
        if plan is None:
            raise ProtocolAbort(f"graph must be certified, got no {self.graph} one for {len(clients)} clients. Lower corrupt or dropout.")
        sparse = not plan.complete
        return Parameters(
            run_id=run_id, round=round, clients=tuple(sorted(clients)), threshold=plan.threshold,
            length=sum(tensor.numel() for tensors in (template, buffers) for tensor in floating(tensors).values()) + 1,
            bits=self.bits_for(len(clients), max_examples), degree=plan.degree if sparse else 0, seed=seed if sparse else b"",
            quorum=self.quorum_for(len(clients), rounds) if sparse else 0, active=self.active, standing=self.setup == "once",
        )  # fmt: skip

    def upload_bytes(self, numbers: int, world: World) -> float | None:
        """What a client sends; the arms with a trusted party cost the words, or what they cost before."""
        if self.mode == "plain" or (plan := self.plan_for(world.federation.cohort_size, world.federation.rounds)) is None:
            return None
        bits = self.bits_for(plan.clients, self.largest_upload(world))
        if self.mode == "quantized":
            return packed_bytes(numbers + 1, bits)
        return cost.upload_bytes(numbers + 1, bits, plan.degree, active=self.active, standing=self.setup == "once")

    def rounding_rms(self, *, cohort: int, senders: int, num_examples: int, max_examples: int, limit: float = 0.0) -> float:
        """Expected rms rounding error of one coordinate of the mean update, in the update's unit: print it with a run."""
        return self.scale_for(cohort, max_examples).rms_error(limit or self.clip_range, senders=senders, num_examples=num_examples)

    def encode(
        self, update: Update, buffers: Tensors, num_examples: int, *, cohort: int, max_examples: int, rng: torch.Generator,
        noise: Integers | None = None, longest: float = math.inf, limit: float = 0.0, rotation: torch.Generator | None = None,
    ) -> Words:  # fmt: skip
        """A client's vector to be masked: see :func:`_secagg.encoding.encode`.

        ``cohort``, the clients invited to the round, fixes the scale, whoever drops out; ``max_examples``, the public bound on n_i, is
        ignored where the setting of that name is not 0; ``noise`` and ``longest`` are in units of :meth:`grid`; ``limit`` is
        :meth:`range_for` the update, 0 takes ``clip_range``.
        """
        scale, ranges = self.scale_for(cohort, max_examples), (limit or self.clip_range, self.buffer_range)
        return encoding.encode(
            update, buffers, num_examples, ranges=ranges, scale=scale, rng=rng, noise=noise, longest=longest, rotation=rotation
        )

    def decode(
        self, total: Words, *, kind: Literal["gradient", "delta"], template: Tensors, buffer_template: Tensors,
        senders: frozenset[int], cohort: int, max_examples: int, noisy: bool = False, limit: float = 0.0,
        rotation: torch.Generator | None = None,
    ) -> Upload:  # fmt: skip
        """The upload that the server sees, out of a sum of such vectors: see :func:`_secagg.encoding.decode`."""
        scale, ranges = self.scale_for(cohort, max_examples), (limit or self.clip_range, self.buffer_range)
        return encoding.decode(
            total, kind=kind, template=template, buffer_template=buffer_template, senders=senders, ranges=ranges, scale=scale, noisy=noisy,
            rotation=rotation,
        )  # fmt: skip
