"""Model inspection: it rings for what an active server plants, and not for honest models, initial or trained."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from defenses.client.model_inspection import ModelInspection, lopsided_share, parallel_share
from simulator import config
from simulator.rng import stream
from simulator.types import Broadcast, LocalTraining, Tensors
from simulator.world import World
from tests.attacks.test_active import surface
from tests.attacks.victims import build, digits
from tests.defenses.tiny import context

WIDTHS = ((256,), (64, 32))
SEEDS = range(5)


def trained(hidden: tuple[int, ...], seed: int, steps: int, optimizer: str) -> nn.Module:
    """An honest model after some steps on all digits; accuracy on them is 80 to 99 %."""
    data, rng = digits(1797), stream(seed, "batches")
    model = build("mlp", (1, 8, 8), seed=seed, hidden=hidden)
    rates: dict[str, Any] = {
        "sgd": torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        "adam": torch.optim.Adam(model.parameters(), lr=3e-3),
    }
    for _ in range(steps):
        chosen = torch.randint(len(data), (32,), generator=rng)
        rates[optimizer].zero_grad()
        nn.functional.cross_entropy(model(data.inputs[chosen]), data.labels[chosen]).backward()
        rates[optimizer].step()
    return model


def verdict(model: nn.Module, parameters: Tensors | None = None) -> str | None:
    sent = parameters or {name: tensor.detach() for name, tensor in model.named_parameters()}
    return ModelInspection().on_broadcast(Broadcast(1, sent, {}, LocalTraining()), model, (1, 8, 8), context())


@pytest.mark.parametrize("hidden", WIDTHS)
@pytest.mark.parametrize(("steps", "optimizer"), [(0, "sgd"), (150, "sgd"), (150, "adam")])
def test_no_alarm_on_honest_models(hidden: tuple[int, ...], steps: int, optimizer: str) -> None:
    rung = [seed for seed in SEEDS if verdict(trained(hidden, seed, steps, optimizer)) is not None]
    assert rung == []


@pytest.mark.parametrize("known", ["prior", "public"])
@pytest.mark.parametrize("records", [2, 8, 64])
@pytest.mark.parametrize(("method", "named"), [("imprint", "imprint"), ("trap_weights", "trap weights")])
def test_alarm_on_planted_models(method: str, named: str, records: int, known: str) -> None:
    public = digits(360, offset=1400) if known == "public" else None
    for seed in SEEDS:
        view, knowledge = surface(digits(records), method, seed=seed, public=public)
        found = verdict(knowledge.model, view.broadcast.parameters)
        assert found is not None
        assert found.endswith(named)


def test_how_rarely_neurons_fire_does_not_tell_a_trap_from_training() -> None:
    """The mark that the detector leaves out; the pixels are those that the models' first layer makes of [0, 1]."""
    pixels, public = (digits(1000).inputs.flatten(1) - 0.5) / 0.25, digits(360, offset=1400)
    for seed in SEEDS:
        view, _ = surface(digits(8), "trap_weights", seed=seed, public=public)
        trap, honest = list(view.broadcast.parameters.values()), list(trained((256,), seed, 500, "sgd").parameters())
        planted, learned = (float((pixels @ weight.T + bias > 0).double().mean(0).median()) for weight, bias, *_ in (trap, honest))
        print(f"records for which the median neuron fires: {learned:.3f} of an honest trained model, {planted:.3f} of a trap")
        assert learned < planted


@pytest.mark.parametrize("pixels", [64, 3072])
def test_share_of_lopsided_rows_is_the_closed_form(pixels: int) -> None:
    rng = stream(0, "rows", pixels)
    for rows, ratio in (
        (torch.randn(2000, pixels + 1, generator=rng), math.sqrt(2 / math.pi)),  # odd: signs cannot tie
        (torch.rand(2000, pixels + 1, generator=rng) - 0.5, math.sqrt(3) / 2),
    ):
        expected = 0.25 - math.asin(ratio) / (2 * math.pi)
        assert _strict(rows) == pytest.approx(expected, abs=0.03)
        assert lopsided_share(rows) >= _strict(rows)  # a majority of one is no majority


def _strict(rows: Tensor) -> float:
    return float(((rows.sum(1) < 0) & ((rows < 0).sum(1) <= (rows > 0).sum(1))).double().mean())


def test_share_of_lopsided_rows_sees_signs_drawn_one_by_one() -> None:
    rows = torch.randn(512, 1024, generator=stream(0, "rows"))
    assert lopsided_share(torch.where(rows > 0, 0.9 * rows, rows)) > 0.4


def test_share_of_parallel_rows() -> None:
    rows = torch.randn(20, 64, generator=stream(0, "rows"))
    assert parallel_share(rows) == 0
    assert parallel_share(torch.cat([rows, -2 * rows[:5]])) == pytest.approx(10 / 25)
    assert parallel_share(torch.zeros(3, 4)) == 0


@pytest.mark.parametrize("model", ["lenet", "linear", {"name": "mlp", "activation": "sigmoid"}])
def test_models_that_cannot_be_inspected_are_refused_before_running(model: Any) -> None:
    of = config.build(World, {"data": "digits", "model": model, "defenses": ["model_inspection"]})
    reason = of.defenses[0].refuses(of)
    assert reason is not None
    assert "must" in reason


@pytest.mark.parametrize("setting", ["parallel", "lopsided"])
def test_settings_are_checked(setting: str) -> None:
    with pytest.raises(ValueError, match="must be > 0"):
        ModelInspection(**{setting: 0.0})
