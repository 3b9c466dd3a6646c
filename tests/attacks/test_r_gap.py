"""Layers peeled from the end: their systems, what is refused, and what is certified."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from attacks import _peel
from attacks._chain import ACTIVATIONS, Activation, Chain, Layer, activation_between, chain
from attacks._layers import probe
from attacks._peel import Known, Peeled, peel, undone
from attacks._second_order.proof import RADIUS
from attacks.strongest import Strongest
from attacks.update.r_gap import PROOF, RGap, with_errors
from simulator.adversary import Knowledge
from simulator.rng import stream
from simulator.types import Batch, LocalTraining, Observation, Tensors, Update
from tests.attacks.victims import attack_surface, build, photos, psnr_db

RNG = stream(0, "attack")
SHAPE = (3, 16, 16)


def surface(
    name: str = "lenet", seed: int = 0, recipe: LocalTraining | None = None, **settings: Any
) -> tuple[Observation, Knowledge, torch.Tensor]:
    batch = photos(1, 16, seed)
    return *attack_surface(build(name, SHAPE, seed=seed, **settings), [batch], recipe), batch.inputs


def of(model: nn.Module, seed: int = 0) -> tuple[Observation, Knowledge, torch.Tensor]:
    batch = photos(1, 16, seed)
    return *attack_surface(model, [batch]), batch.inputs


def with_update(view: Observation, tensors: Tensors) -> Observation:
    return replace(view, uploads=(replace(view.upload, update=Update(view.upload.update.kind, tensors)),))


def layers(view: Observation, knowledge: Knowledge) -> list[tuple[Layer, Peeled]]:
    model = chain(knowledge, view.broadcast)
    assert isinstance(model, Chain), model
    return peel(model, view.broadcast.parameters, with_errors(view, knowledge))


@pytest.mark.parametrize("f", ACTIVATIONS, ids=lambda f: f.name)
def test_activations_are_undone_and_their_slopes_are_functions_of_their_values(f: Activation) -> None:
    z = torch.linspace(0.05 if f.flat else -3, 3, 50, dtype=torch.float64).requires_grad_(True)
    a = f.of(z)
    (slope,) = torch.autograd.grad(a.sum(), z)
    assert torch.allclose(f.inverse(a), z, atol=1e-9)
    assert torch.allclose(f.slope(a), slope)
    values = a.detach().requires_grad_(True)
    bend = torch.autograd.grad(f.slope(values).sum(), values, allow_unused=True)[0] if f.slope(values).requires_grad else None
    assert torch.allclose(f.bend(a), torch.zeros_like(a) if bend is None else bend)


def test_values_at_the_end_of_a_range_say_nothing_of_what_went_in() -> None:
    sigmoid, softplus = (next(f for f in ACTIVATIONS if f.name == name) for name in ("sigmoid", "softplus"))
    value = torch.tensor([0.0, 1e-5, 0.5, 1.0], dtype=torch.float64)
    z, slope = undone(sigmoid, Known(value, torch.full_like(value, 1e-6)))
    assert torch.isfinite(z.error).tolist() == [False, True, True, False]
    assert bool(torch.isfinite(slope.value).all() & torch.isfinite(slope.error).all())
    assert float(z.error[2]) == pytest.approx(4e-6, rel=0.01)
    subnormal = torch.tensor([5.6e-45, 1e-30], dtype=torch.float64)  # float32 has few digits there, if any
    z, _ = undone(softplus, Known(subnormal, 1e-7 * subnormal))
    assert torch.isfinite(z.error).tolist() == [False, True]
    assert float(z.value[1]) == pytest.approx(-69.0776, abs=1e-3)


def test_activations_are_told_by_their_values() -> None:
    z = torch.linspace(-3, 3, 50)
    for f in ACTIVATIONS:
        found = activation_between(z, f.of(z))
        assert found is not None
        assert found.name == f.name
    leaky = activation_between(z, F.leaky_relu(z, 0.1))
    assert leaky is not None
    assert torch.allclose(leaky.inverse(F.leaky_relu(z, 0.1)), z, atol=1e-6)
    assert activation_between(z, F.gelu(z)) is None
    assert activation_between(z, z.abs()) is None


@pytest.mark.parametrize("settings", [{"padding": 1}, {"stride": 2, "padding": 2}, {"padding": 1, "dilation": 2}, {"stride": (2, 1)}])
def test_both_matrices_of_a_convolution_are_pytorchs(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 24, 3, **settings)
    features = int(conv(torch.zeros(1, *SHAPE)).numel())
    view, knowledge, _ = of(nn.Sequential(conv, nn.Sigmoid(), nn.Flatten(), nn.Linear(features, 10)))
    model = chain(knowledge, view.broadcast)
    assert isinstance(model, Chain), model
    layer, x = model.layers[0], torch.randn(1, *SHAPE, dtype=torch.float64)
    weight = torch.randn(conv.weight.shape, dtype=torch.float64, requires_grad=True)
    z = F.conv2d(x, weight, None, conv.stride, conv.padding, conv.dilation)  # type: ignore[arg-type]
    delta = torch.randn_like(z)
    (gradient,) = torch.autograd.grad(z, weight, delta)
    flat = x.flatten().numpy()
    assert torch.allclose(torch.from_numpy(layer.forward(weight.detach().flatten(1)) @ flat), z.detach().flatten())
    assert torch.allclose(torch.from_numpy(layer.backward(delta[0].flatten(1)) @ flat), gradient.flatten())


@pytest.mark.parametrize("settings", [{}, {"activation": "tanh"}, {"activation": "softplus"}, {"init": 0.0}], ids=str)
def test_one_record_of_a_lenet_is_exact_and_proven(settings: dict[str, Any]) -> None:
    for seed in range(3):
        view, knowledge, truth = surface(seed=seed, **settings)
        assert RGap().supports(view, knowledge) is None
        guess = RGap()(view, knowledge, rng=RNG)
        assert guess.certificate == (PROOF,)
        assert guess.converged
        assert psnr_db(guess.inputs, truth) > 90
        assert guess.labels.tolist() == photos(1, 16, seed).labels.tolist()


class Written(nn.Module):
    """Activations as functions, without bias in the body, and one fully connected layer of a slope that no module names."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 12, 4, stride=2, bias=False), nn.Conv2d(12, 12, 3, bias=False)
        self.third, self.head = nn.Linear(300, 40, bias=False), nn.Linear(40, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.elu(self.first(2 * x - 1))
        x = F.leaky_relu(self.second(x), 0.3).flatten(1)
        out: torch.Tensor = self.head(torch.tanh(self.third(x)))
        return out


def test_layers_are_found_by_what_they_do() -> None:
    view, knowledge, truth = of(Written())
    assert [layer.after.name for layer, _ in layers(view, knowledge)] == ["none", "tanh", "leaky relu", "elu"]
    guess = RGap()(view, knowledge, rng=RNG)
    assert guess.certificate == (PROOF,)
    assert psnr_db(guess.inputs, truth) > 90


def test_expected_errors_are_those_that_are_made() -> None:
    """Of every layer's input, on average: neither a certificate in vain nor a wrong one."""
    for seed in range(4):
        view, knowledge, truth = surface(seed=seed)
        inputs = {call.name: call.inputs.double().flatten() for call in probe(knowledge, view.broadcast, truth)}
        for layer, peeled in layers(view, knowledge):
            made = float((peeled.x.value - inputs[layer.call.name]).square().mean().sqrt())
            expected = float(peeled.x.error.square().mean().sqrt())
            assert expected / 20 < made < 2 * expected, (layer.call.name, made, expected)


def test_relu_layers_with_enough_equations_are_exact() -> None:
    for seed in range(2):
        view, knowledge, truth = surface("cnn", seed=seed, width=32, hidden=64)
        guess = RGap()(view, knowledge, rng=RNG)
        assert guess.certificate == (PROOF,)
        assert psnr_db(guess.inputs, truth) > 90


def test_a_layer_with_too_few_live_outputs_is_named_and_nothing_certified(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = photos(1, 32)
    view, knowledge = attack_surface(build("lenet", (3, 32, 32), activation="relu"), [batch])
    monkeypatch.setattr(logging.getLogger("fedpeek"), "propagate", True)
    with caplog.at_level(logging.INFO, logger="fedpeek"):
        guess = RGap()(view, knowledge, rng=RNG)
    assert "body.conv0" in caplog.text
    assert not guess.converged
    assert guess.certificate == ("",)
    assert psnr_db(guess.inputs, batch.inputs) > psnr_db(torch.full_like(batch.inputs, 0.5), batch.inputs) + 5


def test_an_unknown_scale_changes_nothing() -> None:
    view, knowledge, truth = surface()
    scaled = with_update(view, {name: 0.01 * tensor for name, tensor in view.upload.update.tensors.items()})
    knowledge = replace(knowledge, defenses=(("clip", {"clip_norm": 1e-3}),))
    guess = RGap()(scaled, knowledge, rng=RNG)
    assert guess.certificate == (PROOF,)
    assert psnr_db(guess.inputs, truth) > 90


def test_a_delta_of_one_step_counts_the_rounding_of_its_parameters() -> None:
    recipe = LocalTraining(algorithm="fedavg", batch_size=0, learning_rate=0.1, momentum=0.9, weight_decay=0.01, label_smoothing=0.1)
    for seed in range(3):
        view, knowledge, truth = surface(seed=seed, recipe=recipe)
        assert RGap().supports(view, knowledge) is None
        guess = RGap()(view, knowledge, rng=RNG)
        assert psnr_db(guess.inputs, truth) > (60 if guess.certificate[0] else 25)


def tampered(kind: str, view: Observation, knowledge: Knowledge) -> Observation:
    tensors, rng = view.upload.update.tensors, stream(0, kind)
    if kind == "shuffled":
        return with_update(view, {n: t.flatten()[torch.randperm(t.numel(), generator=rng)].view(t.shape) for n, t in tensors.items()})
    if kind == "half":
        return with_update(view, {n: t.half() for n, t in tensors.items()})
    if kind in ("another layer", "another bias"):
        part = "body.conv0.bias" if kind == "another bias" else "body.conv0"
        other = attack_surface(knowledge.model, [photos(1, 16, 9)])[0].upload.update.tensors
        return with_update(view, {n: other[n] if n.startswith(part) else t for n, t in tensors.items()})
    sizes = {"faint noise": 1e-4, "noise": 1e-2}
    return with_update(view, {n: t + sizes[kind] * t.std() * torch.randn(t.shape, generator=rng) for n, t in tensors.items()})


@pytest.mark.parametrize("kind", ["shuffled", "half", "another layer", "another bias", "faint noise", "noise"])
@pytest.mark.parametrize("settings", [{}, {"activation": "relu"}], ids=str)
def test_nothing_wrong_is_certified(kind: str, settings: dict[str, Any]) -> None:
    for seed in range(3):
        view, knowledge, truth = surface(seed=seed, **settings)
        guess = RGap()(tampered(kind, view, knowledge), knowledge, rng=RNG)
        assert guess.inputs is not None
        if guess.certificate[0]:
            assert float((guess.inputs - truth).square().mean().sqrt()) < RADIUS
        assert bool(torch.isfinite(guess.inputs).all())
        assert kind not in ("shuffled", "another layer", "another bias", "noise") or guess.certificate == ("",)


def test_a_zeroed_update_is_refused() -> None:
    view, knowledge, _ = surface()
    reason = RGap().supports(with_update(view, {n: torch.zeros_like(t) for n, t in view.upload.update.tensors.items()}), knowledge)
    assert reason is not None
    assert "zero" in reason


@pytest.mark.parametrize(
    ("name", "settings", "named"),
    [
        ("resnet20", {"width": 4}, "body.norm"),
        ("convnet", {"width": 4}, "between body.conv4 and head"),
        ("lenet", {"activation": "gelu"}, "between body.conv0 and body.conv1"),
        ("lenet", {"dropout": 0.3}, "dropout"),
    ],
)
def test_what_cannot_be_peeled_is_refused_by_the_name_of_its_layer(name: str, settings: dict[str, Any], named: str) -> None:
    reason = RGap().supports(*surface(name, **settings)[:2])
    assert reason is not None
    assert named in reason


def test_too_few_equations_and_several_records_are_refused() -> None:
    narrow = nn.Sequential(nn.Conv2d(3, 2, 3, stride=2, padding=1), nn.Sigmoid(), nn.Flatten(), nn.Linear(128, 10))
    reason = RGap().supports(*of(narrow)[:2])
    assert reason is not None
    assert "equations" in reason
    assert "768" in reason
    pair = photos(2, 16)
    reason = RGap().supports(*attack_surface(build("lenet", SHAPE), [pair]))
    assert reason is not None
    assert "1 record" in reason


def test_conjugate_gradients_give_what_the_factor_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    view, knowledge, _ = surface()
    factored = layers(view, knowledge)[-1][1].x
    monkeypatch.setattr(_peel, "DENSE", 0)
    found: Known = layers(view, knowledge)[-1][1].x
    assert float((found.value - factored.value).norm() / factored.value.norm()) < 1e-4
    assert 0.5 < float(found.error.norm() / factored.error.norm()) < 2


def test_strongest_asks_it_before_it_searches() -> None:
    view, knowledge, truth = surface()
    guess = Strongest(seconds=20)(view, knowledge, rng=RNG)
    assert guess.solver == ("r_gap",)
    assert psnr_db(guess.inputs, truth) > 90


@pytest.mark.slow
def test_photographs_of_full_size_on_all_initial_weights() -> None:
    for seed in range(3):
        for init in (0.5, 0.0):
            batch: Batch = photos(1, 32, seed)
            view, knowledge = attack_surface(build("lenet", (3, 32, 32), seed=seed, init=init), [batch])
            guess = RGap()(view, knowledge, rng=RNG)
            assert guess.certificate == (PROOF,)
            assert psnr_db(guess.inputs, batch.inputs) > 80


def test_time_that_is_over_leaves_gray_and_no_proof() -> None:
    view, knowledge = attack_surface(build("lenet", (3, 16, 16)), [photos(1, 16)])
    answer = RGap(seconds=1e-9)(view, knowledge, rng=stream(0))
    assert answer.inputs is not None
    assert bool((answer.inputs == 0.5).all())
    assert answer.certificate == ("",)
    assert not answer.converged
