"""The ceilings of an arm are those of its mechanism, against closed forms; where the formula does not hold there are none."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
from simulator.defense import ClientContext, Defense
from simulator.models.dropout import Dropout
from simulator.network import tensors
from simulator.rng import stream
from simulator.types import Broadcast, Observation, Tensors, Update, Upload
from simulator.world import World
from tests.defenses.tiny import Reporter
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


DP_SGD = {"name": "dp_sgd", "clip_norm": 0.5, "noise_multiplier": 2.0}
CLIENT_DP = {"name": "client_dp", "clip_norm": 0.5, "noise_multiplier": 2.0}
LOCAL_DP = {"name": "local_dp", "clip_norm": 0.5, "noise_multiplier": 1.0}  # in units of 2S
NOISE = {"name": "gaussian_noise", "sigma": 0.1}
CLIP = {"name": "clip", "clip_norm": 2.0}
HELD = 100


@pytest.mark.parametrize(
    ("of", "expected"),
    [
        (defended(), None),
        (defended(DP_SGD), (0.5, 1.0)),
        (defended(DP_SGD, batch_size=4), (0.5, 1.0)),  # each record's is clipped
        (defended(DP_SGD, batch_size=0), (0.5, 1.0)),
        (defended(DP_SGD, batch_size=4, sampling="poisson"), (0.5, 1.0)),
        (defended({**DP_SGD, "noise_multiplier": 0.0}), None),
        (defended({**DP_SGD, "noise_multiplier": 0.0}, NOISE, batch_size=4), (0.5, 0.4)),
        (defended(CLIENT_DP), (0.5, 1.0)),
        (defended({**CLIENT_DP, "noise_multiplier": 0.0}, NOISE), (0.5, 0.1)),
        (defended({**CLIENT_DP, "clip_norm": math.inf, "noise_multiplier": 0.0}, NOISE, batch_size=4), (math.inf, 0.4)),
        (defended(CLIENT_DP, batch_size=4), None),
        (defended(CLIENT_DP, sampling="poisson"), None),  # one record is expected, two may be drawn
        (defended(LOCAL_DP), (0.5, 1.0)),
        (defended(LOCAL_DP, batch_size=4), None),
        (defended({**LOCAL_DP, "mechanism": "laplace"}), None),
        (defended({**LOCAL_DP, "mechanism": "laplace", "noise_multiplier": 0.0}, NOISE), None),  # clips in another norm
        (defended(NOISE, batch_size=4), (math.inf, 0.4)),
        (defended(NOISE, batch_size=0), (math.inf, 0.1 * HELD)),
        (defended(CLIP, NOISE), (2.0, 0.1)),
        (defended(CLIP, {**CLIP, "clip_norm": 0.7}, NOISE), (0.7, 0.1)),
        (defended(CLIP, NOISE, batch_size=4), None),
        (defended({"name": "central_dp", "clip_norm": 0.7}, NOISE), (0.7, 0.1)),
        (defended({"name": "central_dp", "clip_norm": 0.7}), None),
        (defended("top_k", NOISE), None),
        (defended("laplace_noise"), None),
        (defended("laplace_noise", NOISE), None),
        (defended("distributed_dp", {"name": "secure_aggregation", "bits": 20}), None),
        (defended(NOISE, algorithm="fedavg"), None),
    ],
)
def test_the_mechanism_is_read_off_the_stack(of: World, expected: tuple[float, float] | None) -> None:
    assert clipping_and_noise(of, HELD) == (expected if expected is None else pytest.approx(expected))


@pytest.mark.parametrize("mechanism", [DP_SGD, CLIENT_DP, LOCAL_DP])
@pytest.mark.parametrize(
    "after",
    ["sign_sgd", "top_k", "qsgd", "random_pruning", "clip", "gaussian_noise", "laplace_noise", "secure_aggregation", "ckks_aggregation",
     "simulated_enclave", "central_dp", "group_norm", "model_inspection"],
)  # fmt: skip
def test_what_is_done_to_the_noisy_update_alone_leaves_the_bound(mechanism: dict[str, Any], after: str) -> None:
    assert clipping_and_noise(defended(mechanism, after), HELD) == clipping_and_noise(defended(mechanism), HELD) == (0.5, 1.0)


@pytest.mark.parametrize("mechanism", [DP_SGD, CLIENT_DP, LOCAL_DP, NOISE])
@pytest.mark.parametrize("other", ["soteria", "censor", "outpost", "mixup", "instahide", "ats"])
def test_where_the_private_batch_is_used_otherwise_there_is_no_bound(mechanism: dict[str, Any], other: str) -> None:
    for stack in ((mechanism, other), (other, mechanism)):
        assert clipping_and_noise(defended(*stack), HELD) is None


def test_a_report_on_the_update_must_come_after_its_noise() -> None:
    for mechanism, before in ((DP_SGD, True), (CLIENT_DP, False)):  # dp_sgd's noise is there before any update
        (noise,) = defended(mechanism).defenses
        assert clipping_and_noise(replace(defended(), defenses=(noise, Reporter())), HELD) == (0.5, 1.0)
        assert (clipping_and_noise(replace(defended(), defenses=(Reporter(), noise)), HELD) is not None) == before


@dataclass(frozen=True)
class Doubling(Defense):
    """Listed after the noise on updates, and acts before it: every on_step precedes every on_update."""

    name = "doubling"

    def on_step(self, gradient: Tensors, context: ClientContext) -> Tensors:
        return {name: 2 * tensor for name, tensor in gradient.items()}


def test_hooks_count_in_the_order_in_which_a_client_comes_to_them() -> None:
    for mechanism, expected in ((DP_SGD, (0.5, 1.0)), (CLIENT_DP, None)):
        (noise,) = defended(mechanism).defenses
        assert clipping_and_noise(replace(defended(), defenses=(noise, Doubling())), HELD) == expected


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("stack", [(DP_SGD,), (CLIENT_DP,), (LOCAL_DP,), (NOISE,), (CLIP, NOISE)])
def test_clip_norm_and_noise_are_those_that_the_hooks_apply(stack: tuple[dict[str, Any], ...], batch: int) -> None:
    """What comes out of a long gradient among zeros, less what comes out of zeros alone, which is the noise: its clipped self, over the batch."""
    of = defended(*stack, batch_size=batch)
    stated = clipping_and_noise(of, HELD)
    if batch > 1 and stack not in ((DP_SGD,), (NOISE,)):
        assert stated is None
        return
    assert stated is not None
    clip_norm, std = stated
    rule = next((defense for defense in of.defenses if defense.per_example), Defense())

    def uploaded(gradient: torch.Tensor) -> torch.Tensor:
        context = ClientContext(client=0, round=1, batch_size=batch, rng=stream(0, "noise"))
        update = Update("gradient", rule.on_gradient({"w": torch.cat([gradient[None], torch.zeros(batch - 1, len(gradient))])}, context))
        for defense in of.defenses:
            update = defense.on_update(update, context)
        return batch * update.tensors["w"]

    gradient = torch.randn(100_000, generator=stream(0, "gradient"))  # of norm 316: clipped by all that clip
    noise = uploaded(torch.zeros_like(gradient))
    assert float(noise.std()) == pytest.approx(std, rel=4 / math.sqrt(2 * len(noise)))
    kept = float(gradient.norm()) if math.isinf(clip_norm) else clip_norm
    assert float((uploaded(gradient) - noise).norm()) == pytest.approx(kept, rel=1e-3)


def test_at_a_batch_of_one_clipped_updates_are_bounded_as_dp_sgd_is() -> None:
    """Against the whole Jacobian of the clipped gradient of softmax regression, written out: (p − e) ⊗ (x − 1/2, 1)."""
    attacked = victims(defended())[:2]
    same = [leakage(defended(one), attacked) for one in (DP_SGD, CLIENT_DP, LOCAL_DP)]
    after = [leakage(defended(one, *rest), attacked) for one, *rest in ((CLIENT_DP, "sign_sgd"), (LOCAL_DP, "qsgd", "secure_aggregation"))]
    assert len(same[0]) == 2
    assert same[0] == same[1] == same[2] == after[0] == after[1]
    assert leakage(defended({**LOCAL_DP, "noise_multiplier": 2.0}), attacked) == pytest.approx([one / 2 for one in same[0]])
    model, truth = attacked[0].knowledge.model, attacked[0].truth
    weight, bias = (tensor.double() for tensor in tensors(model)[0].values())

    def clipped(pixels: torch.Tensor) -> torch.Tensor:
        seen = pixels.flatten() - 0.5
        error = torch.softmax(weight @ seen + bias, 0) - torch.nn.functional.one_hot(truth.labels[0], len(bias))
        gradient = torch.cat([torch.outer(error, seen).flatten(), error])
        return gradient * torch.clamp(0.5 / gradient.norm(), max=1.0)

    jacobian = torch.autograd.functional.jacobian(clipped, truth.inputs[0].double())
    exact = math.sqrt(float(jacobian.square().sum()) / 64) / 1.0
    assert exact < same[0][0] < 1.25 * exact


def test_no_ceiling_without_victims_or_with_batch_statistics() -> None:
    of = defended({"name": "gaussian_noise", "sigma": 0.1})
    assert leakage(of, []) == []
    attacked = victims(of)
    for random, bounded in (
        (torch.nn.BatchNorm2d(1), False), (torch.nn.Dropout(0.5), False), (Dropout(0.5), False), (Dropout(0.0), True), (torch.nn.Identity(), True)
    ):  # fmt: skip
        model = torch.nn.Sequential(OrderedDict([("random", random), *attacked[0].knowledge.model.named_children()]))
        assert bool(leakage(of, [replace(attacked[0], knowledge=replace(attacked[0].knowledge, model=model))])) == bounded


def test_a_bottleneck_that_draws_ends_the_bound_and_other_models_of_defenses_keep_it() -> None:
    for stack, bounded in (
        (("precode", DP_SGD), False), (("no_first_bias", CLIENT_DP), True), (("frozen_first_layer", CLIENT_DP), True), ((CLIENT_DP,), True)
    ):  # fmt: skip
        of = replace_model(defended(*stack), "mlp")
        assert bool(leakage(of, victims(of))) == bounded
    of = replace_model(defended("group_norm", DP_SGD), "resnet20")
    assert leakage(of, victims(of)[:1])[0] > 0


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
