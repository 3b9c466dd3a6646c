"""The gradient-matching engine against independent implementations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.fft import idctn
from torch import Tensor, nn
from torch.nn import functional as F

from attacks._matching.batch import chunks
from attacks._matching.client import Trial
from attacks._matching.distances import DISTANCES
from attacks._matching.objective import Objective, Setting
from attacks._matching.priors import Weighted, rough, roughness, task, total_variation
from attacks._matching.simulate import Victim, assumed_order, prepare, simulate
from attacks._matching.solve import Matching
from attacks._matching.spectrum import Spectrum
from attacks._matching.variables import Pixels
from attacks.update.dlg import DLG
from attacks.update.dlg_paper import DLGPaper
from attacks.update.idlg import IDLG
from attacks.update.inverting_gradients import InvertingGradients
from simulator.adversary import Reconstruction
from simulator.rng import stream
from simulator.types import Batch, LocalTraining
from tests.attacks.victims import attack_surface, build, digits, psnr_db, records, smooth

SHAPE = (1, 4, 4)
FEDAVG = LocalTraining(algorithm="fedavg", batch_size=2, epochs=2, learning_rate=0.2, momentum=0.5, weight_decay=0.01)


def victim(model: nn.Module, count: int = 3, recipe: LocalTraining | None = None, seed: int = 0) -> Victim:
    return prepare(*attack_surface(model, [records(count, model_shape(model), seed)], recipe))


def objective_of(victims: list[Victim], restarts: int, distance: str, tv: float = 0.0, dtype: torch.dtype = torch.float32) -> Objective:
    return Objective(victims, Setting(distance=DISTANCES[distance], priors=(Weighted(rough, tv),), restarts=restarts, dtype=dtype))


def model_shape(model: nn.Module) -> tuple[int, int, int]:
    return SHAPE if isinstance(model[0], nn.Flatten) else (1, 8, 8)  # type: ignore[index]


def double_backward(model: nn.Module, x: Tensor, victim: Victim, distance: str, tv: float) -> tuple[Tensor, Tensor]:
    """Objective and gradient by plain autograd, as any textbook would write it."""
    x = x.clone().requires_grad_(True)
    gradient = torch.autograd.grad(F.cross_entropy(model(x), victim.labels), list(model.parameters()), create_graph=True)
    trial, target = torch.cat([g.flatten() for g in gradient]), victim.target.to(x.dtype)
    match = 1 - F.cosine_similarity(trial, target, dim=0)
    if distance == "angle":
        match = (2 * match).sqrt()
    if distance == "l2":
        match = (F.normalize(trial, dim=0) - F.normalize(target, dim=0)).square().sum()
    value = match + tv * ((x[..., 1:] - x[..., :-1]).abs().mean() + (x[..., 1:, :] - x[..., :-1, :]).abs().mean())
    return value.detach(), torch.autograd.grad(value, x)[0]


@pytest.mark.parametrize("distance", ["angle", "cosine", "l2"])
@pytest.mark.parametrize("shared", [True, False], ids=["one broadcast", "many broadcasts"])
def test_objective_equals_double_backward(distance: str, shared: bool) -> None:
    models = [build("lenet", (1, 8, 8), seed=0 if shared else seed) for seed in range(3)]
    victims = [prepare(*attack_surface(model, [records(2, (1, 8, 8), seed)])) for seed, model in enumerate(models)]
    victims = [Victim(**{**vars(v), "model": models[0]}) for v in victims]
    x = torch.rand(6, 2, 1, 8, 8, dtype=torch.float64)
    objective = objective_of(victims, 2, distance, 0.01, torch.float64)
    assert objective.shared == shared
    values, _, gradients = objective(x.flatten(1), torch.arange(6))
    gradients = gradients.view_as(x)
    for row in range(6):
        value, gradient = double_backward(models[row // 2].double(), x[row], victims[row // 2], distance, 0.01)
        assert torch.allclose(values[row], value, rtol=1e-5)
        assert (gradients[row] - gradient).norm() < 1e-5 * gradient.norm()
        alone, _, slope = objective(x[row : row + 1].flatten(1), torch.tensor([row]))
        assert torch.allclose(alone[0], value, rtol=1e-5)
        assert (slope[0] - gradient.flatten()).norm() < 1e-5 * gradient.norm()


def test_unrolled_update_is_that_of_torch_sgd() -> None:
    model = smooth().double()
    known = victim(smooth(), 4, FEDAVG)
    x, y = torch.rand(4, *SHAPE, dtype=torch.float64), torch.tensor([1, 2, 3, 4])
    before = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    update = simulate(model, before, {}, x, y, recipe=known.recipe, order=known.order, names=known.names)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.5, weight_decay=0.01)
    for _ in range(2):
        for batch in (slice(0, 2), slice(2, 4)):
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    delta = torch.cat([(tensor.detach() - before[name]).flatten() for name, tensor in model.named_parameters()])
    assert torch.allclose(update, delta, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("distance", ["angle", "cosine", "l2"])
def test_unrolled_gradient_equals_finite_differences(distance: str) -> None:
    objective = objective_of([victim(smooth(), 4, FEDAVG)], 1, distance, 0.01, torch.float64)
    x = torch.rand(1, 64, dtype=torch.float64)
    _, _, gradient = objective(x, torch.tensor([0]))
    for seed in range(5):
        direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        up, down = (objective(x + sign * 1e-5 * direction, torch.tensor([0]))[0] for sign in (1, -1))
        assert torch.allclose((up - down) / 2e-5, (gradient * direction).sum(), rtol=1e-5)


def test_order_covers_all_records_and_matches_the_recipe() -> None:
    assert assumed_order(5, LocalTraining(), 1) == ((0, 5),)
    assert assumed_order(5, LocalTraining(algorithm="fedavg", batch_size=2), 1) == ((0, 2), (2, 4), (4, 5))
    assert assumed_order(4, LocalTraining(algorithm="fedavg", batch_size=0, epochs=2), 1) == ((0, 4), (0, 4))
    two_senders = assumed_order(8, LocalTraining(algorithm="fedavg", batch_size=2), 2)
    assert two_senders == ((0, 4), (4, 8)), "two senders of 4 records take 2 steps each, so does the joint client"


def test_aggregate_of_equal_batches_is_the_joint_batch() -> None:
    model = smooth()
    clients = [records(2, SHAPE, seed) for seed in range(3)]
    view, knowledge = attack_surface(model, clients)
    known = prepare(view, knowledge)
    x = torch.cat([client.inputs for client in clients])
    y = torch.cat([client.labels for client in clients])
    joint = simulate(model, known.parameters, known.buffers, x, y, recipe=known.recipe, order=known.order, names=known.names)
    assert torch.allclose(joint, known.target, rtol=1e-4, atol=1e-7)


def test_memory_budget_and_kin_bound_a_batch() -> None:
    model, other = smooth(), smooth()
    victims = [victim(model), victim(other), victim(model), victim(model, 2)]
    assert sorted(chunks(victims, 1, memory_mb=64, dtype=torch.float32)) == [[0, 2], [1], [3]]
    wide = build("convnet", (1, 8, 8), width=8)
    many = [prepare(*attack_surface(wide, [records(1, (1, 8, 8), seed)])) for seed in range(4)]
    assert max(map(len, chunks(many, 1, memory_mb=1, dtype=torch.float32))) < 4


def test_batch_norm_in_training_mode_is_batched_too() -> None:
    model = build("resnet20", (1, 8, 8), width=4)
    model.train()
    known = [prepare(*attack_surface(model, [records(2, (1, 8, 8), seed)])) for seed in range(2)]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = torch.rand(2, 128)
    values, _, gradients = objective_of(known, 1, "cosine")(x, torch.arange(2))
    alone, _, slope = objective_of(known[1:], 1, "cosine")(x[1:], torch.arange(1))
    assert torch.allclose(values[1], alone[0], rtol=1e-4)
    assert (gradients[1] - slope[0]).norm() < 1e-3 * slope[0].norm()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def run_digits(attack: Matching, count: int = 4) -> list[Reconstruction]:
    """What an attack makes of single digits on the sigmoid LeNet."""
    data, model = digits(count), build("lenet", (1, 8, 8))
    pairs = [attack_surface(model, [Batch(data.inputs[i : i + 1], data.labels[i : i + 1])]) for i in range(count)]
    return attack.many([v for v, _ in pairs], [k for _, k in pairs], rngs=[stream(0, "victim", i) for i in range(count)])


@pytest.mark.slow
def test_dlg_with_a_line_search_beats_the_published_one() -> None:
    data = digits(4)
    ours, published = run_digits(DLG(evaluations=150)), run_digits(DLGPaper(iterations=8))
    better, worse = ([psnr_db(g.inputs, x[None]) for g, x in zip(guesses, data.inputs, strict=True)] for guesses in (ours, published))
    assert sum(better) / 4 >= sum(worse) / 4 + 8
    assert [int(guess.labels) for guess in ours] == data.labels.tolist()


def test_idlg_knows_the_labels_that_the_published_dlg_optimizes() -> None:
    data = digits(4)
    assert [int(guess.labels) for guess in run_digits(IDLG(iterations=1))] == data.labels.tolist()
    objective = Objective([prepare(*attack_surface(build("lenet", (1, 8, 8)), [data]))], DLGPaper().setting())
    z = objective.start([stream(0)])
    assert z.shape == (1, 4 * 64 + 4 * 10)
    assert bool((objective(z, torch.tensor([0])).gradient[0, -40:] != 0).any()), "labels are optimized, too"


def test_a_run_cut_short_says_that_it_had_not_converged() -> None:
    assert not any(guess.converged for guess in run_digits(DLG(evaluations=30)))
    assert not any(guess.converged for guess in run_digits(InvertingGradients(steps=20)))


def test_patterned_start_repeats_one_square() -> None:
    known = prepare(*attack_surface(build("lenet", (3, 40, 32)), [records(2, (3, 40, 32))]))
    pixels = Pixels("patterned")
    x = pixels.decode(pixels.start(known, stream(0)), known)
    assert x.shape == (2, 3, 40, 32)
    assert torch.equal(x[..., :16, :16], x[..., 16:32, 16:])
    assert not torch.equal(x[0], x[1])


def test_spectrum_is_the_orthonormal_cosine_transform_with_a_fall() -> None:
    known = prepare(*attack_surface(build("lenet", (3, 8, 12)), [records(2, (3, 8, 12))]))
    z = torch.randn(2 * 3 * 8 * 12, dtype=torch.float64)
    decoded = Spectrum(power=0.0).decode(z, known)
    assert np.allclose(decoded.numpy() - 0.5, idctn(z.view(2, 3, 8, 12).numpy(), axes=(2, 3), norm="ortho"))
    lone = torch.zeros_like(z).view(2, 3, 8, 12)
    lone[0, 0, 3, 4] = 1  # five half-waves along the diagonal
    image = Spectrum(power=1.0).decode(lone.flatten(), known) - 0.5
    assert float(image.norm()) == pytest.approx(1 / 6)


def test_priors_keep_their_weight_or_reach_the_final_one() -> None:
    assert [Weighted(rough, 0.3).at(p) for p in (0, 0.5, 1)] == [0.3, 0.3, 0.3]
    falling = Weighted(rough, 0.2, 0.002)
    assert [falling.at(p) for p in (0, 7 / 16, 7 / 8, 1)] == pytest.approx([0.2, 0.02, 0.002, 0.002])
    assert Weighted(rough, 0.0, 0.0).at(0.5) == 0


def test_label_term_is_zero_only_for_a_sure_and_right_prediction() -> None:
    model = smooth()
    known = victim(model, 3)
    inputs = records(3, SHAPE).inputs
    trial = Trial(known, inputs, known.labels, torch.empty(0), known.parameters, known.buffers, known.target)
    softmax = model(inputs).softmax(1)
    wanted = (softmax - F.one_hot(known.labels, 10)).square().sum(1).mean()
    assert torch.allclose(task(trial), wanted)


def test_total_variation_of_a_ramp() -> None:
    ramp = torch.linspace(0, 1, 5).expand(1, 3, 5, 5)
    assert float(total_variation(ramp)) == pytest.approx(0.25)


def test_roughness_sees_where_channels_disagree_and_leaves_gray_alone() -> None:
    gray = torch.rand(2, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(roughness(gray), total_variation(gray))
    assert torch.equal(roughness(gray.expand(-1, 3, -1, -1)), total_variation(gray.expand(-1, 3, -1, -1)))
    colour = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    r, g, b = colour[:, :1], colour[:, 1:2], colour[:, 2:]
    wanted = total_variation(colour) + total_variation(torch.cat([r - g, g - b, r - b], 1))
    assert torch.allclose(roughness(colour), wanted)
