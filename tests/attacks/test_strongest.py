"""The router: what it takes out, what it keeps, and what it says of it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from attacks import _blend, _solving, strongest
from attacks._blend import blended
from attacks._choice import Choice
from attacks._contest import may_rehearse
from attacks._gradient import mean_gradient, noise_level, unusable
from attacks._rest import farthest, in_order, labels_left, mismatch, separable, without
from attacks._solving import Proven, after, merged, united
from attacks.strongest import Strongest
from attacks.update.adaptive_matching import AdaptiveMatching
from attacks.update.linear_leak import LinearLeak
from attacks.update.sparse_factorization import SparseFactorization
from simulator.adversary import Knowledge, Reconstruction
from simulator.models.dropout import Dropout
from simulator.rng import stream
from simulator.training import mean_gradient as gradient_of
from simulator.types import Batch, LocalTraining, Observation, Update
from tests.attacks.victims import attack_surface, build, digits, records

TRUTH = digits(6)


@dataclass(frozen=True)
class Oracle:
    """Knows the first ``proven`` of the records that it is asked for, and guesses the others to be gray; only for this test."""

    name: ClassVar[str] = "oracle"
    proven: int = 2

    def supports(self, view: Observation, knowledge: Knowledge) -> str | None:
        return None

    def __call__(self, view: Observation, knowledge: Knowledge, *, rng: torch.Generator) -> Reconstruction:
        count = knowledge.num_examples
        done = len(TRUTH) - count
        inputs = torch.full((count, 1, 8, 8), 0.5)
        inputs[: self.proven] = TRUTH.inputs[done : done + self.proven]
        proofs = tuple("told" if i < self.proven else "" for i in range(count))
        return Reconstruction(inputs, TRUTH.labels[done:].clone(), certificate=proofs)


@dataclass(frozen=True)
class Broken:
    """Always fails."""

    name: ClassVar[str] = "broken"

    def supports(self, view: Observation, knowledge: Knowledge) -> str | None:
        return None

    def __call__(self, view: Observation, knowledge: Knowledge, *, rng: torch.Generator) -> Reconstruction:
        raise RuntimeError("no")


@pytest.mark.parametrize("recipe", [None, LocalTraining(algorithm="fedavg", batch_size=0, learning_rate=0.3, weight_decay=0.1)])
def test_without_is_the_gradient_of_the_others(recipe: LocalTraining | None) -> None:
    model = build("mlp", (1, 8, 8))
    view, knowledge = attack_surface(model, [TRUTH], recipe)
    known, others = Batch(TRUTH.inputs[:2], TRUTH.labels[:2]), Batch(TRUTH.inputs[2:], TRUTH.labels[2:])
    rest, told = without(view, replace(knowledge, labels=TRUTH.labels), known)
    expected, _ = gradient_of(model, view.broadcast.parameters, {}, others)
    for name, tensor in mean_gradient(rest, told).items():
        assert torch.allclose(tensor, expected[name], atol=2e-6)
    assert told.num_examples == 4
    assert told.labels is not None
    assert sorted(told.labels.tolist()) == sorted(others.labels.tolist())


def test_train_mode_batch_norm_and_several_steps_are_not_taken_apart() -> None:
    normed = attack_surface(build("resnet20", (1, 8, 8), width=4).train(), [TRUTH])
    assert not separable(*normed)
    assert separable(*attack_surface(build("resnet20", (1, 8, 8), width=4).eval(), [TRUTH]))
    assert not separable(*attack_surface(build("mlp", (1, 8, 8)), [TRUTH], LocalTraining(algorithm="fedavg", batch_size=2)))
    with pytest.raises(ValueError, match="Attack the whole update"):
        without(*normed, TRUTH)


def test_mismatch_is_blind_to_scale_and_zero_at_the_truth() -> None:
    view, knowledge = attack_surface(build("cnn", (1, 8, 8), width=4, hidden=16), [TRUTH])
    angle, score = mismatch(view, knowledge, TRUTH)
    assert angle < 1e-5
    smaller = Update("gradient", {name: 0.01 * tensor for name, tensor in view.upload.update.tensors.items()})
    clipped = replace(view, uploads=(replace(view.upload, update=smaller),))
    assert mismatch(clipped, knowledge, TRUTH)[0] < 1e-5
    noisy = Batch((TRUTH.inputs + 0.1 * torch.randn(TRUTH.inputs.shape, generator=stream(0))).clamp(0, 1), TRUTH.labels)
    assert mismatch(view, knowledge, noisy)[1] > score


def test_proven_records_are_taken_out_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each round of the oracle proves two of the records that are left, and gets to see only the others."""
    monkeypatch.setattr(strongest, "LADDER", (Broken, Oracle, Oracle, LinearLeak))
    view, knowledge = attack_surface(build("linear", (1, 8, 8)), [TRUTH])
    guess = Strongest()(view, knowledge, rng=stream(0))
    assert guess.inputs is not None
    assert torch.equal(guess.inputs[:4], TRUTH.inputs[:4])
    assert guess.labels[:4].tolist() == TRUTH.labels[:4].tolist()
    assert guess.certificate[:4] == ("told",) * 4
    assert guess.solver[:4] == ("oracle",) * 4
    assert len(guess.labels) == len(guess.certificate) == len(guess.solver) == 6


