"""Heuristics that a solver sees through: records and mixtures that are read off exactly, in closed form where there is one.

Figures of the defenses' pages; gradient matching against heuristics is measured in test_heuristics_matched.py.

Digits, one record for each upload, the model ``mlp`` where nothing else is said.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from statistics import fmean
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from attacks._matching.defended import struck
from attacks.strongest import Strongest
from attacks.update.candidate_identification import CandidateIdentification
from attacks.update.dlg import DLG
from attacks.update.levenberg_marquardt import LevenbergMarquardt
from attacks.update.linear_leak import LinearLeak
from attacks.update.r_gap import RGap
from clients.local import encoded, local_upload
from clients.private import held_by, private_batches, private_records, splits
from defenses.client.mixup import MixUp
from experiments.disclose import architecture, disclose
from experiments.under_attack import outlooks
from simulator.adversary import Knowledge, ThreatModel
from simulator.answer import checked
from simulator.defense import ClientContext, Pool
from simulator.models.latent import noise_from
from simulator.network import network, tensors
from simulator.rng import secret_stream, stream
from simulator.types import Batch, Broadcast, Observation
from simulator.world import World
from tests.attacks.victims import psnr_db
from tests.federations import world

VICTIMS = 20
CNN = {"name": "cnn", "width": 8, "hidden": 64}
RNG = stream(0, "attack")


class Case(NamedTuple):
    """A view, what is known, the record, and what the client trained on."""

    view: Observation
    known: Knowledge
    truth: Batch
    trained: Batch


def against(defense: Any, count: int = VICTIMS, seed: int = 0, **settings: Any) -> Iterator[Case]:
    of = world(
        federation={"clients": VICTIMS, "rounds": 1},
        training={"batch_size": 1},
        defenses=[defense] if defense else [],
        seed=seed,
        **settings,
    )
    parts = splits(of)
    model, told = network(of.architecture, parts.schema, of.training, of.seed), architecture(of, parts)
    sent = Broadcast(1, *tensors(model), of.training)
    for client in range(count):
        upload = local_upload(of, model, sent, client)
        truth = private_records(of, client, 1)
        known = disclose(ThreatModel(), of, parts, truth, upload, told)
        context = ClientContext(client, 1, 1, secret_stream(of.seed, of.secret, "defense", client, 1))
        yield Case(Observation(sent, (upload,)), known, truth, encoded(of, private_batches(of, client, 1), context)[0])


def read_off(case: Case) -> Tensor:
    """What entered the first layer, as ``linear_leak`` has it."""
    assert LinearLeak().supports(case.view, case.known) is None
    guess = LinearLeak()(case.view, case.known, rng=RNG).inputs
    assert guess is not None
    return guess


def read_targets(case: Case, inputs: Tensor) -> Tensor:
    """Targets y from the head's bias: ∂b = s·softmax − y with s = Σy, and y = 0 for most classes."""
    softmax = functional_call(case.known.model, dict(case.view.broadcast.parameters), (inputs,)).softmax(1)[0]
    bias = case.view.upload.update.tensors["head.bias"]
    return (bias / softmax).median() * softmax - bias


def candidates(case: Case, of: World, number: int) -> Batch:
    """The record and 99 others, itself first."""
    parts = splits(of)
    inputs, labels = (torch.cat([getattr(parts.private, name), getattr(parts.test, name)]) for name in ("inputs", "labels"))
    others = torch.randperm(len(labels), generator=stream(1, "candidates", number))[:99]
    return Batch(torch.cat([case.truth.inputs, inputs[others]]), torch.cat([case.truth.labels, labels[others]]))


class Found(NamedTuple):
    """How many records are named among 100: as the nearest to what was read off, as one that leaves a rest in bounds, by the attack."""

    nearest: int
    bounded: int
    named: int


