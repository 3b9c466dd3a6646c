"""The learned inverter: what it simulates, what it may look at, and what it gives back where matching has nothing to match."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from attacks._gradient import noise_level
from attacks._learned.batches import drawn, pool
from attacks._learned.estimate import PURE, Affine, Estimator, Pairs, affine
from attacks._learned.features import LONG, Shortened, shortened
from attacks._learned.mechanisms import Compressed, Step, chain, compressed, grid, visible
from attacks._learned.pairs import sender, spared, updates
from attacks._learned.train import FIRST, Plan, affordable, compression, reader, simulated, train
from attacks._matching.simulate import flat
from attacks._matching.stack import known_stack
from attacks.update.inverting_gradients import InvertingGradients
from attacks.update.learning_to_invert import LearningToInvert, kinds
from clients.local import gradient_rule
from clients.local import told as handed
from defenses.client.censor import Censor
from defenses.client.client_dp import ClientDP
from defenses.client.clip import Clip
from defenses.client.dp_sgd import DPSGD
from defenses.client.gaussian_noise import GaussianNoise
from defenses.client.laplace_noise import LaplaceNoise
from defenses.client.local_dp import LocalDP
from defenses.client.qsgd import QSGD
from defenses.client.random_pruning import RandomPruning
from defenses.client.top_k import TopK
from experiments.controls import shuffled
from simulator import config, lookup, training
from simulator.adversary import Knowledge
from simulator.defense import ClientContext, Defense, Private
from simulator.rng import stream
from simulator.types import Batch, LocalTraining, Observation, Schema, Tensors, Update
from tests.attacks.victims import CLASSES, attack_surface, build, digits, psnr_db

SHAPE = (1, 8, 8)
PUBLIC, PRIVATE = 600, 700
FEDAVG = LocalTraining(algorithm="fedavg", batch_size=2, epochs=2, learning_rate=0.1, momentum=0.5)
Surface = tuple[Observation, Knowledge]
Map = Callable[[Tensor], Tensor]


@cache
def public() -> Batch:
    return digits(PUBLIC)


def private(count: int, offset: int = 0) -> Batch:
    return digits(count, offset=PRIVATE + offset)


def surface(model: str, clients: list[Batch], recipe: LocalTraining | None = None, *, told: bool = True, seed: int = 0) -> Surface:
    view, knowledge = attack_surface(build(model, SHAPE, seed=seed), clients, recipe)
    labels = torch.cat([batch.labels for batch in clients]) if told else None
    return view, replace(knowledge, public=public(), labels=labels)


def changed(view: Observation, change: Map) -> Observation:
    update = view.upload.update
    return replace(
        view, uploads=(replace(view.upload, update=Update(update.kind, {n: change(tensor) for n, tensor in update.tensors.items()})),)
    )


def noised(pair: Surface, sigma: float, seed: int) -> Surface:
    rng = stream(seed, "the defender's own noise")
    view = changed(pair[0], lambda tensor: tensor + sigma * torch.randn(tensor.shape, generator=rng))
    return view, replace(pair[1], defenses=(("gaussian_noise", {"sigma": sigma}),))


def top(share: float) -> Map:
    def change(tensor: Tensor) -> Tensor:
        limit = tensor.abs().flatten().sort(descending=True).values[max(1, round(share * tensor.numel())) - 1]
        return tensor * (tensor.abs() >= limit)

    return change


def int8(tensor: Tensor) -> Tensor:
    return torch.fake_quantize_per_tensor_affine(tensor, float(tensor.abs().max()) / 127, 0, -127, 127)


# --- what it may look at ---


def test_no_public_records_no_inverter() -> None:
    view, knowledge = surface("linear", [private(1)])
    few = Batch(public().inputs[:31], public().labels[:31])
    for held in (None, few):
        reason = LearningToInvert().supports(view, replace(knowledge, public=held))
        assert reason is not None
        assert "must hold at least 32 public records" in reason
    assert LearningToInvert().supports(view, knowledge) is None


def test_what_is_learned_does_not_depend_on_the_upload() -> None:
    view, knowledge = surface("linear", [private(1)])
    other = changed(view, lambda tensor: torch.randn(tensor.shape, generator=stream(1, "another update")))
    plan = Plan(256, 60.0, 64)
    one, same = (train(seen, knowledge, knowledge.labels, {}, plan) for seen in (view, other))  # type: ignore[arg-type]
    assert torch.equal(one.estimator.affine.weight, same.estimator.affine.weight)
    assert one.estimator.error == same.estimator.error
    assert not torch.equal(one(view), same(other))


def test_many_equal_one_by_one() -> None:
    pairs = [surface("linear", [private(1, i)], told=False) for i in (0, 1, 0)]
    pairs = [(view, replace(known, model=pairs[0][1].model)) for view, known in pairs]
    attack = LearningToInvert(pairs=256)
    together = attack.many([v for v, _ in pairs], [k for _, k in pairs], rngs=[stream(i) for i in range(3)])
    for (view, knowledge), guess in zip(pairs, together, strict=True):
        alone = attack(view, knowledge, rng=stream(9))
        assert guess.inputs is not None
        assert alone.inputs is not None
        assert torch.allclose(guess.inputs, alone.inputs, atol=1e-5)
        assert torch.equal(guess.labels, alone.labels)


# --- what it simulates ---


def real(defenses: tuple[Defense, ...], view: Observation, knowledge: Knowledge, batch: Batch, seed: int) -> Tensors:
    """The update as clients.local makes it."""
    context = ClientContext(0, 1, len(batch), stream(seed, "defense"))
    batches = [batch] * knowledge.training.local_steps(len(batch))
    private = Private(knowledge.model, view.broadcast, tuple(batches))
    rule = gradient_rule(defenses, context, private, knowledge.training)
    update, _ = training.local_update(knowledge.model, view.broadcast.parameters, {}, batches, knowledge.training, rule)
    for defense in defenses:
        update = defense.on_update(update, handed(defense, context, private))
    return update.tensors


STACKS: dict[str, tuple[Defense, ...]] = {
    "clip": (Clip(0.5),),
    "noise": (GaussianNoise(0.02),),
    "client_dp": (ClientDP(0.5, 0.02),),
    "dp_sgd": (DPSGD(0.5, 0.1),),
    "noise, then clip": (GaussianNoise(0.05), Clip(0.5)),
    "dp_sgd, then clip": (DPSGD(0.5, 0.1), Clip(0.3)),
    "laplace": (LaplaceNoise(0.02),),
    "local_dp": (LocalDP(0.5, 0.02),),
    "top_k": (TopK(0.8),),
    "noise, then top_k": (GaussianNoise(0.02), TopK(0.8)),
    "random_pruning": (RandomPruning(0.7),),
    "qsgd": (QSGD(levels=3, bucket=64),),
    "censor": (Censor(trials=1),),
}


@pytest.mark.parametrize("recipe", [None, replace(FEDAVG, batch_size=0)], ids=["fedsgd", "fedavg"])
@pytest.mark.parametrize("name", STACKS)
def test_simulated_defenses_are_the_real_ones(name: str, recipe: LocalTraining | None) -> None:
    if name == "top_k" and recipe is not None:
        pytest.skip("pixels of equal value move equally, and rounding picks which of them is kept; behind noise there are no ties")
    batch, draws = private(3), 60
    view, knowledge = surface("linear", [batch], recipe)
    knowledge = replace(knowledge, defenses=tuple((type(d).name, config.dump(d)) for d in STACKS[name]))
    of = sender(view, knowledge, {})
    assert not of.chain.unknown
    rng, stacked = stream(0, "attacker"), batch.inputs.expand(draws, -1, -1, -1, -1)
    simulated = updates(of, stacked, batch.labels.expand(draws, -1), rng)
    simulated = simulated + of.noise * torch.randn(simulated.shape, generator=rng)
    actual = torch.stack([flat(real(STACKS[name], view, knowledge, batch, seed), of.names) for seed in range(draws)])
    assert float(simulated.norm(dim=1).mean()) == pytest.approx(float(actual.norm(dim=1).mean()), rel=0.02)
    spreads = [float(each.std(0).square().mean().sqrt()) for each in (simulated, actual)]
    assert spreads[0] == pytest.approx(spreads[1], rel=0.03, abs=1e-6)
    noise = float(actual.std(0).square().mean().sqrt()) * (2 / draws) ** 0.5
    assert float((simulated.mean(0) - actual.mean(0)).square().mean().sqrt()) < 1.1 * noise + 1e-6


def test_an_aggregate_is_the_mean_of_its_senders_and_averages_their_noise() -> None:
    clients = [private(2), private(2, 2)]
    view, knowledge = surface("linear", clients)
    of = sender(view, replace(knowledge, defenses=(("gaussian_noise", {"sigma": 0.1}),)), {})
    everything = Batch(*(torch.cat([getattr(client, name) for client in clients]) for name in ("inputs", "labels")))
    row = updates(of, everything.inputs[None], everything.labels[None], stream(0))[0]
    assert torch.allclose(row, flat(view.upload.update.tensors, of.names), atol=1e-6)
    assert of.noise == pytest.approx(0.1 / 2**0.5)


@pytest.mark.parametrize("model", ["lenet", "resnet20"])
def test_senders_are_simulated_at_once_where_nothing_acts_on_each(model: str) -> None:
    """Batch statistics act on each sender's records; else one gradient of all records is the mean of the senders'."""
    view, knowledge = surface(model, [private(1), private(1, 1), private(1, 2)])
    of, batch = sender(view, knowledge, {}), private(3, 5)
    assert of.adds_up == (model == "lenet")
    assert not replace(of, chain=replace(of.chain, steps=(Step(clip_norm=1.0),))).adds_up
    assert not sender(*surface(model, [private(3)]), {}).adds_up
    together = updates(of, batch.inputs[None], batch.labels[None], stream(0))
    alone = replace(of, sizes=(1,))
    each = [updates(alone, batch.inputs[None, i : i + 1], batch.labels[None, i : i + 1], stream(0)) for i in range(3)]
    assert torch.allclose(together, torch.stack(each).mean(0), rtol=1e-4, atol=1e-6)


def test_simulation_ends_with_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each simulated upload takes 10 ms of the clock: 0.5 s pay for about 50, and no time at all for the fewest."""
    now = [0.0]

    def slow(of: object, images: Tensor, labels: Tensor, rng: torch.Generator) -> Tensor:
        now[0] += 0.01 * len(images)
        return torch.zeros(len(images), 4)

    monkeypatch.setattr("attacks._learned.train.updates", slow)
    monkeypatch.setattr("attacks._learned.train.time.process_time", lambda: now[0])
    of = sender(*surface("lenet", [private(1)]), {})
    images, labels, shorten = torch.zeros(1000, 1, *SHAPE), torch.zeros(1000, 1).long(), Shortened(((4,),), (None,))
    assert FIRST < len(simulated(of, images, labels, shorten, 0.5, stream(0))) <= 50 + FIRST
    assert len(simulated(of, images, labels, shorten, now[0] - 1, stream(0))) == FIRST
    assert len(simulated(of, images, labels, shorten, now[0] + 60, stream(0))) == 1000


