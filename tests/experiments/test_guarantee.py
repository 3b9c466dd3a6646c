"""The ceilings of an arm are those of its mechanism, against closed forms; where the formula does not hold there are none."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dp_accounting import ComposedDpEvent, GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from scipy.stats import chi2, norm

from clients.private import private_record_ids, records_held, splits
from defenses import fisher
from defenses.accounting import guarantee, until
from defenses.bounds import success_ceiling
from experiments import candidates
from experiments.directory import read_facts
from experiments.disclose import architecture, disclose
from experiments.guarantee import PROBES, clipping_and_noise, guarantee_of, leakage
from experiments.refusals import check
from experiments.run import run
from experiments.spec import Experiment
from experiments.under_attack import Victim
from simulator import config
from simulator.adversary import ThreatModel
from simulator.dataset import take
from simulator.network import tensors
from simulator.rng import stream
from simulator.types import Broadcast, Observation, Update, Upload
from simulator.world import World
from tests.federations import world


def victims(of: World, round: int = 1, history: Sequence[int] = ()) -> list[Victim]:
    """Uploads of three clients, beside what was disclosed of other rounds; their tensors play no part in a ceiling."""
    parts = splits(of)
    model = architecture(of, parts)
    parameters, buffers = tensors(model)
    found = []
    for client in range(3):
        ids = private_record_ids(of, client, round)
        upload = Upload(frozenset({client}), Update("gradient", parameters), buffers, len(ids))
        view, *others = [Observation(Broadcast(number, parameters, buffers, of.training), (upload,)) for number in (round, *history)]
        truth, threat = take(parts.private, ids), ThreatModel(rounds="all" if history else "one")
        told = disclose(threat, of, parts, truth, upload, model, others=others)
        found.append(Victim(view, told, truth, ids, (client,) * len(ids)))
    return found


def defended(*defenses: Any, **training: Any) -> World:
    return world(model={"name": "linear"}, federation={"rounds": 1}, training={"batch_size": 1, **training}, defenses=list(defenses))


def test_ceilings_of_dp_sgd() -> None:
    of = defended({"name": "dp_sgd", "clip_norm": 0.5, "noise_multiplier": 2.0})
    attacked = victims(of)
    found = guarantee_of(of, delta=1e-5, candidates=100, victims=attacked).views[1]
    assert found.identification == pytest.approx(norm.cdf(norm.ppf(0.01) + 0.5), abs=1e-6)
    seen = sorted(float((victim.truth.inputs - 0.5).norm()) for victim in attacked)
    mse = (seen[1] * 2.0) ** 2 * chi2.ppf(0.5, 64) / 64
    assert found.no_prior_psnr_db == pytest.approx(-10 * math.log10(mse))


def test_the_fisher_information_of_a_linear_model_is_its_closed_form() -> None:
    of = defended({"name": "gaussian_noise", "sigma": 0.1})
    attacked = victims(of)
    model, record, label = attacked[0].knowledge.model, attacked[0].truth.inputs, attacked[0].truth.labels
    parameters, buffers = tensors(model)

    def gradient(pixels: torch.Tensor) -> torch.Tensor:
        outputs = torch.func.functional_call(model, {**parameters, **buffers}, (pixels,))
        loss = torch.nn.functional.cross_entropy(outputs, label)
        return torch.cat([each.flatten() for each in torch.autograd.grad(loss, list(wanted.values()), create_graph=True)])

    wanted = {name: tensor.requires_grad_() for name, tensor in parameters.items()}
    parameters = wanted
    jacobian = torch.autograd.functional.jacobian(gradient, record).flatten(1)
    expected = math.sqrt(float(jacobian.square().sum()) / 64) / 0.1
    assert leakage(of, attacked)[0] == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize(
    ("of", "expected"),
    [
        (defended(), None),
        (defended({"name": "dp_sgd", "clip_norm": 0.5, "noise_multiplier": 2.0}), (0.5, 1.0)),
        (defended({"name": "dp_sgd", "clip_norm": 0.5, "noise_multiplier": 0.0}), None),
        (defended({"name": "gaussian_noise", "sigma": 0.1}, batch_size=4), (math.inf, 0.4)),
        (defended({"name": "clip", "clip_norm": 2.0}, {"name": "gaussian_noise", "sigma": 0.1}), (2.0, 0.1)),
        (defended({"name": "clip", "clip_norm": 2.0}, {"name": "gaussian_noise", "sigma": 0.1}, batch_size=4), None),
        (defended({"name": "gaussian_noise", "sigma": 0.1}, "secure_aggregation"), None),
        (defended({"name": "gaussian_noise", "sigma": 0.1}, algorithm="fedavg"), None),
    ],
)
def test_the_mechanism_is_read_off_the_stack(of: World, expected: tuple[float, float] | None) -> None:
    assert clipping_and_noise(of) == (expected if expected is None else pytest.approx(expected))


def test_no_ceiling_without_victims_or_with_batch_statistics() -> None:
    of = defended({"name": "gaussian_noise", "sigma": 0.1})
    assert leakage(of, []) == []
    attacked = victims(of)
    normed = torch.nn.Sequential(torch.nn.BatchNorm2d(1), attacked[0].knowledge.model)
    assert leakage(of, [replace(attacked[0], knowledge=replace(attacked[0].knowledge, model=normed))]) == []


@pytest.mark.parametrize(("model", "linear"), [("linear", True), ("mlp", True), ("lenet", False), ("cnn", False)])
def test_psnr_without_a_prior_is_bounded_only_where_the_first_layer_is_linear(model: str, linear: bool) -> None:
    """The bound is about a gradient row that is a multiple of the record; behind a convolution there is none."""
    of = replace_model(defended({"name": "dp_sgd", "clip_norm": 0.5, "noise_multiplier": 2.0}), model)
    found = guarantee_of(of, delta=1e-5, candidates=100, victims=victims(of)).views[1]
    assert (found.no_prior_psnr_db is not None) == linear
    assert found.identification < 1


def replace_model(of: World, model: str) -> World:
    return replace(of, model=world(model={"name": model}).model)


def test_the_mean_squared_error_is_bounded_for_the_most_exposed_record() -> None:
    of = defended({"name": "gaussian_noise", "sigma": 0.1})
    attacked = victims(of)
    every = leakage(of, attacked)
    found = guarantee_of(of, delta=1e-5, candidates=100, victims=attacked).views[1]
    assert found.dfil == max(every) > min(every)
    first = attacked[0]
    estimate = fisher.trace(
        first.knowledge.model, first.view.broadcast.parameters, {}, first.truth.inputs[0], first.truth.labels[0],
        probes=PROBES, rng=stream(of.seed, "fisher", 1, 0),
    )  # fmt: skip
    assert every[0] == pytest.approx(math.sqrt(estimate.value * math.exp(4.5 * estimate.error / estimate.value) / 64) / 0.1)
    assert every[0] > estimate.dfil(0.1)


def test_guarantees_for_several_units_bound_an_attack_together() -> None:
    stack = {"name": "dp_sgd", "clip_norm": 0.5, "noise_multiplier": 2.0}, {"name": "client_dp", "noise_multiplier": 1.9}
    both, alone = (guarantee_of(defended(*part), delta=1e-5, candidates=100) for part in (stack, stack[:1]))
    weak = guarantee_of(defended(stack[1]), delta=1e-5, candidates=100)
    assert both.training.identification == min(alone.training.identification, weak.training.identification)
    assert both.guarantee.sentence.count("ε = ") == 2


@pytest.mark.parametrize(
    ("defense", "round", "history", "releases", "whole"),
    [
        ("dp_sgd", 1, (), 1, 4),  # two batches an epoch: a record enters one release in two rounds
        ("dp_sgd", 2, (), 1, 4),
        ("dp_sgd", 3, (), 2, 4),
        ("dp_sgd", 1, (2, 8), 4, 4),
        ("dp_sgd", 3, (1, 2), 2, 4),
        ("client_dp", 1, (), 1, 8),
        ("client_dp", 3, (), 3, 8),
        ("local_dp", 3, (5,), 5, 8),
    ],
)
def test_the_ceiling_of_a_view_counts_the_releases_up_to_the_latest_round_in_it(
    defense: str, round: int, history: Sequence[int], releases: int, whole: int
) -> None:
    of = world(federation={"rounds": 8}, training={"batch_size": 100}, defenses=[{"name": defense, "noise_multiplier": 2.0}])
    found = guarantee_of(of, delta=1e-5, candidates=100, victims=victims(of, round, history))
    z = 4.0 if defense == "local_dp" else 2.0  # every clipped update is S from 0, and the noise is of 2S
    assert found.views[round].identification == pytest.approx(norm.cdf(norm.ppf(0.01) + math.sqrt(releases) / z), abs=1e-9)
    assert found.training.identification == pytest.approx(norm.cdf(norm.ppf(0.01) + math.sqrt(whole) / z), abs=1e-9)
    assert found.seen == {round: max(round, *history, 0)}
    assert found.guarantee.epsilon == guarantee(of, records_held=records_held(of)).epsilon  # ε is for the whole training


def test_the_ceiling_of_a_view_under_poisson_sampling_takes_the_earlier_rounds_with_q() -> None:
    defended = {"name": "dp_sgd", "noise_multiplier": 2.0}
    of = world(federation={"rounds": 5}, training={"batch_size": 60, "sampling": "poisson"}, defenses=[defended])
    found = guarantee_of(of, delta=1e-5, candidates=100, victims=[*victims(of), *victims(of, 3)])
    assert found.views[1].identification == pytest.approx(norm.cdf(norm.ppf(0.01) + 0.5), abs=1e-9)
    release, q = GaussianDpEvent(2.0), of.training.sampling_rate(min(records_held(of)))
    third = ComposedDpEvent([release, SelfComposedDpEvent(PoissonSampledDpEvent(q, release), 2)])
    assert found.views[3].identification == pytest.approx(success_ceiling(third, 0.01), abs=1e-9)
    assert found.views[1].identification < found.views[3].identification < found.training.identification


def test_what_an_adversary_of_released_models_may_know_is_no_ceiling_of_a_view() -> None:
    of = world(federation={"rounds": 3}, defenses=[{"name": "central_dp", "noise_multiplier": 2.0}])
    found = guarantee_of(of, delta=1e-5, candidates=100, victims=victims(of))
    assert found.views[1].identification == found.training.identification == 1.0


def test_there_is_no_view_beyond_the_training() -> None:
    with pytest.raises(ValueError, match=r"last must be a round in 1\.\.2, got 3"):
        until(world(), 3)


def test_noise_that_comes_after_the_server_saw_is_said_to_be_for_outsiders() -> None:
    of = world(federation={"rounds": 3}, defenses=[{"name": "central_dp", "noise_multiplier": 2.0}])
    outside = guarantee(of, records_held=records_held(of), delta=1e-5, adversary="outsider")
    found = guarantee_of(of, delta=1e-5, candidates=10).guarantee
    assert math.isinf(found.epsilon)
    assert found.sentence.startswith("ε = ∞ against the honest-but-curious server")
    assert found.sentence.endswith(outside.sentence)
    assert f"ε = {outside.epsilon:.5g}" in outside.sentence
    for quiet in (world(), world(training={"batch_size": 1}, defenses=[{"name": "dp_sgd", "noise_multiplier": 1.0}])):
        assert "outsider" not in guarantee_of(quiet, delta=1e-5, candidates=10).guarantee.sentence


def test_who_knows_the_other_records_of_a_batch_wastes_no_guess_on_them(tmp_path: Path) -> None:
    """Five guesses of ten candidates, four of which he knows to be the others: five of six, whatever the noise."""
    spec = {
        "data": "digits", "model": "linear", "federation": {"clients": 3}, "training": {"batch_size": 5}, "attacks": ["random_guess"],
        "arms": [{"name": "none"}, {"name": "dp", "defenses": [{"name": "dp_sgd", "noise_multiplier": 2.0}]}],
        "evaluation": {"candidates": 10, "shuffled_control": False},
    }  # fmt: skip
    assert run(config.build(Experiment, spec), tmp_path / "run", workers=1) == []
    facts = {fact.arm: fact for fact in read_facts(tmp_path / "run")}
    assert facts["dp"].ceiling >= 5 / 6
    assert facts["none"].ceiling == 1.0


@pytest.mark.parametrize(
    ("threat", "least"), [({}, 1797), ({"public_data": True}, 1797 - 539), ({"labels": "exact"}, 174), ({"labels": "exact", "public_data": True}, 110)]
)
def test_all_candidates_are_those_that_nobody_rules_out_as_many_for_each_victim(threat: dict[str, Any], least: int) -> None:
    """Of digits the rarest class has 174; three tenths of the records are public. Chance and ceiling are for this N."""
    table = {"data": "digits", "model": "linear", "split": {"public": 0.3}, "threat": threat, "arms": [{"name": "none"}]}
    found = config.build(Experiment, table | {"evaluation": {"candidates": 0}, "seeds": [0, 1]})
    check(found)
    if threat == {"labels": "exact", "public_data": True}:
        rarest = []
        for seed in (0, 1):
            parts = splits(found.world(found.arms[0], seed))
            rarest.append(int((parts.private.labels.bincount() + parts.test.labels.bincount()).min()))
        least = min(rarest)
        assert least < 174
    assert candidates.number(found) == least
    assert candidates.number(config.build(Experiment, table)) == 100