def identified(defense: Any, count: int = VICTIMS, *, masked: bool = False, seed: int = 0) -> Found:
    nearest = bounded = hits = 0
    public = splits(world(seed=seed)).public
    for number, case in enumerate(against(defense, count, seed=seed)):
        mixture = read_off(case)
        targets = read_targets(case, mixture)
        assert case.trained.targets is not None
        torch.testing.assert_close(targets, case.trained.targets[0], atol=1e-5, rtol=0)
        among = candidates(case, world(seed=seed), number)
        share = targets[among.labels].clamp(0, 1).view(-1, 1, 1, 1)
        nearest += int((among.inputs - mixture).flatten(1).norm(dim=1).argmin() == 0)
        rests = torch.stack([pixels - share * among.inputs for pixels in ([mixture, 1 - mixture] if masked else [mixture])])
        outside = ((-rests).clamp(min=0) + (rests - (1 - share)).clamp(min=0)).amin(0).flatten(1).sum(1)
        bounded += int(torch.where(share.flatten() < 0.02, torch.inf, outside).argmin() == 0)
        hits += named(case, among, public)
    return Found(nearest, bounded, hits)


def named(case: Case, among: Batch, public: Batch | None = None) -> int:
    """Whether the shipped attack names the record, which is the first of them; it is handed them backwards."""
    handed = Batch(among.inputs.flip(0), among.labels.flip(0))
    answer = CandidateIdentification()(case.view, replace(case.known, candidates=handed, public=public), rng=stream(0, "attack"))
    assert answer.inputs is not None
    assert answer.certificate == ("",)
    return int(torch.equal(answer.inputs, case.truth.inputs))


# --- MixUp ---


def test_a_mixture_and_its_shares_are_read_off_and_tell_who_is_in_it() -> None:
    for case in against({"name": "mixup"}, 5):
        assert psnr_db(read_off(case), case.trained.inputs) > 100
    found = identified({"name": "mixup"})
    assert found.nearest <= 12
    assert found.named >= max(found.bounded, 18)


