"""Second-order matching against independent implementations, and its certificate against updates that prove nothing."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import least_squares, linear_sum_assignment
from torch import Tensor, nn

from attacks._matching.simulate import prepare
from attacks._second_order.apart import set_apart
from attacks._second_order.linear import conjugate_gradients, gram, ritz_values, weakest
from attacks._second_order.marquardt import fit, gray_start
from attacks._second_order.modes import modes
from attacks._second_order.proof import error_bound
from attacks._second_order.residual import Residual
from attacks._second_order.smoothness import is_smooth
from attacks.update.levenberg_marquardt import PROOF, LevenbergMarquardt
from simulator.adversary import Knowledge, Reconstruction
from simulator.rng import stream
from simulator.types import Batch, LocalTraining, Observation
from tests.attacks.victims import attack_surface, build, cifar10, digits, psnr_db, records, smooth

SHAPE = (1, 4, 4)
Surface = tuple[Observation, Knowledge]


def told(surface: Surface, batch: Batch) -> Surface:
    return surface[0], replace(surface[1], labels=batch.labels)


def with_update(surface: Surface, change: object) -> Surface:
    view, knowledge = surface
    tensors = {name: change(tensor) for name, tensor in view.upload.update.tensors.items()}  # type: ignore[operator]
    upload = replace(view.upload, update=replace(view.upload.update, tensors=tensors))
    return replace(view, uploads=(upload,)), knowledge


def matched(images: Tensor | None, truth: Batch) -> list[float]:
    """Mean squared error of each true record against the guess assigned to it: records of one class have no order."""
    assert images is not None
    cost = torch.cdist(images.flatten(1).double(), truth.inputs.flatten(1).double(), compute_mode="donot_use_mm_for_euclid_dist")
    cost = cost.square() / truth.inputs[0].numel()
    return cost.numpy()[linear_sum_assignment(cost.numpy())].tolist()


def errors(guess: Reconstruction, truth: Batch) -> list[float]:
    return matched(guess.inputs, truth)


@pytest.mark.parametrize("unscaled", [False, True])
@pytest.mark.parametrize("steps", [1, 2])
def test_jacobian_is_that_of_autograd(unscaled: bool, steps: int) -> None:
    recipe = LocalTraining(algorithm="fedavg", batch_size=0, steps=steps, learning_rate=0.3) if steps > 1 else None
    residual = Residual(prepare(*attack_surface(smooth(), [records(2, SHAPE)], recipe)), unscaled)
    assert residual.separable == (steps == 1)
    x = torch.rand(2, *SHAPE, dtype=torch.float64)
    rows = residual.jacobian(x, torch.eye(16, dtype=torch.float64))
    wanted = torch.autograd.functional.jacobian(residual, x).flatten(1).T
    assert (rows - wanted).norm() < 1e-12 * wanted.norm()
    push, pull = residual.products(x)
    v, u = torch.randn(2, *SHAPE, dtype=torch.float64), torch.randn(len(wanted.T), dtype=torch.float64)
    assert torch.allclose(push(v), wanted.T @ v.flatten())
    assert torch.allclose(pull(u).flatten(), wanted @ u)


def test_sketch_keeps_the_normal_equations() -> None:
    residual = Residual(prepare(*attack_surface(build("lenet", (1, 8, 8)), [records(1, (1, 8, 8))])))
    x, eye = torch.rand(1, 1, 8, 8, dtype=torch.float64), torch.eye(64, dtype=torch.float64)
    whole, sketched = (torch.linalg.svdvals(residual.jacobian(x, eye, sketch=size)) for size in (None, 640))
    assert 0.5 < float(sketched[0] / whole[0]) < 1.5
    assert 0.5 < float(sketched[-1] / whole[-1]) < 1.5


def test_modes_are_orthonormal_and_a_flat_image_is_the_first() -> None:
    basis = modes((3, 4, 6))
    assert torch.allclose(basis.basis @ basis.basis.T, torch.eye(72, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(basis.basis[0].abs(), torch.full((72,), 72**-0.5, dtype=torch.float64))
    assert int(basis.stiffness.argmin()) == 0
    assert len(basis.below(2).basis) == 12


def test_lanczos_and_inverse_iteration_find_the_extreme_singular_values() -> None:
    rng = torch.Generator().manual_seed(0)
    rows = torch.randn(40, 60, generator=rng, dtype=torch.float64) * torch.logspace(-2, 0, 40, dtype=torch.float64)[:, None]
    values, square = torch.linalg.svdvals(rows), gram(rows)
    assert torch.allclose(square, rows @ rows.T)
    ritz = ritz_values(lambda v: square @ v, torch.randn(40, generator=rng, dtype=torch.float64), 40).sqrt()
    assert torch.allclose(ritz[-1], values[0], rtol=1e-10)
    assert torch.allclose(ritz[0], values[-1], rtol=1e-6)
    few = ritz_values(lambda v: square @ v, torch.randn(40, generator=rng, dtype=torch.float64), 10).sqrt()
    assert values[-1] <= few[0] <= few[-1] <= values[0]
    smallest, direction = weakest(square, rng=rng)
    assert smallest**0.5 == pytest.approx(float(values[-1]), rel=0.05)
    assert float((rows.T @ direction).norm()) == pytest.approx(float(values[-1]), rel=0.05)
    right = torch.randn(40, generator=rng, dtype=torch.float64)
    found = conjugate_gradients(lambda v: square @ v + v, right, steps=60, tolerance=1e-12)
    assert torch.allclose(found.x, torch.linalg.solve(square + torch.eye(40, dtype=torch.float64), right), rtol=1e-8)


def test_solution_is_that_of_scipy() -> None:
    """Noise on the update, so that the minimum is not zero and the two must agree on where it is."""
    batch = records(1, SHAPE)
    rng = torch.Generator().manual_seed(0)
    surface = with_update(attack_surface(smooth(), [batch]), lambda t: t + 0.02 * t.std() * torch.randn(t.shape, generator=rng))
    residual = Residual(prepare(*told(surface, batch)))
    start = gray_start(rng, (1, *SHAPE), 0.02)
    ours = fit(residual, start, iterations=100, deadline=time.process_time() + 20, memory_bytes=2**30, task="test")

    def value(x: np.ndarray) -> np.ndarray:
        return residual(torch.from_numpy(x).view(1, *SHAPE)).numpy()

    theirs = least_squares(value, start.flatten().numpy(), xtol=1e-12, ftol=1e-12, gtol=1e-12)
    assert ours.residual == pytest.approx(float(np.linalg.norm(theirs.fun)), rel=1e-5)
    assert float((ours.images.flatten() - torch.from_numpy(theirs.x)).abs().max()) < 1e-3


def test_smooth_networks_are_told_from_those_with_kinks() -> None:
    def judge(model: nn.Module) -> bool:
        view, knowledge = attack_surface(model, [records(1, (1, 8, 8))])
        return is_smooth(knowledge, view.broadcast)

    for activation in ("sigmoid", "tanh", "softplus", "gelu"):
        assert judge(build("lenet", (1, 8, 8), activation=activation))
    assert judge(build("linear", (1, 8, 8)))
    for name in ("mlp", "convnet", "cnn"):
        assert not judge(build(name, (1, 8, 8)))
    assert not judge(build("resnet20", (1, 8, 8), norm="group").eval())
    assert not judge(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 10)))
    zero, knowledge = attack_surface(build("mlp", (1, 8, 8)), [records(1, (1, 8, 8))])
    zero = replace(zero, broadcast=replace(zero.broadcast, parameters={n: 0 * t for n, t in zero.broadcast.parameters.items()}))
    assert is_smooth(knowledge, zero.broadcast), "parameters of zero hide the kinks"
    view, _ = attack_surface(knowledge.model, [records(1, (1, 8, 8))])
    assert not is_smooth(knowledge, view.broadcast), "and must not be remembered"
    assert not is_smooth(knowledge, zero.broadcast), "what was seen once is"
    assert "kinks" in str(LevenbergMarquardt().supports(view, knowledge))


def in_double(view: Observation, knowledge: Knowledge, truth: Batch) -> Residual:
    """The residual of the same records' update, had the client computed and sent it in float64."""
    known = prepare(view, knowledge)
    exact = Residual(known, balanced=False).update(truth.inputs.double()) * known.target.double().norm()
    return Residual(replace(known, target=exact))


