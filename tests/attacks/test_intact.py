"""Exact solvers on what a defense left as it was: nothing wrong is certified, and nothing changed is taken for exact."""

from __future__ import annotations

from dataclasses import replace
from statistics import fmean

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from scipy.sparse import csr_matrix
from torch import Tensor, nn

from attacks import _bounds
from attacks._bounds import bounded
from attacks._chain import Chain, chain
from attacks._choice import Choice
from attacks._intact import changed, intact, lossy
from attacks._matching.defended import struck
from attacks._peel import CLEAR, System
from attacks._second_order.proof import RADIUS
from attacks.strongest import Strongest
from attacks.update.hybrid import Hybrid
from attacks.update.linear_leak import LinearLeak
from attacks.update.r_gap import RGap
from attacks.update.sparse_factorization import SparseFactorization
from simulator import lookup
from simulator.adversary import Knowledge
from simulator.mechanisms.outpost import perturbed, risks
from simulator.mechanisms.soteria import kept_features, sensitivities, without_features
from simulator.rng import stream
from simulator.types import Batch, Observation, Schema, Update
from tests.attacks.victims import CLASSES, attack_surface, build, digits, psnr_db

SHAPE = (1, 8, 8)
SOTERIA = ("soteria", {"pruned": 0.5, "layer": "head"})
PRECODE = ("precode", {"k": 16, "beta": 1e-3})
OUTPOST = ("outpost", {"pruned": 0.8, "noised": 0.4, "scale": 0.8, "decay": 1.0, "iterations": "training"})
FROZEN = ("frozen_first_layer", dict[str, object]())
RNG = stream(0, "attack")

Defended = tuple[str, dict[str, object]]


def surface(defense: Defended, number: int = 0, count: int = 1, layer: str = "head") -> tuple[Observation, Knowledge, Batch]:
    """Digits behind the CNN of the spec on defenses and one defense, by the models and mechanisms that implement it."""
    family = lookup.get("models", "cnn")(width=8, hidden=64)
    if defense is PRECODE:
        family = lookup.get("models", "precode")(family, 16)
    if defense is FROZEN:
        family = lookup.get("models", "frozen_first_layer")(family)
    model, batch = family.build(Schema(SHAPE, CLASSES), stream(number, "model")), digits(count, offset=50 + count * number)
    view, knowledge = attack_surface(model, [batch], seed=number)
    if defense[0] == "soteria":
        keep = kept_features(sensitivities(model, view.broadcast.parameters, {}, batch.inputs, layer), 0.5)
        view = with_update(view, without_features(view.upload.update.tensors, layer, keep))
    return view, replace(knowledge, defenses=(defense,)), batch


def with_update(view: Observation, tensors: dict[str, Tensor]) -> Observation:
    return replace(view, uploads=(replace(view.upload, update=Update("gradient", tensors)),))


def test_what_each_defense_leaves_alone() -> None:
    for defense, gone in ((SOTERIA, {"head.weight"}), (PRECODE, set()), (OUTPOST, set())):
        view, knowledge, _ = surface(defense)
        assert set(view.upload.update.tensors) - intact(view, knowledge) == gone
    view, knowledge, _ = surface(SOTERIA)
    assert lossy(view, knowledge) == ("soteria",)
    assert "head.weight" in str(changed(view, knowledge, "hidden.weight", "head.weight"))
    assert changed(view, knowledge, "hidden.weight", "no.weight") is None
    for other in ("top_k", "censor", "qsgd"):
        assert intact(view, replace(knowledge, defenses=(SOTERIA, (other, {})))) == frozenset()


@pytest.mark.parametrize("noised", [0.1, 0.4, 0.8])
def test_outpost_is_seen_by_its_zeros_or_by_the_rank_it_adds(noised: float) -> None:
    for number in range(3):
        view, knowledge, _ = surface(OUTPOST, number)
        sent, parameters = view.upload.update.tensors, view.broadcast.parameters
        normal = {name: torch.randn(tensor.shape, generator=stream(number, name)) for name, tensor in sent.items()}
        changed_one = perturbed(sent, risks(parameters), normal, pruned=0.8, noised=noised, scale=0.8)
        assert not struck(sent, 1)
        assert struck(changed_one, 1)
        assert intact(with_update(view, changed_one), knowledge) == frozenset()


@pytest.mark.parametrize("defense", [SOTERIA, PRECODE, OUTPOST, FROZEN], ids=lambda defense: defense[0])
def test_no_deliberately_changed_tensor_is_certified(defense: Defended) -> None:
    """Tensor by tensor: another record's, noise of a thousandth, twice its size; and one that was never read changes nothing."""
    proven = 0
    for number in (2,):
        view, knowledge, batch = surface(defense, number)
        other = surface(defense, number + 5)[0].upload.update.tensors
        sent = view.upload.update.tensors
        proven += RGap()(view, knowledge, rng=RNG).certificate != ("",)
        for name, tensor in sent.items():
            noise = 1e-3 * tensor.std() * torch.randn(tensor.shape, generator=stream(number, name))
            for wrong in (other[name], tensor + noise, 2 * tensor):
                guess = RGap()(with_update(view, {**sent, name: wrong}), knowledge, rng=RNG)
                assert guess.inputs is not None
                if guess.certificate[0]:
                    assert float((guess.inputs - batch.inputs).square().mean().sqrt()) < RADIUS, name
                assert (defense is SOTERIA and name == "head.weight") == (guess.certificate[0] != ""), name
    assert proven == 1


