"""Local training against plain autograd and torch.optim, for every model, alone and batched over victims."""

from __future__ import annotations

import copy
import functools
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import jacrev, vmap
from torch.nn import functional as F

from simulator import config
from simulator.models.dropout import drawn_masks, masks_from, with_own_masks
from simulator.models.initial import drawn_from
from simulator.models.latent import Bottleneck, drawn_noise, noise_from
from simulator.rng import stream
from simulator.training import (
    batch_indices,
    clip_by_norm,
    local_training,
    local_update,
    mean_gradient,
    per_example_gradients,
    root,
    rounded,
    settled_gradient,
)
from simulator.types import Batch, LocalTraining, Schema, Tensors, Update

ROOT = Path(__file__).parents[2]
SHAPE, CLASSES, RECORDS = (3, 16, 16), 4, 4
WITHOUT_BATCH_NORM = [
    "linear",
    "mlp",
    {"name": "mlp", "hidden": [24, 16], "activation": "sigmoid"},
    "lenet",
    {"name": "convnet", "width": 8},
    {"name": "resnet20", "norm": "group"},
    {"name": "resnet18", "norm": "group"},
]
WITH_BATCH_NORM = ["resnet20", "resnet18"]
MODELS = [*WITHOUT_BATCH_NORM, *WITH_BATCH_NORM]
RESNET18 = ("resnet18", {"name": "resnet18", "norm": "group"})


def slow_if(large: Sequence[object], specs: Sequence[object]) -> list[Any]:
    return [pytest.param(spec, marks=pytest.mark.slow) if spec in large else spec for spec in specs]


LARGE_ONES_SLOW = slow_if(RESNET18, MODELS)
MODES = pytest.mark.parametrize("mode", ["train", "eval"])


@functools.cache
def _built(spec: str) -> nn.Module:
    family = config.build_plugin("models", eval(spec), "model")
    return family.build(Schema(SHAPE, tuple(map(str, range(CLASSES)))), stream(0, "model"))


def build(spec: object, mode: str) -> nn.Module:
    return copy.deepcopy(_built(repr(spec))).train(mode == "train")


def tensors(model: nn.Module) -> tuple[Tensors, Tensors]:
    return {n: p.detach() for n, p in model.named_parameters()}, dict(model.named_buffers())


def draw(*, seed: int = 0, dtype: torch.dtype = torch.float32) -> Batch:
    rng = stream(seed, "batch")
    inputs = torch.rand(RECORDS, *SHAPE, generator=rng, dtype=torch.float32).to(dtype)
    return Batch(inputs, torch.randint(CLASSES, (RECORDS,), generator=rng))


def distance(got: Tensors, wanted: Tensors) -> float:
    """‖got − wanted‖ / ‖wanted‖ over all tensors together."""
    assert set(got) == set(wanted)
    flat = [torch.cat([t[name].flatten().double() for name in wanted]) for t in (got, wanted)]
    return float((flat[0] - flat[1]).norm() / flat[1].norm())


def floating(buffers: Tensors) -> Tensors:
    return {name: tensor for name, tensor in buffers.items() if tensor.is_floating_point()}


@MODES
@pytest.mark.parametrize("spec", MODELS, ids=str)
def test_mean_gradient_is_autograds(spec: object, mode: str) -> None:
    model, batch = build(spec, mode), draw()
    gradient, after = mean_gradient(model, *tensors(model), batch)
    plain = copy.deepcopy(model)
    F.cross_entropy(plain(batch.inputs), batch.labels).backward()
    assert distance(gradient, {name: parameter.grad for name, parameter in plain.named_parameters()}) <= 1e-5
    for name, tensor in plain.named_buffers():
        torch.testing.assert_close(after[name], tensor)


DRAWING = [{"name": "cnn", "dropout": 0.5}, {"name": "mlp", "dropout": 0.3}, "vit"]


