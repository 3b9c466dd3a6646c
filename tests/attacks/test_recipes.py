"""Updates as real clients send them: what can be divided out of them, what is refused, and what the simulated client gains."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from attacks._gradient import (
    contradiction,
    keeps_sizes,
    maybe_clipped,
    mean_gradient,
    norm,
    reach,
    several_steps,
    smoothed,
    unsmoothed,
    unusable,
)
from attacks._labels.embeddings import Head, embedding_counts
from attacks._matching.simulate import assumed_order
from attacks.update.fedavg_matching import FedAvgMatching
from attacks.update.linear_leak import LinearLeak
from simulator import lookup, training
from simulator.adversary import Attack, Knowledge
from simulator.rng import stream
from simulator.training import rounded
from simulator.types import LocalTraining, Observation
from tests.attacks.test_conformance import fast
from tests.attacks.victims import attack_surface, digits, psnr_db, records, smooth

SHAPE = (1, 4, 4)
ONE_STEP = LocalTraining(algorithm="fedavg", batch_size=0)
Surface = tuple[Observation, Knowledge]


def true_gradient(view: Observation, knowledge: Knowledge, inputs: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    batch = training.Batch(inputs, labels)
    smoothing = knowledge.training.label_smoothing
    gradient, _ = training.mean_gradient(knowledge.model, view.broadcast.parameters, {}, batch, label_smoothing=smoothing)
    return dict(gradient)


def relative(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    return norm({name: got[name] - wanted[name] for name in wanted}) / norm(wanted)


def in_half(surface: Surface, dtype: str) -> Surface:
    view, knowledge = surface
    recipe = replace(knowledge.training, upload_dtype=dtype)
    upload = replace(view.upload, update=rounded(view.upload.update, recipe))
    return Observation(replace(view.broadcast, training=recipe), (upload,)), replace(knowledge, training=recipe)


@pytest.fixture(scope="module", autouse=True)
def label_counts_once() -> Iterator[None]:
    """Where sizes are unknown, label recovery tries 81 scales: once an update here, and not once for each attack on it."""
    answers: dict[tuple[object, ...], Any] = {}

    def remembered(weight: torch.Tensor, bias: torch.Tensor, head: Head, records: int, recipe: LocalTraining) -> Any:
        key = (*(tensor.detach().numpy().tobytes() for tensor in (weight, bias, *head)), records, recipe)
        if key not in answers:
            answers[key] = embedding_counts(weight, bias, head, records, recipe)
        return tuple(tensor.clone() for tensor in answers[key])

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("attacks.update.labels.embedding_counts", remembered)
        yield


# --- the gradient behind a delta ---


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"momentum": 0.9, "weight_decay": 0.1},
        {"proximal": 3.0, "label_smoothing": 0.2},
        {"max_grad_norm": 1e3},
        {"optimizer": "adam", "adam_eps": 10.0, "weight_decay": 0.1},
    ],
    ids=str,
)
def test_gradient_of_one_step_is_divided_out(settings: dict[str, object]) -> None:
    recipe = replace(ONE_STEP, **settings)  # type: ignore[arg-type]
    batch = records(3, SHAPE)
    view, knowledge = attack_surface(smooth(), [batch], recipe)
    assert relative(mean_gradient(view, knowledge), true_gradient(view, knowledge, batch.inputs, batch.labels)) < 1e-5


@pytest.mark.parametrize("settings", [{}, {"momentum": 0.5}, {"momentum": 0.9, "weight_decay": 0.2}, {"proximal": 2.0, "momentum": 0.3}])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_reach_is_how_far_torch_goes_along_a_constant_gradient(settings: dict[str, float], steps: int) -> None:
    recipe = LocalTraining(algorithm="fedavg", learning_rate=0.1, **settings)  # type: ignore[arg-type]
    theta = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([theta], lr=0.1, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
    for _ in range(steps):
        optimizer.zero_grad()
        (theta + recipe.proximal / 2 * theta.square()).backward()
        optimizer.step()
    assert reach(recipe, steps) == pytest.approx(-float(theta.detach()), rel=1e-12)


def test_one_step_of_adam_keeps_signs_and_small_sizes() -> None:
    batch = records(1, SHAPE)
    view, knowledge = attack_surface(smooth(), [batch], replace(ONE_STEP, optimizer="adam", learning_rate=0.01))
    got, wanted = mean_gradient(view, knowledge), true_gradient(view, knowledge, batch.inputs, batch.labels)
    flat, true = (torch.cat([tensors[name].flatten() for name in wanted]) for tensors in (got, wanted))
    clear = true.abs() > 1e-6
    assert torch.equal(flat[clear].sign(), true[clear].sign())
    assert not keeps_sizes(view, knowledge)
    assert maybe_clipped(view, knowledge)
    assert "keeps signs only" in (several_steps(view, knowledge) or "")
    assert "keeps signs only" in (LinearLeak().supports(view, knowledge) or "")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_gradient_of_a_half_precision_delta_is_float32(dtype: str) -> None:
    batch = records(3, SHAPE)
    view, knowledge = in_half(attack_surface(smooth(), [batch], replace(ONE_STEP, momentum=0.9)), dtype)
    got = mean_gradient(view, knowledge)
    assert all(tensor.dtype == torch.float32 for tensor in got.values())
    assert relative(got, true_gradient(view, knowledge, batch.inputs, batch.labels)) < {"float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype]


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_label_counts_under_smoothing_solve_the_bias_equation(smoothing: float) -> None:
    batch = records(6, SHAPE)
    model, recipe = smooth(), LocalTraining(batch_size=0, label_smoothing=smoothing)
    view, _ = attack_surface(model, [batch], recipe)
    softmax = F.softmax(model(batch.inputs), 1).mean(0)
    shares = torch.bincount(batch.labels, minlength=10) / 6
    bias = view.upload.update.tensors["3.bias"]
    assert torch.allclose(bias, (softmax - smoothed(shares, recipe)).detach(), atol=1e-6)
    assert torch.allclose(unsmoothed(softmax - bias, recipe), shares, atol=1e-5)


# --- clipping of the client's own ---


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("settings", [{}, {"weight_decay": 0.3, "momentum": 0.9}], ids=str)
def test_a_clipped_step_is_never_taken_for_an_unclipped_one(settings: dict[str, float], dtype: str) -> None:
    batch = records(1, SHAPE)
    recipe = replace(ONE_STEP, **settings)  # type: ignore[arg-type]
    view, knowledge = attack_surface(smooth(), [batch], recipe)
    size = norm(true_gradient(view, knowledge, batch.inputs, batch.labels))
    for factor in (1.1, 1.01, 1.0001):  # the gradient is so much longer than the limit
        clipped = attack_surface(smooth(), [batch], replace(recipe, max_grad_norm=size / factor))
        assert maybe_clipped(*in_half(clipped, dtype))
    for factor in (0.9, 0.1):
        whole = attack_surface(smooth(), [batch], replace(recipe, max_grad_norm=size / factor))
        assert not maybe_clipped(*in_half(whole, dtype))
    tiny = attack_surface(smooth(), [batch], replace(recipe, max_grad_norm=1e-5))  # where the 1e-6 of clip_grad_norm_ is felt
    assert maybe_clipped(*tiny)


def test_several_clipped_steps_and_aggregates_tell_nothing() -> None:
    two = attack_surface(smooth(), [records(2, SHAPE)], LocalTraining(algorithm="fedavg", batch_size=1, max_grad_norm=1e3))
    both = attack_surface(smooth(), [records(1, SHAPE, seed) for seed in (1, 2)], replace(ONE_STEP, max_grad_norm=1e3))
    assert maybe_clipped(*two)
    assert maybe_clipped(*both)
    assert not maybe_clipped(*attack_surface(smooth(), [records(2, SHAPE)], LocalTraining(algorithm="fedavg", batch_size=1)))


@pytest.mark.parametrize("settings", [{"max_grad_norm": 0.05}, {"proximal": 2.0}, {"label_smoothing": 0.2}, {"weight_decay": 0.1}], ids=str)
def test_one_record_is_exact_through_any_step_of_sgd(settings: dict[str, float]) -> None:
    batch = records(1, SHAPE)
    view, knowledge = attack_surface(smooth(), [batch], replace(ONE_STEP, **settings))  # type: ignore[arg-type]
    assert LinearLeak().supports(view, knowledge) is None
    guess = LinearLeak()(view, knowledge, rng=stream(0, "attack"))
    assert psnr_db(guess.inputs, batch.inputs) > 60
    assert guess.certificate == ("rank one",)


# --- what every attack does with them ---

REAL = {
    "adam": {"optimizer": "adam", "learning_rate": 0.01},
    "clipped": {"max_grad_norm": 0.1, "momentum": 0.9},
    "fedprox": {"proximal": 1.0},
    "smoothed": {"label_smoothing": 0.1},
    "dropped": {"batch_size": 2, "drop_last": True, "epochs": 2},
}


def quick(name: str) -> Attack:
    attack = fast(name)
    return replace(attack, seconds=0.2) if hasattr(attack, "seconds") else attack  # type: ignore[type-var]


@pytest.mark.parametrize(("case", "dtype"), [*((case, "float32") for case in REAL), ("fedprox", "float16"), ("fedprox", "bfloat16")])
@pytest.mark.parametrize("name", lookup.names("attacks"))
def test_every_attack_runs_or_says_why_not(name: str, case: str, dtype: str) -> None:
    settings = REAL[case]
    batch = records(2 if "batch_size" in settings else 3, SHAPE)
    view, knowledge = in_half(attack_surface(smooth(), [batch], replace(ONE_STEP, **settings)), dtype)  # type: ignore[arg-type]
    attack = quick(name)
    if (reason := attack.supports(view, knowledge)) is not None:
        assert len(reason) > 10
        return
    guess = attack(view, knowledge, rng=stream(0, "attack"))
    assert guess.labels.shape == (len(batch),)
    if guess.inputs is not None:
        assert torch.isfinite(guess.inputs).all()
        for proof, image in zip(guess.certificate, guess.inputs, strict=False):
            nearest = float((batch.inputs - image).flatten(1).square().mean(1).min())
            assert not proof or nearest < 1e-5, f"certified by {proof!r}, but wrong"


def test_dropped_batches_use_every_dummy() -> None:
    recipe = LocalTraining(algorithm="fedavg", batch_size=4, epochs=2, drop_last=True)
    assert assumed_order(8, recipe, 1) == ((0, 4), (4, 8), (0, 4), (4, 8))
    assert assumed_order(10, recipe, 1) == ((0, 4), (4, 8), (2, 6), (6, 10))
    assert assumed_order(3, recipe, 1) == ((0, 3), (0, 3))


# --- views that contradict themselves ---


@pytest.fixture(scope="module")
def surface() -> Surface:
    return attack_surface(smooth(), [records(3, SHAPE)], LocalTraining(batch_size=3))


def with_records(surface: Surface, count: int) -> Surface:
    view, knowledge = surface
    return replace(view, uploads=(replace(view.upload, num_examples=count),)), replace(knowledge, num_examples=count)


def test_what_is_consistent_is_usable(surface: Surface) -> None:
    assert unusable(*surface) is None
    assert unusable(*with_records(surface, 2)) is None, "a client may hold fewer records than batch_size"
    view, knowledge = surface
    zeros = {name: torch.zeros_like(tensor) for name, tensor in view.upload.update.tensors.items()}
    zeroed = replace(view, uploads=(replace(view.upload, update=replace(view.upload.update, tensors=zeros)),))
    assert unusable(zeroed, knowledge) is None, "a control that attacks must survive"


@pytest.mark.parametrize("count", [0, -1])
def test_no_examples_are_refused(surface: Surface, count: int) -> None:
    assert f"num_examples must be ≥ 1 for each of ≥ 1 senders, got {count}" in (unusable(*with_records(surface, count)) or "")


def test_numbers_that_contradict_each_other_are_refused(surface: Surface) -> None:
    view, knowledge = surface
    assert "num_examples must be ≤ 3: 1 senders with 1 batches of batch_size = 3, got 4" in (unusable(*with_records(surface, 4)) or "")
    assert "num_examples must be what the upload says, 3, got 2" in (unusable(view, replace(knowledge, num_examples=2)) or "")
    assert "labels must be of num_examples = 3 records, got 2" in (
        contradiction(view, replace(knowledge, labels=torch.tensor([0, 1]))) or ""
    )
    counts = torch.bincount(torch.tensor([0, 1]), minlength=10)
    assert "label_counts must be of num_examples = 3" in (contradiction(view, replace(knowledge, label_counts=counts)) or "")
    many = replace(view, uploads=(replace(view.upload, senders=frozenset(range(4))),))
    assert "got 3 for 4" in (unusable(many, knowledge) or "")
    steps = LocalTraining(algorithm="fedavg", batch_size=1, steps=2)
    assert "the update must be a delta with algorithm = 'fedavg', got a gradient" in (
        unusable(view, replace(knowledge, training=steps)) or ""
    )
    delta, told = attack_surface(smooth(), [records(3, SHAPE)], replace(steps, steps=3))
    assert unusable(delta, told) is None
    assert "num_examples must be ≤ 2: 1 senders with 2 batches" in (unusable(delta, replace(told, training=steps)) or "")


def test_another_models_update_is_refused(surface: Surface) -> None:
    view, knowledge = surface
    other, _ = attack_surface(smooth((1, 5, 5)), [records(3, (1, 5, 5))], LocalTraining(batch_size=3))
    assert "the broadcast must have the model's tensors, '1.weight' of shape (12, 16), got of shape (12, 25)" in (
        unusable(other, knowledge) or ""
    )
    mixed = replace(view, uploads=other.uploads)
    assert "the update must have the model's tensors, '1.weight'" in (unusable(mixed, knowledge) or "")
    tensors = dict(view.upload.update.tensors)
    del tensors["3.bias"]
    short = replace(view, uploads=(replace(view.upload, update=replace(view.upload.update, tensors=tensors)),))
    assert "'3.bias' of shape (10,), got none" in (unusable(short, knowledge) or "")
    long = replace(view, uploads=(replace(view.upload, update=replace(view.upload.update, tensors={**tensors, "x": torch.ones(1)})),))
    assert unusable(long, knowledge) is not None


@pytest.mark.parametrize("name", lookup.names("attacks"))
def test_every_attack_gives_the_reason(name: str, surface: Surface) -> None:
    view, knowledge = surface
    attack = fast(name)
    applies = attack.supports(view, knowledge) is None  # else another reason may come first
    for count in (0, -1, 4):
        reason = attack.supports(*with_records(surface, count))
        assert reason is not None
        assert "num_examples must be" in reason or not applies
    if name == "random_guess":
        return
    other, _ = attack_surface(smooth((1, 5, 5)), [records(3, (1, 5, 5))], LocalTraining(batch_size=3))
    for wrong in (other, replace(view, uploads=other.uploads)):
        reason = attack.supports(wrong, knowledge)
        assert reason is not None
        assert "the model's tensors" in reason or not applies


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "adam", "learning_rate": 0.01},
        {"proximal": 1.0, "max_grad_norm": 0.2, "learning_rate": 0.5, "momentum": 0.9},
        {"optimizer": "adam", "learning_rate": 0.01, "proximal": 1.0, "max_grad_norm": 0.5},
    ],
    ids=["adam", "clipped fedprox", "all"],
)
def test_simulating_the_clients_own_optimizer_beats_assuming_plain_sgd(settings: dict[str, object]) -> None:
    """Four steps over two digits; by 3.0, 3.0 and 9 dB."""
    batch = digits(2, offset=10)
    recipe = LocalTraining(algorithm="fedavg", batch_size=1, epochs=2, **settings)  # type: ignore[arg-type]
    view, knowledge = attack_surface(smooth((1, 8, 8)), [batch], recipe)
    told = replace(knowledge, labels=batch.labels)
    plain = LocalTraining(algorithm="fedavg", batch_size=1, epochs=2, learning_rate=recipe.learning_rate)
    attack, scores = FedAvgMatching(steps=60), []
    for known in (told, replace(told, training=plain)):
        inputs = attack(view, known, rng=stream(0, "a")).inputs
        assert inputs is not None
        scores.append(max(psnr_db(inputs, batch.inputs), psnr_db(inputs.flip(0), batch.inputs)))
    own, assumed = scores
    assert own > assumed + 2
