"""Heuristics on the update: each does what it says, to the coordinate, and its randomness is the client's alone."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clients.local import local_upload
from clients.private import private_batches
from defenses.client.censor import Censor, client_loss
from defenses.client.clip import Clip, clip_to_norm
from defenses.client.gaussian_noise import GaussianNoise, add_gaussian
from defenses.client.outpost import Outpost
from defenses.client.qsgd import QSGD
from defenses.client.random_pruning import RandomPruning
from defenses.client.sign_sgd import SignSGD
from defenses.client.soteria import Soteria
from defenses.client.top_k import TopK
from simulator.defense import ClientContext, Defense, Private
from simulator.mechanisms.censor import orthogonal
from simulator.mechanisms.outpost import most_informative, risks
from simulator.mechanisms.qsgd import drawn_uniform, norms, qsgd
from simulator.mechanisms.soteria import representation
from simulator.mechanisms.top_k import kept, top_k
from simulator.models.mlp import MLP
from simulator.network import network, tensors
from simulator.rng import secret_stream, stream
from simulator.types import Batch, Broadcast, Tensors, Update
from simulator.world import World
from tests.defenses.tiny import TinyData, context, world

HEAD = "3"  # the last layer of the tiny network
SGD, AVG = {"batch_size": 5}, {"algorithm": "fedavg", "batch_size": 5, "steps": 3, "learning_rate": 0.05}
ALL: tuple[Defense, ...] = (
    TopK(0.6),
    RandomPruning(0.6),
    RandomPruning(0.6, masks="training"),
    SignSGD(scale="mean"),
    QSGD(levels=3, bucket=4),
    Soteria(0.5, layer=HEAD),
    Outpost(decay=0.0),
    Censor(trials=3),
)
RANDOM = tuple(defense for defense in ALL if not isinstance(defense, (TopK, SignSGD, Soteria)))
BOTH = pytest.mark.parametrize("recipe", [SGD, AVG], ids=["fedsgd", "fedavg"])


def each(defenses: tuple[Defense, ...]) -> Any:
    return pytest.mark.parametrize("defense", defenses, ids=str)


def upload(of: World, client: int = 0, round: int = 1) -> Tensors:
    """What this client uploads in this round on the initial model."""
    model = network(of.architecture, of.data.load().schema, of.training, of.seed)
    return local_upload(of, model, Broadcast(round, *tensors(model), of.training), client).update.tensors


def same(a: Tensors, b: Tensors) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def normal(seed: int = 0, **shapes: tuple[int, ...]) -> dict[str, Tensor]:
    rng = stream(seed, "update")
    return {name: torch.randn(shape, generator=rng) for name, shape in shapes.items()}


def private(recipe: dict[str, Any], **settings: Any) -> tuple[World, ClientContext]:
    """A world, and the context of its client 0 in round 1 with what only that client knows."""
    of = world(training=recipe, **settings)
    model = network(of.architecture, of.data.load().schema, of.training, of.seed)
    broadcast = Broadcast(1, *tensors(model), of.training)
    batches = tuple(private_batches(of, 0, 1))
    return of, replace(context(batch_size=5), private=Private(model, broadcast, batches))


# --- all of them ---


@each(ALL)
@BOTH
def test_changes_the_update_and_keeps_its_shape(defense: Defense, recipe: dict[str, Any]) -> None:
    """Outpost's published code is a no-op: every defense must be seen to act, in the client's own round."""
    plain, defended = upload(world(training=recipe)), upload(world(defense, training=recipe))
    assert not same(plain, defended)
    assert {name: t.shape for name, t in plain.items()} == {name: t.shape for name, t in defended.items()}
    assert all(torch.isfinite(tensor).all() for tensor in defended.values())


@each(ALL)
@BOTH
def test_the_same_world_gives_the_same_bits_whatever_the_process_drew_before(defense: Defense, recipe: dict[str, Any]) -> None:
    torch.manual_seed(1)
    first, state = upload(world(defense, training=recipe)), torch.get_rng_state()
    torch.manual_seed(2)
    assert same(first, upload(world(defense, training=recipe)))
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())  # nor does it touch the process's generator


@each(RANDOM)
@BOTH
def test_who_knows_all_but_the_secret_cannot_repeat_the_draw(defense: Defense, recipe: dict[str, Any]) -> None:
    of = replace(world(defense, training=recipe), secret="128 bits")
    assert not same(upload(of), upload(replace(of, secret="other bits")))
    assert not same(upload(of), upload(replace(of, secret="")))  # what the adversary could compute from the seed


@each(RANDOM)
def test_every_client_and_round_has_a_draw_of_its_own(defense: Defense) -> None:
    """The same update under the generators of two clients and of two rounds."""
    _, there = private(SGD)
    update = Update("gradient", normal(w=(8, 9), b=(7,)) if not isinstance(defense, (Outpost, Censor)) else upload(world(training=SGD)))

    def draw(client: int, round: int) -> Tensors:
        rng, lasting = secret_stream(0, "", "defense", client, round), secret_stream(0, "", "lasting defense", client)
        now = replace(there, rng=rng, lasting=lasting, step=1)
        return defense.on_step(update.tensors, now) if isinstance(defense, Outpost) else defense.on_update(update, now).tensors

    assert same(draw(0, 1), draw(0, 1))
    assert not same(draw(0, 1), draw(1, 1))
    assert same(draw(0, 1), draw(0, 2)) == (isinstance(defense, RandomPruning) and defense.masks == "training")


@each(tuple(defense for defense in ALL if defense not in RANDOM))
def test_what_is_not_random_draws_nothing(defense: Defense) -> None:
    _, there = private(SGD)
    before = there.rng.get_state()
    defense.on_update(Update("gradient", upload(world(training=SGD))), there)
    assert torch.equal(before, there.rng.get_state())


@each(ALL)
def test_claims_nothing(defense: Defense) -> None:
    assert defense.claim(world(defense), (15, 15, 15, 15)) is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TopK(1.0), r"pruned must be in \[0, 1\), got 1.0"),
        (lambda: RandomPruning(-0.1), r"pruned must be in \[0, 1\), got -0.1"),
        (lambda: RandomPruning(masks="ever"), "masks must be 'round' or 'training', got 'ever'"),  # type: ignore[arg-type]
        (lambda: SignSGD("max"), "scale must be 'none' or 'mean', got 'max'"),  # type: ignore[arg-type]
        (lambda: QSGD(levels=0), "levels must be ≥ 1, got 0"),
        (lambda: QSGD(bucket=-1), "bucket must be ≥ 0, got -1"),
        (lambda: Soteria(math.nan), r"pruned must be in \[0, 1\), got nan"),
        (lambda: Outpost(decay=-1.0), "decay must be ≥ 0 and finite, got -1.0"),
        (lambda: Outpost(scale=math.inf), "scale must be ≥ 0 and finite, got inf"),
        (lambda: Outpost(noised=1.1), r"noised must be in \[0, 1\], got 1.1"),
        (lambda: Outpost(iterations="epoch"), "iterations must be 'training' or 'round', got 'epoch'"),  # type: ignore[arg-type]
        (lambda: Censor(trials=0), "trials must be ≥ 1, got 0"),
        (lambda: Censor(probe=0.0), "probe must be > 0 and finite, got 0.0"),
        (lambda: Censor(rounds=-1), "rounds must be ≥ 0, got -1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@BOTH
def test_clip_then_noise_then_compression_act_in_the_order_of_the_stack(recipe: dict[str, Any]) -> None:
    stack = (Clip(0.5), GaussianNoise(0.1), TopK(0.5), QSGD(levels=3))
    rng = secret_stream(0, "", "defense", 0, 1)
    expected = add_gaussian(clip_to_norm(upload(world(training=recipe)), 0.5), 0.1, rng)
    expected = top_k(expected, 0.5)
    expected = qsgd(expected, drawn_uniform(expected, rng), levels=3, bucket=512)
    assert same(upload(world(*stack, training=recipe)), expected)
    assert not same(upload(world(*reversed(stack), training=recipe)), expected)


# --- top-k ---


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(1, 200), min_size=1, max_size=3), pruned=st.floats(0, 0.9999), seed=st.integers(0, 99))
def test_top_k_keeps_exactly_the_largest_of_each_tensor(sizes: list[int], pruned: float, seed: int) -> None:
    before = normal(seed, **{f"t{i}": (size,) for i, size in enumerate(sizes)})
    after = TopK(pruned).on_update(Update("delta", before), context()).tensors
    for name, tensor in before.items():
        stays = after[name] != 0
        assert int(stays.sum()) == kept(tensor.numel(), pruned) == tensor.numel() - math.floor(pruned * tensor.numel() + 1e-9) >= 1
        assert torch.equal(after[name][stays], tensor[stays])
        if (~stays).any():
            assert tensor[~stays].abs().max() <= tensor[stays].abs().min()


def test_top_k_agrees_with_the_percentile_of_other_implementations() -> None:
    tensor = normal(w=(40, 50))["w"]
    threshold = np.percentile(tensor.abs().numpy(), 90)
    after = TopK(0.9).on_update(Update("delta", {"w": tensor}), context()).tensors["w"]
    assert torch.equal(after, torch.where(tensor.abs() < threshold, 0.0, tensor))


def test_top_k_counts_shares_that_are_no_binary_fractions_right() -> None:
    assert [kept(100, share) for share in (0.29, 0.57, 0.9, 0.999)] == [71, 43, 10, 1]


def test_top_k_keeps_its_count_under_ties_and_zeros() -> None:
    after = top_k({"ties": torch.ones(10), "dead": torch.zeros(10)}, 0.7)
    assert [int(t.count_nonzero()) for t in after.values()] == [3, 0]


def test_mechanisms_run_on_stacks_and_pass_gradients_through_what_stays() -> None:
    stack = torch.randn(4, 6, 7, generator=stream(0, "stack"))
    apart = torch.stack([top_k({"w": one}, 0.5)["w"] for one in stack])
    assert torch.equal(torch.vmap(lambda one: top_k({"w": one}, 0.5)["w"])(stack), apart)
    slope = torch.func.grad(lambda one: top_k({"w": one}, 0.5)["w"].sum())(stack[0])
    assert torch.equal(slope, (apart[0] != 0).float())


# --- random pruning ---


def test_random_pruning_leaves_out_the_share_it_says_independently_of_the_values() -> None:
    before = normal(w=(200, 200))
    stays = RandomPruning(0.8).on_update(Update("delta", before), context()).tensors["w"] != 0
    assert abs(int(stays.sum()) - 0.2 * 40_000) < 5 * math.sqrt(40_000 * 0.16)
    large = before["w"].abs() > before["w"].abs().median()
    assert abs(int((stays & large).sum()) - int(stays.sum()) / 2) < 5 * math.sqrt(40_000 * 0.16 / 2)


def test_random_pruning_keeps_bits_or_rescales_them_to_the_mean() -> None:
    update, rng = Update("delta", normal(w=(30,))), stream(3, "noise")
    plain = RandomPruning(0.6).on_update(update, context()).tensors["w"]
    assert all(value in (0.0, float(before)) for value, before in zip(plain.tolist(), update.tensors["w"], strict=True))
    rule, there = RandomPruning(0.6, rescaled=True), replace(context(), rng=rng)
    draws = torch.stack([rule.on_update(update, there).tensors["w"] for _ in range(4000)])
    error = update.tensors["w"].abs() * math.sqrt(0.6 / 0.4 / 4000)
    assert ((draws.mean(0) - update.tensors["w"]).abs() < 5 * error).all()


def test_random_masks_of_the_whole_training_are_the_clients_own() -> None:
    of = world(RandomPruning(0.5, masks="training"), training=SGD)

    def support(client: int, round: int) -> Tensor:
        return torch.cat([tensor.flatten() for tensor in upload(of, client, round).values()]) != 0

    assert torch.equal(support(0, 1), support(0, 2))
    assert not torch.equal(support(0, 1), support(1, 1))
    with pytest.raises(ValueError, match="context.lasting must be a generator"):
        RandomPruning(masks="training").on_update(Update("delta", normal(w=(3,))), context())


# --- signs ---


def test_sign_sgd_uploads_signs_alone() -> None:
    before = {**normal(w=(9, 9)), "zero": torch.zeros(4)}
    after = SignSGD().on_update(Update("gradient", before), context()).tensors
    assert all(np.array_equal(after[name].numpy(), np.sign(before[name].numpy())) for name in before)
    scaled = SignSGD("mean").on_update(Update("gradient", before), context()).tensors
    assert scaled["w"].abs().unique().numel() == 1
    assert scaled["w"].abs().mean() == pytest.approx(float(before["w"].abs().mean()))
    assert torch.equal(scaled["w"].sign(), after["w"])


def test_sign_sgd_refuses_bare_signs_of_a_delta() -> None:
    assert SignSGD().refuses(world(training=SGD)) is None
    assert SignSGD("mean").refuses(world(training=AVG)) is None
    reason = SignSGD().refuses(world(training=AVG))
    assert reason is not None
    assert reason.startswith("scale must be 'mean' for sign_sgd with algorithm = 'fedavg', got 'none'")


# --- QSGD ---


@settings(max_examples=40, deadline=None)
@given(size=st.integers(1, 70), levels=st.integers(1, 20), bucket=st.integers(0, 30), seed=st.integers(0, 99))
def test_qsgd_rounds_to_a_neighbor_on_its_grid(size: int, levels: int, bucket: int, seed: int) -> None:
    before = normal(seed, w=(size,))["w"]
    after = QSGD(levels, bucket).on_update(Update("delta", {"w": before}), context(seed=seed)).tensors["w"]
    width = bucket or size
    for start in range(0, size, width):
        piece, rounded = before[start : start + width].double(), after[start : start + width].double()
        level = rounded / piece.norm() * levels
        assert torch.allclose(level, level.round(), atol=1e-4)
        assert ((level.round() - piece / piece.norm() * levels).abs() < 1 + 1e-4).all()
        assert (rounded * piece >= 0).all()


def test_qsgd_is_unbiased_with_the_variance_of_its_grid() -> None:
    before, draws = normal(w=(5, 13))["w"], 5_000
    rng, rule = stream(0, "qsgd"), QSGD(levels=3, bucket=20)
    stack = torch.stack([rule.on_update(Update("delta", {"w": before}), replace(context(), rng=rng)).tensors["w"] for _ in range(draws)])
    step = norms(before, 20).double() / 3
    up = (before.double().abs() / step) % 1
    variance = step.square() * up * (1 - up)
    assert ((stack.double().mean(0) - before).abs() < 5 * (variance / draws).sqrt() + 1e-6).all()
    assert float(stack.double().var(0).sum()) == pytest.approx(float(variance.sum()), rel=0.04)


def test_qsgd_leaves_zeros_and_lone_coordinates_as_they_are() -> None:
    before = {"zero": torch.zeros(7), "one": torch.tensor([-0.3])}
    assert same(QSGD().on_update(Update("delta", before), context()).tensors, before)


# --- Soteria ---


def by_hand(there: ClientContext, layer: str) -> Tensor:
    """Σ |rᵢ|/‖∂rᵢ/∂X‖ over all records, one record and one feature at a time."""
    assert there.private is not None
    model, broadcast = there.private.model, there.private.broadcast
    total = torch.zeros(broadcast.parameters[f"{layer}.weight"].shape[1])
    for batch in there.private.batches:
        for record in batch.inputs:
            inputs = record[None].clone().requires_grad_()
            features = representation(model, broadcast.parameters, broadcast.buffers, inputs, layer)[0]
            for i, feature in enumerate(features):
                (slope,) = torch.autograd.grad(feature, inputs, retain_graph=True)
                total[i] += feature.detach().abs() / slope.norm() if feature else 0.0
    return total


@BOTH
@pytest.mark.parametrize("pruned", [0.0, 0.25, 0.8])
def test_soteria_zeroes_the_columns_that_reveal_most_and_nothing_else(recipe: dict[str, Any], pruned: float) -> None:
    of, there = private(recipe)
    plain, defended = upload(of), upload(replace(of, defenses=(Soteria(pruned, HEAD),)))
    weight = f"{HEAD}.weight"
    gone = (defended[weight] == 0).all(0)
    assert int(gone.sum()) == math.floor(pruned * gone.numel())
    assert set(by_hand(there, HEAD).topk(int(gone.sum())).indices.tolist()) == set(gone.nonzero().flatten().tolist())
    assert torch.equal(defended[weight][:, ~gone], plain[weight][:, ~gone])
    assert all(torch.equal(defended[name], plain[name]) for name in plain if name != weight)


def test_soteria_takes_features_that_hide_nothing_last() -> None:
    """A ReLU that is off for every record has a zero column already: to prune it would be to prune nothing."""
    of = World(data=TinyData(), model=MLP((40,)), training=world(training={"batch_size": 1}).training)
    plain, defended = upload(of), upload(replace(of, defenses=(Soteria(0.3),)))
    dead = (plain["head.weight"] == 0).all(0)
    gone = (defended["head.weight"] == 0).all(0) & ~dead
    assert 0 < dead.sum() < 28
    assert int(gone.sum()) == 12


def test_soteria_refuses_layers_that_have_no_representation() -> None:
    assert Soteria(layer=HEAD).refuses(world()) is None
    for layer in ("head", "0"):
        reason = Soteria(layer=layer).refuses(world())
        assert reason is not None
        assert reason.startswith(f"layer must be an nn.Linear of the model, got '{layer}'. It has ['{HEAD}']")


# --- Outpost ---


def test_outpost_prunes_and_adds_noise_where_the_gradient_says_most() -> None:
    of, there = private(SGD)
    assert there.private is not None
    gradient, weights = upload(of), there.private.broadcast.parameters
    rule = Outpost(decay=0.0, pruned=0.7, noised=0.3, scale=0.8)
    draws = [rule.on_step(gradient, replace(there, step=1)) for _ in range(400)]
    places, pruned = most_informative(gradient, 0.3), top_k(gradient, 0.7)
    total = sum(tensor.numel() for tensor in gradient.values())
    assert sum(int(place.sum()) for place in places.values()) == math.floor(0.3 * total)
    assert min(gradient[n][places[n]].abs().min() for n in gradient if places[n].any()) >= max(
        gradient[n][~places[n]].abs().max() for n in gradient if (~places[n]).any()
    )
    for name, tensor in gradient.items():
        noise = torch.stack([draw[name] - pruned[name] for draw in draws])
        assert (noise[:, ~places[name]] == 0).all()
        deviation, noisy = 0.8 * float(weights[name].var()), noise[:, places[name]]
        if noisy.numel():
            assert float(noisy.std()) == pytest.approx(deviation, rel=5 / math.sqrt(2 * noisy.numel()))
            assert tensor.numel() > 1


def test_outpost_risk_is_the_spread_of_the_weights_at_most_one() -> None:
    found = risks({"wide": torch.tensor([-9.0, 9.0]), "narrow": torch.tensor([1.0, 1.2]), "flat": torch.ones(3), "one": torch.ones(1)})
    assert {name: float(risk) for name, risk in found.items()} == pytest.approx({"wide": 1, "narrow": 0.02, "flat": 0, "one": 0})


@pytest.mark.parametrize(("iterations", "round", "iteration"), [("training", 1, 2), ("training", 5, 14), ("round", 5, 2)])
def test_outpost_perturbs_ever_fewer_steps(iterations: Any, round: int, iteration: int) -> None:
    """Step 2 of a round of three: the (round − 1)·3 + 2nd of the training."""
    _, there = private(AVG)
    now, rule = replace(there, round=round, step=2), Outpost(decay=0.25, iterations=iterations)
    gradient, draws = upload(world(training=SGD)), 1500
    acted = sum(not same(rule.on_step(gradient, now), gradient) for _ in range(draws))
    expected = 1 / (1 + 0.25 * iteration)
    assert abs(acted - draws * expected) < 5 * math.sqrt(draws * expected * (1 - expected))


# --- Censor ---


@BOTH
def test_censor_is_orthogonal_tensor_by_tensor_and_as_long(recipe: dict[str, Any]) -> None:
    plain, defended = upload(world(training=recipe)), upload(world(Censor(), training=recipe))
    for name, tensor in plain.items():
        cosine = torch.nn.functional.cosine_similarity(tensor.double().flatten(), defended[name].double().flatten(), dim=0)
        assert abs(float(cosine)) < 1e-5
        assert float(defended[name].norm()) == pytest.approx(float(tensor.norm()), rel=1e-5)


def test_censor_projects_by_the_square_of_the_norm() -> None:
    """The published code divides by the norm alone, which is orthogonal for gradients of length 1 only."""
    rng = stream(0, "censor")
    g, r = 3 * torch.randn(50, generator=rng), torch.randn(50, generator=rng)
    published = r - (r @ g) / g.norm() * g
    assert abs(float(published @ g)) > 1
    for length in (1e-12, 1.0, 1e6):
        assert abs(float(orthogonal(r, g * length) @ (g * length))) < 1e-5 * float((g * length).square().sum())


def test_censor_sends_nothing_where_nothing_is_orthogonal() -> None:
    rng = stream(1, "censor")
    for tensor in (*torch.randn(50, 1, generator=rng), torch.zeros(5), torch.zeros(1)):
        assert torch.equal(orthogonal(torch.randn(tensor.shape, generator=rng), tensor), torch.zeros_like(tensor))


@BOTH
def test_censor_keeps_the_trial_with_the_lowest_loss(recipe: dict[str, Any]) -> None:
    of, there = private(recipe)
    assert there.private is not None
    plain = Update("delta" if recipe is AVG else "gradient", upload(of))
    rule, step = Censor(trials=6, probe=0.5), 1.0 if recipe is AVG else -0.5
    now = there.private.broadcast.parameters

    def after(trial: Tensors) -> float:
        assert there.private is not None
        return client_loss(there.private, {name: now[name] + step * trial[name] for name in now})

    each = [Censor(trials=1).on_update(plain, there).tensors for _ in range(6)]  # draws one after the other
    best = rule.on_update(plain, replace(there, rng=context(batch_size=5).rng)).tensors
    assert same(best, min(each, key=after))
    assert max(after(trial) for trial in each) > after(best)


def test_censor_compares_the_clients_own_loss() -> None:
    _, there = private(AVG)
    assert there.private is not None
    batches, now = there.private.batches, there.private.broadcast.parameters
    every = Batch(torch.cat([batch.inputs for batch in batches]), torch.cat([batch.labels for batch in batches]))
    logits = torch.func.functional_call(there.private.model, now, (every.inputs,))
    assert client_loss(there.private, now) == pytest.approx(float(torch.nn.functional.cross_entropy(logits, every.labels)))


def test_censor_stops_after_its_rounds() -> None:
    plain, defended = world(training=SGD), world(Censor(rounds=1), training=SGD)
    assert not same(upload(plain, round=1), upload(defended, round=1))
    assert same(upload(plain, round=2), upload(defended, round=2))
