"""What every registered attack must do; a new file in attacks/ is tested here without being named."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace

import pytest
import torch

from simulator import lookup
from simulator.adversary import Attack, BatchedAttack, Knowledge, Reconstruction
from simulator.rng import stream
from simulator.types import LocalTraining, Observation
from tests.attacks.victims import attack_surface, records, smooth

SHAPE = (1, 4, 4)
FAST = {"steps": 3, "evaluations": 3, "iterations": 3}
FEDAVG = LocalTraining(algorithm="fedavg", batch_size=1, learning_rate=0.1)
Surface = tuple[Observation, Knowledge]


def fast(name: str) -> Attack:
    cls = lookup.get("attacks", name)
    return cls(**{field.name: FAST[field.name] for field in fields(cls) if field.name in FAST})


def surfaces() -> dict[str, Surface]:
    one, several = [records(1, SHAPE)], [records(2, SHAPE, seed) for seed in (1, 2)]
    return {
        "one record": attack_surface(smooth(), one),
        "a batch": attack_surface(smooth(), [records(3, SHAPE)]),
        "an aggregate": attack_surface(smooth(), several),
        "delta of one step": attack_surface(smooth(), one, FEDAVG),
        "delta of two steps": attack_surface(smooth(), [records(2, SHAPE)], FEDAVG),
    }


@pytest.fixture(params=sorted(surfaces()))
def surface(request: pytest.FixtureRequest) -> Surface:
    return surfaces()[request.param]


@pytest.fixture(params=lookup.names("attacks"))
def attack(request: pytest.FixtureRequest) -> Attack:
    return fast(request.param)


def values(guess: Reconstruction) -> Iterator[torch.Tensor]:
    yield guess.labels
    if guess.inputs is not None:
        yield guess.inputs


def test_attack_runs_or_says_why_not_and_leaves_its_inputs_alone(attack: Attack, surface: Surface) -> None:
    view, knowledge = surface
    sent, received = view.broadcast, view.upload
    seen = [sent.parameters, sent.buffers, received.update.tensors, received.buffers, knowledge.model.state_dict()]
    before = [{name: tensor.clone() for name, tensor in tensors.items()} for tensors in seen]
    rng = torch.random.get_rng_state()
    reason = attack.supports(view, knowledge)
    guess = attack(view, knowledge, rng=stream(0, "attack")) if reason is None else None
    for tensors, copies in zip(seen, before, strict=True):
        assert all(torch.equal(tensors[name], copies[name]) for name in copies)
    assert all(p.grad is None for p in knowledge.model.parameters())
    assert torch.equal(rng, torch.random.get_rng_state()), "an attack must not touch the global generator"
    if guess is None:
        assert isinstance(reason, str)
        assert len(reason) > 10
        return
    assert guess.labels.shape == (knowledge.num_examples,)
    assert guess.labels.dtype == torch.int64
    assert bool(((guess.labels >= 0) & (guess.labels < 10)).all())
    if guess.inputs is not None:
        assert guess.inputs.shape == (knowledge.num_examples, *SHAPE)
        assert guess.inputs.dtype == torch.float32
        assert bool(((guess.inputs >= 0) & (guess.inputs <= 1)).all()), "inputs must be in [0, 1], and no NaN"
    assert len(guess.certificate) in (0, knowledge.num_examples)
    assert guess.seconds >= 0


def test_attack_is_a_function_of_its_rng(attack: Attack) -> None:
    view, knowledge = surfaces()["one record"]
    if attack.supports(view, knowledge) is not None:
        pytest.skip("does not attack one record")
    one, same = (attack(view, knowledge, rng=stream(7, "attack")) for _ in range(2))
    for first, second in zip(values(one), values(same), strict=True):
        assert torch.equal(first, second)


def test_attack_returns_no_nan_silently(attack: Attack) -> None:
    view, knowledge = surfaces()["one record"]
    name = next(iter(view.upload.update.tensors))
    broken = {**view.upload.update.tensors, name: torch.full_like(view.upload.update.tensors[name], torch.nan)}
    upload = replace(view.upload, update=replace(view.upload.update, tensors=broken))
    view = replace(view, uploads=(upload,))
    if attack.supports(view, knowledge) is None:
        guess = attack(view, knowledge, rng=stream(0, "attack"))
        assert all(bool(torch.isfinite(value).all()) for value in values(guess))


def test_attack_uses_the_labels_it_is_told(attack: Attack) -> None:
    view, knowledge = surfaces()["a batch"]
    if hasattr(attack, "seconds"):  # wrong labels explain nothing: the search would take all it is given
        attack = replace(attack, seconds=0.15)  # type: ignore[type-var]
    told = replace(knowledge, labels=torch.tensor([9, 0, 4]))
    counts = replace(knowledge, label_counts=torch.bincount(torch.tensor([9, 0, 9]), minlength=10))
    for known, labels in ((told, [9, 0, 4]), (counts, [0, 9, 9])):
        if attack.supports(view, known) is not None:
            continue
        guess = attack(view, known, rng=stream(0, "attack"))
        assert guess.inputs is None or guess.labels.tolist() == labels


def test_many_equals_one_by_one(attack: Attack) -> None:
    if not isinstance(attack, BatchedAttack):
        pytest.skip("takes one victim at a time")
    model = smooth()
    recipe = FEDAVG if attack.name.removesuffix("-paper") in ("fedavg_matching", "sme") else None
    pairs = [attack_surface(model, [records(1, SHAPE, seed)], recipe) for seed in range(3)]
    views, knowledge = [view for view, _ in pairs], [known for _, known in pairs]
    if attack.supports(views[0], knowledge[0]) is not None:
        pytest.skip("does not attack one record")
    together = attack.many(views, knowledge, rngs=[stream(seed, "attack") for seed in range(3)])
    for seed, guess in enumerate(together):
        alone = attack(views[seed], knowledge[seed], rng=stream(seed, "attack"))
        assert guess.inputs is not None
        assert alone.inputs is not None
        assert torch.allclose(guess.inputs, alone.inputs, atol=1e-4)
        assert torch.equal(guess.labels, alone.labels)


def test_settings_are_checked(attack: Attack) -> None:
    for field in fields(attack):  # type: ignore[arg-type]
        if isinstance(getattr(attack, field.name), int | float):
            with pytest.raises(ValueError, match="must be"):
                replace(attack, **{field.name: -1})  # type: ignore[type-var]
