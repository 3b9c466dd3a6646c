"""The mechanisms: what they compute, what they refuse, what they claim."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from dp_accounting import GaussianDpEvent, SelfComposedDpEvent
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from defenses.client.client_dp import ClientDP
from defenses.client.clip import Clip, global_norm
from defenses.client.dp_sgd import DPSGD, clipped_sum, per_record_norms
from defenses.client.gaussian_noise import GaussianNoise
from defenses.refusal import batch_statistics
from defenses.server.central_dp import CentralDP, weighted_noise_multiplier
from simulator import lookup, training
from simulator.defense import Defense, Private, ServerContext
from simulator.network import tensors
from simulator.rng import stream
from simulator.types import Batch, Broadcast, LocalTraining, Update
from simulator.world import World
from tests.defenses.tiny import TinyData, TinyModel, context, world

MECHANISMS = (Clip, GaussianNoise, DPSGD, ClientDP, CentralDP)


def update(*values: float) -> Update:
    return Update("delta", {"a": torch.tensor(values[:1]), "b": torch.tensor(values[1:])})


def per_example(seed: int = 1, batch: int = 6) -> tuple[nn.Module, dict[str, torch.Tensor], Batch]:
    schema, records = TinyData().load().schema, TinyData().load().records
    model = TinyModel().build(schema, stream(seed, "model"))
    return model, dict(tensors(model)[0]), Batch(records.inputs[:batch], records.labels[:batch])


# --- settings ---


@pytest.mark.parametrize("defense", [Clip, DPSGD, ClientDP, CentralDP])
@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan])
def test_clip_norm_must_be_positive(defense: type[Defense], bad: float) -> None:
    with pytest.raises(ValueError, match=r"clip_norm must be > 0, got .* Use clip_norm = inf to disable clipping\."):
        defense(clip_norm=bad)


@pytest.mark.parametrize("defense", [DPSGD, ClientDP, CentralDP])
def test_noise_needs_a_finite_multiplier_of_a_finite_norm(defense: type[Defense]) -> None:
    for bad in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="noise_multiplier must be ≥ 0 and finite"):
            defense(noise_multiplier=bad)
    with pytest.raises(ValueError, match="clip_norm must be finite"):
        defense(clip_norm=math.inf, noise_multiplier=1.0)
    defense(clip_norm=math.inf, noise_multiplier=0.0)


@pytest.mark.parametrize("bad", [-0.1, math.nan, math.inf])
def test_sigma_must_be_a_standard_deviation(bad: float) -> None:
    with pytest.raises(ValueError, match="sigma must be ≥ 0 and finite"):
        GaussianNoise(sigma=bad)


@pytest.mark.parametrize("defense", MECHANISMS)
def test_is_registered_and_says_what_it_does_and_does_not(defense: type[Defense]) -> None:
    import sys

    assert lookup.get("defenses", defense.name) is defense
    assert (defense.__doc__ or "").splitlines()[0].endswith(".")
    page = sys.modules[defense.__module__].__doc__ or ""
    for part in ("Source:", "Deviations:", "Hook", "What it does not protect"):
        assert part in page


# --- clipping ---

finite = st.floats(-1e6, 1e6, width=32)


@settings(max_examples=40, deadline=None)
@given(values=st.lists(finite, min_size=2, max_size=8), clip_norm=st.floats(1e-3, 1e3))
def test_clip_bounds_the_norm_and_keeps_the_direction(values: list[float], clip_norm: float) -> None:
    before = update(*values)
    after = Clip(clip_norm).on_update(before, context())
    norm = global_norm(before.tensors)
    assert after.kind == before.kind
    assert all(torch.isfinite(tensor).all() for tensor in after.tensors.values())
    assert global_norm(after.tensors) <= clip_norm * (1 + 1e-5)
    scale = min(1.0, clip_norm / float(norm)) if norm else 1.0
    for name, tensor in before.tensors.items():
        torch.testing.assert_close(after.tensors[name], tensor * scale, rtol=1e-5, atol=1e-30)
    torch.testing.assert_close(dict(Clip(clip_norm).on_update(after, context()).tensors), dict(after.tensors), rtol=1e-5, atol=1e-30)


def test_clip_inf_and_short_updates_pass_unchanged() -> None:
    short = update(0.3, 0.4)
    for clip_norm in (0.6, math.inf):
        after = Clip(clip_norm).on_update(short, context())
        assert all(torch.equal(after.tensors[name], short.tensors[name]) for name in short.tensors)


@settings(max_examples=30, deadline=None)
@given(values=st.lists(st.lists(finite, min_size=3, max_size=3), min_size=1, max_size=5), clip_norm=st.floats(1e-2, 1e2))
def test_one_record_moves_the_clipped_sum_by_clip_norm_at_most(values: list[list[float]], clip_norm: float) -> None:
    """The sensitivity behind the claim: replace one record's gradient by zero and nothing moves farther than C."""
    rule = DPSGD(clip_norm, noise_multiplier=0.0)
    full = {"w": torch.tensor(values)}
    without = {"w": full["w"].index_fill(0, torch.tensor([0]), 0.0)}
    there, gone = rule.on_gradient(full, context(batch_size=1)), rule.on_gradient(without, context(batch_size=1))
    assert (there["w"].double() - gone["w"].double()).norm() <= clip_norm * (1 + 1e-4)