def test_victims_that_outpost_struck_and_spared_ones_learn_apart() -> None:
    """What is simulated for them differs, and the first of a group is simulated for all."""
    settings: dict[str, object] = {"pruned": 0.4, "noised": 0.4, "scale": 0.1, "decay": 0.1, "gamma": 1.0}
    view, knowledge = surface("lenet", [private(1)])
    knowledge = replace(knowledge, defenses=(("outpost", settings),))
    holes = {name: tensor * (torch.rand(tensor.shape, generator=stream(0)) > 0.4) for name, tensor in view.upload.update.tensors.items()}
    struck = replace(view, uploads=(replace(view.upload, update=Update("gradient", holes)),))
    assert spared(view, knowledge)
    assert not spared(struck, knowledge)
    assert kinds([view, struck, view], [knowledge] * 3, [{}] * 3) == [[0, 2], [1]]


def test_victims_share_the_time_that_their_kind_took() -> None:
    pairs = [surface("linear", [private(1, place)]) for place in range(4)]
    model, pool = pairs[0][1].model, public()
    told = [replace(known, model=model, public=pool) for _, known in pairs]
    views = [replace(view, broadcast=pairs[0][0].broadcast) for view, _ in pairs]
    began = time.perf_counter()
    found = LearningToInvert(pairs=64, seconds=0.2).many(views, told, rngs=[stream(0)] * 4)
    took = time.perf_counter() - began
    assert len({guess.seconds for guess in found}) == 1
    assert 0.5 * took < sum(guess.seconds for guess in found) <= took