@MODES
@pytest.mark.parametrize("spec", [*MODELS, *DRAWING], ids=str)
def test_a_clients_gradient_is_the_differentiable_one_to_the_bit(spec: object, mode: str) -> None:
    """Also where masks are drawn; buffers included; and whether or not the caller lets autograd record."""
    model, batch = with_own_masks(build(spec, mode)), draw()
    found = []
    for rule in (mean_gradient, settled_gradient, torch.no_grad()(settled_gradient)):
        with masks_from(drawn_masks(stream(0, "masks"))):
            found.append(rule(model, *tensors(model), batch, label_smoothing=0.1))
    for got in found[1:]:
        for tensors_got, wanted in zip(got, found[0], strict=True):
            assert list(tensors_got) == list(wanted)
            assert all(tensors_got[name].numpy().tobytes() == wanted[name].numpy().tobytes() for name in wanted)  # -0.0 is not 0.0


def test_a_clients_gradient_counts_what_layers_add_to_the_loss() -> None:
    """PRECODE's bottleneck draws noise and adds a divergence; a parameter that nothing uses has the gradient 0."""
    model, batch = nn.Sequential(nn.Flatten(), nn.Linear(768, 8), Bottleneck(8, 4, 0.5), nn.Linear(8, CLASSES)), draw()
    model.register_parameter("unused", nn.Parameter(torch.ones(2)))
    found = []
    for rule in (mean_gradient, settled_gradient):
        with noise_from(drawn_noise(stream(0, "noise"))):
            found.append(rule(model, *tensors(model), batch)[0])
    wanted, got = found
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    assert torch.equal(got["unused"], torch.zeros(2))


@MODES
@pytest.mark.parametrize("spec", LARGE_ONES_SLOW, ids=str)
def test_local_training_is_that_of_torch_optim(spec: object, mode: str) -> None:
    recipe = LocalTraining(algorithm="fedavg", learning_rate=0.05, momentum=0.9, weight_decay=1e-2)
    model = build(spec, mode).double()
    batches = [draw(seed=step, dtype=torch.float64) for step in range(3)]
    delta, after = local_training(model, *tensors(model), batches, recipe)
    plain = copy.deepcopy(model)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)
    for batch in batches:
        optimizer.zero_grad()
        F.cross_entropy(plain(batch.inputs), batch.labels).backward()
        optimizer.step()
    start = dict(model.named_parameters())
    assert distance(delta, {name: parameter.detach() - start[name].detach() for name, parameter in plain.named_parameters()}) <= 1e-5
    for name, tensor in plain.named_buffers():
        torch.testing.assert_close(after[name], tensor)
    if spec in WITH_BATCH_NORM:
        moved = distance(floating(after), floating(dict(model.named_buffers()))) > 1e-3
        assert moved == (mode == "train")


RECIPES = {
    "adam": LocalTraining(algorithm="fedavg", optimizer="adam", learning_rate=0.01),
    "adam, its settings": LocalTraining(
        algorithm="fedavg", optimizer="adam", learning_rate=0.01, adam_beta1=0.8, adam_beta2=0.95, adam_eps=1e-4, weight_decay=0.1
    ),
    "clipped": LocalTraining(algorithm="fedavg", max_grad_norm=0.1, momentum=0.5),
    "clipped, decayed": LocalTraining(algorithm="fedavg", max_grad_norm=0.1, weight_decay=0.3),
    "not clipped, since far below": LocalTraining(algorithm="fedavg", max_grad_norm=1e3),
    "fedprox": LocalTraining(algorithm="fedavg", proximal=2.0),
    "label smoothing": LocalTraining(algorithm="fedavg", label_smoothing=0.2),
    "all of it": LocalTraining(
        algorithm="fedavg", optimizer="adam", learning_rate=0.01, weight_decay=0.1, max_grad_norm=0.1, proximal=2.0, label_smoothing=0.2
    ),
}


