"""Gradients and updates that are not finite: they become 0 before anything is scaled, since no noise covers NaN."""

from __future__ import annotations

import math

import pytest
import torch

from defenses.client.client_dp import ClientDP
from defenses.client.clip import Clip, clip_to_norm
from defenses.client.distributed_dp import DistributedDP
from defenses.client.dp_sgd import DPSGD, clipped_sum
from defenses.client.local_dp import LocalDP, clip_to_l1
from defenses.server.central_dp import CentralDP
from simulator.defense import Defense
from simulator.types import Update
from tests.defenses.tiny import context

BAD = [math.nan, math.inf, -math.inf, 3e38]
"""The last is finite, and its norm is not."""


@pytest.mark.parametrize("bad", BAD)
def test_a_record_without_a_finite_norm_adds_nothing_and_spoils_no_other(bad: float) -> None:
    """A sum of the other two; one NaN in a batch would otherwise be seen in every coordinate, whatever the noise."""
    each = {"w": torch.tensor([[3.0, 4.0], [bad, bad], [0.3, 0.4]]), "b": torch.tensor([[0.0], [1.0], [0.0]])}
    total = clipped_sum(each, 1.0)
    torch.testing.assert_close(total["w"], torch.tensor([0.9, 1.2]))
    assert float(total["b"]) == 0.0
    noised = DPSGD(1.0, 1.0).on_gradient(each, context(batch_size=3))
    without = DPSGD(1.0, 1.0).on_gradient({name: tensor[[0, 2]] for name, tensor in each.items()}, context(batch_size=3))
    assert all(torch.equal(noised[name], without[name]) for name in each)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize(
    "defense", [Clip(), ClientDP(1.0, 0.0), CentralDP(1.0, 0.0), LocalDP(1.0, 0.0), LocalDP(1.0, 0.0, "laplace"), DistributedDP()]
)
def test_an_update_without_a_finite_norm_becomes_0(defense: Defense, bad: float) -> None:
    if bad == 3e38 and isinstance(defense, LocalDP) and defense.mechanism == "laplace":
        pytest.skip("its norm is a sum in float64, and finite")
    update = Update("delta", {"a": torch.tensor([bad, bad]), "b": torch.tensor([1.0])})
    found = defense.on_update(update, context()).tensors
    assert all(torch.equal(tensor, torch.zeros_like(tensor)) for tensor in found.values())


def test_without_a_limit_nothing_changes() -> None:
    tensors = {"a": torch.tensor([math.nan, 1.0])}
    assert clip_to_norm(tensors, math.inf) is tensors
    assert clip_to_l1(tensors, math.inf) is tensors