def test_unknown_defenses_are_named_and_harmless_ones_are_not() -> None:
    view, knowledge = surface("linear", [private(1)])
    found = chain(view, replace(knowledge, defenses=(("model_inspection", {}), ("magic", {}), ("gaussian_noise", {"sigma": 0.1}))))
    assert found.unknown == ("magic",)
    assert found.last == pytest.approx(0.1)


@pytest.mark.parametrize(("name", "settings", "noise"), [
    ("distributed_dp", {"clip_norm": 0.01, "noise_multiplier": 0.1}, 0.001 / 2),
    ("simulated_enclave", {"clip_norm": 0.01, "noise_multiplier": 0.1}, 0.001 / 2),
    ("central_dp", {"clip_norm": 0.01, "noise_multiplier": 0.1}, 0.0),
    ("adaptive_clipping", {"clip_norm": 5.0, "noise_multiplier": 0.1}, 0.0),
])  # fmt: skip
def test_each_sender_is_clipped_and_noise_is_what_the_server_sees_of_it(name: str, settings: dict[str, float], noise: float) -> None:
    """Two senders: noise of z·S on the sum is z·S/2 on the mean. The server's own comes later; its norm travels with the model."""
    view, knowledge = surface("linear", [private(2), private(2, 2)])
    told = {"adaptive_clip_norm": torch.tensor(0.01)} if name == "adaptive_clipping" else {}
    view = replace(view, broadcast=replace(view.broadcast, buffers={**view.broadcast.buffers, **told}))
    of = sender(view, replace(knowledge, defenses=((name, settings),)), {})
    batch = private(4)
    row = updates(of, batch.inputs[None], batch.labels[None], stream(0))[0]
    assert of.noise == pytest.approx(noise)
    assert of.chain.unknown == ()
    assert 0.005 < float(row.norm()) <= 0.01 + 1e-6


