"""Whether attacks succeeded more often than a guarantee allows: then the guarantee, the code or the accounting is wrong.

Each row is one measured attack beside its ceiling. The null hypothesis is that its success rate is at most the ceiling; it is rejected
where the exact one-sided p-value, corrected for having looked at all rows, falls below 1 − confidence. For one row this is the same as
the lower Clopper–Pearson limit lying above the ceiling.

Where trials have ceilings of their own, as in rounds that see more and more releases, the null hypothesis is that each one succeeds with
probability at most its own ceiling, whatever the others did. The number of successes is then at its largest, stochastically, where each
probability is its ceiling, so that the upper tail of their Poisson binomial distribution is the exact p-value. Neither the binomial tail
at the highest ceiling, which is far too large, nor that at their mean is.

Source: auditing by the lower confidence limit of an attack's success, Jagielski, Ullman and Oprea, 2020, arXiv:2006.07709; the exact
binomial limit of Clopper and Pearson, 1934; the step-down correction of Holm, 1979; Tarone, 1990, for rows that cannot fail; Hoeffding,
1956, on the distribution of the number of successes in independent trials.
Deviations: success is that of naming one of N candidates and the ceiling is reconstruction robustness at 1/N, not ε by two
hypotheses. Trials must be independent: one victim each, with its own noise.

A pass proves nothing: it says that this attack at this many trials found no violation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from statistics import fmean

import numpy as np
import numpy.typing as npt
from scipy import stats

CONFIDENCE = 0.95
"""Probability, at least, that an audit of correct rows fails none of them."""
NO_TEST = 0.5
"""Chance of a guess without any update from which on a row that does not fail says nothing: there is little left to be named above it."""


@dataclass(frozen=True)
class Measured:
    """One attack on one arm.

    Attributes:
        name: of the row, for the message.
        successes: trials in which the attack named the true candidate.
        trials: independent ones.
        ceiling: the most that it may succeed, in [0, 1]: ``bounds.reconstruction_ceiling`` at the same number of candidates; the mean of
            those in ``own`` where trials have ceilings of their own.
        chance: of a guess without any update, in [0, 1]: from :data:`NO_TEST` on, naming the true candidate tests nothing.
        own: the ceiling of each trial, where they differ; else empty.
        left_out: further independent trials, not counted because their own ceiling is 1, which nothing can exceed. Ceilings alone may say
            which ones these are, never what was measured.
    """

    name: str
    successes: int
    trials: int
    ceiling: float
    chance: float = 0.0
    own: tuple[float, ...] = ()
    left_out: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.successes <= self.trials or self.trials < 1:
            raise ValueError(f"successes must be in 0..trials with trials ≥ 1, got {self.successes} of {self.trials}. Count both again.")
        if not 0 <= self.ceiling <= 1:
            raise ValueError(f"ceiling must be in [0, 1], got {self.ceiling}. Use 1 where nothing is claimed.")
        if self.own and not (len(self.own) == self.trials and all(0 <= one <= 1 for one in self.own)):
            raise ValueError(f"own must be a ceiling in [0, 1] for each of {self.trials} trials, got {self.own}. Leave it empty for one.")
        if self.own and not math.isclose(self.ceiling, fmean(self.own)):
            raise ValueError(f"ceiling must be the mean of own = {fmean(self.own)}, got {self.ceiling}. Use statistics.fmean.")

    @property
    def allowed(self) -> str:
        """The ceiling in words, or the range of the trials' own and their mean."""
        if not self.own:
            return f"ceiling of {self.ceiling:.1%}"
        return f"ceilings of {min(self.own):.1%} to {max(self.own):.1%}, {self.ceiling:.1%} on average"