# --- noise ---


def moments(noise: torch.Tensor) -> tuple[float, float]:
    return float(noise.mean()), float(noise.std())


def assert_standard_deviation(noise: torch.Tensor, sigma: float) -> None:
    """Mean and deviation of n draws lie within 5 standard errors: sigma/√n and sigma/√(2n)."""
    mean, std = moments(noise)
    assert abs(mean) < 5 * sigma / math.sqrt(noise.numel())
    assert abs(std - sigma) < 5 * sigma / math.sqrt(2 * noise.numel())


ZEROS = {"w": torch.zeros(100, 200)}


def test_gaussian_noise_has_standard_deviation_sigma() -> None:
    assert_standard_deviation(GaussianNoise(0.3).on_update(Update("delta", ZEROS), context()).tensors["w"], 0.3)


def test_client_dp_has_standard_deviation_z_times_s_around_the_clipped_update() -> None:
    long = {"w": torch.full((100, 200), 1.0)}
    after = ClientDP(clip_norm=2.0, noise_multiplier=0.5).on_update(Update("delta", long), context()).tensors["w"]
    assert_standard_deviation(after - 2.0 / math.sqrt(20_000), 1.0)


def test_dp_sgd_has_standard_deviation_z_times_c_over_the_expected_batch_size() -> None:
    """B is the expected batch size, not the number of gradients: three records arrive where ten were expected."""
    gradients = {"w": torch.zeros(3, 100, 200)}
    noise = DPSGD(clip_norm=2.0, noise_multiplier=1.5).on_gradient(gradients, context(batch_size=10))["w"]
    assert_standard_deviation(noise, 1.5 * 2.0 / 10)


def test_central_dp_has_standard_deviation_z_times_s_over_n() -> None:
    server = ServerContext(round=1, cohort=5, rng=stream(0, "server"))
    noise = CentralDP(clip_norm=2.0, noise_multiplier=1.5).on_aggregate(Update("delta", ZEROS), server).tensors["w"]
    assert_standard_deviation(noise, 1.5 * 2.0 / 5)


def test_central_dp_sends_clipped_updates_without_noise() -> None:
    seen = CentralDP(clip_norm=1.0, noise_multiplier=9.0).on_update(update(3.0, 4.0), context()).tensors
    assert seen["a"].item() == pytest.approx(0.6)
    assert seen["b"].item() == pytest.approx(0.8)


@pytest.mark.parametrize("defense", [GaussianNoise(0.1), ClientDP()])
def test_noise_comes_from_the_context_alone_and_differs_between_tensors(defense: Defense) -> None:
    before = Update("delta", {"a": torch.zeros(5), "b": torch.zeros(5)})
    torch.manual_seed(0)
    first, again = (defense.on_update(before, context(seed=3)).tensors for _ in range(2))
    other = defense.on_update(before, context(seed=4)).tensors
    assert all(tensor.dtype == torch.float32 for tensor in first.values())
    assert torch.equal(first["a"], again["a"])
    assert not torch.equal(first["a"], other["a"])
    assert not torch.equal(first["a"], first["b"])


# --- DP-SGD ---