def test_what_is_not_separable_keeps_its_proofs_beside_the_guess(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strongest, "LADDER", (Oracle,))
    view, knowledge = attack_surface(build("resnet20", (1, 8, 8), width=4).train(), [TRUTH])
    guess = Strongest()(view, knowledge, rng=stream(0))
    assert guess.inputs is not None
    assert guess.certificate == ("told", "told", "", "", "", "")
    assert torch.equal(guess.inputs[:2], TRUTH.inputs[:2])


@dataclass(frozen=True)
class Latter(Oracle):
    """Proves the third record alone."""

    def __call__(self, view: Observation, knowledge: Knowledge, *, rng: torch.Generator) -> Reconstruction:
        found = super().__call__(view, knowledge, rng=rng)
        assert found.inputs is not None
        inputs = torch.full_like(found.inputs, 0.5)
        inputs[2] = TRUTH.inputs[2]
        return replace(found, inputs=inputs, certificate=("", "", "told", "", "", ""))


def test_what_two_solvers_prove_of_a_batch_that_cannot_be_taken_apart_is_united(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strongest, "LADDER", (Oracle, Latter))
    view, knowledge = attack_surface(build("resnet20", (1, 8, 8), width=4).train(), [TRUTH])
    guess = Strongest()(view, knowledge, rng=stream(0))
    assert guess.inputs is not None
    assert guess.certificate == ("told", "told", "told", "", "", "")
    assert torch.equal(guess.inputs[:3], TRUTH.inputs[:3])


def test_answer_follows_the_order_of_disclosed_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strongest, "LADDER", (Oracle, Oracle, Oracle))
    view, knowledge = attack_surface(build("linear", (1, 8, 8)), [TRUTH])
    told = replace(knowledge, labels=TRUTH.labels.flip(0))
    guess = Strongest()(view, told, rng=stream(0))
    assert guess.inputs is not None
    assert torch.equal(guess.labels, TRUTH.labels.flip(0))
    assert torch.equal(guess.inputs, TRUTH.inputs.flip(0))


def test_nothing_that_applies_is_a_reason_and_no_answer_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    view, knowledge = attack_surface(build("mlp", (1, 8, 8)), [TRUTH])
    monkeypatch.setattr(strongest, "LADDER", (Broken,))
    with pytest.raises(RuntimeError, match="at least one solver must answer"):
        Strongest()(view, knowledge, rng=stream(0))
    monkeypatch.setattr(strongest, "LADDER", (LinearLeak,))
    reason = Strongest().supports(*attack_surface(build("lenet", (1, 8, 8)), [TRUTH]))
    assert reason is not None
    assert "linear_leak: the first layer" in reason
    broken = Update("gradient", {name: tensor * torch.nan for name, tensor in view.upload.update.tensors.items()})
    assert "must be finite" in str(Strongest().supports(replace(view, uploads=(replace(view.upload, update=broken),)), knowledge))


def test_a_gradient_of_zeros_proves_nothing() -> None:
    view, knowledge = attack_surface(build("mlp", (1, 8, 8)), [records(2, (1, 8, 8))])
    zeros = Update("gradient", {name: torch.zeros_like(tensor) for name, tensor in view.upload.update.tensors.items()})
    nothing = replace(view, uploads=(replace(view.upload, update=zeros),))
    guess = Strongest(seconds=0.5)(nothing, knowledge, rng=stream(0))
    assert guess.certificate == ("", "")
    assert LinearLeak()(nothing, knowledge, rng=stream(0)).certificate == ("", "")


