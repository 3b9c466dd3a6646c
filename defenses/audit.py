"""Whether attacks succeeded more often than a guarantee allows: then the guarantee, the code or the accounting is wrong.

Each row is one measured attack beside its ceiling. The null hypothesis is that its success rate is at most the ceiling; it is rejected
where the exact one-sided p-value, corrected for having looked at all rows, falls below 1 − confidence. For one row this is the same as
the lower Clopper–Pearson limit lying above the ceiling.

Source: auditing by the lower confidence limit of an attack's success, Jagielski, Ullman and Oprea, 2020, arXiv:2006.07709; the exact
binomial limit of Clopper and Pearson, 1934; the step-down correction of Holm, 1979.
Deviations: success is that of naming one of N candidates and the ceiling is reconstruction robustness at 1/N, not ε by two
hypotheses. Trials must be independent: one victim each, with its own noise.

A pass proves nothing: it says that this attack at this many trials found no violation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats

from simulator.errors import FedpeekError

CONFIDENCE = 0.95
"""Probability, at least, that an audit of correct rows fails none of them."""


class AuditFailure(FedpeekError):
    """Attacks succeeded more often than their ceilings allow."""


@dataclass(frozen=True)
class Measured:
    """One attack on one arm.

    Attributes:
        name: of the row, for the message.
        successes: trials in which the attack named the true candidate.
        trials: independent ones.
        ceiling: the most that it may succeed, in [0, 1]: ``bounds.reconstruction_ceiling`` at the same number of candidates.
    """

    name: str
    successes: int
    trials: int
    ceiling: float

    def __post_init__(self) -> None:
        if not 0 <= self.successes <= self.trials or self.trials < 1:
            raise ValueError(f"successes must be in 0..trials with trials ≥ 1, got {self.successes} of {self.trials}. Count both again.")
        if not 0 <= self.ceiling <= 1:
            raise ValueError(f"ceiling must be in [0, 1], got {self.ceiling}. Use 1 where nothing is claimed.")


@dataclass(frozen=True)
class Verdict:
    """What the audit says of one row.

    Attributes:
        measured: the row.
        low: one-sided lower limit of its success rate, Holm's correction included: the row fails where it lies above the ceiling.
        p_value: adjusted by Holm, of a success rate at most the ceiling.
        failed: whether the guarantee is refuted.
    """

    measured: Measured
    low: float
    p_value: float
    failed: bool

    @property
    def sentence(self) -> str:
        """The row in words."""
        row = self.measured
        rate = f"{row.successes} of {row.trials} ({row.successes / row.trials:.1%})"
        if row.ceiling >= 1:
            return f"{row.name}: {rate} named, nothing is claimed, nothing can fail."
        if not self.failed:
            return f"{row.name}: {rate} named, at least {self.low:.1%} with confidence, within the ceiling of {row.ceiling:.1%}."
        return (
            f"{row.name}: AUDIT FAILED: {rate} named, at least {self.low:.1%} with confidence, above the ceiling of {row.ceiling:.1%} "
            f"(p = {self.p_value:.2g}): the implementation is broken or claims too much."
        )


def lower_limit(successes: int, trials: int, confidence: float = CONFIDENCE) -> float:
    """One-sided Clopper–Pearson lower limit of a success rate; 0 without successes."""
    return float(stats.beta.ppf(1 - confidence, successes, trials - successes + 1)) if successes else 0.0


def audit(rows: Sequence[Measured], *, confidence: float = CONFIDENCE) -> list[Verdict]:
    """Judge all rows together, by Holm's step-down: the smallest p-value is held to the strictest level.

    Args:
        rows: what was measured.
        confidence: probability, at least, that no correct row fails, however many there are.
    """
    p_values = [float(stats.binom.sf(row.successes - 1, row.trials, row.ceiling)) for row in rows]
    order = sorted(range(len(rows)), key=lambda place: p_values[place])
    verdicts: dict[int, Verdict] = {}
    largest = 0.0
    for rank, place in enumerate(order):
        remaining = len(rows) - rank
        largest = max(largest, min(1.0, remaining * p_values[place]))
        low = lower_limit(rows[place].successes, rows[place].trials, 1 - (1 - confidence) / remaining)
        verdicts[place] = Verdict(rows[place], low, largest, largest < 1 - confidence)
    return [verdicts[place] for place in range(len(rows))]


def require_passed(verdicts: Sequence[Verdict]) -> None:
    """Fail loudly if any row did.

    Raises:
        AuditFailure: with a sentence for each row that failed.
    """
    failed = [verdict.sentence for verdict in verdicts if verdict.failed]
    if failed:
        raise AuditFailure(" ".join(failed))