@pytest.mark.parametrize("clip_norm", [0.05, 0.5, 100.0])
def test_dp_sgd_equals_a_plain_loop_over_records(clip_norm: float) -> None:
    """Reference: autograd on one record after another, python clipping, the same noise drawn separately."""
    model, parameters, batch = per_example()
    defense, z = DPSGD(clip_norm, noise_multiplier=0.7), 0.7
    total = {name: torch.zeros_like(tensor) for name, tensor in parameters.items()}
    clipped = 0
    for i in range(len(batch)):
        loss = nn.functional.cross_entropy(model(batch.inputs[i : i + 1]), batch.labels[i : i + 1])
        gradient = dict(zip(parameters, torch.autograd.grad(loss, list(model.parameters())), strict=True))
        norm = math.sqrt(sum(float((tensor**2).sum()) for tensor in gradient.values()))
        clipped += norm > clip_norm
        for name in total:
            total[name] += gradient[name] * min(1.0, clip_norm / norm)
    assert {0.05: 6, 100.0: 0}.get(clip_norm, clipped) == clipped
    noise = stream(0, "noise")
    expected = {name: (tensor + z * clip_norm * torch.randn(tensor.shape, generator=noise)) / 6 for name, tensor in total.items()}
    gradients = training.per_example_gradients(model, parameters, {}, batch)
    got = defense.on_gradient(gradients, context(batch_size=6))
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-5, atol=1e-6)


def test_dp_sgd_equals_opacus() -> None:
    """An independent implementation: Opacus's GradSampleModule gives the per-example norms and the clipped sum."""
    from opacus import GradSampleModule

    model, parameters, batch = per_example()
    gradients = training.per_example_gradients(model, parameters, {}, batch)
    batch.inputs.requires_grad_()  # else torch warns about Opacus's hooks
    wrapped = GradSampleModule(TinyModel().build(TinyData().load().schema, stream(1, "model")), loss_reduction="sum")
    nn.functional.cross_entropy(wrapped(batch.inputs), batch.labels, reduction="sum").backward()
    samples = {name.removeprefix("_module."): parameter.grad_sample for name, parameter in wrapped.named_parameters()}
    norms = torch.stack([sample.flatten(1).norm(dim=1) for sample in samples.values()]).norm(dim=0)
    torch.testing.assert_close(per_record_norms(gradients), norms, rtol=1e-4, atol=1e-6)
    clip_norm = float(norms.median())
    got = DPSGD(clip_norm, noise_multiplier=0.0).on_gradient(gradients, context(batch_size=6))
    for name, sample in samples.items():
        expected = torch.einsum("b,b...->...", (clip_norm / norms).clamp(max=1.0), sample) / 6
        torch.testing.assert_close(got[name], expected, rtol=1e-4, atol=1e-6)


def test_per_example_gradients_and_clipped_sums_are_opacus_to_1e_6() -> None:
    """The network of the reference: three 5×5 sigmoid convolutions with 12 channels, strides 2, 2, 1, FC 768 → 10; 3×32×32, 32 records."""
    from opacus import GradSampleModule

    def build() -> nn.Module:
        torch.manual_seed(0)
        convolutions = [(3, 2), (12, 2), (12, 1)]
        layers = [layer for wide, stride in convolutions for layer in (nn.Conv2d(wide, 12, 5, stride, padding=2), nn.Sigmoid())]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(768, 10))

    batch = Batch(torch.rand(32, 3, 32, 32, generator=stream(0, "x")), torch.arange(32) % 10)
    model = build()
    gradients = training.per_example_gradients(model, tensors(model)[0], {}, batch)
    batch.inputs.requires_grad_()
    wrapped = GradSampleModule(build(), loss_reduction="sum")
    nn.functional.cross_entropy(wrapped(batch.inputs), batch.labels, reduction="sum").backward()
    samples = {name.removeprefix("_module."): parameter.grad_sample for name, parameter in wrapped.named_parameters()}
    norms = torch.stack([sample.flatten(1).norm(dim=1) for sample in samples.values()]).norm(dim=0)
    clip_norm = float(norms.median())
    total = clipped_sum(gradients, clip_norm)
    for name, sample in samples.items():
        assert float((gradients[name] - sample).abs().max()) <= 1e-6
        clipped = torch.einsum("b,b...->...", (clip_norm / norms).clamp(max=1.0), sample)
        assert float((total[name] - clipped).abs().max()) <= 1e-6


