"""Whether a certificate can be trusted where it is hard to come by: the measurement behind claims about certificates.

Where every record comes back, a certificate that always says yes would pass. So the cases here are such that not all is exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from experiments.claims.claim import MEASURES
from experiments.claims.defended import DefendedMeasure
from experiments.claims.scores import Trial, summarize
from experiments.matching import EXACT_MSE
from experiments.statistics import binomial_rate


@dataclass(frozen=True, kw_only=True)
class CertificateMeasure:
    """The certificates of hard cases, pooled.

    Records of one batch share their fate, so the rate that is bounded is that of batches: of those that hold a certificate, the share
    in which one is wrong, and the upper end of its exact two-sided 95 % interval (Clopper and Pearson).
    """

    kind: ClassVar[str] = "certificates"

    cases: tuple[DefendedMeasure, ...]

    def __post_init__(self) -> None:
        if not self.cases:
            raise ValueError("cases must hold at least one, got none. Add [[measure.cases]].")

    def names(self) -> Sequence[str]:
        """How many batches, how many of them with a certificate, what came back, what was certified, and how often wrongly."""
        return ["runs", "runs_certified", "exact", "certified", "certified_wrong", "certified_wrong_high"]

    def __call__(self) -> Mapping[str, float]:
        """Attack every batch of every case."""
        return trusted([trial for case in self.cases for seed in case.seeds for trial in case.one_seed(seed)[0]])


def trusted(trials: Sequence[Trial]) -> dict[str, float]:
    """The figures of :class:`CertificateMeasure`."""
    proofs = [trial.proofs for trial in trials if len(trial.proofs)]
    wrong = sum(bool((errors >= EXACT_MSE).any()) for errors in proofs)
    pooled = summarize(trials)
    return {
        "runs": float(len(trials)), "runs_certified": float(len(proofs)),
        **{name: pooled[name] for name in ("exact", "certified", "certified_wrong")},
        "certified_wrong_high": binomial_rate(wrong, len(proofs)).high if proofs else 1.0,
    }  # fmt: skip


MEASURES[CertificateMeasure.kind] = CertificateMeasure
