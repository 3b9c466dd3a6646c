"""How close a reconstruction came, record by record.

All images are compared in [0, 1], after the guess is clamped to it. Nothing is dropped: a record without a guess, or with a
guess that is not finite, counts as a failure and scores as the mid-gray image.

Sources: SSIM: Wang et al., 2004 (doi:10.1109/TIP.2003.819861), over windows that lie inside the image.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from experiments.matching import EXACT_MSE, UNMATCHED, Images, assign_labels, pairwise_mse
from experiments.perceptual import LPIPS_VARIABLE, Lpips

PSNR_CAP_DB = 60.0
"""PSNR is capped here (a mean squared error of 1e-6), lest one exact record carry the mean to infinity."""

SSIM_WINDOW = 11
"""Side in pixels of the Gaussian window (standard deviation 1.5) of Wang et al.; smaller images get a smaller one."""

TIE = 1e-9
"""Relative difference below which two distances are a tie; float64 sums over a record differ by about 1e-13."""


@dataclass(frozen=True)
class Metric:
    """One line of ``fedpeek list metrics``."""

    name: str
    unit: str
    higher_is_better: bool
    description: str


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("psnr_db", "dB", True, f"peak signal-to-noise ratio on clamped [0, 1], capped at {PSNR_CAP_DB:.0f} dB; a mean is of dB"),
        Metric("ssim", "1", True, f"structural similarity, {SSIM_WINDOW}-pixel Gaussian window inside the image, less for smaller images"),
        Metric("mse", "1", False, "mean squared error on [0, 1], after clamping the guess; not capped"),
        Metric("exact", "share", True, f"records whose mean squared error is below {EXACT_MSE:.0e}"),
        Metric(
            "label_correct",
            "share",
            True,
            "records whose matched guess carries the right label; beside it the floor of a guess that knows the class frequencies",
        ),
        Metric(
            "identified",
            "share",
            True,
            "records that are nearest to their guess among N candidates; ties count against the attack. Interval: Clopper–Pearson; "
            "where one upload holds several records, no narrower than the bootstrap over whole uploads",
        ),
        Metric("rank", "1..N", False, "candidates at least as near to the guess as the true record, itself included; 1 is identified"),
        Metric("lpips", "1", False, f"learned perceptual distance (AlexNet v0.1); only with real weights in ${LPIPS_VARIABLE}"),
    )
}
"""Every number that is measured per record; ``higher_is_better`` is the attacker's point of view."""


@dataclass(frozen=True)
class ImageScores:
    """How close one image is to the true one.

    Attributes:
        psnr_db: in dB, in [0, 60].
        ssim: in [-1, 1]; 1 is identical.
        mse: on [0, 1] images; 0 is identical.
    """

    psnr_db: float
    ssim: float
    mse: float


@dataclass(frozen=True)
class RecordScores(ImageScores):
    """The scores of one private record.

    Attributes:
        exact: whether the record was recovered up to rounding.
        label_correct: whether its guess carries the right label; None when no labels were compared.
        failed: whether there was no usable guess, so that the mid-gray image was scored.
        lpips: the perceptual distance; None where no real weights were found.
    """

    exact: bool
    label_correct: bool | None = None
    failed: bool = False
    lpips: float | None = None


@dataclass(frozen=True)
class Identification:
    """Whether the true record is the nearest of N candidates to its guess, and its rank among them (1 is nearest)."""

    identified: bool
    rank: int


def evaluate(
    guess: Images | None,
    truth: Images,
    assignment: Int[Tensor, " truth"] | None,
    *,
    guess_labels: Int[Tensor, " guess"] | None = None,
    true_labels: Int[Tensor, " truth"] | None = None,
    perceptual: Lpips | None = None,
) -> list[RecordScores]:
    """Score every true record against the guess that ``assignment`` gives it.

    Args:
        guess: in any range; None when the attack failed or recovers labels only.
        truth: the private records, in [0, 1].
        assignment: from :func:`experiments.matching.assign`; None with ``guess`` None.
        guess_labels: recovered labels, in the order of ``guess``; without a guess they are matched among themselves.
        true_labels: the private labels, in the order of ``truth``.
        perceptual: the LPIPS distance from :func:`experiments.perceptual.load_lpips`, or None to leave it out.
    """
    matched, failed = _matched(guess, truth, assignment)
    if guess is None and guess_labels is not None and true_labels is not None:
        assignment = assign_labels(guess_labels, true_labels)
    labels = [None] * len(truth) if true_labels is None else _label_hits(guess_labels, true_labels, assignment)
    distances = perceptual(matched, truth).tolist() if perceptual else [None] * len(truth)
    return [
        RecordScores(score.psnr_db, score.ssim, score.mse, score.mse < EXACT_MSE and not fail, label, fail, distance)
        for score, label, fail, distance in zip(image_scores(matched, truth), labels, failed.tolist(), distances, strict=True)
    ]