@pytest.mark.parametrize(("name", "change", "how"), [
    ("top 5 %", top(0.05), Compressed(kept=32)),
    ("sign", torch.sign, Compressed(levels=1)),
    ("scaled sign", lambda tensor: 0.01 * torch.sign(tensor), Compressed(levels=1)),
    ("int8", int8, Compressed(levels=127)),
])  # fmt: skip
def test_compression_shows_in_the_update(name: str, change: Map, how: Compressed) -> None:
    view, knowledge = surface("linear", [private(4)])
    weight = next(name for name in view.upload.update.tensors if name.endswith("weight"))
    original = view.upload.update.tensors[weight]
    assert compression(view, knowledge) == {}
    seen = compression(changed(view, change), knowledge)[weight]
    assert seen == how
    mine, theirs = compressed(original.flatten()[None], seen)[0], change(original).flatten()
    assert torch.allclose(mine, theirs.sign() if seen.levels == 1 else theirs, atol=1e-7)


def test_rounding_and_chance_are_no_grid() -> None:
    values = torch.randn(4096, generator=stream(0))
    assert grid(values) == 0
    assert grid(values.bfloat16()) == 0
    assert visible(Update("gradient", {"w": values}), {"w": values[None]}) == {}


def test_batches_are_drawn_for_their_labels_in_a_fixed_order() -> None:
    source, labels = pool(public()), torch.tensor([3, 3, 7])
    own = drawn(source, labels, 50, stream(0), own=1.0, altered=0.0)
    assert own.shape == (50, 3, *SHAPE)
    index = [(public().inputs == image).flatten(1).all(1).nonzero()[0, 0] for image in own.flatten(0, 1)]
    assert public().labels[index].view(50, 3).tolist() == [[3, 3, 7]] * 50
    key = own.flatten(2) @ source.order
    assert bool((key[:, 0] <= key[:, 1]).all())
    other = drawn(source, labels, 50, stream(0), own=0.0, altered=1.0)
    assert float(other.min()) >= 0
    assert float(other.max()) <= 1


