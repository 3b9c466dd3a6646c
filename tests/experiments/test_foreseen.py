"""What is said of an update before any attack."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from attacks import identifiability
from experiments.under_attack import Victim, foreseen
from simulator import progress
from tests.attacks.victims import attack_surface, build, digits


def victim(model: str, count: int, **told: object) -> Victim:
    truth = digits(count)
    view, knowledge = attack_surface(build(model, (1, 8, 8)), [truth])
    return Victim(view, replace(knowledge, **told), truth, torch.arange(count), (0,) * count)  # type: ignore[arg-type]


def test_every_victim_is_predicted_and_announced_and_singular_values_are_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    honest = identifiability.singular_values

    def counted(*arguments: Any) -> tuple[float, float]:
        asked.append(1)
        return honest(*arguments)

    monkeypatch.setattr(identifiability, "singular_values", counted)
    heard: list[str] = []
    with progress.listening(lambda *tick: heard.append(tick[3])):
        found = foreseen([victim("mlp", 1), victim("mlp", 1), victim("mlp", 2), victim("linear", 40)], 0)
    assert [one.predicted for one in found] == [1, 1, 2, 0]
    assert [note.partition(" records")[0] for note in heard if "records can be exact" in note] == ["1 of 1", "1 of 1", "2 of 2", "0 of 40"]
    assert len(asked) == 3, "once for one record, once for two, once for forty"


def test_nothing_is_predicted_under_noise_or_of_what_cannot_be_used() -> None:
    noisy = victim("mlp", 1, defenses=(("gaussian_noise", {"sigma": 0.1}),))
    contradicting = victim("mlp", 1, num_examples=7)
    assert foreseen([noisy], 0)[0].predicted is None
    assert foreseen([contradicting], 0)[0].predicted is None
