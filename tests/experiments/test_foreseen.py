"""What is said of an update before any attack."""

from __future__ import annotations

from dataclasses import replace

import torch

from experiments.under_attack import Victim, foreseen
from simulator import progress
from tests.attacks.victims import attack_surface, build, digits


def victim(model: str, count: int, **told: object) -> Victim:
    truth = digits(count)
    view, knowledge = attack_surface(build(model, (1, 8, 8)), [truth])
    return Victim(view, replace(knowledge, **told), truth, torch.arange(count), (0,) * count)  # type: ignore[arg-type]


def test_the_first_victim_stands_for_all_and_is_announced() -> None:
    heard: list[str] = []
    with progress.listening(lambda *tick: heard.append(tick[3])):
        first, other = foreseen([victim("mlp", 1), victim("mlp", 1)], 0)
    assert (first.predicted, other.predicted) == (1, None)
    assert heard[-1].startswith("1 of 1 records can be exact")


def test_a_batch_without_neurons_of_its_own_is_predicted_to_stay_mixed() -> None:
    assert foreseen([victim("linear", 40)], 0)[0].predicted == 0


def test_nothing_is_predicted_under_noise_or_of_what_cannot_be_used() -> None:
    noisy = victim("mlp", 1, defenses=(("gaussian_noise", {"sigma": 0.1}),))
    contradicting = victim("mlp", 1, num_examples=7)
    assert foreseen([noisy], 0)[0].predicted is None
    assert foreseen([contradicting], 0)[0].predicted is None