# --- how it estimates ---


def test_affine_map_is_the_best_linear_estimator_under_noise() -> None:
    """Wiener filter: x ~ N(0, 1), z = 2x + noise of deviation σ: E[x|z] = 2z/(4 + σ²)."""
    x = torch.randn(200_000, 1, generator=stream(0))
    pairs = Pairs(2 * x, x, torch.full((len(x),), PURE))
    for sigma in (0.5, 3.0):
        assert float(affine(pairs, sigma, (1.0, 0.0, 0.0), 0.0).weight) == pytest.approx(2 / (4 + sigma**2), rel=0.01)


def test_an_update_unlike_any_simulated_one_is_pulled_back() -> None:
    there = Affine(torch.zeros(2), torch.full((1,), 0.5), torch.tensor([[0.01], [0.0]]))
    estimator = Estimator(there, None, torch.ones(2), reach=2.0)
    near, far = torch.tensor([[3.0, 4.0]]), torch.tensor([[3000.0, 4000.0]])
    assert float(estimator(near)) == pytest.approx(0.53)
    assert float(estimator(far)) == pytest.approx(0.5 + 0.01 * 0.6 * 6)


def test_shortening_keeps_what_simulated_updates_hold() -> None:
    rows, columns, rng = 256, 1024, stream(0)
    errors = torch.randn(rows, 8, generator=rng)  # updates of 8 records' errors, whatever the inputs
    stack = torch.einsum("rk,nkc->nrc", errors, torch.randn(6, 8, columns, generator=rng)).flatten(1)
    short = shortened(stack, [(rows, columns)])
    assert short(stack).shape[1] == sum(short.sizes) <= LONG
    assert torch.allclose(short(stack).norm(dim=1), stack.norm(dim=1), rtol=1e-4)


# --- what it gives back ---


def test_linear_model_is_inverted_in_closed_form() -> None:
    batch = private(1)
    guess = LearningToInvert()(*surface("linear", [batch], told=False), rng=stream(0))
    assert psnr_db(guess.inputs, batch.inputs) > 34  # the mean image: 11
    assert torch.equal(guess.labels, batch.labels)
    assert guess.certificate == ("",)
    assert guess.objective < 1e-3


@pytest.mark.parametrize("case", ["delta of four steps", "two senders", "bfloat16"])
def test_any_recipe_beats_the_mean_of_the_class(case: str) -> None:
    clients = [private(2), private(2, 2)] if case == "two senders" else [private(4)]
    recipes = {"delta of four steps": FEDAVG, "bfloat16": LocalTraining(batch_size=0, upload_dtype="bfloat16")}
    batch = private(4)
    view, knowledge = surface("mlp", clients, recipes.get(case))
    if case == "bfloat16":
        view = changed(view, lambda tensor: tensor.bfloat16())
    guess = LearningToInvert(pairs=256)(view, knowledge, rng=stream(0))
    assert psnr_db(guess.inputs, batch.inputs) > psnr_db(class_means(batch.labels), batch.inputs) + 3
    assert torch.equal(guess.labels, batch.labels)


