"""The contest between the ladder and the learned inverter: decided on public records, none of which both sides have seen."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch

from attacks import _contest, strongest
from attacks._contest import contested, inverter_wins, worth
from attacks._rehearsal import psnr_db
from attacks._solving import State, after
from attacks.strongest import Strongest
from attacks.update.learning_to_invert import LearningToInvert
from attacks.update.linear_leak import LinearLeak
from simulator.adversary import Knowledge, Reconstruction
from simulator.rng import stream
from simulator.types import Batch, LocalTraining, Observation
from tests.attacks.victims import attack_surface, build, digits

TRUTH, PUBLIC = digits(2), digits(60, offset=200)


@dataclass(frozen=True)
class Painter:
    """Guesses one gray for every record, or, if it is skilled, finds the record among all digits by its first pixel's row; only here."""

    name: ClassVar[str] = "painter"

    def supports(self, view: Observation, knowledge: Knowledge) -> str | None:
        return None

    def __call__(self, view: Observation, knowledge: Knowledge, *, rng: torch.Generator) -> Reconstruction:
        count = knowledge.num_examples
        return Reconstruction(torch.full((count, 1, 8, 8), 0.5), torch.zeros(count).long(), converged=True)


@dataclass(frozen=True)
class Skilled(Painter):
    """Divides the record out of a linear layer's gradient and adds a speckle, so that it is good and unproven."""

    def __call__(self, view: Observation, knowledge: Knowledge, *, rng: torch.Generator) -> Reconstruction:
        found = LinearLeak()(view, knowledge, rng=rng)
        assert found.inputs is not None
        noise = 0.001 * torch.randn(found.inputs.shape, generator=rng)
        return replace(found, inputs=(found.inputs + noise).clamp(0, 1), certificate=(), converged=True)


@pytest.mark.parametrize(("solver", "winner"), [(Painter, "learning_to_invert"), (Skilled, "painter")])
def test_who_was_better_on_public_records_answers_for_the_victims(solver: type[Any], winner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strongest, "LADDER", (solver,))
    pairs = [attack_surface(build("linear", (1, 8, 8)), [Batch(TRUTH.inputs[i : i + 1], TRUTH.labels[i : i + 1])]) for i in (0, 1)]
    model = pairs[0][1].model
    views, knowledge = [view for view, _ in pairs], [replace(known, model=model, public=PUBLIC) for _, known in pairs]
    taught: list[set[int]] = []
    honest = LearningToInvert.many

    def watched(
        self: LearningToInvert, views: Sequence[Observation], knowledge: Sequence[Knowledge], *, rngs: Sequence[torch.Generator]
    ) -> list[Reconstruction]:
        taught.append({len(known.public) for known in knowledge if known.public is not None})
        return honest(self, views, knowledge, rngs=rngs)

    monkeypatch.setattr(LearningToInvert, "many", watched)
    answers = Strongest(seconds=1.0).many(views, knowledge, rngs=[stream(i) for i in (0, 1)])
    assert [answer.solver for answer in answers] == [(winner,), (winner,)]
    rehearsal, performance = {len(PUBLIC) - 2}, {len(PUBLIC)}  # two victims, two rehearsals
    assert taught == ([rehearsal, performance] if winner == "learning_to_invert" else [rehearsal])


def proven_and_guessed(
    views: Sequence[Observation], knowledge: Sequence[Knowledge], rngs: Sequence[torch.Generator], seconds: float
) -> list[State]:
    """The first upload solved with a proof, the second well guessed, by division; as the ladder would."""
    states = []
    for number, state in enumerate(strongest.begun(views, knowledge)):
        found = LinearLeak()(state.view, state.knowledge, rng=rngs[number])
        assert found.inputs is not None
        guess = replace(found, inputs=(found.inputs + 0.02).clamp(0, 1), certificate=(), converged=True)
        states.append(after(state, "leak", guess if number else found))
    return states


