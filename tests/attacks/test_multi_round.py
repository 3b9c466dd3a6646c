"""Several rounds of the same records: which rounds count, what their objective is, and what they gain."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from attacks._matching.objective import Objective
from attacks._matching.rounds import Rounds, averaged, trimmed_mean
from attacks._rounds import drift, redraws, same_sender
from attacks.update.inverting_gradients import InvertingGradients
from attacks.update.multi_round_matching import MultiRoundMatching
from experiments import isolated, trial
from experiments.isolated import Question
from experiments.refusals import check
from experiments.run import run
from experiments.spec import Experiment, load
from experiments.under_attack import find_victims
from simulator import config, host, lookup, parcel
from simulator.adversary import Knowledge, ThreatModel
from simulator.errors import SpecError
from simulator.rng import stream
from simulator.transcript import Record, read
from simulator.types import Batch, LocalTraining, Observation, Tensors, Update
from simulator.world import World
from tests.attacks.victims import attack_surface, build, photos, psnr_db, records, smooth
from tests.federations import equal

SHAPE = (1, 4, 4)
FULL = LocalTraining(batch_size=0)


def moved(model: nn.Module, by: float, seed: int) -> nn.Module:
    rng = stream(seed, "move")
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(torch.randn(tensor.shape, generator=rng), alpha=by)
    return model


def several(
    count: int, batch: Batch, build_model: object = smooth, *, sigma: float = 0.0, by: float = 0.05
) -> tuple[Observation, Knowledge]:
    """The first of ``count`` rounds with the others as history: one client, a model that drifts, noise drawn anew in each."""
    model, seen = build_model(), []  # type: ignore[operator]
    for number in range(count):
        view, knowledge = attack_surface(model, [batch], FULL)
        tensors: Tensors = view.upload.update.tensors
        rng = stream(number, "noise")
        tensors = {name: tensor + sigma * torch.randn(tensor.shape, generator=rng) for name, tensor in tensors.items()}
        upload = replace(view.upload, update=Update("gradient", tensors))
        seen.append(Observation(replace(view.broadcast, round=number + 1), (upload,)))
        moved(model, by, number)
    defenses = (("gaussian_noise", {"sigma": sigma}),) if sigma else ()
    return seen[0], replace(knowledge, history=tuple(seen[1:]), defenses=defenses, labels=batch.labels)


@pytest.mark.parametrize(
    ("recipe", "records", "same"),
    [
        (LocalTraining(batch_size=0), 5, True),
        (LocalTraining(batch_size=8), 5, True),
        (LocalTraining(batch_size=8), 8, False),
        (LocalTraining(algorithm="fedavg", batch_size=2), 5, True),
        (LocalTraining(algorithm="fedavg", batch_size=2, steps=1), 5, False),
        (LocalTraining(algorithm="fedavg", batch_size=2, drop_last=True), 5, False),
    ],
)
def test_which_recipes_take_the_same_records_again(recipe: LocalTraining, records: int, same: bool) -> None:
    assert (redraws(recipe, records) is None) == same


def test_dropout_is_refused_as_its_masks_differ_from_round_to_round() -> None:
    def dropping(p: float) -> nn.Module:
        return build("mlp", SHAPE, hidden=(8,), activation="sigmoid", dropout=p)

    refused = MultiRoundMatching().supports(*several(2, records(2, SHAPE), lambda: dropping(0.3)))
    assert refused is not None
    assert "dropout" in refused
    assert MultiRoundMatching().supports(*several(2, records(2, SHAPE), lambda: dropping(0.0))) is None


def test_other_rounds_are_those_of_the_same_sender() -> None:
    view, knowledge = several(4, records(1, SHAPE))
    stranger = replace(knowledge.history[1].upload, senders=frozenset({7}))
    larger = replace(knowledge.history[2].upload, num_examples=2)
    history = (knowledge.history[0], replace(knowledge.history[1], uploads=(stranger,)), replace(knowledge.history[2], uploads=(larger,)))
    assert same_sender(view, replace(knowledge, history=history)) == [knowledge.history[0]]
    attack = MultiRoundMatching()
    assert attack.supports(view, knowledge) is None
    assert "history must hold" in str(attack.supports(view, replace(knowledge, history=history[1:])))
    assert "history must hold" in str(attack.supports(view, replace(knowledge, history=())))
    drawn = replace(knowledge, training=LocalTraining(batch_size=1))
    assert "batch_size" in str(attack.supports(view, drawn))


def test_the_objective_is_the_mean_over_the_rounds() -> None:
    view, knowledge = several(3, records(2, SHAPE))
    attack = MultiRoundMatching(tv=0.0, tv_final=0.0)
    victim = attack.ready(view, knowledge)
    assert [len(v.others) for v in (victim,)] == [2]
    z = torch.rand(1, 32, generator=stream(0, "z"))
    rows = torch.arange(1)
    alone = [Objective([v], attack.setting())(z, rows) for v in (victim, *victim.others)]
    together = Rounds(Objective([victim], attack.setting()))(z, rows)
    assert torch.allclose(together.total, torch.stack([v.total for v in alone]).mean(0))
    assert torch.allclose(together.gradient, torch.stack([v.gradient for v in alone]).mean(0), atol=1e-6)
    in_turn = Rounds(Objective([victim], attack.setting()), at_once=1)
    for value in (*alone, alone[0]):
        assert torch.allclose(in_turn(z, rows).total, value.total)


def test_trimmed_mean_ignores_the_rounds_that_disagree() -> None:
    slopes = torch.tensor([[[1.0, 2.0], [1.0, 2.0], [1.0, 2.0], [900.0, -900.0]]])
    assert trimmed_mean(slopes).tolist() == [[1.0, 2.0]]
    assert trimmed_mean(slopes[:, :1]).tolist() == [[1.0, 2.0]]


def test_averaged_rounds_are_one() -> None:
    view, knowledge = several(3, records(1, SHAPE))
    victim = MultiRoundMatching(average="never").ready(view, knowledge)
    one = averaged(victim)
    assert one.others == ()
    assert torch.allclose(one.target, (victim.target + victim.others[0].target + victim.others[1].target) / 3)


def test_rounds_are_averaged_where_noise_is_larger_than_drift() -> None:
    for sigma, by, expected in ((0.1, 1e-4, True), (1e-5, 0.1, False), (0.0, 1e-6, False)):
        view, knowledge = several(3, records(2, SHAPE), sigma=sigma, by=by)
        assert MultiRoundMatching().averages(view, knowledge, knowledge.history) == expected


def test_drift_is_the_distance_of_the_models() -> None:
    view, knowledge = several(3, records(1, SHAPE))
    sent = [view.broadcast, *(seen.broadcast for seen in knowledge.history)]
    found = drift(sent, view.broadcast)
    expected = sum(float((sent[2].parameters[n] - t).double().square().sum()) for n, t in view.broadcast.parameters.items())
    assert float(found[0, 0]) == 0.0
    assert float(found[2, 2]) == pytest.approx(expected, rel=1e-6)


def test_labels_are_what_the_rounds_agree_on() -> None:
    view, knowledge = several(5, records(1, SHAPE, seed=3))
    untold = replace(knowledge, labels=None)
    wrong = replace(view.upload, update=Update("gradient", {n: -t for n, t in view.upload.update.tensors.items()}))
    liar = replace(view, uploads=(wrong,))
    assert MultiRoundMatching().ready(liar, untold).labels.tolist() == records(1, SHAPE, seed=3).labels.tolist()


SPEC = """
seeds = [31337]
attacks = ["random_guess"]
[data]
name = "digits"
[model]
name = "linear"
[federation]
clients = 2
rounds = 3
[evaluation]
rounds = [2]
[[arms]]
name = "none"
"""


@pytest.fixture(scope="module")
def run_of_three_rounds(tmp_path_factory: pytest.TempPathFactory) -> tuple[Experiment, World, Record]:
    place = tmp_path_factory.mktemp("rounds")
    (place / "spec.toml").write_text(SPEC)
    experiment = load(str(place / "spec.toml"), ["threat.rounds=all"])
    assert run(experiment, place / "out", workers=1) == []
    return experiment, experiment.world(experiment.arms[0], 31337), read(place / "out" / "transcript" / "none-seed31337")


@pytest.mark.slow
def test_history_is_withheld_unless_all_rounds_are_granted(run_of_three_rounds: tuple[Experiment, World, Record]) -> None:
    experiment, world, record = run_of_three_rounds
    assert [seen.broadcast.round for seen in record.observations] == [1, 2, 3]
    for victim in find_victims(replace(experiment, threat=ThreatModel()), world, record):
        assert victim.knowledge.history == ()
    for victim in find_victims(experiment, world, record):
        assert [seen.broadcast.round for seen in victim.knowledge.history] == [1, 3]
        assert all(any(seen is shown for shown in record.observations) for seen in victim.knowledge.history)
    kept = replace(experiment, threat=ThreatModel()).world(experiment.arms[0], 31337).federation.record_rounds
    assert kept == (2,)


def test_history_crosses_to_the_attack_once_and_whole(run_of_three_rounds: tuple[Experiment, World, Record]) -> None:
    experiment, world, record = run_of_three_rounds
    questions = [Question(victim.view, victim.knowledge, stream(0, "q")) for victim in find_victims(experiment, world, record)]
    job = isolated._job(lookup.get("attacks", "random_guess")(), config.dump(world.model), questions, ask=True, together=True)
    assert [len(known.history) for known in job["knowledge"]] == [0, 0]
    assert len(job["rounds"]) == 2
    heard: list[Knowledge] = []

    def answers(_attack: object, _views: object, knowledge: list[Knowledge], _states: object, **_: bool) -> list[object]:
        heard.extend(knowledge)
        return []

    sent = parcel.unpack(parcel.pack({**job, "path": sys.path}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "_answers", answers)
        assert list(host._do(sent, None)) == []  # type: ignore[arg-type]
    for known, question in zip(heard, questions, strict=True):
        assert len(known.history) == 2
        assert all(equal(got, was) for got, was in zip(known.history, question.knowledge.history, strict=True))


def test_the_shuffled_control_shuffles_history_too(run_of_three_rounds: tuple[Experiment, World, Record]) -> None:
    experiment, world, record = run_of_three_rounds
    victims = find_victims(experiment, world, record)
    blind = trial._blinded(victims, 1)
    for victim, hidden in zip(victims, blind, strict=True):
        for seen, shuffled in zip(victim.knowledge.history, hidden.knowledge.history, strict=True):
            weight, other = (of.uploads[0].update.tensors["head.weight"] for of in (seen, shuffled))
            assert not torch.equal(weight, other)
            assert torch.equal(weight.flatten().sort().values, other.flatten().sort().values)
            assert shuffled.broadcast.round == seen.broadcast.round
            sent, told, own = (of.broadcast.parameters["head.weight"] for of in (seen, shuffled, victim.view))
            assert not torch.equal(sent, own)
            assert torch.equal(told, own), "the difference of two models is the true mean update"
    assert blind[0].knowledge.history[0] is blind[1].knowledge.history[0]


def test_all_rounds_of_one_are_refused() -> None:
    with pytest.raises(SpecError, match="threat.rounds must be 'one'"):
        check(load("demo", ["threat.rounds=all", "federation.rounds=1", "evaluation.rounds=[1]"]))


@pytest.mark.slow
def test_noise_averages_out_over_rounds() -> None:
    batch = photos(1, 32, 5)
    view, knowledge = several(8, batch, lambda: build("convnet", (3, 32, 32), width=8), sigma=0.01, by=1e-4)
    one = InvertingGradients(steps=200)(view, knowledge, rng=stream(0, "attack"))
    eight = MultiRoundMatching(steps=200)(view, knowledge, rng=stream(0, "attack"))
    assert psnr_db(eight.inputs, batch.inputs) > psnr_db(one.inputs, batch.inputs) + 1.0