def class_means(labels: Tensor) -> Tensor:
    return torch.stack([public().inputs[public().labels == label].mean(0) for label in labels])


def of_one_class(count: int) -> list[Batch]:
    data = digits(1000, offset=PRIVATE)
    return [Batch(data.inputs[i : i + 1], data.labels[i : i + 1]) for i in (data.labels == 3).nonzero().flatten()[:count].tolist()]


def identified(guesses: list[Tensor], victims: list[Batch]) -> int:
    """How many guesses are nearest to their own victim."""
    truth = torch.cat([victim.inputs for victim in victims]).flatten(1)
    return int((torch.cdist(torch.stack(guesses).flatten(1), truth).argmin(1) == torch.arange(len(victims))).sum())


def test_without_information_it_gives_the_mean_of_the_class_and_identifies_nobody() -> None:
    victims, attack = of_one_class(12), LearningToInvert(pairs=256)
    pairs = [surface("lenet", [victim]) for victim in victims]
    pairs = [(view, replace(known, model=pairs[0][1].model)) for view, known in pairs]
    cases = {
        "real": [view for view, _ in pairs],
        "zeroed": [changed(view, torch.zeros_like) for view, _ in pairs],
        "shuffled": [shuffled(view, stream(i, "shuffled")) for i, (view, _) in enumerate(pairs)],
    }
    hits = {}
    for name, views in cases.items():
        found = attack.many(views, [known for _, known in pairs], rngs=[stream(0)] * len(pairs))
        guesses = [guess.inputs[0] for guess in found if guess.inputs is not None]
        hits[name] = identified(guesses, victims)
        if name == "zeroed":
            assert float((torch.stack(guesses) - class_means(torch.tensor([3]))).square().mean()) < 0.003
        assert all(guess.certificate == ("",) for guess in found)
    assert hits["real"] == 12
    assert hits["zeroed"] <= 3  # by chance 1 of 12; more than 3 has probability 0.02
    assert hits["shuffled"] <= 3


def test_labels_are_learned_where_noise_hides_them() -> None:
    victims = [private(1, i) for i in range(40)]
    pairs = [noised(surface("lenet", [victim], told=False), 0.3, i) for i, victim in enumerate(victims)]
    read = reader(*pairs[0], {}, Plan(512, 60.0, 256))
    assert read is not None, "learned labels must be taken, since iDLG's are worse on held-out uploads"
    right = sum(int(read(view)[0]) == int(victim.labels) for (view, _), victim in zip(pairs, victims, strict=True))
    assert right >= 30
    view, knowledge = surface("lenet", [private(1)], told=False)
    assert reader(view, knowledge, {}, Plan(512, 60.0, 256)) is None


@pytest.mark.slow
@pytest.mark.parametrize(("defense", "least_db"), [("noise 0.1", 15.5), ("top 1 %", 17.5), ("sign", 20.0)])
def test_learned_inverter_beats_matching_under_strong_defenses(defense: str, least_db: float) -> None:
    """Wu et al., 2023, section 4: where signs, 1 % of the coordinates, or noise are left, learning beats optimization."""
    learned, matched = [], []
    for seed in range(5):
        for place in range(2):
            victim = private(1, 10 * seed + place)
            pair = surface("lenet", [victim], seed=seed)
            if defense == "noise 0.1":
                pair = noised(pair, 0.1, 2 * seed + place)
            else:
                pair = changed(pair[0], torch.sign if defense == "sign" else top(0.01)), pair[1]
            began = time.process_time()
            guess = LearningToInvert()(*pair, rng=stream(0))
            seconds = time.process_time() - began
            other = InvertingGradients(seconds=seconds)(*pair, rng=stream(0))
            learned.append(psnr_db(guess.inputs, victim.inputs))
            matched.append(psnr_db(other.inputs, victim.inputs))
    assert sum(learned) / len(learned) > least_db
    assert sum(learned) > sum(matched) + 4 * len(learned)  # behind noise 4.9 dB in the mean: matching stops by the clock