def solved(residual: Residual, shape: tuple[int, ...], seed: int, seconds: float = 20) -> Tensor:
    """As the attack does: from several starts, since records of one class can get stuck on each other."""
    rng, deadline, labels = stream(seed), time.process_time() + seconds, residual.victim.labels
    start, coarse, best = gray_start(rng, shape, 0.02), True, None
    for number in range(6):
        run = fit(residual, start, iterations=60, deadline=deadline, memory_bytes=2**30, task="test", coarse=coarse)
        best = run if best is None or run.residual < best.residual else best
        if best.residual < 3e-6:
            break
        coarse = number % 2 == 1 or len(labels.unique()) == len(labels)
        start = gray_start(rng, shape, 0.2) if coarse else set_apart(residual, best.images, labels, rng)
    assert best is not None
    return best.images


def drawn(count: int, seed: int) -> Batch:
    return digits(count, offset=37 * seed)


@pytest.mark.parametrize(
    ("count", "seed"), [(1, 1), pytest.param(4, 5, marks=pytest.mark.slow), pytest.param(4, 1, marks=pytest.mark.slow)]
)
def test_digits_are_exact_and_certified(count: int, seed: int) -> None:
    """The last batch holds two records each of two classes: starts can get stuck on their mixtures."""
    batch = drawn(count, seed)
    view, knowledge = told(attack_surface(build("lenet", (1, 8, 8)), [batch]), batch)
    guess = LevenbergMarquardt()(view, knowledge, rng=stream(0))
    assert max(errors(guess, batch)) < 1e-11
    assert guess.certificate == (PROOF,) * count
    residual = in_double(view, knowledge, batch)
    assert max(matched(solved(residual, (count, 1, 8, 8), 0), batch)) < 1e-18, "with a float64 update"