@pytest.mark.parametrize("algorithm", ["fedsgd", "fedavg"])
def test_a_client_trains_with_every_mechanism(algorithm: str) -> None:
    """Through the client's own page: the upload is finite, differs from the undefended one, and the buffers stay."""
    from clients.local import local_upload

    plain = world(training={"algorithm": algorithm, "batch_size": 5})
    model, parameters, _ = per_example()
    bare = local_upload(plain, model, Broadcast(1, parameters, {}, plain.training), 0)
    for defense in (DPSGD(), ClientDP(), GaussianNoise(), CentralDP(clip_norm=1e-3), Clip(1e-3)):
        defended = world(defense, training={"algorithm": algorithm, "batch_size": 5})
        upload = local_upload(defended, model, Broadcast(1, parameters, {}, defended.training), 0)
        assert upload.num_examples == bare.num_examples
        for name, tensor in upload.update.tensors.items():
            assert torch.isfinite(tensor).all()
            assert not torch.equal(tensor, bare.update.tensors[name])


def test_dp_sgd_without_clipping_and_noise_is_the_mean_gradient() -> None:
    model, parameters, batch = per_example()
    gradients = training.per_example_gradients(model, parameters, {}, batch)
    mean, _ = training.mean_gradient(model, parameters, {}, batch)
    got = DPSGD(math.inf, noise_multiplier=0.0).on_gradient(gradients, context(batch_size=6))
    for name, tensor in mean.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-5, atol=1e-7)


def test_dp_sgd_takes_zero_gradients_and_an_empty_batch() -> None:
    zeros = DPSGD(noise_multiplier=0.0).on_gradient({"w": torch.zeros(2, 3)}, context(batch_size=2))
    assert torch.equal(zeros["w"], torch.zeros(3))
    empty = DPSGD(noise_multiplier=1.0).on_gradient({"w": torch.zeros(0, 3)}, context(batch_size=2))
    assert torch.isfinite(empty["w"]).all()
    assert empty["w"].abs().min() > 0


# --- what they refuse ---


def test_batch_statistics_are_found_by_layer() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Sequential(nn.InstanceNorm2d(2, track_running_stats=True)))
    assert batch_statistics(model) == ["1 (BatchNorm2d)", "2.0 (InstanceNorm2d)"]
    assert batch_statistics(nn.Sequential(nn.GroupNorm(2, 2), nn.InstanceNorm2d(2), nn.LayerNorm(3))) == []


@pytest.mark.parametrize(
    ("defense", "mode", "refused"),
    [
        (DPSGD(), "train", True),
        (DPSGD(), "eval", True),
        (ClientDP(), "train", True),
        (ClientDP(), "eval", False),
        (CentralDP(), "train", True),
        (CentralDP(), "eval", False),
        (Clip(), "train", False),
        (GaussianNoise(), "train", False),
    ],
)
def test_dp_with_batch_norm_is_refused(defense: Defense, mode: str, refused: bool) -> None:
    reason = defense.refuses(world(defense, batch_norm=True, training={"batch_norm": mode}))
    assert (reason is not None) is refused
    if reason:
        assert "BatchNorm2d" in reason
        assert "GroupNorm" in reason
    assert defense.refuses(world(defense)) is None


def test_dp_sgd_refuses_a_second_per_example_defense() -> None:
    assert "at most 1, got 2" in str(DPSGD().refuses(world(DPSGD(), DPSGD(2.0))))


@dataclass(frozen=True)
class Amplify(Defense):
    name = "amplify"

    def on_update(self, update: Update, context: object) -> Update:
        return Update(update.kind, {name: 100 * tensor for name, tensor in update.tensors.items()})


@dataclass(frozen=True)
class AmplifyMean(Defense):
    name = "amplify_mean"

    def on_aggregate(self, update: Update, context: object) -> Update:
        return Update(update.kind, {name: 100 * tensor for name, tensor in update.tensors.items()})