@dataclass(frozen=True)
class Verdict:
    """What the audit says of one row.

    Attributes:
        measured: the row.
        low: one-sided lower limit of its mean success rate, at the level to which Holm's procedure held the row. Where all trials have one
            ceiling, the row fails where, and only where, this lies above it. Where they have their own, ``p_value`` alone decides: from
            two successes on a limit above their mean suffices, and less may do, as unequal trials vary less (Hoeffding, 1956).
        p_value: adjusted by Holm, of success rates at most the ceilings; 1 where the row could not fail.
        failed: whether the guarantee is refuted.
        fails_from: successes from which on the row fails whatever the others measured; None where no number does.
    """

    measured: Measured
    low: float
    p_value: float
    failed: bool
    fails_from: int | None = None

    @property
    def sentence(self) -> str:
        """The row in words."""
        row = self.measured
        rate = f"{row.successes} of {row.trials} ({row.successes / row.trials:.1%}) named"
        if row.left_out:
            rate += f" in those of {row.trials + row.left_out} trials whose ceiling is below 1"
        if row.chance >= NO_TEST and not self.failed:
            return f"{row.name}: {rate}, no test: guessing alone names {row.chance:.0%}."
        if row.ceiling >= 1:
            return f"{row.name}: {rate}, nothing is claimed, nothing can fail."
        if self.fails_from is None:
            return f"{row.name}: {rate}, cannot fail at {row.trials} trials beside {'' if row.own else 'a '}{row.allowed}."
        limit, p = f"at least {self.low:.1%} with confidence", f"p = {self.p_value:.2g}"
        if not self.failed:
            kept = f"within {row.allowed} ({p})" if row.own else f"{limit}, within the {row.allowed}"
            return f"{row.name}: {rate}, {kept}; fails from {self.fails_from / row.trials:.1%} on."
        beaten = f"more than {row.allowed}, allow ({p})" if row.own else f"{limit}, above the {row.allowed} ({p})"
        return f"{row.name}: AUDIT FAILED: {rate}, {beaten}: the implementation is broken or claims too much."


def lower_limit(successes: int, trials: int, confidence: float = CONFIDENCE) -> float:
    """One-sided Clopper–Pearson lower limit of a success rate; 0 without successes."""
    return float(stats.beta.ppf(1 - confidence, successes, trials - successes + 1)) if successes else 0.0


def audit(rows: Sequence[Measured], *, confidence: float = CONFIDENCE) -> list[Verdict]:
    """Judge all rows together, by Holm's step-down: the smallest p-value is held to the strictest level.

    Rows that could not fail whatever they had measured, because of few trials or a high ceiling, do not count among those looked at
    (Tarone, 1990): that says nothing of what they measured.

    Args:
        rows: what was measured.
        confidence: probability, at least, that no correct row fails, however many there are.
    """
    alpha, smallest = 1 - confidence, [p_value(row, row.trials) for row in rows]
    strictest = next((k for k in range(1, len(rows) + 1) if sum(p < alpha / k for p in smallest) <= k), 1)
    able = [place for place in range(len(rows)) if smallest[place] < alpha / strictest]
    p_values = {place: p_value(rows[place], rows[place].successes) for place in able}
    verdicts = {
        place: Verdict(row, lower_limit(row.successes, row.trials, 1 - alpha / strictest), 1.0, failed=False)
        for place, row in enumerate(rows)
    }
    factor, largest = len(able), 0.0
    for rank, place in enumerate(sorted(able, key=lambda place: p_values[place])):
        if largest < alpha:
            factor = len(able) - rank  # once a row has passed, those after it are held to its level
        largest, row = max(largest, min(1.0, factor * p_values[place])), rows[place]
        low = lower_limit(row.successes, row.trials, 1 - alpha / factor)
        verdicts[place] = Verdict(row, low, largest, failed=largest < alpha, fails_from=fewest_that_fail(row, alpha / len(able)))
    return [verdicts[place] for place in range(len(rows))]


def tails(row: Measured) -> npt.NDArray[np.float64]:
    """The probability of k successes or more, k = 0 … trials, where each trial succeeds as often as its ceiling allows."""
    if not row.own:
        return np.asarray(stats.binom.sf(np.arange(row.trials + 1) - 1, row.trials, row.ceiling))
    law = reduce(np.convolve, [np.array([1 - one, one]) for one in row.own])
    return np.asarray(np.minimum(1.0, np.cumsum(law[::-1])[::-1]))


def p_value(row: Measured, successes: int) -> float:
    """The probability of so many successes or more where the ceilings are the success rates."""
    return float(tails(row)[successes])


def fewest_that_fail(row: Measured, level: float) -> int:
    """The fewest successes whose p-value is below ``level``; all trials are enough."""
    return int((tails(row)[:-1] >= level).sum())