@pytest.mark.parametrize(("uses", "least"), [(5, 18), (20, 28), (100, 34)])
def test_mixtures_of_one_record_give_it_away_by_their_median(uses: int, least: float) -> None:
    """The third of the mixtures with the largest shares, their partner taken for the public mean, median by pixel."""
    of = world(federation={"clients": VICTIMS})
    parts, found = splits(of), []
    mean = parts.public.inputs.mean(0)
    for number in range(VICTIMS):
        image, label = parts.private.inputs[number], parts.private.labels[number]
        pool = Pool(held_by(of, number), parts.public, 10)
        context = ClientContext(0, 1, 1, stream(0, "uses", number), pool=pool)
        mixtures = MixUp().on_batch(Batch(image.expand(uses, -1, -1, -1), label.expand(uses)), context)
        assert mixtures.targets is not None
        shares = mixtures.targets[:, label]  # a partner of the same class counts: hence the median
        top = shares.topk(max(3, uses // 3)).indices
        weights = shares[top].view(-1, 1, 1, 1)
        guess = ((mixtures.inputs[top] - (1 - weights) * mean) / weights).median(0).values.clamp(0, 1)
        found.append(psnr_db(guess, image))
    assert fmean(found) > least
    assert fmean(psnr_db(mean, image) for image in parts.private.inputs[:VICTIMS]) < 12


# --- InstaHide ---


@pytest.mark.parametrize(
    ("settings", "count", "least"),
    [({"k": 2}, 10, 9), ({"partners": "inter"}, 20, 16), pytest.param({}, 20, 12, marks=pytest.mark.slow)],
    ids=str,
)
def test_an_encoding_is_read_off_and_one_is_enough_to_identify_most(settings: dict[str, Any], count: int, least: int) -> None:
    """Better than by bounds alone; chance is 0.01 of each."""
    defense = {"name": "instahide", **settings}
    for case in against(defense, 3):
        assert psnr_db(read_off(case), case.trained.inputs) > 100
        assert psnr_db(read_off(case), case.truth.inputs) < 10
    found = identified(defense, count, masked=True)
    assert found.nearest <= 1
    assert found.named >= max(found.bounded, least)


# --- ATS ---


def test_a_transformed_record_is_read_off_far_from_the_record_and_yet_identified() -> None:
    far, nearest, best = [], 0, 0
    for number, case in enumerate(against({"name": "ats"}, 3)):
        seen = read_off(case)
        assert psnr_db(seen, case.trained.inputs) > 100
        far.append(psnr_db(seen, case.truth.inputs))
        among = candidates(case, world(), number)
        nearest += int((among.inputs - seen).flatten(1).norm(dim=1).argmin() == 0)
        best += named(case, among)
    assert fmean(far) < 11, "the trap: by this metric it is protected"
    assert nearest <= 1
    assert best == 3


@pytest.mark.parametrize("name", ["mixup", "instahide", "ats"])
def test_no_proof_is_taken_for_one_about_the_record(name: str) -> None:
    case = next(against({"name": name}))
    answer = LinearLeak()(case.view, case.known, rng=RNG)
    assert answer.certificate == ("rank one",)
    assert case.known.encoded
    assert checked(answer, case.known).certificate == ()
    assert checked(answer, replace(case.known, encoded=False)).certificate == ("rank one",)
    assert outlooks([(case.view, case.known)], 0) == [None]
    assert not next(against({"name": "precode"})).known.encoded


# --- PRECODE ---


def test_a_fully_connected_first_layer_does_not_notice_the_bottleneck() -> None:
    for case in against({"name": "precode"}, 5):
        assert psnr_db(read_off(case), case.truth.inputs) > 100


def read_noise(case: Case) -> Tensor:
    """ε of one record: a linear layer's input x from ∂W = ∂b·xᵀ, at the encoder and at the decoder."""
    update, parameters = case.view.upload.update.tensors, case.view.broadcast.parameters

    def entered(layer: str) -> Tensor:
        weight, bias = update[f"{layer}.weight"].double(), update[f"{layer}.bias"].double()
        return weight.T @ bias / bias.square().sum()

    encoder = "head.bottleneck.encoder"
    both = parameters[f"{encoder}.weight"].double() @ entered(encoder) + parameters[f"{encoder}.bias"].double()
    mean, log_variance = both.chunk(2)
    return (entered("head.bottleneck.decoder") - mean) / (0.5 * log_variance).exp()


def test_the_noise_is_read_off_one_records_update() -> None:
    for client, case in enumerate(against({"name": "precode"}, 5, model="lenet")):
        drawn = torch.randn(1, 256, generator=secret_stream(0, "", "latent", client, 1))
        torch.testing.assert_close(read_noise(case), drawn[0].double(), atol=2e-5, rtol=0)


@pytest.mark.slow
def test_with_the_noise_known_matching_is_as_strong_as_without_the_defense() -> None:
    attack = DLG(seconds=8)
    for case in against({"name": "precode"}, 5, model="lenet"):
        noise = read_noise(case)
        assert psnr_db(attack(case.view, case.known, rng=RNG).inputs, case.truth.inputs) < 8
        with noise_from(lambda like, noise=noise: noise.to(like).expand(like.shape)):  # type: ignore[misc]
            assert psnr_db(attack(case.view, case.known, rng=RNG).inputs, case.truth.inputs) > 80


# --- what is left as it was: the model and the data of experiments/specs/defenses.toml ---


@pytest.mark.parametrize(
    "defense",
    [
        None,
        *({"name": "soteria", "pruned": pruned} for pruned in (0.2, 0.5, 0.8)),
        *({"name": "precode", "k": k} for k in (16, 64, 256)),
    ],
    ids=str,
)
def test_one_record_is_peeled_from_the_layers_that_a_defense_leaves_alone(defense: Any) -> None:
    """Exact and proven, as without any defense, of which the control is the first of these."""
    found = [(Strongest(seconds=0.5)(case.view, case.known, rng=RNG), case.truth.inputs) for case in against(defense, 10, model=CNN)]
    scores = [psnr_db(guess.inputs, truth) for guess, truth in found]
    print(f"\n{defense}: {fmean(scores):.0f} dB, {sum(bool(guess.certificate[0]) for guess, _ in found)} of {len(found)} proven")
    assert min(scores) > 100
    assert all(guess.certificate == ("layer by layer",) and guess.solver == ("r_gap",) for guess, _ in found)


@pytest.mark.parametrize("noised", [0.1, 0.4, 0.8])
def test_steps_that_outpost_leaves_alone_are_read_like_any_others(noised: float) -> None:
    """One in nine in round 1; zeros, or the rank of the head's gradient, tell which. What it struck is not peeled."""
    plain, free = against(None, model=CNN), 0
    for case, other in zip(against({"name": "outpost", "noised": noised}, model=CNN), plain, strict=True):
        one, two = case.view.upload.update.tensors, other.view.upload.update.tensors
        alone = all(torch.equal(tensor, two[name]) for name, tensor in one.items())
        assert struck(one, 1) != alone
        free += alone
        if alone:
            guess = Strongest(seconds=0.5)(case.view, case.known, rng=RNG)
            assert psnr_db(guess.inputs, case.truth.inputs) > 100
            assert guess.certificate == ("layer by layer",)
        else:
            assert RGap().supports(case.view, case.known) is not None
    assert 0 < free < VICTIMS / 2


# --- hygiene ---


@pytest.mark.parametrize("model", ["mlp", "lenet", CNN], ids=str)
def test_without_the_first_bias_a_record_is_peeled_layer_by_layer(model: Any) -> None:
    for case in against({"name": "no_first_bias"}, 3, model=model):
        assert LinearLeak().supports(case.view, case.known) is not None, "what it stops"
        guess = RGap()(case.view, case.known, rng=RNG)
        assert psnr_db(guess.inputs, case.truth.inputs) > 100
        assert guess.certificate == ("layer by layer",)


def test_behind_a_frozen_relu_layer_the_active_neurons_are_equations() -> None:
    """The next layer gives h = relu(Wx + b) away; the rows with h > 0 are linear in the pixels, 64 of them."""
    for case in against({"name": "frozen_first_layer"}, 5):
        update, sent = case.view.upload.update.tensors, case.view.broadcast
        weight, bias = update["head.weight"].double(), update["head.bias"].double()
        hidden = weight.T @ bias / bias.square().sum()
        active = hidden > 1e-6
        assert int(active.sum()) > 64
        left, right = sent.buffers["layer0.weight"].double()[active], (hidden - sent.buffers["layer0.bias"].double())[active]
        pixels = 0.5 + 0.25 * torch.linalg.lstsq(left, right[:, None]).solution.flatten()
        assert psnr_db(pixels, case.truth.inputs.flatten()) > 80


@pytest.mark.parametrize("model", ["mlp", "lenet", CNN], ids=str)
def test_a_frozen_first_layer_is_peeled_like_the_others(model: Any) -> None:
    """Without its gradient there is z = Wx + b. Where a ReLU leaves too few equations, black pixels and dead outputs make up for them."""
    found = [
        (RGap()(case.view, case.known, rng=RNG), case.truth.inputs) for case in against({"name": "frozen_first_layer"}, 10, model=model)
    ]
    scores = [psnr_db(guess.inputs, truth) for guess, truth in found]
    proven = [score for score, (guess, _) in zip(scores, found, strict=True) if guess.certificate[0]]
    print(f"\n{model}: {fmean(scores):.0f} dB, {sum(score > 60 for score in scores)} exact, {len(proven)} of {len(found)} proven")
    assert sum(score > 60 for score in scores) >= 8
    assert len(proven) >= 6
    assert min(proven) > 60


def test_behind_a_frozen_smooth_layer_second_order_steps_are_exact() -> None:
    for case in against({"name": "frozen_first_layer"}, 2, model="lenet"):
        guess = LevenbergMarquardt(seconds=8)(case.view, case.known, rng=RNG)
        assert psnr_db(guess.inputs, case.truth.inputs) > 100
        assert guess.certificate[0]
