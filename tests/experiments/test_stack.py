"""Orders and pairs of defenses that are refused, each with its reason, before anything is written; and those that are not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import pytest
import torch

from defenses.channel.enclave import SimulatedEnclave
from defenses.channel.secure_aggregation import SecureAggregation
from defenses.client.client_dp import ClientDP
from defenses.client.clip import Clip
from defenses.client.dp_sgd import DPSGD
from defenses.client.gaussian_noise import GaussianNoise
from defenses.server.central_dp import CentralDP
from experiments import spec
from experiments.refusals import check
from experiments.stack import misplaced
from simulator.defense import ClientContext, Defense, Role
from simulator.errors import SpecError
from simulator.types import Update
from simulator.world import World
from tests.defenses.tiny import Reporter


@dataclass(frozen=True)
class Halve(Defense):
    """A compression."""

    name = "halve"
    role: ClassVar[Role] = "compression"

    def on_update(self, update: Update, context: ClientContext) -> Update:
        return update


@dataclass(frozen=True)
class Shares(Defense):
    """Adds integers to the words of secure aggregation."""

    name = "shares"

    def integer_noise(self, world: World, shape: tuple[int, ...], rng: torch.Generator) -> npt.NDArray[np.int64]:
        return np.zeros(shape, np.int64)


@pytest.mark.parametrize(
    ("stack", "reason"),
    [
        ((GaussianNoise(), Clip()), "clip must come before noise, got it after gaussian_noise"),
        ((GaussianNoise(), Halve(), Clip()), "clip must come before noise"),
        ((Clip(), Halve(), GaussianNoise()), "halve must not come between clip and gaussian_noise"),
        ((SecureAggregation(), Clip()), "clip must come before the channel, got it after secure_aggregation"),
        ((SimulatedEnclave(), Reporter()), "reporter must come before the channel, got it after simulated_enclave"),
        ((SecureAggregation(), Shares()), "shares must come before the channel"),
        ((SecureAggregation(), CentralDP()), "central_dp must come before the channel"),
        ((DPSGD(), DPSGD(clip_norm=2.0)), "at most one per-example defense"),
        ((SecureAggregation(), SecureAggregation(threshold=3)), "at most one channel"),
    ],
)
def test_refused(stack: tuple[Defense, ...], reason: str) -> None:
    assert reason in str(misplaced(stack))


@pytest.mark.parametrize(
    "stack",
    [
        (),
        (Clip(), GaussianNoise()),
        (Clip(), GaussianNoise(), Halve()),
        (Halve(), Clip(), GaussianNoise()),
        (DPSGD(), Clip(), SecureAggregation()),
        (CentralDP(), SecureAggregation()),
        (ClientDP(), Halve()),
    ],
)
def test_accepted(stack: tuple[Defense, ...]) -> None:
    assert misplaced(stack) is None


def test_a_spec_with_such_a_stack_is_refused() -> None:
    table = {"data": "digits", "model": "mlp", "arms": [{"name": "upside down", "defenses": ["gaussian_noise", "clip"]}]}
    with pytest.raises(SpecError, match="arm 'upside down': clip must come before noise"):
        check(spec.config.build(spec.Experiment, table))


def test_an_arm_changes_the_recipe_and_no_more() -> None:
    table = {"data": "digits", "model": "mlp", "training": {"learning_rate": 0.3}, "arms": [{"name": "none"}]}
    table["arms"].append({"name": "larger batch", "training": {"batch_size": 8}})
    experiment = spec.config.build(spec.Experiment, table)
    check(experiment)
    plain, larger = (experiment.world(arm, 0).training for arm in experiment.arms)
    assert (plain.batch_size, larger.batch_size, larger.learning_rate) == (1, 8, 0.3)
    assert experiment.control is experiment.arms[0]
    table["arms"][1] = {"name": "typo", "training": {"batchsize": 8}}
    with pytest.raises(SpecError, match=r"arm 'typo', training.batchsize must be one of LocalTraining's, .* Did you mean 'batch_size'"):
        check(spec.config.build(spec.Experiment, table))
