"""What an update comes with, disclosed and withheld: two leaks that are there, and gone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from attacks._matching.normalization import estimated
from attacks._matching.simulate import prepare
from attacks.update.labels import LabelRecovery
from experiments import spec
from experiments.metadata import usual_examples
from experiments.refusals import check
from experiments.under_attack import Victim, find_victims
from simulator import config
from simulator.errors import SpecError
from simulator.rng import stream
from tests.federations import federate

UNEVEN = {"federation": {"clients": 4, "partition": "quantity"}, "training": {"batch_size": 0}, "model": {"name": "mlp", "hidden": [8]}}
NORMED = {"federation": {"clients": 2}, "training": {"batch_size": 4}, "model": {"name": "resnet20", "width": 2}}


def victims(table: dict[str, Any], directory: Path, *, metadata: bool, defenses: tuple[str, ...] = ()) -> list[Victim]:
    arms = [{"name": "a", "defenses": list(defenses)}]
    experiment = config.build(spec.Experiment, {"data": "digits", **table, "arms": arms, "threat": {"metadata": metadata}})
    of = experiment.world(experiment.arms[0], 0)
    return find_victims(experiment, of, federate(of, directory))


def test_the_statistics_of_the_batch_are_gone(tmp_path: Path) -> None:
    """The first BatchNorm layer's mean is that of the records behind the first convolution; without the buffers there is nothing."""
    told, blind = (victims(NORMED, tmp_path / str(flag), metadata=flag)[0] for flag in (True, False))
    found = estimated(prepare(told.view, told.knowledge))
    model, sent = told.knowledge.model, told.view.broadcast
    seen: list[torch.Tensor] = []
    first = next(layer for layer in model.modules() if isinstance(layer, torch.nn.BatchNorm2d))
    handle = first.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    buffers = {name: tensor.clone() for name, tensor in model.named_buffers()}
    torch.func.functional_call(model, {**buffers, **sent.buffers, **sent.parameters}, (told.truth.inputs,))
    handle.remove()
    means = [name for name in found if name.endswith("running_mean")]
    assert torch.allclose(found[means[0]], seen[0].mean((0, 2, 3)), rtol=1e-3, atol=1e-4)
    assert estimated(prepare(blind.view, blind.knowledge)) == {}
    assert set(blind.view.broadcast.buffers) == set(sent.buffers), "what every client got is no secret"


def test_how_many_of_each_class_is_gone_with_the_number_of_examples(tmp_path: Path) -> None:
    """The gradient tells shares; the number makes counts of them."""
    wrong = {True: 0, False: 0}
    for flag in wrong:
        for victim in victims(UNEVEN, tmp_path / str(flag), metadata=flag):
            answer = LabelRecovery()(victim.view, victim.knowledge, rng=stream(0, "attack"))
            got, truth = (torch.bincount(labels, minlength=10) for labels in (answer.labels, victim.truth.labels))
            wrong[flag] += int((got - truth).abs().sum())
    assert wrong[False] > 5 * wrong[True]


def test_a_lone_sender_counts_as_usual_and_a_sum_keeps_its_total(tmp_path: Path) -> None:
    alone = victims(UNEVEN, tmp_path / "alone", metadata=False)
    experiment = config.build(spec.Experiment, {"data": "digits", **UNEVEN, "arms": [{"name": "a"}]})
    usual = usual_examples(experiment.world(experiment.arms[0], 0))
    assert {victim.knowledge.num_examples for victim in alone} == {victim.view.upload.num_examples for victim in alone} == {usual}
    sizes = [len(victim.truth) for victim in alone]
    assert usual == round(sum(sizes) / 4), "each of the 4 clients is a victim, and trains on all that it has"
    assert any(size != usual for size in sizes)
    (summed,) = victims(UNEVEN, tmp_path / "sum", metadata=False, defenses=("secure_aggregation",))
    assert summed.knowledge.num_examples == len(summed.truth)


@pytest.mark.parametrize(
    ("table", "threat", "reason"),
    [
        (UNEVEN, {"labels": "counts"}, "must be true with threat.labels, got false: clients state"),
        ({**NORMED, "federation": {"clients": 2, "rounds": 2}}, {"rounds": "all"}, "each broadcast shows the mean of those before"),
        (NORMED, {"labels": "counts"}, None),
        ({**UNEVEN, "federation": {**UNEVEN["federation"], "rounds": 2}}, {"rounds": "all"}, None),  # no statistics
    ],
)
def test_metadata_that_shows_otherwise_cannot_be_withheld(table: dict[str, Any], threat: dict[str, Any], reason: str | None) -> None:
    full = {"data": "digits", **table, "arms": [{"name": "a"}], "evaluation": {"candidates": 2}, "threat": {**threat, "metadata": False}}
    experiment = config.build(spec.Experiment, full)
    if reason is None:
        return check(experiment)
    with pytest.raises(SpecError, match=reason):
        check(experiment)
    return None