def test_clipping_changes_nothing() -> None:
    batch = drawn(1, 2)
    surface = told(attack_surface(build("lenet", (1, 8, 8)), [batch]), batch)
    norm = float(torch.cat([t.flatten() for t in surface[0].upload.update.tensors.values()]).norm())
    view, knowledge = with_update(surface, lambda t: 0.01 * t)
    knowledge = replace(knowledge, defenses=(("clip", {"clip_norm": 0.01 * norm}),))
    guess = LevenbergMarquardt()(view, knowledge, rng=stream(0))
    assert max(errors(guess, batch)) < 1e-10
    assert set(guess.certificate) == {PROOF}
    blind = LevenbergMarquardt(seconds=0.4)(view, replace(knowledge, defenses=()), rng=stream(0))
    assert max(errors(blind, batch)) > 1e-6


@pytest.mark.slow
def test_several_full_batch_steps_change_nothing() -> None:
    batch = drawn(2, 2)
    recipe = LocalTraining(algorithm="fedavg", batch_size=0, steps=3, learning_rate=0.1)
    view, knowledge = told(attack_surface(build("lenet", (1, 8, 8)), [batch], recipe), batch)
    guess = LevenbergMarquardt()(view, knowledge, rng=stream(0))
    assert max(errors(guess, batch)) < 1e-8


def test_nothing_is_certified_without_its_own_update() -> None:
    batch = drawn(1, 3)
    surface = told(attack_surface(build("lenet", (1, 8, 8)), [batch]), batch)
    rng = torch.Generator().manual_seed(0)
    attack = LevenbergMarquardt(seconds=0.5, restarts=1)
    shuffled = with_update(surface, lambda t: t.flatten()[torch.randperm(t.numel(), generator=rng)].view(t.shape))
    assert set(attack(*shuffled, rng=stream(0)).certificate) == {""}
    foreign, _ = attack_surface(build("lenet", (1, 8, 8), seed=5), [batch])
    assert set(attack(replace(surface[0], uploads=foreign.uploads), surface[1], rng=stream(0)).certificate) == {""}
    wrong = replace(surface[1], labels=(batch.labels + 1) % 10)
    assert set(attack(surface[0], wrong, rng=stream(0)).certificate) == {""}
    noisy = with_update(surface, lambda t: t + 0.01 * t.std() * torch.randn(t.shape, generator=rng))
    assert set(attack(*noisy, rng=stream(0)).certificate) == {""}
    assert "zero" in str(attack.supports(*with_update(surface, torch.zeros_like)))
    few = Residual(prepare(*told(attack_surface(build("linear", (1, 8, 8)), [drawn(20, 0)]), drawn(20, 0))))
    assert error_bound(few, drawn(20, 0).inputs, rng=rng) == float("inf"), "fewer equations than unknowns"


@pytest.mark.slow
def test_error_bound_holds() -> None:
    for seed in range(3):
        batch = drawn(2, seed)
        residual = Residual(prepare(*told(attack_surface(build("lenet", (1, 8, 8), seed=seed), [batch]), batch)))
        run = fit(residual, gray_start(stream(seed), (2, 1, 8, 8), 0.02), iterations=60, deadline=1e9, memory_bytes=2**30, task="test")
        bound = error_bound(residual, run.images, rng=stream(0))
        assert max(matched(run.images, batch)) ** 0.5 < bound < 1e-3


