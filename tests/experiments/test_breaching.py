"""The peer breaching as an independent reference: on one identical gradient its losses are ours; and its benchmark's arithmetic."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from attacks._matching.distances import cosine
from attacks._matching.priors import roughness, total_variation
from experiments.benchmarks import curves, peer
from experiments.victims import Victim, victim
from simulator import config, training
from simulator.network import network
from simulator.rng import stream
from simulator.types import Batch, LocalTraining, Schema

SCHEMA = Schema((3, 32, 32), tuple("0123456789"))
needs_the_peer = pytest.mark.skipif(not peer.installed(), reason="breaching is not installed; see experiments/benchmarks/peer.py")


def observed(model: nn.Module) -> Victim:
    rng = stream(0, "picture")
    one = Batch(torch.rand(1, 3, 32, 32, generator=rng), torch.tensor([3]))
    return victim(model, SCHEMA, [one], LocalTraining(batch_norm="eval"), labels="exact")


def models() -> dict[str, nn.Module]:
    ours = network(config.build_plugin("models", {"name": "convnet", "width": 8}, "model"), SCHEMA, LocalTraining(batch_norm="eval"), 0)
    return {"our convnet": ours, "its ConvNet": peer.its_convnet(8, SCHEMA, seed=0)}


@needs_the_peer
@pytest.mark.parametrize("name", ["our convnet", "its ConvNet"])
def test_its_loss_is_ours_on_one_identical_gradient(name: str) -> None:
    model = models()[name]
    of = observed(model)
    server, user = peer.payloads(of)
    attacker = peer.attacker(model, tv=0.2, steps=1)
    (its_model,), labels, _ = attacker.prepare_attack(server, user)
    attacker.objective.initialize(attacker.loss_fn, attacker.cfg.impl, None)
    candidate = torch.rand(1, 3, 32, 32, generator=stream(1, "candidate"))
    normalized = (candidate - attacker.dm) / attacker.ds
    its, _ = attacker.objective(its_model, user[0]["gradients"], normalized, labels)

    broadcast, names = of.view.broadcast, list(of.view.broadcast.parameters)
    buffers = {name: tensor.clone() for name, tensor in model.named_buffers()}
    trial, _ = training.mean_gradient(model, broadcast.parameters, buffers, Batch(candidate, of.truth.labels))
    mine = cosine(*(torch.cat([update[name].flatten() for name in names]) for update in (trial, of.view.upload.update.tensors)))
    assert float(mine) > 1e-4, "a candidate that matches proves nothing"
    assert float(its.detach()) == pytest.approx(float(mine), abs=1e-6)


@needs_the_peer
@pytest.mark.parametrize("opponents", [False, True])
def test_its_total_variation_is_ours_up_to_its_border_and_scale(opponents: bool) -> None:
    """It pads with a zero row and column and divides by all pixels; ours takes inner differences only, each mean over its own count."""
    from breaching.attacks.auxiliaries.regularizers import TotalVariation

    image = torch.rand(1, 3, 32, 32, generator=stream(2, "image"))
    its = float(TotalVariation({"device": torch.device("cpu"), "dtype": torch.float32}, scale=1.0, double_opponents=opponents)(image))
    padded = F.pad(image, (0, 1, 0, 1))
    mine = float(roughness(padded)) / 2 if opponents else float(total_variation(padded))
    assert abs(its - mine * 33 / 32) < 1e-5


@needs_the_peer
def test_it_attacks_our_observation() -> None:
    of = observed(models()["its ConvNet"])
    guess, other = (peer.prepare(of, tv=2e-4, steps=steps, seed=0)() for steps in (30, 1))
    before = torch.get_rng_state()
    again = peer.prepare(of, tv=2e-4, steps=30, seed=0)()
    assert torch.equal(guess, again)
    assert torch.equal(before, torch.get_rng_state())
    assert guess.shape == (1, 3, 32, 32)
    assert float(guess.min()) >= 0
    assert float(guess.max()) <= 1
    error, start = ((x - of.truth.inputs).square().mean() for x in (guess, other))
    assert error < start


def row(side: str, weight: float, data: str, picture: int, budget: float, psnr_db: float) -> dict[str, object]:
    task = {"network": "n", "side": side, "weight": weight, "data": data, "picture": picture, "budget": budget}
    return {"task": task, "psnr_db": psnr_db, "ssim": 0.5, "cpu_seconds": budget, "steps": 10, "memory_mb": 30.0}


def hand_made() -> list[dict[str, object]]:
    """The peer's public pictures favour 2e-4, ours 0.1; tuned, ours is 4 dB ahead on both pictures and reaches 20 dB on one."""
    rows = [row("breaching", 0.2, "public", 0, 1, 12), row("breaching", 2e-4, "public", 0, 1, 15)]
    rows += [row("ours", 1.0, "public", 0, 1, 15), row("ours", 0.1, "public", 0, 1, 19)]
    for picture in (0, 1):
        rows += [row("breaching", 0.2, "private", picture, 10, 11), row("breaching", 2e-4, "private", picture, 10, 14 + 3 * picture)]
        rows += [row("ours", 1.0, "private", picture, 10, 15), row("ours", 0.1, "private", picture, 10, 18 + 3 * picture)]
    return rows


