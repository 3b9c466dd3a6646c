"""Variables, priors and generators against references."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.fft import dctn, idctn

from attacks._matching.bases import Cosines, LowResolution
from attacks._matching.client import Trial
from attacks._matching.distances import angle
from attacks._matching.generators import Plan, decoded, entering, features_at, into_ball, into_l1_ball, learn
from attacks._matching.group import registered_mean, rolled, shift, straying
from attacks._matching.networks import UntrainedNetwork
from attacks._matching.objective import Objective, Setting
from attacks._matching.priors import Weighted
from attacks._matching.simulate import Victim, prepare
from attacks._matching.statistics import batch_moments, gap, head_features, moments, running_statistics, uploaded_statistics
from attacks._matching.variables import Variable
from attacks.update.deep_image_prior import DeepImagePrior
from attacks.update.gifd import GIFD
from attacks.update.grad_inversion import GradInversion
from simulator.rng import stream
from simulator.types import Batch, LocalTraining
from tests.attacks.victims import attack_surface, build, digits, records

SHAPE = (3, 12, 9)


def victim(shape: tuple[int, int, int] = SHAPE, count: int = 2) -> Victim:
    return prepare(*attack_surface(build("convnet", shape), [records(count, shape)]))


def trial(known: Victim, inputs: torch.Tensor) -> Trial:
    """A candidate as priors see it, after the client was simulated."""
    setting = Setting(distance=angle)
    empty = torch.empty(0)
    before = Trial(known, inputs, known.labels, empty, known.parameters, known.buffers, known.target, uploaded=known.uploaded)
    return replace(before, after=setting.client.simulate(before)[1])


def test_cosines_are_the_orthonormal_transform_of_scipy() -> None:
    known, variable = victim(), Cosines()
    start = variable.start(known, stream(0))
    pixels = torch.rand(2, *SHAPE, generator=stream(0), dtype=torch.float64).numpy()
    assert np.allclose(start.view(2, *SHAPE).numpy(), dctn(pixels, axes=(2, 3), norm="ortho"))
    assert np.allclose(variable.decode(start, known).numpy(), idctn(start.view(2, *SHAPE).numpy(), axes=(2, 3), norm="ortho"))


def test_a_share_of_the_cosines_is_the_image_without_its_high_frequencies() -> None:
    known, variable = victim(), Cosines(share=0.5)
    coefficients = np.zeros((2, *SHAPE))
    start = variable.start(known, stream(0))
    coefficients[:, :, :6, :4] = start.view(2, 3, 6, 4).numpy()
    assert np.allclose(variable.decode(start, known).numpy(), idctn(coefficients, axes=(2, 3), norm="ortho"))
    rates = Cosines(damping=8).rates(known)
    assert (float(rates.max()), float(rates.min())) == pytest.approx((1, 1 / 8))


def cubic(distance: np.ndarray, a: float = -0.75) -> np.ndarray:
    """The kernel of Keys, 1981, with PyTorch's a."""
    d = np.abs(distance)
    return np.where(d <= 1, (a + 2) * d**3 - (a + 3) * d**2 + 1, np.where(d < 2, a * (d**3 - 5 * d**2 + 8 * d - 4), 0))


def test_low_resolution_is_enlarged_by_cubic_convolution() -> None:
    known, variable = victim((1, 12, 12)), LowResolution(factor=4)
    start = 0.3 + 0.4 * variable.start(known, stream(0))
    small = np.pad(start.view(2, 1, 3, 3).numpy(), ((0, 0), (0, 0), (3, 3), (3, 3)), mode="edge")
    at = (np.arange(12) + 0.5) / 4 - 0.5
    weights = cubic(at[:, None] - np.arange(-3, 6)[None])
    assert np.allclose(variable.decode(start, known).numpy(), (weights @ small @ weights.T).clip(0, 1))


@pytest.mark.parametrize("variable", [LowResolution(4), Cosines(), UntrainedNetwork(8, 4, 2)])
def test_variables_run_batched_as_alone(variable: Variable) -> None:
    known = [prepare(*attack_surface(build("convnet", SHAPE), [records(2, SHAPE, seed)])) for seed in range(2)]
    model = known[0].model
    known = [replace(one, model=model) for one in known]
    both = Objective(known, Setting(distance=angle, variable=variable))
    z = both.start([stream(seed) for seed in range(2)])
    values = both(z, torch.arange(2))
    alone = Objective(known[1:], Setting(distance=angle, variable=variable))(z[1:], torch.arange(1))
    assert values.total[1] == pytest.approx(float(alone.total[0]), rel=1e-4)
    assert (values.gradient[1] - alone.gradient[0]).norm() < 1e-3 * alone.gradient[0].norm()