def by_hand(model: nn.Module, batches: list[Batch], recipe: LocalTraining) -> Tensors:
    """The usual training loop: the loss with its terms, backward(), clip_grad_norm_, torch.optim."""
    plain = copy.deepcopy(model)
    start = {name: parameter.detach().clone() for name, parameter in plain.named_parameters()}
    if recipe.optimizer == "adam":
        betas = (recipe.adam_beta1, recipe.adam_beta2)
        optimizer: torch.optim.Optimizer = torch.optim.Adam(
            plain.parameters(), lr=recipe.learning_rate, betas=betas, eps=recipe.adam_eps, weight_decay=recipe.weight_decay
        )
    else:
        optimizer = torch.optim.SGD(
            plain.parameters(), lr=recipe.learning_rate, momentum=recipe.momentum, weight_decay=recipe.weight_decay
        )
    criterion = nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
    for batch in batches:
        optimizer.zero_grad()
        drift = torch.stack([(parameter - start[name]).square().sum() for name, parameter in plain.named_parameters()]).sum()
        (criterion(plain(batch.inputs), batch.labels) + recipe.proximal / 2 * drift).backward()
        if recipe.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(plain.parameters(), recipe.max_grad_norm)
        optimizer.step()
    return {name: parameter.detach() - start[name] for name, parameter in plain.named_parameters()}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("spec", ["mlp", "lenet", "resnet20"])
def test_local_training_is_the_usual_loop(spec: str, recipe: LocalTraining) -> None:
    model = build(spec, "train").double()
    batches = [draw(seed=step, dtype=torch.float64) for step in range(4)]
    delta, _ = local_training(model, *tensors(model), batches, recipe)
    assert distance(delta, by_hand(model, batches, recipe)) <= 1e-9
    plain = LocalTraining(algorithm="fedavg", learning_rate=recipe.learning_rate, optimizer=recipe.optimizer)
    without, _ = local_training(model, *tensors(model), batches, plain)
    same = recipe in (RECIPES["adam"], RECIPES["not clipped, since far below"])
    assert (distance(delta, without) < 1e-12) == same, "each setting must do something"


