"""Where in a client's round each hook acts, and what it is told."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import pytest
import torch

from clients.local import local_upload
from simulator.defense import ClientContext, Defense
from simulator.models.mlp import MLP
from simulator.network import network, tensors
from simulator.types import Broadcast, Tensors, Update
from simulator.world import World
from tests.federations import world


@dataclass(frozen=True)
class Doubled(Defense):
    """Doubles the gradient of each local step."""

    steps: list[int] = field(default_factory=list, compare=False)

    def on_step(self, gradient: Tensors, context: ClientContext) -> Tensors:
        self.steps.append(context.step)
        return {name: 2 * tensor for name, tensor in gradient.items()}


@dataclass(frozen=True)
class Watching(Defense):
    """Changes nothing, and keeps what it is told."""

    looks_again: ClassVar[bool] = True

    told: list[ClientContext] = field(default_factory=list, compare=False)

    def on_update(self, update: Update, context: ClientContext) -> Update:
        self.told.append(context)
        return update


@dataclass(frozen=True)
class Wider(Defense):
    """Trains another model."""

    def on_model(self, family: Any) -> Any:
        return MLP(hidden=(*family.hidden, 7))


def upload(of: World) -> Tensors:
    model = network(of.architecture, of.data.load().schema, of.training, of.seed)
    return local_upload(of, model, Broadcast(1, *tensors(model), of.training), 0).update.tensors


@pytest.mark.parametrize(
    ("training", "steps"),
    [
        ({"algorithm": "fedsgd", "batch_size": 3}, [1]),
        ({"algorithm": "fedavg", "batch_size": 8, "steps": 3, "learning_rate": 0.1}, [1, 2, 3]),
    ],
)
def test_each_step_is_doubled(training: dict, steps: list[int]) -> None:
    """Doubled gradients of plain SGD are a doubled learning rate; of FedSGD, a doubled update."""
    of, doubled = world(training=training), Doubled()
    found = upload(replace(of, defenses=(doubled,)))
    assert doubled.steps == steps
    twice = of if of.training.algorithm == "fedsgd" else replace(of, training=replace(of.training, learning_rate=0.2))
    wanted = upload(twice)
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor if twice is not of else 2 * tensor)


def test_a_defense_knows_its_client_s_batches_and_the_broadcast() -> None:
    of = world(training={"algorithm": "fedavg", "batch_size": 8, "steps": 2})
    watching = Watching()
    upload(replace(of, defenses=(watching,)))
    (told,) = watching.told
    assert told.private is not None
    assert [len(batch) for batch in told.private.batches] == [8, 8]
    assert told.private.broadcast.round == 1
    assert told.step == 0


def test_a_defense_that_does_not_say_so_is_told_nothing_private(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Watching, "looks_again", False)
    watching = Watching()
    upload(replace(world(), defenses=(watching,)))
    assert watching.told[0].private is None


def test_everybody_trains_the_model_that_the_defense_makes() -> None:
    of = world(model={"name": "mlp", "hidden": [16]})
    assert {name: t.shape for name, t in upload(replace(of, defenses=(Wider(),))).items()} == {
        name: t.shape for name, t in upload(replace(of, model=MLP(hidden=(16, 7)))).items()
    }


@pytest.mark.parametrize(
    "defense", [{"name": "gaussian_noise", "sigma": 0.1}, {"name": "dp_sgd", "clip_norm": 1.0, "noise_multiplier": 1.0}]
)
def test_an_upload_computed_again_from_the_transcript_has_the_same_noise(defense: dict) -> None:
    """A transcript keeps tensors by name; colluders and rounding are computed from it, so that the order must not matter."""
    of = world(defenses=[defense])
    model = network(of.architecture, of.data.load().schema, of.training, of.seed)
    parameters, buffers = tensors(model)
    assert list(parameters) != sorted(parameters)
    sent = local_upload(of, model, Broadcast(1, parameters, buffers, of.training), 0)
    again = local_upload(of, model, Broadcast(1, dict(sorted(parameters.items())), buffers, of.training), 0)
    for name, tensor in sent.update.tensors.items():
        assert torch.equal(tensor, again.update.tensors[name])