def test_l1_ball_is_the_nearest_point() -> None:
    rows = torch.randn(5, 40, generator=stream(0), dtype=torch.float64)
    inside = into_l1_ball(rows, 4.0)
    assert torch.allclose(inside.abs().sum(1), torch.full((5,), 4.0, dtype=torch.float64))
    for row, found in zip(rows, inside, strict=True):
        low, high = 0.0, float(row.abs().max())
        for _ in range(60):  # the nearest point is a soft threshold: find it by bisection
            middle = (low + high) / 2
            low, high = (middle, high) if float((row.abs() - middle).clamp(min=0).sum()) > 4 else (low, middle)
        assert torch.allclose(found, row.sign() * (row.abs() - low).clamp(min=0))
    small = 0.01 * rows
    assert torch.equal(into_l1_ball(small, 4.0), small)


def test_decoder_may_be_entered_at_any_block_and_treats_records_apart() -> None:
    plan = Plan(4, (8, 6, 5), (3, 10, 12))
    layers = plan.layers(plan.drawn(stream(0)))
    codes = torch.randn(3, 4, generator=stream(1), dtype=torch.float64)
    whole = decoded(plan, layers, entering(plan, layers, codes))
    assert whole.shape == (3, 3, 10, 12)
    middle = features_at(layers, entering(plan, layers, codes), 1)
    assert torch.allclose(decoded(plan, layers, middle, first=1), whole)
    assert torch.allclose(decoded(plan, layers, entering(plan, layers, codes[1:2])), whole[1:2])


@pytest.mark.slow
def test_generator_learns_its_public_records_and_repeats_itself() -> None:
    data, plan = digits(60, (1, 16, 16)).inputs, Plan(16, (16, 16, 16), (1, 16, 16))
    one, same = (learn(plan, data, seconds=0.5, rng=stream(0)) for _ in range(2))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(one, same, strict=True))
    codes = torch.zeros(60, 16, requires_grad=True)
    optimizer = torch.optim.Adam([codes], lr=0.05)
    for _ in range(60):
        error = (decoded(plan, one, entering(plan, one, into_ball(codes))) - data).square().mean()
        optimizer.zero_grad()
        error.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert float(error.detach()) < 0.5 * float((data.mean(0) - data).square().mean())


def test_registration_finds_a_shift_and_the_mean_of_shifted_copies_stays_sharp() -> None:
    image = digits(1, (3, 16, 16)).inputs
    moved = rolled(image, torch.tensor([2.0]), torch.tensor([-3.0]))
    down, right = shift(moved.mean(1), image.mean(1))
    assert (float(down), float(right)) == (-2, 3)
    group = torch.stack([image, image, rolled(image, torch.tensor([1.0]), torch.tensor([0.0]))])
    assert (registered_mean(group) - image).norm() < 0.2 * (group.mean(0) - image).norm()


def test_group_term_is_zero_where_all_restarts_agree() -> None:
    known = victim((1, 16, 16), 1)
    inputs = torch.rand(1, 1, 16, 16, generator=stream(0))
    same = registered_mean(torch.stack([inputs, inputs, inputs]))
    assert float(straying(replace(trial(known, inputs), consensus=same))) < 1e-12
    assert float(straying(trial(known, inputs))) == 0
    far = replace(trial(known, inputs), consensus=inputs + 0.5)
    assert float(straying(far)) == pytest.approx(0.25)


def resnet(count: int, recipe: LocalTraining | None = None) -> tuple[Victim, Batch]:
    model = build("resnet20", (3, 8, 8), width=4)
    model.train()
    batch = records(count, (3, 8, 8))
    return prepare(*attack_surface(model, [batch], recipe)), batch


def test_uploaded_buffers_reveal_the_statistics_of_the_batch_at_every_layer() -> None:
    known, batch = resnet(4)
    found = batch_moments(known.model, known.buffers, known.uploaded)
    inputs: dict[str, torch.Tensor] = {}
    names = {layer: name for name, layer in known.model.named_modules()}
    hooks = [
        layer.register_forward_pre_hook(lambda layer, args: inputs.__setitem__(names[layer], args[0].detach()))
        for layer in known.model.modules()
        if isinstance(layer, torch.nn.BatchNorm2d)
    ]
    torch.func.functional_call(known.model, ({k: v.clone() for k, v in {**known.parameters, **known.buffers}.items()}), (batch.inputs,))
    for hook in hooks:
        hook.remove()
    assert len(found) == len(inputs) == 19
    for name, (mean, var) in found.items():
        true_mean, true_var = moments(inputs[name])
        assert (mean - true_mean).abs().max() < 1e-5 * (1 + true_mean.abs().max())
        assert (var - true_var).abs().max() < 1e-5 * (1 + true_var.max())


