"""Answers beside their own truth and beside others': zero without information, the leak itself with one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from experiments.claims.own import own_victim
from experiments.claims.scores import Trial
from simulator.adversary import Reconstruction
from simulator.types import Batch


def trials(answers: Tensor, truths: Tensor) -> list[Trial]:
    labels = torch.zeros(1, dtype=torch.int64)
    return [
        Trial(Batch(truth[None], labels), Reconstruction(inputs=answer[None], labels=labels, objective=0.0), 0.0, None)
        for answer, truth in zip(answers, truths, strict=True)
    ]


def pictures(count: int, seed: int) -> Tensor:
    return torch.rand(count, 1, 6, 6, generator=torch.Generator().manual_seed(seed))


def test_the_same_answer_for_everybody_knows_nobody() -> None:
    same = own_victim(trials(torch.full((8, 1, 6, 6), 0.5), pictures(8, 0)))
    assert same.mean == pytest.approx(0, abs=1e-5)
    assert same.low <= 0 <= same.high


def test_a_leak_of_a_decibel_is_seen_far_below_every_floor() -> None:
    """A fifth of the truth in noise is still worse than any gray picture: no bar on the gain over a floor sees it."""
    truth, noise = pictures(10, 1), pictures(10, 2)
    leaking = own_victim(trials(0.8 * noise + 0.2 * truth, truth))
    assert 0.1 < leaking.low < leaking.mean < 1.5


def test_noise_knows_nobody() -> None:
    held = [own_victim(trials(pictures(5, 2 * seed), pictures(5, 2 * seed + 1))) for seed in range(20)]
    assert sum(found.low <= 0 <= found.high for found in held) >= 17  # of 20 at 95 %
    assert np.mean([found.mean for found in held]) == pytest.approx(0, abs=0.1)


def test_whose_upload_it_was_is_none_of_the_others() -> None:
    truth = pictures(6, 3)
    stranger = trials(truth.roll(-1, dims=0), truth)  # each answer is exactly the next one's truth
    assert abs(own_victim(stranger, foreign=True).mean) < 1.0
    assert own_victim(stranger).mean < -5  # as one of the others it would hide a leak of 5 dB
    with pytest.raises(ValueError, match="must be ≥ 4"):
        own_victim(stranger[:3], foreign=True)