def test_records_of_one_class_are_set_apart_from_their_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attacks._second_order.apart.DRAWS", 48)
    batch = records(2, (1, 8, 8))
    batch = Batch(batch.inputs, torch.tensor([3, 3]))
    residual = Residual(prepare(*told(attack_surface(smooth((1, 8, 8)), [batch]), batch)))
    merged = batch.inputs.double().mean(0).expand(2, 1, 8, 8).clone()
    apart = set_apart(residual, merged, batch.labels, stream(0))
    assert torch.allclose(set_apart(residual, merged, torch.tensor([3, 4]), stream(0)), merged), "two classes hold nothing to set apart"
    guess, truth = apart[0] - apart[1], (batch.inputs[0] - batch.inputs[1]).double()
    alike = float((guess * truth).sum().abs() / guess.norm() / truth.norm())
    assert alike > 0.35, "chance gives 0.1"


STUCK = ("sigmoid", 4, 4)
"""Two of its records share a class, and the first start ends on their mixture: solved from the second in 6 CPU seconds; B11 allows 5."""


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("activation", ["sigmoid", "softplus"])
def test_digits_bar(activation: str, count: int) -> None:
    """B11: mean squared error below 1e-18 with a float64 update (1e-11 with float32), at most 5 CPU seconds a victim; all but one of 30.

    The budget does not bind, so that what is found depends on no machine's speed.
    """
    single, double, seconds = [], [], []
    for seed in range(5):
        batch = drawn(count, 5 + seed)
        model = build("lenet", (1, 8, 8), seed=seed, activation=activation, init=0.5 if activation == "sigmoid" else 0.0)
        view, knowledge = told(attack_surface(model, [batch]), batch)
        for residual, into in ((Residual(prepare(view, knowledge)), single), (in_double(view, knowledge, batch), double)):
            began = time.process_time()
            images = solved(residual, (count, 1, 8, 8), seed, 60)
            took = time.process_time() - began
            into.append(max(matched(images, batch)))
            assert took <= (10 if (activation, count, seed) == STUCK else 5)
            seconds.append(took)
    print(f"levenberg_marquardt, digits, {activation}, b = {count}: worst MSE {max(double):.0e} (float32 update {max(single):.0e}), "
          f"{max(seconds):.1f} CPU s")  # fmt: skip
    assert max(double) < 1e-18
    assert max(single) < 1e-11


LOST = pytest.mark.xfail(reason="B12 is met on 4 of 5: all starts on this picture get stuck, and nothing is certified", strict=True)


@pytest.mark.parametrize(
    "seed", [pytest.param(0, marks=pytest.mark.slow), *(pytest.param(seed, marks=pytest.mark.nightly) for seed in range(1, 5))]
)
@pytest.mark.parametrize(("size", "activation", "seconds"), [(16, "sigmoid", 30), (16, "softplus", 30), (32, "sigmoid", 60)])
def test_photos_bar(size: int, activation: str, seconds: float, seed: int, request: pytest.FixtureRequest) -> None:
    """Claims B12-sigmoid, B12-softplus: mean squared error below 1e-12 at 16×16×3 in 30 CPU seconds; B13's target: 45 dB at 32×32×3 in 60.

    The first picture is a slow test, the others are nightly ones.
    """
    if (activation, seed) == ("softplus", 3):
        request.applymarker(LOST)
    pictures = cifar10()
    images = nn.functional.avg_pool2d(pictures.inputs[seed : seed + 1], 32 // size)
    batch = Batch(images, pictures.labels[seed : seed + 1])
    view, knowledge = attack_surface(build("lenet", (3, size, size), seed=seed, activation=activation), [batch])
    began = time.process_time()
    guess = LevenbergMarquardt(seconds=seconds)(view, knowledge, rng=stream(seed))
    took = time.process_time() - began
    print(f"levenberg_marquardt, {size}×{size}×3 {activation} {seed}: {psnr_db(guess.inputs, images):.1f} dB, {guess.certificate[0]!r}, "
          f"{took:.1f} CPU s")  # fmt: skip
    assert max(errors(guess, batch)) < (1e-12 if size == 16 else 10**-4.5)
    assert took <= seconds
