"""The rehearsal: its uploads are those that a client would send, and what it chooses is what serves the victim."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attacks._rehearsal import psnr_db, rehearsal
from attacks.update.inverting_gradients import InvertingGradients
from attacks.update.tuned_inverting_gradients import FACTORS, TunedInvertingGradients, scaled
from simulator.rng import stream
from simulator.training import mean_gradient
from simulator.types import Batch
from tests.attacks.victims import attack_surface, build, digits

TRUTH, PUBLIC = digits(1), digits(12, offset=200)


def test_rehearsed_uploads_are_the_clients_own() -> None:
    model = build("convnet", (1, 8, 8), width=4)
    view, knowledge = attack_surface(model, [TRUTH])
    views, told, records = rehearsal(view, replace(knowledge, public=PUBLIC, labels=TRUTH.labels), 3)
    for seen, known, batch in zip(views, told, records, strict=True):
        own, _ = mean_gradient(model, view.broadcast.parameters, {}, batch)
        for name, tensor in seen.upload.update.tensors.items():
            assert torch.allclose(tensor, own[name], atol=1e-6), name
        assert known.labels is not None
        assert known.labels.tolist() == batch.labels.tolist()
        assert any(torch.equal(batch.inputs[0], image) for image in PUBLIC.inputs)


@pytest.mark.slow
def test_the_weight_that_serves_public_records_best_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against five attacks by hand on the same uploads; the victim's own update has no say."""
    view, knowledge = attack_surface(build("convnet", (1, 8, 8), width=4), [TRUTH])
    knowledge = replace(knowledge, public=PUBLIC)
    plain, attack = InvertingGradients(steps=10), TunedInvertingGradients(steps=10, rehearsals=2)
    views, told, records = rehearsal(view, knowledge, 2)
    by_hand = {}
    for factor in FACTORS:
        rngs = [torch.Generator().manual_seed(i) for i in range(2)]
        answers = scaled(plain, factor).many(views, told, rngs=rngs)
        by_hand[factor] = sum(psnr_db(answer.inputs, batch) for answer, batch in zip(answers, records, strict=True))
    best = max(by_hand, key=by_hand.__getitem__)
    chosen = attack.tuned(view, knowledge)
    assert chosen.tv == pytest.approx(0.3 * best)
    other, _ = attack_surface(build("convnet", (1, 8, 8), width=4), [digits(1, offset=7)])
    assert attack.tuned(other, knowledge) == chosen
    answer = attack(view, knowledge, rng=stream(0))
    wanted = scaled(plain, best)(view, knowledge, rng=stream(0))
    assert answer.inputs is not None
    assert wanted.inputs is not None
    assert torch.allclose(answer.inputs, wanted.inputs)


def test_without_public_records_there_is_no_rehearsal() -> None:
    view, knowledge = attack_surface(build("convnet", (1, 8, 8), width=4), [TRUTH])
    for public in (None, digits(3)):
        reason = TunedInvertingGradients().supports(view, replace(knowledge, public=public))
        assert reason is not None
        assert "at least 4 public records" in reason


def test_quality_is_that_of_the_best_assignment() -> None:
    batch = Batch(torch.stack([torch.zeros(1, 2, 2), torch.ones(1, 2, 2)]), torch.tensor([0, 1]))
    assert psnr_db(batch.inputs.flip(0) * 0.9, batch) == pytest.approx((20 + 60) / 2)
    assert psnr_db(None, batch) == pytest.approx(6.0206, abs=1e-3)