def test_one_record_of_a_dense_network_is_proven_at_once() -> None:
    data = digits(1)
    guess = Strongest()(*attack_surface(build("mlp", (1, 8, 8)), [data]), rng=stream(0))
    assert guess.inputs is not None
    assert float((guess.inputs - data.inputs).square().mean()) < 1e-10
    assert guess.certificate == ("rank one",)
    assert guess.solver == ("linear_leak",)
    assert guess.converged


def test_bookkeeping() -> None:
    assert in_order([3, 1, 1], [1, 3, 1]) == [1, 0, 2]
    assert in_order([3, 5], [5, 4]) == [1, 0]
    assert labels_left(torch.tensor([1, 1, 2]), [1, 9]).tolist() == [1]
    images = torch.arange(3.0)[:, None, None, None]
    assert farthest(images, [torch.tensor([[[0.9]]])]).tolist() == [0, 2]


@dataclass(frozen=True)
class Gray:
    """Answers gray, or, if told to, what is no number; only for this test."""

    name: ClassVar[str] = "gray"
    value: float = 0.5
    whole: bool = True

    def supports(self, view: Observation, knowledge: Knowledge) -> str | None:
        return None

    def __call__(self, view: Observation, knowledge: Knowledge, *, rng: torch.Generator) -> Reconstruction:
        count = knowledge.num_examples
        return Reconstruction(torch.full((count, 1, 8, 8), self.value), torch.zeros(count).long(), converged=self.whole)


@dataclass(frozen=True)
class Diverging(Gray):
    name: ClassVar[str] = "diverging"
    value: float = torch.nan


@dataclass(frozen=True)
class Hasty(Gray):
    """Stopped by its clock with a guess no better than the first."""

    name: ClassVar[str] = "hasty"
    whole: bool = False


@dataclass(frozen=True)
class Single(Gray):
    """Knows the last record, once it is alone."""

    name: ClassVar[str] = "single"

    def supports(self, view: Observation, knowledge: Knowledge) -> str | None:
        return None if knowledge.num_examples == 1 else f"the batch must be 1 record, got {knowledge.num_examples}"

    def __call__(self, view: Observation, knowledge: Knowledge, *, rng: torch.Generator) -> Reconstruction:
        return Reconstruction(TRUTH.inputs[-1:].clone(), TRUTH.labels[-1:].clone(), certificate=("alone",), converged=True)


@dataclass(frozen=True)
class AllButOne(Oracle):
    proven: int = 5


def test_what_is_left_is_offered_to_solvers_that_refused_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strongest, "LADDER", (Single, AllButOne))
    guess = Strongest()(*attack_surface(build("linear", (1, 8, 8)), [TRUTH]), rng=stream(0))
    assert guess.certificate == ("told",) * 5 + ("alone",)
    assert guess.inputs is not None
    assert torch.equal(guess.inputs, TRUTH.inputs)
    assert guess.converged


def test_proofs_of_two_solvers_are_united() -> None:
    def proof(value: float, who: str) -> Proven:
        return Proven(torch.full((1, 2, 2), value), 0, "told", who)

    first, second = (proof(0.1, "a"), proof(0.2, "a")), (proof(0.1, "b"), proof(0.3, "b"), proof(0.3, "b"))
    values = sorted(round(float(item.image[0, 0, 0]), 3) for item in united(first, second, 6))
    assert values == [0.1, 0.2, 0.3, 0.3]
    assert len(united(first, second, 3)) == 3


def test_many_records_behind_many_neurons_are_proven_within_a_second() -> None:
    """linear_leak took fifteen seconds here, with whose clock sparse_factorization was never asked."""
    truth = records(8, (1, 16, 16))
    view, knowledge = attack_surface(build("mlp", (1, 16, 16), hidden=[512]), [truth])
    began = time.process_time()
    guess = Strongest(seconds=1 / 8)(view, knowledge, rng=stream(0))
    assert time.process_time() - began < 4
    assert all(guess.certificate)
    assert guess.converged


