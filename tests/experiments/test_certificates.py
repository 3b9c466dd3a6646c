"""Claims about certificates: hard victims are as said, and a certificate that always says yes is caught."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from attacks.update.sparse_factorization import SparseFactorization
from experiments.claims.certificates import CertificateMeasure, trusted
from experiments.claims.claim import select
from experiments.claims.defended import DefendedMeasure
from experiments.claims.scores import Trial
from simulator import config
from simulator.adversary import Reconstruction
from simulator.errors import SpecError
from simulator.types import Batch

BASE: dict[str, Any] = {"data": "digits", "model": "mlp", "attack": "linear_leak", "batch": 2, "victims": 3}


def measure(**settings: Any) -> DefendedMeasure:
    return config.build(DefendedMeasure, BASE | settings)


def trial(wrong: int, marks: tuple[str, ...] = ("proof", "proof")) -> Trial:
    """Two records of which so many are not exact."""
    truth = torch.arange(8.0).view(2, 1, 2, 2) / 8
    guess = truth.clone()
    guess[:wrong] += 0.01
    labels = torch.zeros(2, dtype=torch.long)
    return Trial(Batch(truth, labels), Reconstruction(guess, labels, certificate=marks), 1.0, None)


def test_a_certificate_that_always_says_yes_is_caught_and_the_rate_is_bounded() -> None:
    honest = trusted([trial(0)] * 40 + [trial(1, ("", "proof"))] * 10 + [trial(2, ("", ""))] * 30)
    assert (honest["runs"], honest["runs_certified"], honest["certified_wrong"]) == (80.0, 50.0, 0.0)
    assert (honest["certified"], honest["exact"]) == (90 / 160, 90 / 160)
    assert honest["certified_wrong_high"] == pytest.approx(1 - 0.025 ** (1 / 50))  # Clopper and Pearson, none of 50
    always = trusted([trial(0)] * 40 + [trial(1)] * 10 + [trial(2)] * 30)
    assert (always["certified"], always["certified_wrong"]) == (1.0, 70.0)
    assert always["certified_wrong_high"] > 0.5
    assert trusted([trial(2, ("", ""))])["certified_wrong_high"] == 1.0


def test_hard_claims_hold_easy_records_and_hard_ones() -> None:
    (claim,) = select(["B8-hard"])
    assert isinstance(claim.measure, CertificateMeasure)
    assert sum(len(case.seeds) * case.victims for case in claim.measure.cases) >= 200
    assert claim.figures["certified_wrong"].at_most == 0
    assert claim.figures["certified"].at_most < 1
    few = replace(claim.measure, cases=tuple(replace(case, seeds=(0,), victims=1) for case in claim.measure.cases[:5]))
    found = few()
    assert found["certified_wrong"] == 0
    assert 0 < found["certified"] < 1


def test_pairs_resemble_each_other_as_much_as_is_said() -> None:
    plain, near = measure(), measure(near=0.02)
    for before, after in zip(plain.build(0), near.build(0), strict=True):
        first, second = after.truth.inputs
        assert torch.equal(first, before.truth.inputs[0])
        assert int(after.truth.labels[0]) == int(after.truth.labels[1])
        assert 0 < float((first - second).abs().mean()) < 0.02
        assert float(second.min()) >= 0


def test_the_defense_acts_and_is_told() -> None:
    for of, before in zip(measure(defense={"name": "clip", "clip_norm": 0.01}).build(0), measure().build(0), strict=True):
        update, plain = (torch.cat([t.flatten() for t in v.view.upload.update.tensors.values()]) for v in (of, before))
        assert float(update.norm()) == pytest.approx(0.01, rel=1e-5)
        assert float(torch.cosine_similarity(update, plain, 0)) == pytest.approx(1, abs=1e-5)
        ((name, told),) = of.knowledge.defenses
        assert (name, told["clip_norm"]) == ("clip", 0.01)
    noisy = measure(defense={"name": "gaussian_noise", "sigma": 0.1}).build(0)
    noise = [
        torch.cat([(t - before.view.upload.update.tensors[n]).flatten() for n, t in of.view.upload.update.tensors.items()])
        for of, before in zip(noisy, measure().build(0), strict=True)
    ]
    assert float(noise[0].std()) == pytest.approx(0.1, rel=0.05)
    assert not torch.equal(noise[0], noise[1])


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"defense": {"name": "dp_sgd", "clip_norm": 1.0, "noise_multiplier": 1.0}}, "on_update alone"),
        ({"defense": {"name": "distributed_dp", "clip_norm": 1.0, "noise_multiplier": 1.0}}, "on_update alone"),  # its noise is integers
        ({"defense": {"name": "soteria", "pruned": 0.2}}, "on_update alone"),  # it looks at the records again
        ({"defense": "clip", "clients": 2}, "one client"),
        ({"near": 0.1, "classes": 2}, "near must be"),
        ({"near": -1.0}, "near must be"),
    ],
)
def test_what_a_case_cannot_be_is_refused(settings: dict[str, Any], word: str) -> None:
    with pytest.raises(SpecError, match=word):
        measure(**settings)


def test_sparse_factorization_is_what_the_hard_cases_attack_with() -> None:
    (claim,) = select(["B8-hard"])
    assert all(isinstance(case.attack, SparseFactorization) for case in claim.measure.cases)  # type: ignore[attr-defined]