def test_central_dp_refuses_what_undoes_its_clipping() -> None:
    assert "amplify" in str(CentralDP().refuses(world(CentralDP(), Amplify())))
    assert CentralDP().refuses(world(Amplify(), CentralDP(), GaussianNoise(), Clip(), ClientDP())) is None
    assert "amplify_mean" in str(CentralDP().refuses(world(AmplifyMean(), CentralDP())))
    assert CentralDP().refuses(world(CentralDP(), AmplifyMean())) is None


# --- what they claim ---


def event(defense: Defense, held: tuple[int, ...], **keywords: object) -> SelfComposedDpEvent:
    claim = defense.claim(world(defense, **keywords), held)  # type: ignore[arg-type]
    assert claim is not None
    assert isinstance(claim.event, SelfComposedDpEvent)
    return claim.event


def test_dp_sgd_counts_the_releases_of_the_most_used_record() -> None:
    """FedSGD, batch 4: a client of 20 has 5 batches an epoch, one of 8 has 2, one of 3 uses all its records every round."""
    sgd = {"training": {"batch_size": 4}, "rounds": 10}
    assert event(DPSGD(1, 2.5), (20, 20, 20, 20), **sgd) == SelfComposedDpEvent(GaussianDpEvent(2.5), 2)
    assert event(DPSGD(), (20, 20, 8, 20), **sgd).count == 5
    assert event(DPSGD(), (20, 3, 8, 20), **sgd).count == 10
    assert event(DPSGD(), (20, 0, 8, 20), **sgd).count == 5  # a client without records has none to protect
    assert event(DPSGD(), (20, 20, 20, 20), rounds=10, training={"batch_size": 4, "algorithm": "fedavg", "epochs": 3}).count == 30
    assert event(DPSGD(), (20, 20, 20, 20), rounds=10, training={"batch_size": 4, "algorithm": "fedavg", "steps": 6}).count == 20


@pytest.mark.parametrize(
    "recipe",
    [
        LocalTraining(batch_size=4),
        LocalTraining(batch_size=0),
        LocalTraining(algorithm="fedavg", batch_size=4, steps=7),
        LocalTraining(algorithm="fedavg", batch_size=4, epochs=3),
        LocalTraining(algorithm="fedavg", batch_size=0, steps=3),
        LocalTraining(algorithm="fedavg", batch_size=4, steps=7, drop_last=True),
    ],
)
def test_who_holds_fewer_records_uses_each_at_least_as_often(recipe: LocalTraining) -> None:
    """Why the claim is made for the smallest client."""
    here: World = World(data=TinyData(), model=TinyModel(), federation=world(rounds=17).federation, training=recipe)
    uses = [here.participations(held) for held in range(1, 60)]
    assert uses == sorted(uses, reverse=True)


@pytest.mark.parametrize(
    ("algorithm", "steps", "drop_last"), [("fedsgd", 0, False), ("fedavg", 0, False), ("fedavg", 5, False), ("fedavg", 5, True)]
)
def test_no_record_enters_more_releases_than_the_claim_counts(algorithm: str, steps: int, drop_last: bool) -> None:
    """Against the clients' own schedule: count every record's local steps over the whole training."""
    from collections import Counter

    from clients.private import records_held, round_indices

    recipe = {"algorithm": algorithm, "steps": steps, "batch_size": 11 if drop_last else 5, "epochs": 2, "drop_last": drop_last}
    here = world(DPSGD(), clients=3, rounds=7, training=recipe)
    claim = DPSGD().claim(here, records_held(here))
    assert claim is not None
    for client in range(3):
        uses = Counter(int(i) for round in range(1, 8) for batch in round_indices(here, client, round) for i in batch)
        assert max(uses.values()) <= claim.event.count


@pytest.mark.parametrize("defense", [Clip(), GaussianNoise(), *(cls(noise_multiplier=0) for cls in (DPSGD, ClientDP, CentralDP))])
def test_without_both_clipping_and_noise_there_is_no_claim(defense: Defense) -> None:
    assert defense.claim(world(defense), (10, 10, 10, 10)) is None


