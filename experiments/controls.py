"""What an adversary without the gradient would score: the floors that every attack must beat.

Each floor answers for the whole batch and is matched to it with the same freedom as the attack. The last floor,
``shuffled_gradient``, is the same attack on a view that lost its information (:func:`shuffled`); the runner adds it.
Recovered labels have a floor of their own, :func:`label_floor`.

The nearest public record is no floor: only who holds the truth can choose it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from scipy import stats
from torch import Tensor

from experiments.matching import Images, assign
from experiments.metrics import ImageScores, evaluate
from simulator.types import Batch, Observation, Update, Upload

FLOORS: dict[str, str] = {
    "mean_image": "the mean of all other records of the data set",
    "class_mean": "the mean of the other records of the true class, which an update may tell without telling of the picture",
    "another_victim": "other records of the data set, drawn at random",
    "random_guess": "uniform noise",
    "shuffled_gradient": "the same attack on an update whose values, and those of its buffers, were permuted within each tensor",
}
"""What each floor guesses. A shuffled update has lost its label, too: what an attack knows of a class once the update named it, as one does
that learned from public records, ``class_mean`` holds against it."""

SAMPLE = "shuffled_sample"
"""The last one where it ran on some victims only: compared with the attack on these, and no floor, since the others lack it."""


def floors(truth: Images, records: Batch, true_index: Int[Tensor, " truth"], *, rng: torch.Generator) -> list[dict[str, ImageScores]]:
    """Score, for each true record, the guesses that need no observation.

    The batch itself is left out of the data set before anything is drawn from it or averaged over it.

    Args:
        truth: the records of one upload, in [0, 1].
        records: the whole data set, the true records among them, with their classes.
        true_index: for each true record, its index in ``records``.

    Raises:
        ValueError: the data set holds nothing but the batch.
    """
    outside = torch.ones(len(records), dtype=torch.bool).index_fill(0, true_index, False)
    others = outside.nonzero().flatten()
    if not len(others):
        raise ValueError(f"records must hold more than the batch of {len(truth)}, got {len(records)}. Use a larger data set.")
    inside = records.inputs[~outside]
    mean = ((records.inputs.sum(0, dtype=torch.float64) - inside.sum(0, dtype=torch.float64)) / len(others)).to(truth)
    of_class = {label: _class_mean(records, outside, label) for label in records.labels[true_index].tolist()}
    classes = [mean if (found := of_class[label]) is None else found for label in records.labels[true_index].tolist()]
    drawn = torch.cat([torch.randperm(len(others), generator=rng) for _ in range(-(-len(truth) // len(others)))])[: len(truth)]
    guesses = {
        "mean_image": mean.expand_as(truth),
        "class_mean": torch.stack(classes),
        "another_victim": records.inputs[others[drawn]],
        "random_guess": torch.rand(truth.shape, generator=rng),
    }
    scored = {name: floor_scores(guess, truth) for name, guess in guesses.items()}
    return [{name: scores[i] for name, scores in scored.items()} for i in range(len(truth))]


def _class_mean(records: Batch, outside: Bool[Tensor, " record"], label: int) -> Float[Tensor, "channel height width"] | None:
    """The mean of the records of a class that are outside the batch; None where all of them are in it."""
    alike = records.inputs[outside & (records.labels == label)]
    return alike.mean(0, dtype=torch.float64).to(alike) if len(alike) else None


def floor_scores(guess: Images | None, truth: Images) -> list[ImageScores]:
    """Score a floor's guesses like an attack's: one assignment, failures as mid-gray. For ``shuffled_gradient``, too."""
    assignment = None if guess is None or not len(guess) else assign(guess, truth)
    return [ImageScores(score.psnr_db, score.ssim, score.mse) for score in evaluate(guess, truth, assignment)]


def best_floor(floors: Mapping[str, ImageScores]) -> tuple[str, ImageScores]:
    """Return the floor with the highest PSNR, and its name: what the attack must beat on this record."""
    return max(((name, score) for name, score in floors.items() if name != SAMPLE), key=lambda item: item[1].psnr_db)


def shuffled(view: Observation, rng: torch.Generator) -> Observation:
    """Return ``view`` with every tensor of its uploads permuted, BatchNorm's buffers too: the same values, without their information.

    Norm and histogram of each tensor stay, so that an attack which succeeds on it lives on its prior. A buffer left in place
    would tell it the batch's mean and variance, channel by channel. What the server broadcast is its own and stays.
    """
    return replace(view, uploads=tuple(_shuffled(upload, rng) for upload in view.uploads))


def label_floor(batches: Sequence[Sequence[int]], *, matched: bool) -> float:
    """Return the share of labels that a guess gets right in expectation when it knows how frequent each class is, and nothing else.

    For one label at a time this is the share of the most frequent class: random guessing cannot beat it. Where k labels are
    guessed at once and matched to the truth in the best order, the floor has the same freedom: it guesses the k labels with
    the most expected hits Σ_c E[min(m_c, X_c)], X_c ~ Binomial(k, frequency of c). Each further guess of a class adds
    P(X_c ≥ m_c), ever less, so the k largest of these terms are the optimum.

    Args:
        batches: the true labels of each upload. Frequencies are taken over all of them: the floor knows the victims' own.
        matched: whether the attack's labels were matched among themselves, as :func:`experiments.matching.assign_labels` does.
    """
    counts = Counter(label for batch in batches for label in batch)
    total = counts.total()
    if not matched:
        return max(counts.values()) / total
    return sum(_most_hits(len(batch), [count / total for count in counts.values()]) for batch in batches) / total


def _most_hits(guesses: int, frequencies: Sequence[float]) -> float:
    terms = [float(stats.binom.sf(hit, guesses, share)) for share in frequencies for hit in range(guesses)]
    return sum(sorted(terms, reverse=True)[:guesses])


def _shuffled(upload: Upload, rng: torch.Generator) -> Upload:
    update = Update(upload.update.kind, _permuted(upload.update.tensors, rng))
    return replace(upload, update=update, buffers=_permuted(upload.buffers, rng))


def _permuted(tensors: Mapping[str, Tensor], rng: torch.Generator) -> dict[str, Tensor]:
    places = {name: torch.randperm(tensors[name].numel(), generator=rng) for name in sorted(tensors)}  # whatever order they came in
    return {name: tensor.flatten()[places[name]].reshape(tensor.shape) for name, tensor in tensors.items()}
