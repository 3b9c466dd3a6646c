"""Answers of an attack beside the truth, and what they come to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import inf

import numpy as np
import torch
from torch import Tensor

from experiments.matching import EXACT_MSE, assign, assign_labels, pairwise_mse
from experiments.metrics import mse, psnr_db
from experiments.statistics import bootstrap_mean
from simulator.adversary import Reconstruction
from simulator.types import Batch

CLOSE_MSE = 1e-4
VISIBLE_MSE = 10**-2.8
"""28 dB, the least that B16 asks of any record."""


@dataclass(frozen=True)
class Trial:
    """One answer beside its truth."""

    truth: Batch
    answer: Reconstruction
    seconds: float
    floor_db: Tensor | None

    @cached_property
    def errors(self) -> Tensor:
        """Squared error of each true record; that of mid-gray where there is no guess."""
        guess = self.answer.inputs
        if guess is None:
            return mse(torch.full_like(self.truth.inputs, 0.5), self.truth.inputs)
        assignment = assign(guess, self.truth.inputs)
        matched = guess[assignment.clamp(min=0)]
        matched = torch.where((assignment < 0)[:, None, None, None] | ~matched.isfinite(), 0.5, matched)
        return mse(matched, self.truth.inputs)

    @property
    def psnr_db(self) -> Tensor:
        """In dB, for each true record."""
        return psnr_db(self.errors)

    def all_back(self, mse: float = EXACT_MSE) -> bool:
        """Whether no true record is farther than this from its guess."""
        return bool((self.errors < mse).all())

    @property
    def labels_right(self) -> Tensor:
        """For each true label whether a guess of its own names it."""
        return assign_labels(self.answer.labels, self.truth.labels) >= 0

    @property
    def proofs(self) -> Tensor:
        """Squared error of each guess that carries a certificate to a true record of its own; infinite where none is left for it."""
        marked = torch.tensor([bool(proof) for proof in self.answer.certificate], dtype=torch.bool)
        if self.answer.inputs is None or not marked.any():
            return torch.zeros(0, dtype=torch.float64)
        sure = self.answer.inputs[marked]
        places, errors = assign(sure, self.truth.inputs), torch.full((len(sure),), inf, dtype=torch.float64)
        matched = places >= 0
        errors[places[matched]] = pairwise_mse(sure, self.truth.inputs)[places[matched], matched.nonzero().flatten()]
        return errors


def summarize(trials: Sequence[Trial]) -> dict[str, float]:
    """The figures of :data:`experiments.claims.measures.UNITS` that need one attack only."""
    errors, db = torch.cat([trial.errors for trial in trials]), torch.cat([trial.psnr_db for trial in trials])
    proofs, seconds = torch.cat([trial.proofs for trial in trials]), torch.tensor([trial.seconds for trial in trials])
    figures = {
        "psnr_db": float(db.mean()),
        "psnr_db_min": float(db.min()),
        "psnr_db_median": float(db.median()),
        "mse_max": float(errors.max()),
        "mse_median": float(errors.median()),
        "exact": float((errors < EXACT_MSE).double().mean()),
        "exact_batches": sum(bool((trial.errors < EXACT_MSE).all()) for trial in trials) / len(trials),
        "close": float((errors < CLOSE_MSE).double().mean()),
        "counts_exact": sum(bool(trial.labels_right.all()) for trial in trials) / len(trials),
        "labels_right": float(torch.cat([trial.labels_right for trial in trials]).double().mean()),
        "certified": len(proofs) / len(errors),
        "certified_wrong": float((proofs >= EXACT_MSE).sum()),
        "cpu_seconds": float(seconds.mean()),
        "cpu_seconds_median": float(seconds.median()),
        "cpu_seconds_max": float(seconds.max()),
    }
    floors = [trial.floor_db for trial in trials if trial.floor_db is not None]
    if not floors:
        return figures
    gains, clusters = db - torch.cat(floors), [number for number, trial in enumerate(trials) for _ in trial.errors]
    interval = bootstrap_mean(gains.tolist(), clusters, rng=np.random.default_rng(0))
    return figures | {"gain_db": interval.mean, "gain_db_low": interval.low}
