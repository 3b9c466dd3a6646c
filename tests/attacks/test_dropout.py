"""Clients that train with dropout: whose masks they are, what gives them away, and what an attack makes of the rest."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from attacks._dropout import with_read_mask
from attacks._matching.masks import Masked, keep_rate, masked_sizes
from attacks._matching.simulate import Victim, prepare, simulate
from attacks._rest import separable
from attacks.update.april import April
from attacks.update.cocktail_party import CocktailParty
from attacks.update.dlg import DLG
from attacks.update.imprint import Imprint
from attacks.update.inverting_gradients import InvertingGradients
from attacks.update.linear_leak import LinearLeak
from attacks.update.sparse_factorization import SparseFactorization
from attacks.update.trap_weights import TrapWeights
from clients.local import local_upload
from simulator import lookup
from simulator.adversary import Knowledge
from simulator.data.synthetic import Synthetic
from simulator.models.dropout import Dropout, drawn_masks, masks_from
from simulator.models.mlp import MLP
from simulator.network import network, tensors
from simulator.rng import stream
from simulator.training import mean_gradient, per_example_gradients
from simulator.types import Batch, Broadcast, LocalTraining, Observation
from simulator.world import World
from tests.attacks import test_active
from tests.attacks.victims import attack_surface, build, digits, psnr_db, records

RNG = stream(0, "attack")


def explained(victim: Victim, batch: Batch) -> float:
    """Relative distance of the update that the attack simulates at the truth from the observed one."""
    v = victim
    update = simulate(v.model, v.parameters, v.buffers, batch.inputs, batch.labels, recipe=v.recipe, order=v.order, names=v.names)
    return float((update - v.target).norm() / v.target.norm())


def test_masks_drop_the_given_share_and_keep_the_expectation() -> None:
    layer, inputs = Dropout(0.25), torch.ones(100_000)
    assert torch.equal(layer(inputs), inputs), "without masks the layer is its expectation"
    with masks_from(drawn_masks(stream(0, "dropout"))):
        out = layer(inputs)
    assert abs(float((out == 0).float().mean()) - 0.25) < 0.01
    assert abs(float(out.mean()) - 1) < 0.01
    assert torch.equal(layer(inputs), inputs)


def test_a_round_is_repeatable_and_its_masks_are_the_secrets() -> None:
    data = Synthetic()
    worlds = [World(data=data, model=MLP(hidden=(16,), dropout=0.5), secret=secret) for secret in ("", "", "key")]
    sent = []
    for world in worlds:
        model = network(world.model, data.load().schema, world.training, world.seed)
        state = torch.random.get_rng_state()
        upload = local_upload(world, model, Broadcast(1, *tensors(model), world.training), 0)
        assert torch.equal(state, torch.random.get_rng_state())
        sent.append(upload.update.tensors["head.weight"])
    assert torch.equal(sent[0], sent[1])
    assert not torch.equal(sent[0], sent[2])


def test_dropout_of_a_users_own_model_is_ours() -> None:
    class Family:
        def build(self, schema: object, rng: torch.Generator) -> nn.Module:
            return nn.Sequential(nn.Flatten(), nn.Sequential(nn.Dropout(0.5), nn.Linear(16, 10)))

    model = network(Family(), None, LocalTraining(), 0)  # type: ignore[arg-type]
    assert isinstance(model[1][0], Dropout)  # type: ignore[index]
    ones = torch.ones(2, 1, 4, 4)
    assert torch.equal(model(ones), model(ones)), "an attack that runs the model sees no randomness"


def test_per_example_gradients_take_masks_of_their_own() -> None:
    model, batch = build("mlp", (1, 4, 4), dropout=0.5), records(3, (1, 4, 4))
    parameters, buffers = tensors(model)
    with masks_from(drawn_masks(stream(0, "dropout"))):
        each = per_example_gradients(model, parameters, buffers, batch)
    with masks_from(drawn_masks(stream(0, "dropout"))):
        alone = [mean_gradient(model, parameters, buffers, Batch(batch.inputs[i : i + 1], batch.labels[i : i + 1]))[0] for i in range(3)]
    for name, gradients in each.items():
        assert torch.allclose(gradients, torch.stack([one[name] for one in alone]), atol=1e-6)


@pytest.mark.parametrize(("name", "settings"), [("lenet", {}), ("mlp", {"activation": "sigmoid"}), ("cnn", {"width": 8, "hidden": 64})])
@pytest.mark.parametrize("scale", [1.0, 0.01])
def test_the_mask_before_the_head_is_read_off_one_records_gradient(name: str, settings: dict[str, Any], scale: float) -> None:
    batch = digits(1)
    view, knowledge = attack_surface(build(name, (1, 8, 8), dropout=0.5, **settings), [batch])
    scaled = {key: scale * tensor for key, tensor in view.upload.update.tensors.items()}
    view = replace(view, uploads=(replace(view.upload, update=replace(view.upload.update, tensors=scaled)),))
    victim = prepare(view, replace(knowledge, defenses=(("clip", {"clip_norm": 1e-9}),)))
    assert explained(replace(victim, target=victim.target / scale), batch) < 1e-5
    assert masked_sizes(victim) == []
    assert with_read_mask(view, knowledge)[0] is victim.model, "one copy, so that victims are still matched together"


def test_one_record_behind_dropout_is_exact_and_proven() -> None:
    batch = digits(1)
    view, knowledge = attack_surface(build("lenet", (1, 8, 8), dropout=0.5), [batch])
    guess = DLG(seconds=10)(view, knowledge, rng=RNG)
    assert psnr_db(guess.inputs, batch.inputs) > 80
    assert guess.certificate == ("unique match",)


def test_token_gradients_are_exact_whatever_was_dropped() -> None:
    batch = digits(1)
    view, knowledge = attack_surface(build("vit", (1, 8, 8), dropout=0.3), [batch])
    guess = April()(view, knowledge, rng=RNG)
    assert psnr_db(guess.inputs, batch.inputs) > 80
    assert guess.certificate == ("token gradients",)


@pytest.mark.slow
def test_masks_of_several_records_are_optimized_along() -> None:
    batch = digits(2)
    view, knowledge = attack_surface(build("lenet", (1, 8, 8), dropout=0.25), [batch])
    knowledge = replace(knowledge, labels=batch.labels)
    assert masked_sizes(prepare(view, knowledge)) == [(2 * 48, 0.25)]
    score = {
        masks: psnr_db(DLG(seconds=1.5, masks=masks)(view, knowledge, rng=RNG).inputs, batch.inputs) for masks in ("joint", "expected")
    }
    assert score["joint"] > score["expected"] + 5


def test_records_are_taken_out_of_a_batch_only_where_no_mask_is_unknown() -> None:
    def surface(count: int, **settings: object) -> tuple[Observation, Knowledge]:
        return attack_surface(build("mlp", (1, 8, 8), **settings), [digits(count)])

    assert separable(*surface(2, hidden=(64,)))
    assert not separable(*surface(2, hidden=(64,), dropout=0.3))
    assert separable(*surface(1, hidden=(64,), dropout=0.3)), "one record's mask before the head is read off"
    assert not separable(*surface(1, hidden=(64, 32), dropout=0.3)), "the mask before it is not"


def test_relaxed_masks_are_boxed_and_pulled_to_the_rate() -> None:
    view, knowledge = attack_surface(build("mlp", (1, 4, 4), hidden=(8,), dropout=0.25), [records(2, (1, 4, 4))])
    setting = InvertingGradients().setting()
    assert keep_rate in [weighted.prior for weighted in setting.priors]
    start = Masked().start(prepare(view, knowledge), RNG)
    assert start.tolist() == [0.75] * 16
    assert Masked().project(torch.tensor([[-1.0, 0.5, 2.0]])).tolist() == [[0.0, 0.5, 1.0]]


@pytest.mark.parametrize("name", ["linear_leak", "sparse_factorization", "hybrid", "levenberg_marquardt"])
def test_no_solver_certifies_a_wrong_record_under_dropout(name: str) -> None:
    for seed in range(3):
        batch = records(2, (1, 8, 8), seed)
        view, knowledge = attack_surface(build("mlp", (1, 8, 8), seed=seed, hidden=(64, 32), dropout=0.3), [batch], seed=seed)
        cls = lookup.get("attacks", name)
        attack = cls(seconds=0.5) if "seconds" in cls.__dataclass_fields__ else cls()
        if attack.supports(view, knowledge) is None:
            guess = attack(view, knowledge, rng=RNG)
            assert guess.inputs is not None
            error = torch.cdist(guess.inputs.flatten(1), batch.inputs.flatten(1)).square().min(1).values / 64
            assert all(float(error[i]) < 1e-6 for i, proof in enumerate(guess.certificate) if proof)


SIGMOID = {"hidden": (128,), "activation": "sigmoid"}


@pytest.mark.parametrize("p", [0.2, 1e-9])
@pytest.mark.parametrize(
    ("attack", "model", "settings", "count"),
    [
        (LinearLeak(), "mlp", {"hidden": (64,)}, 1),
        (LinearLeak(), "mlp", {"hidden": (512,)}, 2),
        (SparseFactorization(), "mlp", {"hidden": (128,)}, 4),
        (CocktailParty(), "mlp", SIGMOID, 2),
        (April(), "vit", {}, 1),
        (Imprint(), "imprint", {}, 2),
        (TrapWeights(), "trap_weights", {}, 2),
    ],
    ids=lambda value: type(value).__name__ if hasattr(value, "supports") else "",
)
def test_what_is_left_of_dropped_pixels_is_recovered_and_not_proven(
    attack: Any, model: str, settings: dict[str, Any], count: int, p: float
) -> None:
    batch = digits(count)
    if model in test_active.METHODS:
        view, knowledge = test_active.surface(batch, model, public=digits(360, offset=1400))
    else:
        view, knowledge = attack_surface(build(model, (1, 8, 8), **settings), [batch])
    without = attack(view, knowledge, rng=stream(0, "attack"))
    assert any(without.certificate), "nothing that could be taken back"
    dropping = nn.Sequential(Dropout(p), knowledge.model)
    view, told = attack_surface(dropping, [batch])
    knowledge = replace(told, adversary=knowledge.adversary)
    assert attack.supports(view, knowledge) is None
    guess = attack(view, knowledge, rng=stream(0, "attack"))
    assert guess.certificate == ("",) * count
    with masks_from(drawn_masks(stream(0, "dropout", 0))):
        seen = (1 - p) * Dropout(p)(batch.inputs)
    assert (p < 0.1) == torch.allclose(seen, batch.inputs, atol=1e-4)
    error = torch.cdist(guess.inputs.flatten(1), seen.flatten(1)).square().min(0).values / 64
    assert float(error.min()) < 1e-6
