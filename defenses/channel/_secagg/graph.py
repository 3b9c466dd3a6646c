"""Who masks with whom and who holds whose shares: the complete graph, or a random k-regular one, certified before it is used.

Source: Bell et al. (2020), "Secure Single-Server Aggregation with (Poly)Logarithmic Overhead", CCS, eprint 2020/704: a randomly permuted
    Harary graph, in which every client has the k/2 next ones on each side of a ring as its neighbors.
Deviations: the bounds are ours, by exact hypergeometric tails and a union over clients instead of the paper's; so are (k, t). With n
    clients of which c collude with the server and m drop out, both sets chosen without regard to the graph, over R rounds, each of which
    draws its own,
    security:     R·n·(P[H(n−1, c, k) ≥ t] + ((c + m)/n)^(k/2)) ≤ 2^−40: no honest client has t colluding neighbors, and the others stay
                  connected, so that no partial sum shows;
    correctness:  R·n·P[H(n−1, n−1−m, k) ≤ t−1] ≤ 2^−30: every client keeps t neighbors that can help to remove its masks.
    The server must draw the seed at random, as a semi-honest one does and nobody can check; an active one could draw until a graph suits
    it, so against it the graph is complete.
    A client holds a share of its own secrets, too: on the complete graph t is therefore above n/2, elsewhere the bounds do without it.
    On the complete graph both are certain or do not hold: c < t, and against an active server c < 2t − n, so that two sets of survivors
    cannot both gather t signatures, each of the c signing both and each other client one: 2t > n + c; and t clients that stay.
Figures (k, t) at 5 % colluding, 5 % dropping out, and at 20 %, 5 %, in one round: n = 100: (30, 16), (48, 25); n = 1000: (34, 18),
    (58, 39); n = 10⁴: (38, 21), (68, 46); over 100 rounds: n = 100: (34, 18), (54, 28); n = 1000: (38, 20), (66, 45); n = 10⁴: (44, 23),
    (78, 52). ``python -m experiments.benchmarks.secure_aggregation --graph`` prints more of one round, with their bits.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

SECURITY_BITS, CORRECTNESS_BITS = 40.0, 30.0
"""Least −log2 of the probability that a run has a leak, and that it loses a round though no more than foreseen dropped out."""
SMALL_COHORT, FEW_CORRUPT = 64, 2
"""Up to so many clients, or with fewer corrupt ones, the bounds say nothing of use (c = m = 0 "certifies" k = 2): the graph is complete."""
LARGEST_SEARCHED = 1024
"""Clients of the largest cohort that is looked at for a graph sparser than the complete one."""
SEED_BYTES = 32


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A graph and what is certified of it.

    Attributes:
        clients: n.
        degree: neighbors of each client; n − 1 is the complete graph.
        threshold: shares that reconstruct a secret.
        corrupt: clients that may collude with the server.
        dropped: clients that may drop out.
        rounds: of the run, each with a graph of its own.
        security_bits: −log2 of the probability that the server learns more than the sum in any of them; infinite where it cannot happen.
        correctness_bits: −log2 of the probability that any of their sums cannot be unmasked; likewise.
    """

    clients: int
    degree: int
    threshold: int
    corrupt: int
    dropped: int
    rounds: int
    security_bits: float
    correctness_bits: float

    @property
    def complete(self) -> bool:
        """Whether everybody is everybody's neighbor."""
        return self.degree == self.clients - 1

    @property
    def certified(self) -> bool:
        """Whether both probabilities are as small as we ask for."""
        return self.security_bits >= SECURITY_BITS and self.correctness_bits >= CORRECTNESS_BITS

    def __str__(self) -> str:
        kind = "complete graph" if self.complete else f"{self.degree}-regular graph"
        security, correctness = ("certain" if math.isinf(b) else f"{b:.1f} bits" for b in (self.security_bits, self.correctness_bits))
        of = "in one round" if self.rounds == 1 else f"over {self.rounds} rounds together"
        return (
            f"{kind} of {self.clients}, t = {self.threshold}: security {security} with {self.corrupt} colluding, "
            f"correctness {correctness} with {self.dropped} dropped out, {of}"
        )