@pytest.mark.parametrize(
    ("defense", "adversary", "unit", "sampling"),
    [
        (DPSGD(), "server", "record", "fixed schedule, known to the server; no amplification"),
        (ClientDP(), "server", "client", "cohort drawn by the server; no amplification"),
        (CentralDP(), "outsider", "client", "every cohort taken as known; no amplification"),
    ],
)
def test_claims_say_against_whom_for_whom_and_how(defense: Defense, adversary: str, unit: str, sampling: str) -> None:
    claim = defense.claim(world(defense, rounds=9, cohort=2), (10, 10, 10, 10))
    assert claim is not None
    assert (claim.adversary, claim.unit, claim.sampling) == (adversary, unit, sampling)
    assert claim.adjacency.startswith("zero-out (")


def test_client_level_claims_count_every_round() -> None:
    assert event(ClientDP(noise_multiplier=2.0), (10, 10, 10, 10), rounds=9, cohort=2) == SelfComposedDpEvent(GaussianDpEvent(2.0), 9)
    assert event(CentralDP(), (10, 10, 10, 10), rounds=9, cohort=2).count == 9


def test_central_dp_pays_for_unequal_weights() -> None:
    """The mean's sensitivity is the largest weight times S: by brute force over all cohorts and all sets of answers."""
    from itertools import combinations

    examples = (1, 2, 2, 7)
    worst = max(n * max(who) / sum(who) for n in (1, 2, 3) for who in combinations(examples, n))
    assert weighted_noise_multiplier(2.0, examples, range(1, 4)) == pytest.approx(2.0 / worst)
    assert weighted_noise_multiplier(2.0, (5, 5, 5), range(1, 4)) == pytest.approx(2.0)
    unequal = event(CentralDP(noise_multiplier=2.0), (10, 10, 10, 30), training={"algorithm": "fedavg"}, min_clients=4)
    assert unequal.event.noise_multiplier == pytest.approx(2.0 / (4 * 0.5))
    same_batch = event(CentralDP(noise_multiplier=2.0), (10, 10, 10, 30), training={"batch_size": 8})
    assert same_batch.event.noise_multiplier == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("recipe", "weight"),
    [
        (LocalTraining(batch_size=4), 4),
        (LocalTraining(batch_size=0), 10),
        (LocalTraining(batch_size=99), 10),
        (LocalTraining(algorithm="fedavg", batch_size=4), 10),
        (LocalTraining(algorithm="fedavg", batch_size=4, steps=2), 8),
        (LocalTraining(algorithm="fedavg", batch_size=4, steps=9), 10),
        (LocalTraining(algorithm="fedavg", batch_size=4, drop_last=True), 8),
    ],
)
def test_weights_are_the_examples_that_clients_report(recipe: LocalTraining, weight: int) -> None:
    from clients.private import private_record_ids, records_held

    assert recipe.examples_in_round(10) == weight
    here = World(data=TinyData(), model=TinyModel(), federation=world(clients=3).federation, training=recipe)
    for client, held in enumerate(records_held(here)):
        assert len(private_record_ids(here, client, 1)) == recipe.examples_in_round(held)


def test_central_dp_refuses_weights_that_are_random() -> None:
    recipe = {"algorithm": "fedavg", "batch_size": 4, "drop_last": True}
    assert CentralDP().refuses(world(CentralDP(), training=recipe)) is None
    reason = CentralDP().refuses(world(CentralDP(), training={**recipe, "epochs": 2}))
    assert reason is not None
    assert reason.startswith("drop_last must be false for central_dp over more than one epoch, got true")


def test_dp_sgd_takes_the_gradients_of_smoothed_labels() -> None:
    from clients.local import gradient_rule

    here = world(DPSGD(clip_norm=math.inf, noise_multiplier=0), training={"label_smoothing": 0.3})
    model = here.model.build(TinyData().load().schema, stream(0, "model"))
    parameters = {name: tensor.detach() for name, tensor in model.named_parameters()}
    batch = Batch(TinyData().load().records.inputs[:4], TinyData().load().records.labels[:4])
    private = Private(model, Broadcast(1, parameters, {}, here.training), (batch,))
    rule = gradient_rule(here.defenses, context(4), private, here.training)
    assert rule is not None
    mean, _ = training.mean_gradient(model, parameters, {}, batch, label_smoothing=0.3)
    for name, tensor in rule(model, parameters, {}, batch)[0].items():
        torch.testing.assert_close(tensor, mean[name])