def image_scores(guess: Images, truth: Images) -> list[ImageScores]:
    """Score each guess against the true image at the same position."""
    errors = mse(guess, truth)
    return [ImageScores(*row) for row in zip(psnr_db(errors).tolist(), ssim(guess, truth).tolist(), errors.tolist(), strict=True)]


def mse(guess: Images, truth: Images) -> Float[Tensor, " batch"]:
    """Return the mean squared error of each pair, in float64, after clamping the guess to [0, 1]."""
    return (guess.double().clamp(0, 1) - truth.double()).square().flatten(1).mean(1)


def psnr_db(errors: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """Return the peak signal-to-noise ratio in dB of mean squared errors on [0, 1], capped at :data:`PSNR_CAP_DB`."""
    return (-10 * errors.log10()).clamp(max=PSNR_CAP_DB)


def ssim(guess: Images, truth: Images) -> Float[Tensor, " batch"]:
    """Return the structural similarity of each pair: the mean over channels and over windows that lie inside the image.

    The window is Gaussian, 11 pixels wide with standard deviation 1.5. An image with a shorter side gets the largest odd
    window that fits, with the standard deviation in proportion (3.5 of them reach its edge, as in scikit-image).

    Raises:
        ValueError: a side is shorter than 3 pixels.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure  # here: it imports for seconds, in every process

    side = min(truth.shape[-2:])
    if side < 3:
        raise ValueError(f"images must be at least 3 × 3 pixels for SSIM, got {tuple(truth.shape[-2:])}. Use larger records.")
    window = min(SSIM_WINDOW, side - 1 + side % 2)
    sigma, edge = (1.5 if window == SSIM_WINDOW else (window - 1) / 7), window // 2
    full = structural_similarity_index_measure(
        guess.double().clamp(0, 1), truth.double(), sigma=sigma, data_range=1.0, reduction="none", return_full_image=True
    )[1]
    return full[..., edge:-edge, edge:-edge].flatten(1).mean(1)


def identify(
    guess: Images | None, assignment: Int[Tensor, " truth"] | None, candidates: Images, true_index: Int[Tensor, " truth"]
) -> list[Identification]:
    """Ask, for each true record, whether it is the nearest (mean squared error) of all candidates to its guess.

    Ties count against the attack: the rank is the number of candidates at least as near as the true record, itself included.
    A failed guess has the worst rank. Chance is 1/N for one guess; over an assignment of k guesses it is at most k/N, see
    :func:`chance`.

    Args:
        candidates: N distinct records, every true one among them.
        true_index: for each true record, its index in ``candidates``.
    """
    matched, failed = _matched(guess, candidates[true_index], assignment)
    distance = pairwise_mse(matched, candidates)
    own = distance.gather(1, true_index[:, None])
    rank = torch.where(failed, len(candidates), (distance <= own * (1 + TIE)).sum(1))
    return [Identification(place == 1 and not fail, place) for place, fail in zip(rank.tolist(), failed.tolist(), strict=True)]


def chance(guesses: int, candidates: int) -> float:
    """Return the most that identification can reach without information: k/N for k guesses that the truth assigns.

    A guess that knows nothing names each of N candidates with probability 1/N; a record can be identified only if one of the
    k guesses names it.
    """
    return min(1.0, guesses / candidates)


def class_chance(labels: Int[Tensor, " truth"], candidates: Int[Tensor, " candidate"]) -> list[float]:
    """Return, for each true record, :func:`chance` for who knows the classes of the batch and nothing else.

    Args:
        candidates: the class of each of N candidates, the true records' among them.
    """
    mine, there = torch.bincount(labels).tolist(), torch.bincount(candidates).tolist()
    return [chance(mine[label], there[label]) for label in labels.tolist()]


def _matched(guess: Images | None, truth: Images, assignment: Int[Tensor, " truth"] | None) -> tuple[Images, Tensor]:
    """The guess for each true record, mid-gray where it failed, and which ones failed."""
    gray = torch.full_like(truth, 0.5)
    if guess is None or assignment is None or not len(guess):
        return gray, torch.ones(len(truth), dtype=torch.bool)
    chosen = guess[assignment.clamp(min=0)].to(truth)
    failed = (assignment == UNMATCHED) | ~chosen.flatten(1).isfinite().all(1)
    return torch.where(failed[:, None, None, None], gray, chosen), failed


def _label_hits(guess: Tensor | None, truth: Tensor, assignment: Tensor | None) -> list[bool]:
    if guess is None or assignment is None or not len(guess):
        return [False] * len(truth)
    return [bool(hit) for hit in (assignment != UNMATCHED) & (guess[assignment.clamp(min=0)] == truth)]
