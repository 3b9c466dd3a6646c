"""The linear system of a vision transformer's token gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from attacks._embedding import Embedding, embedding
from attacks.update.april import COMPLETED, LINEAR, April, linear_system
from simulator.adversary import Knowledge
from simulator.rng import stream
from simulator.types import LocalTraining, Observation, Tensors, Update
from tests.attacks.victims import attack_surface, build, psnr_db, records

RNG = stream(0, "attack")


def with_update(view: Observation, tensors: Tensors) -> Observation:
    upload = view.upload
    return replace(view, uploads=(replace(upload, update=Update(upload.update.kind, tensors)),))


def surface(seed: int = 0, shape: tuple[int, int, int] = (3, 16, 16), **settings: object) -> tuple[Observation, Knowledge, torch.Tensor]:
    batch = records(1, shape, seed)
    return *attack_surface(build("vit", shape, seed=seed, **settings), [batch]), batch.inputs


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 9, 14)])
def test_one_record_is_exact_and_proven(shape: tuple[int, int, int]) -> None:
    for seed in range(5):
        view, knowledge, truth = surface(seed, shape)
        guess = April()(view, knowledge, rng=RNG)
        assert guess.certificate == (LINEAR,)
        assert psnr_db(guess.inputs, truth) > 80
        assert guess.labels.tolist() == records(1, shape, seed).labels.tolist()


def test_an_unknown_scale_changes_nothing() -> None:
    view, knowledge, truth = surface()
    scaled = with_update(view, {name: 0.01 * tensor for name, tensor in view.upload.update.tensors.items()})
    knowledge = replace(knowledge, defenses=(("clip", {"clip_norm": 1e-3}),))
    guess = April()(scaled, knowledge, rng=RNG)
    assert guess.certificate == (LINEAR,)
    assert psnr_db(guess.inputs, truth) > 80


@pytest.mark.slow
def test_combinations_of_tokens_that_no_gradient_tells_are_completed() -> None:
    """As many tokens as width behind a LayerNorm: their gradients sum to 0 over the width, so one combination is missing."""
    certified = 0
    for seed in range(6):
        view, knowledge, truth = surface(seed, (1, 8, 8), patch=2, width=16)
        found = embedding(knowledge, view.broadcast)
        assert isinstance(found, Embedding)
        gradient = view.upload.update.tensors
        delta, weight = gradient[found.place].double(), gradient[found.call.weight].double().flatten(1)
        system = linear_system(delta, weight, 1.2e-7, 1.0)
        assert len(system.free) >= 1
        guess = April()(view, knowledge, rng=RNG)
        assert psnr_db(guess.inputs, truth) > psnr_db(found.image(system.patches).clamp(0, 1).float(), truth) + 10
        certified += guess.certificate == (COMPLETED,)
        if guess.certificate[0]:
            assert psnr_db(guess.inputs, truth) > 60
    assert certified >= 3


class WithClassToken(nn.Module):
    """As torchvision's and timm's: a learned token before those of the patches, and an embedding of its place."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.token = nn.Conv2d(1, 32, 4, 4), nn.Parameter(torch.randn(1, 1, 32))
        self.other, self.places = nn.Parameter(torch.randn(1, 5, 32)), nn.Parameter(torch.randn(1, 5, 32))
        self.mix = nn.Linear(160, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.embed(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(x), -1, -1), tokens], 1) + self.places
        mixed: torch.Tensor = torch.tanh(self.mix(torch.tanh(tokens * self.other).flatten(1)))
        return mixed


def test_the_position_embedding_is_found_by_what_it_does() -> None:
    batch = records(1, (1, 8, 8))
    view, knowledge = attack_surface(nn.Sequential(WithClassToken(), nn.Linear(32, 10)), [batch])
    found = embedding(knowledge, view.broadcast)
    assert isinstance(found, Embedding)
    assert (found.place, found.first, found.tokens) == ("0.places", 1, 4)
    guess = April()(view, knowledge, rng=RNG)
    assert guess.certificate == (LINEAR,)
    assert psnr_db(guess.inputs, batch.inputs) > 80


def test_what_is_no_single_records_update_is_not_certified() -> None:
    view, knowledge, _ = surface()
    update = view.upload.update.tensors
    shuffled = {name: tensor.flatten()[torch.randperm(tensor.numel())].view(tensor.shape) for name, tensor in update.items()}
    noisy = {name: tensor + 1e-3 * tensor.std() * torch.randn(tensor.shape) for name, tensor in update.items()}
    batch, _ = attack_surface(knowledge.model, [records(2, (3, 16, 16))])
    mean = with_update(view, batch.upload.update.tensors)
    for fake in (with_update(view, shuffled), with_update(view, noisy), mean):
        assert April()(fake, knowledge, rng=RNG).certificate == ("",)
    zero = with_update(view, {name: torch.zeros_like(tensor) for name, tensor in update.items()})
    assert "zero" in str(April().supports(zero, knowledge))


@pytest.mark.parametrize(
    ("reason", "model", "count", "recipe"),
    [
        ("1 record", build("vit", (1, 8, 8)), 2, None),
        ("stride", build("lenet", (1, 8, 8)), 1, None),
        ("about as few", build("vit", (1, 32, 32), patch=1), 1, None),
        ("local steps", build("vit", (1, 8, 8)), 1, LocalTraining(algorithm="fedavg", batch_size=1, steps=2)),
    ],
)
def test_refusals_say_why(reason: str, model: nn.Module, count: int, recipe: LocalTraining | None) -> None:
    assert reason in str(
        April().supports(*attack_surface(model, [records(count, (1, 32, 32) if reason == "about as few" else (1, 8, 8))], recipe))
    )