@pytest.mark.parametrize(
    ("ladder", "converged"),
    [((Gray,), True), ((Broken, Gray), False), ((Gray, Diverging), False), ((Gray, Hasty), False), ((Hasty, Gray), False)],
)
def test_a_solver_that_failed_or_was_cut_short_leaves_the_answer_unconverged(
    ladder: tuple[type, ...], converged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(strongest, "LADDER", ladder)
    guess = Strongest()(*attack_surface(build("linear", (1, 8, 8)), [TRUTH]), rng=stream(0))
    assert guess.converged == converged
    assert set(guess.solver) <= {"gray", "hasty"}


@dataclass(frozen=True)
class Lucky(Gray):
    """Comes halfway to the truth from wherever chance put it, better with every start up to the fourth."""

    name: ClassVar[str] = "lucky"
    asked: ClassVar[list[int]] = []

    def __call__(self, view: Observation, knowledge: Knowledge, *, rng: torch.Generator) -> Reconstruction:
        self.asked.append(1)
        error = 0.4 / min(len(self.asked), 4)
        gray = torch.full_like(TRUTH.inputs, 0.5)
        return Reconstruction(error * gray + (1 - error) * TRUTH.inputs, TRUTH.labels.clone(), converged=True)


def test_matching_starts_again_as_long_as_it_gains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strongest, "LADDER", (Lucky,))
    for again, calls, error in (((Lucky,), 5, 0.07), ((), 1, 0.21)):
        Lucky.asked.clear()
        monkeypatch.setattr(strongest, "MATCHING", again)
        guess = Strongest()(*attack_surface(build("mlp", (1, 8, 8)), [TRUTH]), rng=stream(0))
        assert len(Lucky.asked) == calls
        assert guess.inputs is not None
        assert error - 0.02 < float((guess.inputs - TRUTH.inputs).abs().max()) < error