def test_the_table_pairs_the_tuned_sides_by_picture(tmp_path: Path) -> None:
    curves.write(hand_made(), tmp_path)
    text = (tmp_path / "breaching.md").read_text()
    assert "| `breaching` tuned | 0.0002 | 1 × shipped | 15.5 dB" in text
    assert "| `ours` tuned | 0.1 × ours | 1 × shipped | 19.5 dB" in text
    assert "Tuned against tuned at 10 CPU s, 2 pictures paired: +4.0 dB [+4.0, +4.0]" in text
    assert "10 (1 of 2)" not in text, "the median of two pictures one of which never reached it is no number"
    assert "not reached (1 of 2)" in text
    assert (tmp_path / "breaching.svg").stat().st_size > 1000
    assert len((tmp_path / "breaching.jsonl").read_text().splitlines()) == len(hand_made())
    assert json.loads((tmp_path / "breaching.jsonl").read_text().splitlines()[0])["task"]["side"] == "breaching"


def test_a_better_step_size_is_tuned_with_the_weight(tmp_path: Path) -> None:
    faster = [row("ours", 0.1, data, 0, budget, db) for data, budget, db in (("public", 1, 20), ("private", 10, 23))]
    for trial in faster:
        trial["task"] = {**dict(trial["task"]), "rate": 3.0}  # type: ignore[call-overload]
    curves.write([*hand_made(), *faster], tmp_path)
    assert "| `ours` tuned | 0.1 × ours | 3 × shipped | 23.0 dB" in (tmp_path / "breaching.md").read_text()


@needs_the_peer
def test_the_shipped_step_size_is_the_peers() -> None:
    shipped = peer.breaching().get_attack_config("invertinggradients")
    assert shipped.optim.step_size == peer.SHIPPED_RATE
    assert shipped.regularization.total_variation.scale == peer.SHIPPED_TV


def test_a_cell_with_fewer_pictures_says_how_many(tmp_path: Path) -> None:
    curves.write([*hand_made(), row("ours", 0.1, "private", 0, 30, 25), row("breaching", 2e-4, "private", 0, 30, 20)], tmp_path)
    text = (tmp_path / "breaching.md").read_text()
    assert "| `ours` tuned | 0.1 × ours | 1 × shipped | 19.5 dB [0.4, 38.6] | 25.0 dB (n = 1) |" in text
    drawn = re.findall(r"<!-- (.*) -->", (tmp_path / "breaching.svg").read_text())
    assert drawn.count("n = 1") == 2
    assert drawn[:2] == ["10", "30"], "ticks are the budgets, not powers of ten"


def test_pictures_that_only_one_side_attacked_are_no_pairs() -> None:
    rows = [{"rate": 1.0, **dict(trial.pop("task")), **trial} for trial in hand_made()]  # type: ignore[call-overload]
    own = [r for r in rows if r["side"] == "ours" and r["weight"] == 0.1 and r["data"] == "private"]
    difference = curves.paired(own, [r for r in rows if r["side"] == "breaching" and r["weight"] == 2e-4 and r["picture"] == 0], 10)
    assert difference is not None
    assert difference.mean == 4
    assert math.isinf(difference.high)
    assert curves.paired(own, [], 10) is None


def test_a_trial_survives_the_file(tmp_path: Path) -> None:
    from experiments.benchmarks import breaching

    path = tmp_path / "trials.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in hand_made()))
    trials = breaching.read(path)
    assert trials[0].task == breaching.Task("n", "breaching", 0.2, "public", 0, 1)
    assert breaching.read(tmp_path / "none") == []