def test_statistics_vanish_at_the_truth_alone() -> None:
    known, batch = resnet(4)
    assert float(uploaded_statistics(trial(known, batch.inputs))) < 1e-9
    assert float(uploaded_statistics(trial(known, 1 - batch.inputs))) > 1e-3
    steps = LocalTraining(algorithm="fedavg", batch_size=4, epochs=3, learning_rate=0.1)
    known, batch = resnet(4, steps)
    assert float(uploaded_statistics(trial(known, batch.inputs))) < 1e-8, "the counters of simulated steps are read, too"
    assert float(uploaded_statistics(trial(known, 1 - batch.inputs))) > 1e-3


def test_running_statistics_are_compared_with_what_enters_each_layer() -> None:
    known, batch = resnet(4)
    found = batch_moments(known.model, known.buffers, known.uploaded)
    buffers = dict(known.buffers)
    for name, (mean, var) in found.items():
        buffers |= {f"{name}.running_mean": mean, f"{name}.running_var": var}
    taught = replace(trial(known, batch.inputs), buffers=buffers)
    assert float(running_statistics(taught)) < 1e-8
    assert float(running_statistics(trial(known, batch.inputs))) > 1e-3


def test_gap_is_free_of_scale() -> None:
    one, other = (torch.rand(5, generator=stream(0)), torch.rand(5, generator=stream(1))), (torch.ones(5), 2 * torch.ones(5))
    wide = [{"a": (100 * mean, 100**2 * var)} for mean, var in (one, other)]
    assert float(gap({"a": one}, {"a": other})) == pytest.approx(float(gap(*wide)), rel=1e-4)


def test_head_features_of_one_record_are_exact() -> None:
    model = build("convnet", (3, 8, 8))
    batch = records(1, (3, 8, 8))
    known = prepare(*attack_surface(model, [batch]))
    assert float(head_features(trial(known, batch.inputs))) < 1e-9
    assert float(head_features(trial(known, 1 - batch.inputs))) > 1e-2


def test_priors_of_batch_norm_run_batched_as_alone() -> None:
    known, _ = resnet(2)
    priors = (Weighted(uploaded_statistics, 1.0), Weighted(running_statistics, 1.0), Weighted(head_features, 1.0))
    setting = Setting(distance=angle, priors=priors)
    z = torch.rand(2, 2 * 3 * 64, generator=stream(0))
    both = Objective([known, known], setting)(z, torch.arange(2))
    alone = Objective([known], setting)(z[1:], torch.arange(1))
    assert float(both.total[1]) == pytest.approx(float(alone.total[0]), rel=1e-3)
    assert (both.gradient[1] - alone.gradient[0]).norm() < 1e-2 * alone.gradient[0].norm()


@pytest.mark.parametrize("attack", [GradInversion(steps=4, noise=0.2, restarts=3), DeepImagePrior(steps=4, restarts=2)])
def test_attacks_repeat_themselves_alone_and_together(attack: GradInversion | DeepImagePrior) -> None:
    pairs = [attack_surface(build("convnet", (1, 8, 8)), [records(1, (1, 8, 8), seed)]) for seed in range(2)]
    model = pairs[0][1].model
    views, knowledge = [view for view, _ in pairs], [replace(known, model=model) for _, known in pairs]
    together = attack.many(views, knowledge, rngs=[stream(seed) for seed in range(2)])
    for seed, guess in enumerate(together):
        alone = attack(views[seed], knowledge[seed], rng=stream(seed))
        assert guess.inputs is not None
        assert alone.inputs is not None
        assert torch.allclose(guess.inputs, alone.inputs, atol=1e-3)


def test_gifd_needs_public_records_and_uses_them() -> None:
    data = digits(41, (1, 16, 16))
    view, known = attack_surface(build("convnet", (1, 16, 16)), [Batch(data.inputs[40:], data.labels[40:])])
    attack = GIFD(learning_seconds=0.2, latent_steps=20, feature_steps=4, pixel_steps=10)
    assert "public records" in str(attack.supports(view, known))
    few = replace(known, public=Batch(data.inputs[:3], data.labels[:3]))
    assert "got 3" in str(attack.supports(view, few))
    known = replace(known, public=Batch(data.inputs[:40], data.labels[:40]))
    assert attack.supports(view, known) is None
    guess, again = (attack(view, known, rng=stream(0)) for _ in range(2))
    assert guess.inputs is not None
    assert again.inputs is not None
    assert torch.equal(guess.inputs, again.inputs)
    assert guess.inputs.shape == (1, 1, 16, 16)
    assert float((guess.inputs - data.inputs[40:]).square().mean()) < float((data.inputs[:40].mean(0) - data.inputs[40:]).square().mean())