@pytest.mark.parametrize("name", ["sign_sgd", "soteria"])
def test_what_cannot_be_simulated_by_value_is_compared_alike(name: str) -> None:
    """Signs without their scale; a layer that Soteria touched is left out on both sides."""
    batch = private(3)
    view, knowledge = surface("linear", [batch])
    settings: dict[str, object] = {"scale": "mean"} if name == "sign_sgd" else {"layer": "head", "pruned": 0.8}
    of = sender(view, replace(knowledge, defenses=((name, settings),)), {})
    row = updates(of, batch.inputs[None], batch.labels[None], stream(0))[0]
    seen = {key: 0.3 * tensor.sign() if name == "sign_sgd" else tensor for key, tensor in view.upload.update.tensors.items()}
    assert torch.allclose(row, flat(of.comparable(seen), of.names), atol=1e-6)
    assert float(row.norm()) > 0.1


DRAWING = {
    "bottleneck": lambda: lookup.get("models", "precode")(lookup.get("models", "linear")(), 4),
    "dropout": lambda: lookup.get("models", "mlp")(hidden=(32,), dropout=0.5),
}


@pytest.mark.parametrize("layer", DRAWING)
def test_layers_that_draw_do_so_anew_for_every_pair(layer: str) -> None:
    """The simulated updates of one batch spread as the real ones do."""
    family = DRAWING[layer]()
    batch, draws = private(2), 60
    model = family.build(Schema(tuple(batch.inputs.shape[1:]), CLASSES), stream(0, "model"))  # type: ignore[arg-type]
    shown = [attack_surface(model, [batch], seed=seed) for seed in range(draws)]
    of = sender(*shown[0], {})
    simulated = updates(of, batch.inputs.expand(draws, -1, -1, -1, -1), batch.labels.expand(draws, -1), stream(0))
    actual = torch.stack([flat(view.upload.update.tensors, of.names) for view, _ in shown])
    assert float(simulated.std(0).norm()) == pytest.approx(float(actual.std(0).norm()), rel=0.2)
    assert float(actual.std(0).norm()) > 0.05 * float(actual.mean(0).norm())


def test_a_short_budget_learns_from_fewer_pairs_and_says_that_it_is_not_whole() -> None:
    view, known = attack_surface(build("cnn", SHAPE, width=8, hidden=64), [private(1)])
    known = replace(known, public=public())
    assert affordable(Plan(1024, 30.0, 1024), 9698, 64) == 1024
    inverter = train(view, known, private(1).labels, {}, Plan(1024, 0.3, 1024))
    assert FIRST < inverter.estimator.curve[-1][0] <= affordable(Plan(1024, 0.3, 1024), 9698, 64) < 512
    assert not inverter.whole


def test_a_share_of_the_noise_is_what_a_client_is_told_to_add() -> None:
    """With room for drop-outs and colluders a sum holds more noise than z·S."""
    view, knowledge = surface("linear", [private(2), private(2, 2)])
    told = {"clip_norm": 0.01, "noise_multiplier": 0.1, "noise_std": 0.002}
    known = replace(knowledge, defenses=(("distributed_dp", told),))
    assert sender(view, known, {}).noise == pytest.approx(0.002 / 2**0.5)
    assert known_stack(view, known).distance.sigma == pytest.approx((0.002 / 2**0.5,))
    size = sum(tensor.numel() for tensor in view.upload.update.tensors.values())
    norm = float(flat(view.upload.update.tensors, tuple(view.upload.update.tensors)).double().norm())
    assert noise_level(view, known) == pytest.approx(0.002 / 2**0.5 * size**0.5 / norm, rel=1e-5)