@pytest.mark.parametrize("recipe", [RECIPES["all of it"], RECIPES["clipped, decayed"], RECIPES["fedprox"]], ids=lambda r: r.optimizer)
def test_local_training_is_batched_and_differentiated(recipe: LocalTraining) -> None:
    recipe = replace(recipe, adam_eps=1e-2)  # so that Adam's step is not a jump between signs, which no difference can follow
    model = build({"name": "mlp", "hidden": [8], "activation": "sigmoid"}, "train").double()
    batches = torch.rand(2, 3, RECORDS, *SHAPE, dtype=torch.float64, generator=stream(0, "inputs"))  # victim, step, record
    labels = torch.randint(CLASSES, (RECORDS,), generator=stream(0, "labels"))
    parameters, buffers = tensors(model)
    probe = {name: torch.randn(tensor.shape, dtype=torch.float64, generator=stream(1, name)) for name, tensor in parameters.items()}

    def along(inputs: Tensor) -> Tensor:
        delta, _ = local_training(model, parameters, buffers, [Batch(x, labels) for x in inputs], recipe)
        return torch.stack([(probe[name] * tensor).sum() for name, tensor in delta.items()]).sum()

    slopes = vmap(jacrev(along))(batches)
    step = 1e-5 * torch.randn(batches.shape, dtype=torch.float64, generator=stream(2, "step"))
    for victim in range(2):
        up, down = along(batches[victim] + step[victim]), along(batches[victim] - step[victim])
        torch.testing.assert_close((slopes[victim] * step[victim]).sum(), (up - down) / 2, rtol=1e-5, atol=1e-15)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_gradients_of_zero_are_survived(optimizer: str) -> None:
    """Dead units: their gradient is 0, and so are the derivatives through clipping and through Adam's root, not NaN."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, CLASSES)).double()
    parameters, buffers = tensors(model)
    parameters = {**parameters, "1.bias": torch.full((3,), -100.0, dtype=torch.float64)}
    recipe = LocalTraining(algorithm="fedavg", optimizer=optimizer, max_grad_norm=0.1)  # type: ignore[arg-type]

    def change(inputs: Tensor) -> Tensor:
        delta, _ = local_training(model, parameters, buffers, [Batch(inputs, torch.tensor([0]))] * 2, recipe)
        return torch.cat([tensor.flatten() for tensor in delta.values()])

    slope = jacrev(change)(torch.rand(1, 1, 2, 2, dtype=torch.float64))
    assert torch.isfinite(slope).all()
    zeros = {"w": torch.zeros(3)}
    assert torch.equal(clip_by_norm(zeros, 1.0)["w"], zeros["w"])
    assert float(torch.func.grad(root)(torch.tensor(0.0))) == 0.0
    assert float(torch.func.grad(root)(torch.tensor(4.0))) == 0.25


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_upload_is_rounded_to_nearest(dtype: str) -> None:
    update = Update("delta", {"w": torch.tensor([1 / 3, 1e-3, -2.0])})
    found = rounded(update, LocalTraining(algorithm="fedavg", upload_dtype=dtype)).tensors["w"]  # type: ignore[arg-type]
    assert found.dtype == getattr(torch, dtype)
    bits = {"float16": 11, "bfloat16": 8}[dtype]
    assert ((found.double() / update.tensors["w"].double() - 1).abs() <= 2.0**-bits).all()
    assert not torch.equal(found.float(), update.tensors["w"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "adamw"}, "optimizer must be 'sgd' or 'adam', got 'adamw'"),
        ({"optimizer": "adam", "momentum": 0.9}, "momentum must be 0 with optimizer = 'adam', got 0.9. Set adam_beta1"),
        ({"adam_beta2": 1.0}, r"adam_beta2 must be in \[0, 1\), got 1.0"),
        ({"adam_eps": 0.0}, "adam_eps must be > 0 and finite, got 0.0"),
        ({"max_grad_norm": -1.0}, "max_grad_norm must be ≥ 0 and finite, got -1.0. 0 is none"),
        ({"max_grad_norm": float("inf")}, "max_grad_norm must be ≥ 0 and finite, got inf. 0 is none"),
        ({"proximal": float("nan")}, "proximal must be ≥ 0 and finite, got nan"),
        ({"label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\), got 1.0. 0 is hard labels"),
        ({"upload_dtype": "float8"}, "upload_dtype must be float32, float16 or bfloat16, got 'float8'"),
    ],
)
def test_recipes_that_mean_nothing_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LocalTraining(algorithm="fedavg", **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("setting", [{"optimizer": "adam"}, {"momentum": 0.9}, {"weight_decay": 0.1}, {"max_grad_norm": 1.0}, {"proximal": 1.0}])
def test_what_fedsgd_would_ignore_has_a_reason(setting: dict[str, object]) -> None:
    (name,) = setting
    reason = LocalTraining(**setting).without_effect()  # type: ignore[arg-type]
    assert reason is not None
    assert reason.startswith(f"{name} must be")
    assert LocalTraining(algorithm="fedavg", **setting).without_effect() is None  # type: ignore[arg-type]
    assert LocalTraining(label_smoothing=0.1, drop_last=True, upload_dtype="float16").without_effect() is None


@MODES
@pytest.mark.parametrize("spec", LARGE_ONES_SLOW, ids=str)
def test_victims_can_be_batched(spec: object, mode: str) -> None:
    # float64, since in float32 one ReLU near zero that flips between the two ways changes a gradient by 1e-3
    model, victims = build(spec, mode).double(), [draw(seed=seed, dtype=torch.float64) for seed in range(2)]
    parameters, buffers = tensors(model)

    def attack(inputs: Tensor, labels: Tensor) -> tuple[Tensors, Tensors]:
        return mean_gradient(model, parameters, buffers, Batch(inputs, labels))

    together, after = vmap(attack)(torch.stack([v.inputs for v in victims]), torch.stack([v.labels for v in victims]))
    for i, victim in enumerate(victims):
        alone, alone_after = attack(victim.inputs, victim.labels)
        assert distance({name: tensor[i] for name, tensor in together.items()}, alone) <= 1e-5
        for name, tensor in alone_after.items():
            torch.testing.assert_close(after[name][i], tensor)


@MODES
@pytest.mark.parametrize("spec", ["lenet", "resnet20"])
def test_models_can_be_batched(spec: object, mode: str) -> None:
    model, batch = build(spec, mode).double(), draw(dtype=torch.float64)
    parameters, buffers = tensors(model)
    many = {name: torch.stack([tensor, 1.1 * tensor]) for name, tensor in parameters.items()}
    together, after = vmap(lambda p: mean_gradient(model, p, buffers, batch))(many)
    alone, alone_after = mean_gradient(model, {name: tensor[1] for name, tensor in many.items()}, buffers, batch)
    assert distance({name: tensor[1] for name, tensor in together.items()}, alone) <= 1e-5
    for name, tensor in alone_after.items():
        torch.testing.assert_close(after[name][1], tensor)


@MODES
@pytest.mark.parametrize("spec", slow_if(["resnet20"], [spec for spec in MODELS if spec not in RESNET18]), ids=str)
def test_an_attack_differentiates_through_batched_victims(spec: object, mode: str) -> None:
    model, victims = build(spec, mode).double(), [draw(seed=seed, dtype=torch.float64) for seed in range(2)]
    parameters, buffers = tensors(model)

    def energy(inputs: Tensor, labels: Tensor) -> Tensor:
        gradient, _ = mean_gradient(model, parameters, buffers, Batch(inputs, labels))
        return torch.stack([tensor.square().sum() for tensor in gradient.values()]).sum()

    inputs = torch.stack([v.inputs for v in victims]).requires_grad_()
    vmap(energy)(inputs, torch.stack([v.labels for v in victims])).sum().backward()
    for i, victim in enumerate(victims):
        alone = victim.inputs.clone().requires_grad_()
        reference = copy.deepcopy(model)
        first = torch.autograd.grad(F.cross_entropy(reference(alone), victim.labels), list(reference.parameters()), create_graph=True)
        torch.stack([tensor.square().sum() for tensor in first]).sum().backward()
        assert distance({"x": inputs.grad[i]}, {"x": alone.grad}) <= 1e-5


NORMS = {
    "batch": lambda: nn.BatchNorm2d(4),
    "batch, cumulative": lambda: nn.BatchNorm2d(4, momentum=None),
    "batch, no affine": lambda: nn.BatchNorm2d(4, affine=False),
    "batch, no statistics": lambda: nn.BatchNorm2d(4, track_running_stats=False),
    "instance": lambda: nn.InstanceNorm2d(4, affine=True),
    "instance, statistics": lambda: nn.InstanceNorm2d(4, track_running_stats=True),
    "layer": lambda: nn.LayerNorm([4, 6, 6]),
    "layer, last axis": lambda: nn.LayerNorm(6, elementwise_affine=False),
    "group": lambda: nn.GroupNorm(2, 4),
}


@MODES
@pytest.mark.parametrize("norm", NORMS)
def test_norms_are_right_up_to_second_derivatives_of_batched_victims(norm: str, mode: str) -> None:
    with drawn_from(stream(0, "norms")):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), NORMS[norm](), nn.Sigmoid(), nn.Flatten(), nn.Linear(4 * 36, CLASSES))
        model = model.double().train(mode == "train")
        for tensor in model.state_dict().values():  # no special values that hide a mistake
            tensor += torch.rand_like(tensor) if tensor.is_floating_point() else 0
        batches = torch.rand(2, RECORDS, 3, 8, 8, dtype=torch.float64)
        labels = torch.randint(CLASSES, (2, RECORDS))
    parameters, buffers = tensors(model)

    def energy(inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensors]:
        gradient, after = mean_gradient(model, parameters, buffers, Batch(inputs, labels))
        return torch.stack([tensor.square().sum() for tensor in gradient.values()]).sum(), after

    inputs = batches.clone().requires_grad_()
    energies, after = vmap(energy)(inputs, labels)
    energies.sum().backward(retain_graph=True)
    for i in range(2):
        plain, alone = copy.deepcopy(model), batches[i].clone().requires_grad_()
        first = torch.autograd.grad(F.cross_entropy(plain(alone), labels[i]), list(plain.parameters()), create_graph=True)
        torch.stack([tensor.square().sum() for tensor in first]).sum().backward()
        torch.testing.assert_close(inputs.grad[i], alone.grad, rtol=1e-9, atol=1e-12)
        for name, tensor in plain.named_buffers():
            torch.testing.assert_close(after[name][i], tensor)


def test_an_attack_differentiates_running_statistics() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3 * 64, CLASSES))
    inputs = torch.rand(RECORDS, 3, 8, 8, requires_grad=True)
    _, after = mean_gradient(model, *tensors(model), Batch(inputs, torch.zeros(RECORDS, dtype=torch.long)))
    (slope,) = torch.autograd.grad(after["0.running_mean"].sum(), inputs)
    torch.testing.assert_close(slope, torch.full_like(slope, 0.1 / (RECORDS * 64)))


def test_batch_norm_refuses_a_single_value() -> None:
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4), nn.Linear(4, CLASSES))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        mean_gradient(model, *tensors(model), Batch(torch.rand(1, 1, 2, 2), torch.tensor([0])))


@pytest.mark.parametrize("spec", slow_if(RESNET18, WITHOUT_BATCH_NORM), ids=str)
def test_per_example_gradients_average_to_the_mean_gradient(spec: object) -> None:
    model, batch = build(spec, "train"), draw()
    each = per_example_gradients(model, *tensors(model), batch)
    gradient, _ = mean_gradient(model, *tensors(model), batch)
    assert all(len(tensor) == RECORDS for tensor in each.values())
    assert distance({name: tensor.mean(0) for name, tensor in each.items()}, gradient) <= 1e-5


@pytest.mark.parametrize("spec", ["lenet", "resnet20"])
def test_nothing_is_changed(spec: object) -> None:
    model, batch = build(spec, "train"), draw()
    before, inputs, rng = copy.deepcopy(model.state_dict()), batch.inputs.clone(), torch.get_rng_state()
    recipe = LocalTraining(algorithm="fedavg")
    first = local_update(model, *tensors(model), [batch, batch], recipe)
    second = local_update(model, *tensors(model), [batch, batch], recipe)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(batch.inputs, inputs)
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(first[0].tensors[name], second[0].tensors[name]) for name in first[0].tensors)
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])


def test_fedsgd_uploads_the_gradient_of_one_batch() -> None:
    model, batch = build("linear", "train"), draw()
    update, _ = local_update(model, *tensors(model), [batch], LocalTraining())
    assert update.kind == "gradient"
    assert distance(update.tensors, mean_gradient(model, *tensors(model), batch)[0]) == 0
    with pytest.raises(ValueError, match="exactly 1 batch, got 2"):
        local_update(model, *tensors(model), [batch, batch], LocalTraining())


def test_one_plain_fedavg_step_is_the_scaled_gradient() -> None:
    model, batch = build("mlp", "train"), draw()
    update, _ = local_update(model, *tensors(model), [batch], LocalTraining(algorithm="fedavg", learning_rate=0.5))
    gradient, _ = mean_gradient(model, *tensors(model), batch)
    assert update.kind == "delta"
    assert distance(update.tensors, {name: -0.5 * tensor for name, tensor in gradient.items()}) <= 1e-5


@pytest.mark.parametrize(
    ("recipe", "sizes"),
    [
        (LocalTraining(batch_size=4), [4, 4, 2]),
        (LocalTraining(batch_size=4, epochs=2), [4, 4, 2, 4, 4, 2]),
        (LocalTraining(batch_size=4, epochs=2, steps=4), [4, 4, 2, 4]),
        (LocalTraining(batch_size=0, epochs=3), [10, 10, 10]),
        (LocalTraining(batch_size=64), [10]),
        (LocalTraining(batch_size=4, epochs=2, drop_last=True), [4, 4, 4, 4]),
        (LocalTraining(batch_size=4, steps=3, drop_last=True), [4, 4, 4]),
        (LocalTraining(batch_size=5, drop_last=True), [5, 5]),
        (LocalTraining(batch_size=64, drop_last=True), [10]),
    ],
    ids=str,
)
def test_batch_indices_walk_through_permutations(recipe: LocalTraining, sizes: list[int]) -> None:
    steps = batch_indices(10, recipe, stream(0, "batches"))
    assert [len(step) for step in steps] == sizes
    drawn = torch.cat(steps)
    used = recipe.steps_in_epoch(10) * recipe.size_of_batch(10) if recipe.drop_last else 10
    for start in range(0, len(drawn) - used + 1, used):
        assert len(set(drawn[start : start + used].tolist())) == used


def test_forward_derivatives_print_no_warning_of_torch() -> None:
    code = "import torch; from simulator import training; x = torch.ones(1); torch.func.jvp(torch.sin, (x,), (x,))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