def test_a_changed_layer_in_between_is_refused() -> None:
    view, knowledge, _ = surface(("soteria", {"pruned": 0.5, "layer": "hidden"}), layer="hidden")
    reason = RGap().supports(view, knowledge)
    assert reason is not None
    assert "hidden.weight" in reason
    assert Choice(view, knowledge).refusal(Hybrid) is not None


class Branched(nn.Module):
    """A way around the hidden layer, whose bias' gradient is then not all that comes back to the layers before it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.hidden, self.head = nn.Linear(64, 80), nn.Linear(80, 80), nn.Linear(80, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sigmoid(self.first(x.flatten(1)))
        out: Tensor = self.head(x + torch.sigmoid(self.hidden(x)))
        return out


def test_a_branch_around_a_layer_is_no_chain_to_start_at() -> None:
    view, knowledge = attack_surface(Branched(), [digits(1)])
    found = chain(knowledge, view.broadcast)
    assert isinstance(found, Chain), found
    assert [layer.call.name for layer in found.layers] == ["first"], "its own bias is what came back to it, by both ways"


def test_the_first_layer_of_an_mlp_is_proven_behind_soteria() -> None:
    """linear_leak for one record and the factorization for several, neither of which reads the head."""
    one, many, model = digits(1), digits(4), build("mlp", SHAPE, hidden=(128,))
    for batch, solver in ((one, LinearLeak()), (many, SparseFactorization())):
        view, knowledge = attack_surface(model, [batch])
        keep = torch.arange(128) % 2 == 0
        view = with_update(view, without_features(view.upload.update.tensors, "head", keep))
        knowledge = replace(knowledge, defenses=(SOTERIA,))
        assert Choice(view, knowledge).refusal(type(solver)) is None
        guess = solver(view, knowledge, rng=stream(0))
        assert all(guess.certificate)
        gap = torch.cdist(guess.inputs.flatten(1), batch.inputs.flatten(1))
        assert float(gap.min(0).values.max()) < 1e-3


def test_a_batch_behind_soteria_is_unmixed_with_its_labels() -> None:
    """The head's columns of all that fires are gone: labels are read off what came back to the hidden layer."""
    model, batch = build("cnn", SHAPE, width=32, hidden=128), digits(2, offset=51)
    view, knowledge = attack_surface(model, [batch])
    view = with_update(view, without_features(view.upload.update.tensors, "head", torch.zeros(128, dtype=torch.bool)))
    guess = Strongest(seconds=2)(view, replace(knowledge, defenses=(SOTERIA,)), rng=stream(0))
    assert guess.solver == ("hybrid",) * 2
    assert all(guess.certificate)
    order = torch.cdist(guess.inputs.flatten(1), batch.inputs.flatten(1)).argmin(1)  # type: ignore[union-attr]
    assert guess.labels.tolist() == batch.labels[order].tolist()
    assert psnr_db(guess.inputs, batch.inputs[order]) > 60


def polytope(seed: int, equations: int) -> tuple[Chain, System, Tensor]:
    """A digit of 8×8 seen through random equations and inequalities."""
    rng = np.random.default_rng(seed)
    truth = digits(1, offset=60 + seed).inputs.flatten().double()
    matrix, below = rng.standard_normal((equations, 64)), rng.standard_normal((40, 64))
    sign = -np.sign(below @ truth.numpy())[:, None]
    ones = torch.ones(SHAPE, dtype=torch.float64)
    system = System(csr_matrix(1e7 * matrix), 1e7 * matrix @ truth.numpy(), csr_matrix(sign * below), np.zeros(40))
    return Chain((), ones, 0 * ones), system, truth


@pytest.mark.parametrize("equations", [20, 40, 60])
def test_bounds_tell_whether_a_picture_is_the_only_one(equations: int) -> None:
    """Against the range of every single pixel by linear programs of its own."""
    radii = []
    for seed in range(2):
        model, system, truth = polytope(seed, equations)
        found = bounded(model, system, deadline=float("inf"))
        assert found is not None
        slack = CLEAR / 1e7 + 1e-6
        matrix = np.concatenate([system.matrix.toarray() / 1e7, -system.matrix.toarray() / 1e7, system.below.toarray()])
        most = np.concatenate([system.right / 1e7 + slack, slack - system.right / 1e7, system.most + slack])
        widest = 0.0
        for pixel in range(0, 64, 9):
            for sign in (1, -1):
                end = linprog(sign * np.eye(64)[pixel], A_ub=matrix, b_ub=most, bounds=(0, 1)).x
                widest = max(widest, abs(float(end[pixel]) - float(found.pixels[pixel])))
        assert widest <= found.radius
        if found.radius < RADIUS * 8:
            assert float((found.pixels - truth).norm()) < found.radius
        radii.append(found.radius)
    assert (equations == 60) == (fmean(radii) < RADIUS * 8)


def test_pictures_too_large_for_linear_programs_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, system, _ = polytope(0, 40)
    assert bounded(model, system, deadline=0.0) is None
    monkeypatch.setattr(_bounds, "LARGEST", 63)
    assert bounded(model, system, deadline=float("inf")) is None
