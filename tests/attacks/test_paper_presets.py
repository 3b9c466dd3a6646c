"""Published settings: against literals from the papers' own code, and each loop against a plain rewrite of it in the paper's units."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from attacks._choice import LADDER
from attacks._matching.client import Trial
from attacks._matching.distances import cosine, squared
from attacks._matching.langevin import langevin
from attacks._matching.objective import Objective
from attacks._matching.optimize import adam
from attacks._matching.priors import task, variation
from attacks._matching.simulate import prepare
from attacks._matching.solve import Matching
from attacks.update.cpl_paper import CPLPaper
from attacks.update.fedavg_matching_paper import FedAvgMatchingPaper
from attacks.update.grad_inversion_paper import GradInversionPaper, apart, smoothness
from attacks.update.inverting_gradients_paper import InvertingGradientsPaper
from attacks.update.sme_paper import SMEPaper
from simulator import lookup
from simulator.adversary import Knowledge
from simulator.rng import stream
from simulator.types import LocalTraining, Observation
from tests.attacks.victims import attack_surface, build, records

SHAPE = (1, 8, 8)
MEAN, DEVIATION = 0.5, 0.25  # of the models' first layer: x = 0.5 + 0.25·z for an image z in the paper's units
PAPERS = [name for name in lookup.names("attacks") if name.endswith("-paper")]
TUNED = ["cpl", "dlg", "fedavg_matching", "grad_inversion", "inverting_gradients", "sme"]
FEDAVG = LocalTraining(algorithm="fedavg", batch_size=2, epochs=2, learning_rate=0.1)
STEPS = 16
DECAYED = [6, 10, 14]  # 3/8, 5/8, 7/8
EPSILON = 1e-3  # Adam adds 1e-8 to slopes that are four times as large in our units; of signs it changes nothing


def surface(name: str = "lenet", recipe: LocalTraining | None = None, **settings: object) -> tuple[Observation, Knowledge]:
    return attack_surface(build(name, SHAPE, **settings), [records(2, SHAPE)], recipe)


def run(attack: Matching, view: Observation, knowledge: Knowledge) -> tuple[Tensor, list[float]]:
    """The start and the objective at every step, of one restart in float64."""
    objective = Objective([prepare(view, knowledge)], replace(attack.setting(), dtype=torch.float64, restarts=1))
    start = objective.start([stream(0)])
    return start, [float(values[0]) for _, values in attack.optimize(objective, start).trace]


def total_variation(z: Tensor) -> Tensor:
    return (z[..., 1:] - z[..., :-1]).abs().mean() + (z[..., 1:, :] - z[..., :-1, :]).abs().mean()


def gradient(model: nn.Module, parameters: list[Tensor], z: Tensor, labels: Tensor) -> list[Tensor]:
    named = dict(zip(dict(model.named_parameters()), parameters, strict=True))
    loss = F.cross_entropy(functional_call(model, named, (MEAN + DEVIATION * z,)), labels)
    return list(torch.autograd.grad(loss, parameters, create_graph=True))


def one_minus_cosine(ours: list[Tensor], theirs: list[Tensor]) -> Tensor:
    return 1 - F.cosine_similarity(*(torch.cat([tensor.flatten() for tensor in each]) for each in (ours, theirs)), dim=0)


def opened(start: Tensor) -> Tensor:
    return ((start[0, :128].view(2, *SHAPE) - MEAN) / DEVIATION).clone().requires_grad_(True)


def test_every_one_has_a_tuned_sibling_and_none_is_on_the_ladder() -> None:
    assert [name.removesuffix("-paper") for name in PAPERS] == TUNED
    assert set(TUNED) <= set(lookup.names("attacks"))
    assert not [solver.name for solver in LADDER if solver.name in PAPERS]


@pytest.mark.parametrize(
    ("attack", "values"),
    [
        # JonasGeiping/invertinggradients, "ResNet152 - trained on ImageNet.ipynb": lr=0.1, max_iterations=24_000, total_variation=1e-1
        (InvertingGradientsPaper(), {"learning_rate": 0.1 * DEVIATION, "steps": 24_000, "tv": 0.1 / DEVIATION}),
        # JonasGeiping/invertinggradients, reconstruct_image.py, accumulation > 0: lr=0.1, max_iterations=4_000, total_variation=0
        (FedAvgMatchingPaper(), {"learning_rate": 0.1 * DEVIATION, "steps": 4000, "tv": 0.0}),
        # breaching, config/attack/seethroughgradients.yaml; NVlabs/DeepInversion, FLGradientInversion/config: "grad_l2": 1e-3
        (
            GradInversionPaper(),
            {"learning_rate": 0.1 * DEVIATION, "steps": 20_000, "tv": 1e-4, "l2": 1e-6, "batch_norm": 0.1, "group": 0.01, "noise": 0.2}
            | {"gradient": 1e-3},
        ),
        # JunyiZhu-AI/surrogate_model_extension, cifar_sme.json: alpha 0.5, lamb 0.01, eta 1, beta 0.001, iters 1000; its TV is a mean of two
        (SMEPaper(), {"alpha": 0.5, "tv": 0.01 / 2 / DEVIATION, "learning_rate": 1 * DEVIATION, "alpha_rate": 0.001, "steps": 1000}),
        # git-disl/CPL_attack, LFW_enhanced_random_ASR.ipynb: 300 iterations of L-BFGS; breaching, config/attack/wei.yaml: the weight
        (CPLPaper(), {"iterations": 300, "task": 1.0}),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_settings_are_the_papers(attack: Matching, values: dict[str, float]) -> None:
    own = {field.name: getattr(attack, field.name) for field in fields(attack) if field.name in values}  # type: ignore[arg-type]
    assert own == pytest.approx(values)
    beside = {field.name for field in fields(attack)} - set(values)  # type: ignore[arg-type]
    assert beside <= {"seconds", "restarts", "memory_mb", "max_unroll"}, "what is not checked is a budget"


def test_parts_are_the_papers() -> None:
    for attack in (InvertingGradientsPaper(), FedAvgMatchingPaper(tv=0.1), SMEPaper()):
        setting = attack.setting()
        assert setting.distance is cosine
        assert [prior.prior for prior in setting.priors] == [variation]
        assert not setting.priors[0].moves
    setting = CPLPaper().setting()
    assert setting.distance is squared
    assert [prior.prior for prior in setting.priors] == [task]


@pytest.mark.parametrize("tv", [0.1, 1e-4], ids=["ImageNet", "CIFAR-10"])
def test_inverting_gradients_is_the_published_loop(tv: float) -> None:
    view, knowledge = surface()
    start, trace = run(InvertingGradientsPaper(steps=STEPS, tv=tv / DEVIATION), view, knowledge)
    known, model = prepare(view, knowledge), build("lenet", SHAPE).double()
    parameters = list(model.parameters())
    target = [tensor.double() for tensor in view.upload.update.tensors.values()]
    z = opened(start)
    optimizer = torch.optim.Adam([z], lr=0.1)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=DECAYED, gamma=0.1)
    for value in trace:
        optimizer.zero_grad()
        loss = one_minus_cosine(gradient(model, parameters, z, known.labels), target) + tv * total_variation(z)
        assert value == pytest.approx(float(loss.detach()), rel=1e-6)
        loss.backward()  # type: ignore[no-untyped-call]
        assert z.grad is not None
        z.grad.sign_()
        optimizer.step()
        schedule.step()
        z.data = z.data.clamp(-MEAN / DEVIATION, (1 - MEAN) / DEVIATION)
    assert len(trace) == STEPS


def test_sme_is_the_published_loop() -> None:
    view, knowledge = surface(recipe=FEDAVG)
    start, trace = run(SMEPaper(steps=STEPS), view, knowledge)
    known, model = prepare(view, knowledge), build("lenet", SHAPE).double()
    first = [tensor.double() for tensor in view.broadcast.parameters.values()]
    delta = [tensor.double() for tensor in view.upload.update.tensors.values()]
    z, alpha = opened(start), torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    optimizers = [torch.optim.Adam([z], lr=1.0), torch.optim.Adam([alpha], lr=0.001)]
    schedules = [torch.optim.lr_scheduler.MultiStepLR(o, milestones=DECAYED, gamma=0.1) for o in optimizers]
    for value in trace:
        for optimizer in optimizers:
            optimizer.zero_grad()
        there = [parameter + alpha * moved for parameter, moved in zip(first, delta, strict=True)]
        match = one_minus_cosine(gradient(model, there, z, known.labels), [-moved for moved in delta])
        loss = match + 0.01 * total_variation(z) / 2
        assert value == pytest.approx(float(loss.detach()), rel=EPSILON)
        loss.backward()  # type: ignore[no-untyped-call]
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        z.data, alpha.data = z.data.clamp(-MEAN / DEVIATION, (1 - MEAN) / DEVIATION), alpha.data.clamp(0, 1)
    assert float(alpha.detach()) != 0.5
    with pytest.raises(ValueError, match=r"^alpha must be from 0 to 1, got 2"):
        SMEPaper(alpha=2)


def test_grad_inversion_is_the_published_loop() -> None:
    """Without noise, one restart: every term and the step along a cosine."""
    view, knowledge = surface("resnet20", width=4)
    start, trace = run(GradInversionPaper(steps=6, noise=0, restarts=1, l2=0.01), view, knowledge)
    known, model = prepare(view, knowledge), build("resnet20", SHAPE, width=4).double()
    seen: dict[nn.Module, Tensor] = {}
    norms = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    told = [(layer.running_mean.clone(), layer.running_var.clone()) for layer in norms]  # type: ignore[union-attr]
    for layer in norms:
        layer.register_forward_pre_hook(lambda module, inputs: seen.__setitem__(module, inputs[0]))
        layer.momentum = 0.0  # the broadcast statistics stay what they are
    parameters = list(model.parameters())
    target = [tensor.double() for tensor in view.upload.update.tensors.values()]
    z = opened(start)
    optimizer = torch.optim.Adam([z], lr=0.1)
    for step, value in enumerate(trace):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 + torch.cos(torch.tensor(torch.pi * step / 6)).item()) / 2
        optimizer.zero_grad()
        ours = gradient(model, parameters, z, known.labels)
        loss = 0.001 * torch.stack([(a - b).norm() for a, b in zip(ours, target, strict=True)]).sum()
        pairs = (z[:, :, :, :-1], z[:, :, :, 1:]), (z[:, :, :-1], z[:, :, 1:]), (z[:, :, 1:, :-1], z[:, :, :-1, 1:])
        for one, other in (*pairs, (z[:, :, :-1, :-1], z[:, :, 1:, 1:])):
            loss = loss + 1e-4 * (one - other).norm()
        loss = loss + 0.01 * z.flatten(1).norm(dim=1).mean()
        for layer, (mean, var) in zip(norms, told, strict=True):
            features = seen[layer]
            loss = loss + 0.1 * (features.mean([0, 2, 3]) - mean).norm()
            loss = loss + 0.1 * (features.var([0, 2, 3], unbiased=False) - var).norm()
        assert value == pytest.approx(float(loss.detach()), rel=EPSILON)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def test_group_term_is_a_norm_and_vanishes_without_a_group() -> None:
    view, knowledge = surface()
    known = prepare(view, knowledge)
    inputs, other = records(2, SHAPE, 1).inputs.requires_grad_(True), records(2, SHAPE, 2).inputs
    trial = Trial(known, inputs, known.labels, torch.empty(0), known.parameters, known.buffers, known.target)
    assert float(apart(trial)) == 0
    assert float(apart(replace(trial, consensus=other))) == pytest.approx(float((inputs - other).norm()) / DEVIATION)
    flat = torch.full_like(inputs, 0.5).requires_grad_(True)
    for zero in (apart(replace(trial, inputs=flat, consensus=flat.detach())), smoothness(replace(trial, inputs=flat))):
        assert torch.autograd.grad(zero, flat)[0].abs().max() == 0, "a norm at 0 has a slope, and it is no NaN"


def test_all_restarts_of_a_published_group_go_on_to_the_end() -> None:
    view, knowledge = surface()
    attack = GradInversionPaper(steps=8, restarts=3)
    objective = Objective([prepare(view, knowledge)], attack.setting())
    start = objective.start([stream(0)])
    assert bool(attack.optimize(objective, start).objective.isfinite().all())
    assert int(adam(objective, start, steps=8, learning_rate=0.025).objective.isfinite().sum()) == 1, "halving is what others do"


@pytest.mark.parametrize(("progress", "share"), [(0.25, (1 + 0.5**0.5) / 2), (0.5, 0.5), (1.0, 0.0)])
def test_published_noise_falls_with_the_step(progress: float, share: float) -> None:
    view, knowledge = surface()
    objective = Objective([prepare(view, knowledge)], GradInversionPaper(restarts=1).setting())
    start = objective.start([stream(0)])

    def noise(done: float) -> Tensor:
        problem = langevin(objective, start, deviation=0.2 * 0.025, annealed=True)
        problem(start, torch.tensor([0]), done)
        return problem.project(start) - start

    assert float(noise(0).std()) == pytest.approx(0.005, rel=0.2)
    assert torch.allclose(noise(progress), share * noise(0), atol=1e-6)


@pytest.mark.parametrize("name", PAPERS)
def test_a_short_run_gives_pictures(name: str) -> None:
    cls: Any = lookup.get("attacks", name)
    attack = cls(**{field.name: 3 for field in fields(cls) if field.name in ("steps", "iterations")})
    view, knowledge = surface(recipe=FEDAVG if name in ("sme-paper", "fedavg_matching-paper") else None)
    assert attack.supports(view, knowledge) is None
    guess = attack(view, knowledge, rng=stream(0))
    assert guess.inputs.shape == (2, *SHAPE)
    assert bool(((guess.inputs >= 0) & (guess.inputs <= 1)).all())
    assert not any(guess.certificate)
