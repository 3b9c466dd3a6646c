"""BatchNorm in train mode: what the uploaded buffers say about the batch, and what an attack assumes about it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attacks._matching.normalization import assumed, estimated
from attacks._matching.simulate import Victim, prepare, simulate
from attacks.update.inverting_gradients import InvertingGradients
from simulator.rng import stream
from simulator.types import Batch, LocalTraining
from tests.attacks.victims import attack_surface, build, photos, psnr_db, records

SHAPE = (3, 8, 8)


def surface(count: int, *, train: bool = True, recipe: LocalTraining | None = None) -> tuple[Victim, Batch]:
    batch = records(count, SHAPE)
    view, knowledge = attack_surface(build("resnet20", SHAPE, width=4).train(train), [batch], recipe)
    return prepare(view, replace(knowledge, labels=batch.labels)), batch


def entering(victim: Victim, batch: Batch) -> dict[str, torch.Tensor]:
    """What enters each BatchNorm layer when the truth goes through the model, by hooks of this test's own."""
    seen: dict[str, torch.Tensor] = {}
    layers = {name: layer for name, layer in victim.model.named_modules() if isinstance(layer, torch.nn.BatchNorm2d)}
    handles = [
        layer.register_forward_pre_hook(lambda _, inputs, name=name: seen.__setitem__(name, inputs[0])) for name, layer in layers.items()
    ]
    buffers = {name: tensor.clone() for name, tensor in victim.buffers.items()}
    torch.func.functional_call(victim.model, {**victim.parameters, **buffers}, (batch.inputs,))
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("recipe", [None, LocalTraining(algorithm="fedavg", batch_size=0, learning_rate=0.1)])
def test_uploaded_buffers_are_the_exact_statistics_of_one_step(recipe: LocalTraining | None) -> None:
    victim, batch = surface(3, recipe=recipe)
    found = estimated(victim)
    for name, inputs in entering(victim, batch).items():
        assert torch.allclose(found[f"{name}.running_mean"], inputs.mean((0, 2, 3)), rtol=1e-3, atol=1e-4)
        assert torch.allclose(found[f"{name}.running_var"], inputs.var((0, 2, 3), unbiased=False), rtol=1e-3, atol=1e-4)


def test_assumptions_normalize_as_they_say() -> None:
    """At the truth: the own statistics explain the update, the estimated ones give the same logits, the running ones neither."""
    victim, batch = surface(3)

    def logits(of: Victim) -> torch.Tensor:
        buffers = {name: tensor.clone() for name, tensor in of.buffers.items()}
        return torch.func.functional_call(of.model, {**of.parameters, **buffers}, (batch.inputs,))  # type: ignore[no-any-return]

    own, fixed, running = (assumed([victim], assumption)[0] for assumption in ("train", "estimated", "running"))
    assert own is victim
    assert torch.allclose(logits(fixed), logits(victim), atol=1e-3)
    assert not torch.allclose(logits(running), logits(victim), atol=1e-1)
    cosines = []
    for v in (own, fixed, running):
        update = simulate(v.model, v.parameters, v.buffers, batch.inputs, batch.labels, recipe=v.recipe, order=v.order, names=v.names)
        cosines.append(float(torch.nn.functional.cosine_similarity(update, v.target, dim=0)))
    assert cosines[0] > 0.9999
    assert cosines[0] > cosines[1] + 0.05, "statistics held fixed miss what flows through them"
    assert cosines[1] > cosines[2]


def test_assumptions_leave_the_model_alone_and_share_one_copy() -> None:
    victim, _ = surface(2)
    one, other = assumed([victim, replace(victim)], "estimated")
    assert one.model is other.model
    assert victim.model.training
    assert not one.model.training
    frozen, _ = surface(2, train=False)
    assert assumed([frozen], "estimated") == [frozen]


@pytest.mark.nightly
def test_the_batchs_own_statistics_help_inverting_gradients() -> None:
    """Claim batch-norm-statistics."""
    truth = photos(1, 16, seed=3)
    view, knowledge = attack_surface(build("resnet20", (3, 16, 16), width=8).train(), [truth])
    with_them, without = (
        psnr_db(InvertingGradients(steps=150, statistics=weight)(view, knowledge, rng=stream(0, "attack")).inputs, truth.inputs)
        for weight in (10.0, 0.0)
    )
    assert with_them > without + 1