def test_a_rehearsed_upload_that_is_proven_counts_for_the_ladder(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no guess beside its proof: it was scored as mid-gray."""
    view, knowledge = attack_surface(build("linear", (1, 8, 8)), [digits(1)])

    class Blurred(Skilled):
        def many(
            self, views: Sequence[Observation], knowledge: Sequence[Knowledge], *, rngs: Sequence[torch.Generator]
        ) -> list[Reconstruction]:
            found = [LinearLeak()(*pair, rng=rngs[0]) for pair in zip(views, knowledge, strict=True)]
            return [replace(each, inputs=0.95 * each.inputs + 0.02) for each in found if each.inputs is not None]

    monkeypatch.setattr(_contest, "LearningToInvert", lambda seconds: Blurred())
    assert not inverter_wins(view, replace(knowledge, public=PUBLIC), 2, 10.0, proven_and_guessed)


@dataclass(frozen=True)
class Sketch(Painter):
    """Algebra whose guess is no good."""

    name: ClassVar[str] = "sketch"


@dataclass(frozen=True)
class Photographer(Painter):
    """Matching that explains the victim's update to the last digit and, in rehearsal, paints."""

    name: ClassVar[str] = "photographer"

    def __call__(self, view: Observation, knowledge: Knowledge, *, rng: torch.Generator) -> Reconstruction:
        guess = super().__call__(view, knowledge, rng=rng)
        if knowledge.public is None or len(knowledge.public) < len(PUBLIC):
            return guess
        return replace(guess, inputs=TRUTH.inputs[:1], labels=TRUTH.labels[:1])


def test_what_the_rehearsal_decided_is_final(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strongest, "LADDER", (Sketch, Photographer))
    monkeypatch.setattr(strongest, "ALGEBRAIC", (Sketch,))
    monkeypatch.setattr(strongest, "MATCHING", (Photographer,))
    view, knowledge = attack_surface(build("linear", (1, 8, 8)), [Batch(TRUTH.inputs[:1], TRUTH.labels[:1])])
    answer = Strongest(seconds=2.0)(view, replace(knowledge, public=PUBLIC), rng=stream(0))
    assert answer.solver == ("learning_to_invert",)


def test_a_rehearsal_that_fails_leaves_the_victims_to_the_ladder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it raises or the inverter diverges; and something is missing then, so that the answer is not converged."""

    def broken(*_: object) -> bool:
        raise RuntimeError("no")

    def diverging(self: LearningToInvert, views: Sequence[Observation], *_: object, **__: object) -> list[Reconstruction]:
        return [Reconstruction(torch.full((2, 1, 8, 8), torch.nan), torch.zeros(2).long(), converged=True) for _ in views]

    monkeypatch.setattr(strongest, "LADDER", (Painter,))
    view, knowledge = attack_surface(build("linear", (1, 8, 8)), [TRUTH])
    known = replace(knowledge, public=PUBLIC)
    assert Strongest()(view, knowledge, rng=stream(0)).converged
    for fault in (broken, lambda *_: True):
        monkeypatch.setattr(_contest, "inverter_wins", fault)
        monkeypatch.setattr(LearningToInvert, "many", diverging)
        answer = Strongest()(view, known, rng=stream(0))
        assert answer.solver == ("painter",) * 2
        assert not answer.converged


def test_what_explains_the_update_is_not_contested() -> None:
    view, knowledge = attack_surface(build("linear", (1, 8, 8)), [TRUTH])
    state = replace(strongest.begun([view], [replace(knowledge, public=PUBLIC)])[0], guess=TRUTH)
    assert worth(replace(state, angle=0.5))
    assert not worth(replace(state, angle=0.02))
    assert not worth(replace(state, angle=0.5, knowledge=knowledge))


def test_the_time_of_the_rehearsal_is_the_victims(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(*_: object) -> bool:
        end = time.process_time() + 0.2
        while time.process_time() < end:
            pass
        return False

    monkeypatch.setattr(_contest, "inverter_wins", slow)
    view, knowledge = attack_surface(build("linear", (1, 8, 8)), [TRUTH])
    states = strongest.begun([view] * 2, [replace(knowledge, public=PUBLIC)] * 2)
    after_it = contested(states, [stream(0), stream(1)], proven_and_guessed, lambda state: 1.0)
    assert [after.cpu - before.cpu for after, before in zip(after_it, states, strict=True)] == [pytest.approx(0.1, abs=0.03)] * 2


STEPS = LocalTraining(algorithm="fedavg", batch_size=1, steps=4, learning_rate=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(("victims", "senders", "recipe"), [(1, 1, STEPS), (3, 1, STEPS), (1, 40, LocalTraining())])
def test_rehearsal_and_performance_keep_to_the_budget(victims: int, senders: int, recipe: LocalTraining) -> None:
    """Local steps or many senders: no algebra, matching that takes all it gets, and an inverter; beyond what none of them can leave out."""
    model, own = build("cnn", (1, 8, 8), width=4, hidden=16), 1 if senders > 1 else 4
    pairs = [attack_surface(model, [digits(own, offset=4 * i + own * j) for j in range(senders)], recipe) for i in range(victims)]
    told = [replace(known, model=pairs[0][1].model, public=PUBLIC) for _, known in pairs]

    def took(seconds: float) -> float:
        began = time.process_time()
        Strongest(seconds=seconds).many([view for view, _ in pairs], told, rngs=[stream(i) for i in range(victims)])
        return time.process_time() - began

    took(0.01)  # what is loaded once
    least = took(0.01)  # teaching an inverter at all
    assert took(0.4) - least < 1.5 * 0.4 * own * senders * victims


def test_one_exact_record_does_not_outweigh_those_that_are_not() -> None:
    near = replace(TRUTH, inputs=TRUTH.inputs + 1e-5)
    assert psnr_db(near.inputs, TRUTH) == psnr_db(TRUTH.inputs, TRUTH) == pytest.approx(60.0)


def test_without_public_records_nothing_is_rehearsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strongest, "LADDER", (Painter,))
    monkeypatch.setattr(LearningToInvert, "many", None)
    view, knowledge = attack_surface(build("linear", (1, 8, 8)), [TRUTH])
    for public in (None, digits(20, offset=200)):
        assert Strongest()(view, replace(knowledge, public=public), rng=stream(0)).solver == ("painter",) * 2