@lru_cache(maxsize=64)
def certify(
    clients: int, degree: int, threshold: int, corrupt: int, dropped: int, *, rounds: int = 1, active: bool = False
) -> Plan:  # fmt: skip
    """The bits of a given pair (k, t), computed in whole numbers; they may be too few, or 0; ``active`` knows the complete graph only."""
    sizes = {"clients": clients, "degree": degree, "threshold": threshold, "corrupt": corrupt, "dropped": dropped, "rounds": rounds}
    if degree == clients - 1:  # here a client's own share counts, as in the protocol on the complete graph
        security = math.inf if corrupt < most_corrupt(clients, threshold, active=active) else 0.0
        return Plan(**sizes, security_bits=security, correctness_bits=math.inf if clients - dropped >= threshold else 0.0)
    ways, corrupt_neighbors = _neighbors(clients - 1, corrupt, degree)
    _, alive_neighbors = _neighbors(clients - 1, clients - 1 - dropped, degree)
    neighborhoods = rounds * clients  # each of which may fail
    leak = _bits(neighborhoods * sum(corrupt_neighbors[threshold:]), ways)
    apart = (degree // 2) * math.log2(clients / max(corrupt + dropped, 1)) - math.log2(neighborhoods)
    both = min(leak, apart) - math.log2(1 + 2.0 ** -abs(leak - apart)) if math.isfinite(leak) else apart
    lost = _bits(neighborhoods * sum(alive_neighbors[:threshold]), ways)
    return Plan(**sizes, security_bits=max(0.0, both), correctness_bits=max(0.0, lost))


def most_corrupt(clients: int, threshold: int, *, active: bool = False) -> int:
    """So many colluding clients of the complete graph show the server more than the sum without them; fewer do not."""
    return 2 * threshold - clients if active else threshold


@lru_cache(maxsize=64)
def solve(clients: int, corrupt: float, dropout: float, rounds: int = 1) -> Plan | None:
    """The smallest even k, and for it the smallest t > k/2, certified for these fractions over all rounds together; None if there is none.

    The complete graph comes last; small cohorts get it at once, with t = ⌊2n/3⌋ + 1.
    """
    c, m = (math.floor(fraction * clients + 1e-9) for fraction in (corrupt, dropout))
    if clients <= SMALL_COHORT or c < FEW_CORRUPT:
        plan = certify(clients, clients - 1, 2 * clients // 3 + 1, c, m, rounds=rounds)
        return plan if plan.certified else None
    span = math.log2(clients / (c + m)) if 0 < c + m < clients else 0.0
    neighborhoods = rounds * clients
    least = 2 * math.ceil((SECURITY_BITS + math.log2(neighborhoods)) / span) if span else clients  # below it, connectedness alone fails
    for degree in range(max(2, least - 2), clients - 1, 2):
        ways, corrupt_neighbors = _neighbors(clients - 1, c, degree)
        _, alive_neighbors = _neighbors(clients - 1, clients - 1 - m, degree)
        rest = sum(corrupt_neighbors[degree // 2 + 1 :])
        for threshold in range(degree // 2 + 1, degree + 1):
            if neighborhoods * rest << int(SECURITY_BITS) <= ways:
                plan = certify(clients, degree, threshold, c, m, rounds=rounds)
                if plan.certified:
                    return plan
                if neighborhoods * sum(alive_neighbors[:threshold]) << int(CORRECTNESS_BITS) > ways:
                    break  # a larger t only loses more rounds
            rest -= corrupt_neighbors[threshold]
    plan = certify(clients, clients - 1, max(clients // 2 + 1, c + 1), c, m, rounds=rounds)
    return plan if plan.certified else None


@lru_cache(maxsize=64)
def next_sparse(clients: int, corrupt: float, dropout: float, rounds: int = 1) -> int | None:
    """The next larger cohort for which :func:`solve` finds less than the complete graph; None up to :data:`LARGEST_SEARCHED`."""
    for larger in range(max(clients, SMALL_COHORT) + 1, LARGEST_SEARCHED + 1):
        plan = solve(larger, corrupt, dropout, rounds)
        if plan is not None and not plan.complete:
            return larger
    return None


def order(clients: Sequence[int], seed: bytes) -> list[int]:
    """The clients around the ring: a random permutation that everybody computes from the round's seed alone."""
    return sorted(clients, key=lambda client: hashlib.sha256(seed + struct.pack("<Q", client)).digest())


def ring_neighbors(ring: Sequence[int], degree: int) -> dict[int, tuple[int, ...]]:
    """The neighbors of each client on the ring, ascending: symmetric and of equal number by construction."""
    n, half = len(ring), degree // 2
    return {client: tuple(sorted(ring[(place + step) % n] for step in range(-half, half + 1) if step)) for place, client in enumerate(ring)}


def _neighbors(population: int, marked: int, draws: int) -> tuple[int, list[int]]:
    """All ways to draw, and those with i marked for i = 0…draws: the hypergeometric distribution in whole numbers."""
    unmarked = population - marked
    first = max(0, draws - unmarked)
    counts = [0] * (draws + 1)
    if first > marked:
        return math.comb(population, draws), counts
    ways = math.comb(marked, first) * math.comb(unmarked, draws - first)
    for i in range(first, min(draws, marked) + 1):
        counts[i] = ways
        ways = ways * (marked - i) * (draws - i) // ((i + 1) * (unmarked - draws + i + 1))
    return math.comb(population, draws), counts


def _bits(part: int, whole: int) -> float:
    """−log2 of a ratio of whole numbers of any size."""
    return math.log2(whole) - math.log2(part) if part else math.inf
