"""Metrics against scikit-image and brute force; identification by its properties."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torchvision.models import alexnet

from experiments.matching import UNMATCHED, assign, assign_labels, pairwise_mse
from experiments.metrics import (
    METRICS,
    PSNR_CAP_DB,
    RecordScores,
    chance,
    class_chance,
    evaluate,
    identify,
    image_scores,
)
from experiments.perceptual import ALEXNET_FINGERPRINT, load_lpips


def images(count: int, shape: tuple[int, int, int] = (3, 16, 16), seed: int = 0) -> torch.Tensor:
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed))


def noisy(truth: torch.Tensor, sigma: float, seed: int = 1) -> torch.Tensor:
    return truth + sigma * torch.randn(truth.shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (1, 25, 25), (3, 11, 13), (1, 10, 10), (1, 8, 8), (1, 4, 5), (1, 3, 3)])
def test_psnr_ssim_and_mse_equal_scikit_image(shape: tuple[int, int, int]) -> None:
    truth = images(4, shape)
    guess = noisy(truth, 0.1)
    for scores, got, want in zip(image_scores(guess, truth), guess.clamp(0, 1), truth, strict=True):
        a, b = want.double().numpy(), got.double().numpy()
        side = min(shape[1:])
        window = 11 if side >= 11 else side - 1 + side % 2
        sigma = 1.5 if side >= 11 else (window - 1) / 7
        ssim = structural_similarity(
            a, b, data_range=1.0, channel_axis=0, gaussian_weights=True, sigma=sigma, win_size=window, use_sample_covariance=False
        )
        assert scores.psnr_db == pytest.approx(peak_signal_noise_ratio(a, b, data_range=1.0), abs=1e-9)
        assert scores.ssim == pytest.approx(ssim, abs=1e-9)
        assert scores.mse == pytest.approx(((a - b) ** 2).mean(), rel=1e-9)


def test_scores_worsen_with_noise() -> None:
    truth = images(8)
    means = [np.mean([[s.psnr_db, s.ssim, -s.mse] for s in image_scores(noisy(truth, sigma), truth)], axis=0) for sigma in (0.01, 0.1, 0.4)]
    assert (np.diff(means, axis=0) < 0).all()


def test_perfect_guess_is_capped_exact_and_uncapped_in_mse() -> None:
    truth = images(3)
    for score in evaluate(truth, truth, assign(truth, truth)):
        assert score == RecordScores(PSNR_CAP_DB, pytest.approx(1.0), 0.0, exact=True)
    near = evaluate(truth + 1e-5, truth, assign(truth, truth))[0]  # MSE 1e-10, that is 100 dB
    assert near.psnr_db == 60.0
    assert near.mse == pytest.approx(1e-10, rel=0.05)


def test_exact_means_mse_below_one_millionth() -> None:
    truth = torch.full((2, 1, 8, 8), 0.5)
    guess = truth + torch.tensor([0.9e-3, 1.1e-3])[:, None, None, None]
    assert [score.exact for score in evaluate(guess, truth, torch.tensor([0, 1]))] == [True, False]


def test_guess_is_clamped_before_it_is_scored() -> None:
    truth = torch.ones(1, 1, 8, 8)
    assert evaluate(truth * 7, truth, torch.tensor([0]))[0].mse == 0.0


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_assignment_has_the_least_total_error(guesses: int, records: int, seed: int) -> None:
    guess, truth = images(guesses, (1, 3, 3), seed), images(records, (1, 3, 3), seed + 1)
    assignment = assign(guess, truth)
    cost = ((guess[:, None].double() - truth[None].double()) ** 2).mean((2, 3, 4))
    assert torch.allclose(pairwise_mse(guess, truth), cost, atol=1e-12)
    matched = [(int(g), t) for t, g in enumerate(assignment) if g != UNMATCHED]
    assert len(matched) == min(guesses, records) == len({g for g, _ in matched})
    if guesses >= records:
        best = min(sum(cost[g, t] for t, g in enumerate(order)) for order in permutations(range(guesses), records))
    else:
        best = min(sum(cost[g, t] for g, t in enumerate(order)) for order in permutations(range(records), guesses))
    assert sum(cost[g, t] for g, t in matched) == pytest.approx(best)


def test_an_exact_guess_is_never_given_to_another_record() -> None:
    """By total error alone the exact guess would go to the record that no guess fits, and its own record would get the other one."""
    truth, guess = (torch.stack([torch.full((1, 2, 2), level) for level in levels]) for levels in ((0.5, 1.0), (0.5, 0.0)))
    cost = pairwise_mse(guess, truth)
    assert float(cost[0, 0] + cost[1, 1]) > float(cost[0, 1] + cost[1, 0]), "the case that needs the rule"
    assert assign(guess, truth).tolist() == [0, 1]


@given(st.permutations(range(6)))
@settings(max_examples=20, deadline=None)
def test_scores_do_not_depend_on_the_order_of_guesses(order: list[int]) -> None:
    truth, labels = images(6), torch.arange(6)
    guess = noisy(truth, 0.05)
    want = evaluate(guess, truth, torch.arange(6), guess_labels=labels, true_labels=labels)
    assignment = assign(guess[order], truth)
    assert assignment.tolist() == np.argsort(order).tolist()
    assert evaluate(guess[order], truth, assignment, guess_labels=labels[order], true_labels=labels) == want


def test_missing_and_non_finite_guesses_are_failures_that_score_as_mid_gray() -> None:
    truth = images(4)
    gray = image_scores(torch.full_like(truth, 0.5), truth)
    guess = truth[:3].clone()
    guess[1, 0, 0, 0], guess[2, 0, 0, 0] = float("nan"), float("inf")
    scores = evaluate(guess, truth, assign(guess, truth))
    assert [score.failed for score in scores] == [False, True, True, True]
    for score, floor in list(zip(scores, gray, strict=True))[1:]:
        assert (score.psnr_db, score.ssim, score.mse, score.exact) == (floor.psnr_db, floor.ssim, floor.mse, False)
    assert all(score.failed for score in evaluate(None, truth, None))
    assert not evaluate(None, torch.full((1, 1, 8, 8), 0.5), None)[0].exact  # a gray record is not recovered by failing


def test_guess_that_is_not_finite_is_matched_last() -> None:
    truth = torch.zeros(1, 1, 3, 3)
    guess = torch.stack([truth[0] + torch.nan, truth[0] + torch.inf, truth[0] + 1])
    assert assign(guess, truth).tolist() == [2]  # even the worst finite guess goes before


def test_labels_follow_the_images_and_stand_alone_without_them() -> None:
    truth, labels = images(3), torch.tensor([4, 5, 6])
    guess_labels = torch.tensor([6, 5, 5])
    scores = evaluate(truth.flip(0), truth, assign(truth.flip(0), truth), guess_labels=guess_labels, true_labels=labels)
    assert [score.label_correct for score in scores] == [False, True, True]
    alone = evaluate(None, truth, None, guess_labels=torch.tensor([6, 6, 4]), true_labels=labels)
    assert [score.label_correct for score in alone] == [True, False, True]
    assert [score.label_correct for score in evaluate(truth, truth, torch.arange(3))] == [None] * 3
    assert [score.label_correct for score in evaluate(None, truth, None, true_labels=labels)] == [False] * 3


@given(st.lists(st.integers(0, 3), max_size=6), st.lists(st.integers(0, 3), min_size=1, max_size=6))
@settings(max_examples=40, deadline=None)
def test_label_assignment_is_the_multiset_intersection(guess: list[int], truth: list[int]) -> None:
    assignment = assign_labels(torch.tensor(guess, dtype=torch.int64), torch.tensor(truth))
    used = [int(g) for g in assignment if g != UNMATCHED]
    assert len(used) == len(set(used)) == sum(min(guess.count(c), truth.count(c)) for c in range(4))
    assert all(guess[g] == truth[t] for t, g in enumerate(assignment.tolist()) if g != UNMATCHED)


@given(st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_perfect_guess_is_identified_and_any_guess_ranks_as_in_a_sort(seed: int) -> None:
    candidates = images(20, (1, 4, 4), seed)
    true_index = torch.tensor([3, 11])
    perfect = identify(candidates[true_index], torch.arange(2), candidates, true_index)
    assert [(answer.identified, answer.rank) for answer in perfect] == [(True, 1)] * 2
    guess = images(2, (1, 4, 4), seed + 1)
    for answer, image, own in zip(identify(guess, torch.arange(2), candidates, true_index), guess, true_index, strict=True):
        order = ((candidates - image) ** 2).sum((1, 2, 3)).argsort().tolist()
        assert answer.rank == order.index(int(own)) + 1
        assert answer.identified == (answer.rank == 1)


def test_ties_count_against_the_attack() -> None:
    candidates = torch.eye(9).reshape(9, 1, 3, 3)  # all equally far from any constant image
    for value in (0.0, 0.5, 1.0):
        constant = torch.full((9, 1, 3, 3), value)
        answers = identify(constant, torch.arange(9), candidates, torch.arange(9))
        assert [(answer.identified, answer.rank) for answer in answers] == [(False, 9)] * 9
    swapped = torch.rand(1, 1, 3, 3).expand(2, -1, -1, -1)  # a duplicate of the truth among the candidates
    assert not identify(swapped[:1], torch.tensor([0]), swapped, torch.tensor([0]))[0].identified


def test_failed_guess_has_the_worst_rank() -> None:
    candidates = torch.stack([torch.full((1, 3, 3), 0.5), torch.zeros(1, 3, 3), torch.ones(1, 3, 3)])
    nothing, unmatched = torch.full((1, 1, 3, 3), torch.nan), torch.tensor([UNMATCHED])
    for guess, assignment in ((None, None), (nothing, torch.tensor([0])), (candidates, unmatched)):
        answer = identify(guess, assignment, candidates, torch.tensor([0]))[0]  # the true record is gray itself
        assert (answer.identified, answer.rank) == (False, 3)


def test_assigned_guesses_that_know_nothing_stay_within_chance() -> None:
    candidates, k, hits = images(40, (1, 4, 4)), 8, 0
    rng = torch.Generator().manual_seed(5)
    for _ in range(200):
        true_index = torch.randperm(40, generator=rng)[:k]
        guess = candidates[torch.randperm(40, generator=rng)[:k]]  # sharp pictures of somebody
        hits += sum(answer.identified for answer in identify(guess, assign(guess, candidates[true_index]), candidates, true_index))
    assert chance(1, 40) == 1 / 40
    assert 1 / 40 < hits / (200 * k) <= chance(k, 40) * 1.1


def test_lpips_is_absent_without_real_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDPEEK_LPIPS_DIR", raising=False)
    assert load_lpips()[0] is None
    assert "Set FEDPEEK_LPIPS_DIR" in load_lpips()[1]
    assert "found neither" in load_lpips(tmp_path)[1]
    torch.manual_seed(0)
    weights = alexnet(weights=None).state_dict()
    torch.save(weights, tmp_path / "alexnet.pth")
    assert "must be the ImageNet AlexNet" in load_lpips(tmp_path)[1]
    torch.save({"other": torch.zeros(1)}, tmp_path / "alexnet.pth")
    assert "torchvision's names" in load_lpips(tmp_path)[1]


def test_lpips_uses_the_weights_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    weights = {name: tensor for name, tensor in alexnet(weights=None).state_dict().items() if name.startswith("features")}
    weights["features.0.weight"].view(-1)[:3] = torch.tensor(ALEXNET_FINGERPRINT)  # a forgery, to test the plumbing without a download
    save_file(weights, tmp_path / "alexnet.safetensors")
    monkeypatch.setenv("FEDPEEK_LPIPS_DIR", str(tmp_path))
    distance, reason = load_lpips()
    assert distance is not None
    assert reason == ""
    truth = images(2, (1, 8, 8))
    guess = noisy(truth, 0.2).clamp(0, 1)
    scores = evaluate(guess, truth, torch.arange(2), perceptual=distance)
    assert all(score.lpips is not None and score.lpips > 0 for score in scores)
    assert distance(truth, truth).tolist() == [0.0, 0.0]
    torch.save(weights, tmp_path / "alexnet.pth")
    (tmp_path / "alexnet.safetensors").unlink()
    again = load_lpips(tmp_path)[0]
    assert again is not None
    assert again is not distance
    assert torch.equal(again(guess, truth), distance(guess, truth))  # nothing is left of the random backbone
    torch.save({name: tensor * 2 if name == "features.10.weight" else tensor for name, tensor in weights.items()}, tmp_path / "alexnet.pth")
    other = load_lpips(tmp_path)[0]
    assert other is not None
    assert not torch.allclose(other(guess, truth), distance(guess, truth))


def test_every_score_is_listed() -> None:
    fields = set(RecordScores.__dataclass_fields__) - {"failed"} | {"identified", "rank"}
    assert fields == set(METRICS)
    assert all(metric.unit and metric.description for metric in METRICS.values())


def test_who_knows_the_class_alone_names_one_of_it() -> None:
    """Against a guess drawn from the true class, over many draws."""
    labels, candidates = torch.tensor([2, 0]), torch.tensor([2, 0, 1, 2, 2, 0, 1, 2])
    rng = np.random.default_rng(0)
    draws = [[rng.choice((candidates == label).nonzero().flatten().numpy()) for label in labels] for _ in range(4000)]
    rates = np.mean([[drawn[0] == 0, drawn[1] == 1] for drawn in draws], axis=0)
    assert class_chance(labels, candidates) == pytest.approx(rates, abs=0.03)
    assert class_chance(torch.tensor([1, 1, 1]), torch.tensor([1, 1, 1, 0])) == [1.0] * 3