@pytest.mark.parametrize(
    ("flat", "gains", "converged"),
    [((True,), 1, True), ((False,), 1, True), ((False, False, False), 3, True), ((True, True), 9, False)],
)
def test_matching_that_still_gains_when_time_is_over_is_not_converged(
    flat: tuple[bool, ...], gains: int, converged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers that get better ``gains`` times; nothing but the clock ends the last."""

    @dataclass(frozen=True)
    class Slow(Lucky):
        name: ClassVar[str] = "slow"
        seconds: float = 1.0

        def __call__(self, view: Observation, knowledge: Knowledge, *, rng: torch.Generator) -> Reconstruction:
            self.asked.append(1)
            end = time.process_time() + 0.06
            while time.process_time() < end:
                pass
            number = len(self.asked)
            share = 0.5 / min(number, gains)
            inputs = share * torch.full_like(TRUTH.inputs, 0.5) + (1 - share) * TRUTH.inputs
            return Reconstruction(inputs, TRUTH.labels.clone(), converged=flat[min(number, len(flat)) - 1])

    Lucky.asked.clear()
    monkeypatch.setattr(strongest, "LADDER", (Slow,))
    monkeypatch.setattr(strongest, "MATCHING", (Slow,))
    guess = Strongest(seconds=0.4 / 6)(*attack_surface(build("mlp", (1, 8, 8)), [TRUTH]), rng=stream(0))
    assert guess.converged == converged
    assert len(Lucky.asked) == (gains + 1 if converged else pytest.approx(5, abs=1.5))


def test_records_that_were_clipped_one_by_one_are_explained_by_themselves() -> None:
    model = build("cnn", (1, 8, 8), width=4, hidden=16)
    batch = digits(3)
    singles = [attack_surface(model, [Batch(batch.inputs[i : i + 1], batch.labels[i : i + 1])])[0] for i in range(3)]
    view, knowledge = attack_surface(model, [batch])
    norms = [float(torch.cat([t.flatten() for t in single.upload.update.tensors.values()]).norm()) for single in singles]
    limit = sorted(norms)[1]
    scales = [min(1.0, limit / size) for size in norms]
    names = view.upload.update.tensors
    mean = {n: sum(s * one.upload.update.tensors[n] for s, one in zip(scales, singles, strict=True)) / 3 for n in names}
    view = replace(view, uploads=(replace(view.upload, update=Update("gradient", mean)),))  # type: ignore[arg-type]
    told = replace(knowledge, labels=batch.labels, defenses=(("dp_sgd", {"clip_norm": limit, "noise_multiplier": 0.0}),))
    assert mismatch(view, told, batch)[0] < 1e-4
    assert mismatch(view, replace(told, defenses=()), batch)[0] > 0.01
    able = [solver.name for solver in strongest.applicable(view, told)]
    assert "adaptive_matching" in able
    assert "inverting_gradients" not in able


NOISES: dict[str, dict[str, object]] = {
    "gaussian_noise": {"sigma": 0.1 * 2**0.5},
    "client_dp": {"clip_norm": 1e6, "noise_multiplier": 1e-7 * 2**0.5},
    "distributed_dp": {"clip_norm": 1e6, "noise_multiplier": 1e-7 * 2},
    "simulated_enclave": {"clip_norm": 1e6, "noise_multiplier": 1e-7 * 2},
}


@pytest.mark.parametrize("public", [None, digits(80, offset=100)], ids=["alone", "public"])
def test_equal_noise_on_a_sum_gets_equal_solvers_whatever_it_is_called(public: Batch | None) -> None:
    view, knowledge = attack_surface(build("cnn", (1, 8, 8), width=4, hidden=16), [digits(1), digits(1, offset=1)])
    levels, chosen = set(), set()
    for name, settings in NOISES.items():
        told = replace(knowledge, public=public, defenses=((name, settings),))
        levels.add(round(noise_level(view, told), 4))
        chosen.add(tuple(solver.name for solver in strongest.applicable(view, told)))
    assert len(levels) == 1
    assert levels.pop() > 0.01
    assert len(chosen) == 1
    assert {"adaptive_matching", "learning_to_invert"} & set(chosen.pop())


def test_a_history_that_nothing_uses_changes_nothing() -> None:
    """Of a client that draws its records anew each round, another round tells nothing; who is told more must not ask less."""
    recipe = LocalTraining(algorithm="fedavg", batch_size=1, steps=1, learning_rate=0.1)
    view, knowledge = attack_surface(build("cnn", (1, 8, 8), width=4, hidden=16), [digits(1)], recipe)
    known = replace(knowledge, public=digits(80, offset=100))
    other = replace(view, broadcast=replace(view.broadcast, round=2), uploads=(replace(view.upload, senders=frozenset({7})),))
    states = [strongest.begun([view], [each])[0] for each in (known, replace(known, history=(other,)))]
    assert states[0].able == states[1].able
    assert [may_rehearse(state) for state in states] == [True, True]


@pytest.mark.parametrize(("noise", "rounds", "learned"), [(20.0, 1, True), (20.0, 2, True), (0.6, 1, True), (0.6, 8, False), (0.1, 1, False)])
def test_rounds_are_worth_what_averaging_takes_off_the_noise(noise: float, rounds: int, learned: bool) -> None:
    view, knowledge = attack_surface(build("cnn", (1, 8, 8), width=4, hidden=16), [digits(2)])
    history = tuple(replace(view, broadcast=replace(view.broadcast, round=number)) for number in range(1, rounds))
    sigma = noise / noise_level(view, replace(knowledge, defenses=(("gaussian_noise", {"sigma": 1.0}),)))
    told = replace(knowledge, public=digits(80, offset=100), history=history, defenses=(("gaussian_noise", {"sigma": sigma}),))
    assert Choice(view, told).rounds == rounds
    assert ("learning_to_invert" in {solver.name for solver in strongest.applicable(view, told)}) == learned


def test_matching_that_knows_the_defense_starts_again_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """An undefended victim gets every start that gains; one behind pruning no fewer."""
    starts: list[int] = []

    def gaining(self: AdaptiveMatching, views: Sequence[Observation], *_: object, **__: object) -> list[Reconstruction]:
        starts.append(1)
        share = 0.5**len(starts) if len(starts) < 4 else 0.125
        image = share * torch.full_like(TRUTH.inputs[:1], 0.5) + (1 - share) * TRUTH.inputs[:1]
        return [Reconstruction(image, TRUTH.labels[:1].clone(), converged=True) for _ in views]

    monkeypatch.setattr(AdaptiveMatching, "many", gaining)
    view, knowledge = attack_surface(build("cnn", (1, 8, 8), width=4, hidden=16), [Batch(TRUTH.inputs[:1], TRUTH.labels[:1])])
    Strongest(seconds=20.0)(view, replace(knowledge, defenses=(("top_k", {"pruned": 0.5}),)), rng=stream(0))
    assert len(starts) == 4


def test_a_victim_that_has_little_time_left_leaves_the_others_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    budgets: dict[int, float] = {}

    @dataclass(frozen=True)
    class Timed(Gray):
        name: ClassVar[str] = "timed"
        seconds: float = 1.0

        def __call__(self, view: Observation, knowledge: Knowledge, *, rng: torch.Generator) -> Reconstruction:
            budgets[knowledge.num_examples] = self.seconds
            return super().__call__(view, knowledge, rng=rng)

    monkeypatch.setattr(strongest, "LADDER", (Timed,))
    model = build("mlp", (1, 8, 8))
    pairs = [attack_surface(model, [Batch(TRUTH.inputs[:count], TRUTH.labels[:count])]) for count in (2, 3)]
    fresh = strongest.begun([view for view, _ in pairs], [known for _, known in pairs])
    Strongest(seconds=10.0)._climbed([replace(fresh[0], cpu=19.0), fresh[1]], [stream(0), stream(1)])
    assert budgets[2] == pytest.approx(2.0, abs=0.5)  # its reserve
    assert budgets[3] == pytest.approx(30.0, abs=0.5)


def test_nobody_to_attack_is_no_answer() -> None:
    assert Strongest().many([], [], rngs=[]) == []


def test_the_routers_own_work_is_in_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """A solver that takes no time and gains each time, judged by one that takes 0.1 s: 0.5 s end it, and the answer says what it took."""

    @dataclass(frozen=True)
    class Endless(Lucky):
        name: ClassVar[str] = "endless"

        def __call__(self, view: Observation, knowledge: Knowledge, *, rng: torch.Generator) -> Reconstruction:
            self.asked.append(1)
            share = 0.5 * 0.9 ** len(self.asked)
            inputs = share * torch.full_like(TRUTH.inputs, 0.5) + (1 - share) * TRUTH.inputs
            return Reconstruction(inputs, TRUTH.labels.clone(), converged=True)

    def slowly(*given: Any) -> tuple[float, float]:
        end = time.process_time() + 0.1
        while time.process_time() < end:
            pass
        return mismatch(*given)

    Lucky.asked.clear()
    surface = attack_surface(build("mlp", (1, 8, 8)), [TRUTH])
    monkeypatch.setattr(strongest, "LADDER", (Endless,))
    monkeypatch.setattr(strongest, "MATCHING", (Endless,))
    monkeypatch.setattr(_solving, "mismatch", slowly)
    monkeypatch.setattr(_blend, "mismatch", slowly)
    guess = Strongest(seconds=0.5 / 6)(*surface, rng=stream(0))
    assert 1 < len(Lucky.asked) <= 5
    assert guess.seconds > 0.4


def test_only_what_had_not_flattened_runs_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[tuple[int, int]] = []

    @dataclass(frozen=True)
    class Stepping(Gray):
        name: ClassVar[str] = "stepping"
        steps: int = 10

        def __call__(self, view: Observation, knowledge: Knowledge, *, rng: torch.Generator) -> Reconstruction:
            steps.append((knowledge.num_examples, self.steps))
            return replace(super().__call__(view, knowledge, rng=rng), converged=knowledge.num_examples == 2)

    monkeypatch.setattr(strongest, "LADDER", (Stepping,))
    monkeypatch.setattr(strongest, "MATCHING", (Stepping,))
    model = build("mlp", (1, 8, 8))
    pairs = [attack_surface(model, [Batch(TRUTH.inputs[:count], TRUTH.labels[:count])]) for count in (2, 3)]
    Strongest().many([view for view, _ in pairs], [known for _, known in pairs], rngs=[stream(0), stream(1)])
    assert sorted(steps) == [(2, 10), (2, 10), (3, 10), (3, 30)]


def test_another_start_that_diverges_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Once(Lucky):
        name: ClassVar[str] = "once"

        def __call__(self, view: Observation, knowledge: Knowledge, *, rng: torch.Generator) -> Reconstruction:
            found = super().__call__(view, knowledge, rng=rng)
            assert found.inputs is not None
            return found if len(self.asked) == 1 else replace(found, inputs=found.inputs * torch.nan)

    Lucky.asked.clear()
    monkeypatch.setattr(strongest, "LADDER", (Once,))
    monkeypatch.setattr(strongest, "MATCHING", (Once,))
    guess = Strongest()(*attack_surface(build("mlp", (1, 8, 8)), [TRUTH]), rng=stream(0))
    assert len(Lucky.asked) == 2
    assert guess.converged


def test_told_labels_stay_with_their_records(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of six digits with labels in an order of their own, what is proven has its own label, and what is left the others'."""
    rng = stream(3, "labels")
    view, knowledge = attack_surface(build("mlp", (1, 8, 8)), [TRUTH])
    told = replace(knowledge, labels=TRUTH.labels[torch.randperm(len(TRUTH), generator=rng)])
    for solver in (LinearLeak(), SparseFactorization(seconds=5.0), Strongest(seconds=1.0)):
        guess = solver(view, told, rng=stream(0))
        assert guess.inputs is not None
        assert torch.equal(guess.labels, told.labels if told.labels is not None else guess.labels)
        sure = [i for i, proof in enumerate(guess.certificate) if proof]
        assert len(sure) >= 3
        nearest = torch.cdist(guess.inputs[sure].flatten(1), TRUTH.inputs.flatten(1)).argmin(1)
        assert guess.labels[sure].tolist() == TRUTH.labels[nearest].tolist()


def test_a_guess_survives_the_proof_of_other_records() -> None:
    """Of a batch of six one is guessed well; then two others are proven, by a solver with nothing to say of the rest."""
    view, knowledge = attack_surface(build("linear", (1, 8, 8)), [TRUTH])
    guess = Reconstruction(TRUTH.inputs + 0.01, TRUTH.labels.clone(), converged=True)
    state = after(strongest.begun([view], [knowledge])[0], "guesser", guess)
    proofs = replace(Oracle()(view, knowledge, rng=stream(0)), clients=(7, 8, -1, -1, -1, -1))
    answer = merged(after(state, "oracle", proofs), knowledge)
    assert answer.inputs is not None
    assert answer.solver == ("oracle",) * 2 + ("guesser",) * 4
    assert answer.clients == (7, 8, -1, -1, -1, -1)
    torch.testing.assert_close(answer.inputs[2:], TRUTH.inputs[2:] + 0.01)


def test_what_is_left_of_an_aggregate_is_a_view_that_attacks_take() -> None:
    """Four clients of whose six records five are proven: one record cannot have four senders."""
    parts = [Batch(TRUTH.inputs[i], TRUTH.labels[i]) for i in (slice(0, 2), slice(2, 4), slice(4, 5), slice(5, 6))]
    view, knowledge = attack_surface(build("mlp", (1, 8, 8)), parts)
    rest, told = without(view, knowledge, Batch(TRUTH.inputs[:5], TRUTH.labels[:5]))
    assert unusable(rest, told) is None
    last = LinearLeak()(rest, told, rng=stream(0))
    assert last.inputs is not None
    assert float((last.inputs - TRUTH.inputs[5:]).square().mean()) < 1e-8


def test_under_noise_nothing_is_explained_exactly() -> None:
    view, knowledge = attack_surface(build("mlp", (1, 8, 8)), [TRUTH])
    norm = float(torch.cat([t.flatten().double() for t in view.upload.update.tensors.values()]).norm())
    count = sum(t.numel() for t in view.upload.update.tensors.values())
    for defense, std in (
        (("gaussian_noise", {"sigma": 0.1}), 0.1),
        (("client_dp", {"clip_norm": 2.0, "noise_multiplier": 0.1}), 0.2),
        (("dp_sgd", {"clip_norm": 3.0, "noise_multiplier": 0.2}), 0.6 / 6),
        (("dp_sgd", {"clip_norm": torch.inf, "noise_multiplier": 0.0}), 0.0),
        (("clip", {"clip_norm": 1.0}), 0.0),
        (("laplace_noise", {"scale": 0.1}), 0.1 * 2**0.5),
        (("local_dp", {"clip_norm": 2.0, "noise_multiplier": 0.1, "mechanism": "gaussian"}), 0.4),
        (("local_dp", {"clip_norm": 2.0, "noise_multiplier": 0.1, "mechanism": "laplace"}), 0.4 * 2**0.5),
        (("distributed_dp", {"clip_norm": 2.0, "noise_multiplier": 0.1, "colluding": 0}), 0.2),
    ):
        told = replace(knowledge, defenses=(defense,))
        assert noise_level(view, told) == pytest.approx(std * count**0.5 / norm, rel=1e-5)
        reason = Choice(view, told).refusal(LinearLeak)
        assert ("the noise must be at most" in str(reason)) == (std > 0)


@pytest.mark.parametrize(
    ("upload", "sigma", "held", "learned"),
    [
        ("plain", 0.0, True, False),
        ("plain", 1.0, True, True),
        ("plain", 1.0, False, False),
        ("plain", 1e-4, True, False),
        ("signs", 0.0, True, True),
        ("pruned", 0.0, True, True),
        ("pruned", 0.0, False, False),
    ],
)
def test_an_inverter_is_learned_where_the_update_is_hidden_and_only_there(upload: str, sigma: float, held: bool, learned: bool) -> None:
    """Matching and the learned inverter exclude each other; faint noise is left to matching, which is far better there.

    It also is where many more values than unknowns are left, however small their share: in a large network.
    """
    batch = digits(1)
    view, knowledge = attack_surface(build("cnn", (1, 8, 8), width=4, hidden=32), [batch])
    rng = stream(0)

    def defended(tensor: torch.Tensor) -> torch.Tensor:
        if upload == "signs":
            return tensor.sign() + (tensor == 0)
        if upload == "pruned":
            return torch.where(tensor.abs() >= tensor.abs().flatten().topk(max(1, tensor.numel() // 100)).values[-1], tensor, 0.0)
        return tensor + sigma * torch.randn(tensor.shape, generator=rng)

    tensors = {name: defended(tensor) for name, tensor in view.upload.update.tensors.items()}
    view = replace(view, uploads=(replace(view.upload, update=Update("gradient", tensors)),))
    defenses = (("gaussian_noise", {"sigma": sigma}),) if sigma else ()
    knowledge = replace(knowledge, defenses=defenses, public=digits(40, offset=100) if held else None)
    names = {solver.name for solver in strongest.applicable(view, knowledge)}
    assert ("learning_to_invert" in names) == learned
    assert ("inverting_gradients" in names or "adaptive_matching" in names) != learned


@pytest.mark.parametrize(("share", "hidden"), [(0.01, False), (0.001, True)])
def test_what_is_left_counts_against_the_unknowns_and_not_as_a_share(share: float, hidden: bool) -> None:
    """1440 values for 64 pixels are plenty, 144 are not."""
    view, knowledge = attack_surface(build("cnn", (1, 8, 8)), [digits(1)])

    def largest(tensor: torch.Tensor) -> torch.Tensor:
        return torch.where(tensor.abs() >= tensor.abs().flatten().topk(max(1, int(share * tensor.numel()))).values[-1], tensor, 0.0)

    tensors = {name: largest(tensor) for name, tensor in view.upload.update.tensors.items()}
    view = replace(view, uploads=(replace(view.upload, update=Update("gradient", tensors)),))
    told = replace(knowledge, defenses=(("top_k", {"pruned": 1 - share}),), public=digits(40, offset=100))
    names = {solver.name for solver in strongest.applicable(view, told)}
    assert ("learning_to_invert" in names) == hidden
    assert ("adaptive_matching" in names) != hidden


@pytest.mark.slow
def test_no_proof_under_masks_that_are_not_known() -> None:
    """Dropout on the pixels: what explains the update to its last digit is the picture with its holes."""
    for activation in (nn.Sigmoid, nn.ReLU):
        for count in (1, 3):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Flatten(), Dropout(0.05), nn.Linear(64, 128), activation(), nn.Linear(128, 10)).train()
            view, knowledge = attack_surface(model, [digits(count)])
            answer = Strongest(seconds=0.4)(view, knowledge, rng=stream(0))
            assert answer.certificate == ("",) * count
            if activation is nn.ReLU:  # where matching gets stuck
                assert set(answer.solver) <= {"linear_leak", "sparse_factorization"}


@pytest.mark.parametrize("told", [False, True])
def test_of_two_guesses_the_better_records_of_each_are_kept(told: bool) -> None:
    """Each guess knows half of the batch, and the other half's labels wrong where it may: together they know all of it."""
    rng = stream(1, "blend")
    view, knowledge = attack_surface(build("mlp", (1, 8, 8)), [TRUTH])
    knowledge = replace(knowledge, labels=TRUTH.labels if told else None)
    order = torch.arange(len(TRUTH)) if told else torch.randperm(len(TRUTH), generator=rng)

    def half(known: Sequence[int]) -> Batch:
        inputs, labels = torch.rand(TRUTH.inputs.shape, generator=rng) * 0.5 + 0.5 * TRUTH.inputs, TRUTH.labels.clone()
        inputs[list(known)] = TRUTH.inputs[list(known)]
        if not told:
            labels[next(i for i in range(len(labels)) if i not in known)] += 1
        return Batch(inputs, labels % 10)

    first, second = half((0, 1, 2)), half((3, 4, 5))
    second = Batch(second.inputs[order], second.labels[order])
    found = blended(view, knowledge, first, second, mismatch(view, knowledge, first)[1])
    assert found is not None
    both, taken, (angle, _) = found
    torch.testing.assert_close(both.inputs, TRUTH.inputs)
    assert both.labels.tolist() == TRUTH.labels.tolist()
    assert [there is None for there in taken] == [True] * 3 + [False] * 3
    assert angle < 1e-4
    assert blended(view, knowledge, both, second, 0.0) is None
    assert blended(view, knowledge, first, second, mismatch(view, knowledge, first)[1], until=time.process_time()) is None
