"""The router against each of its solvers alone: is ``strongest`` never worse than the best of them, and where does nothing work?

Every setting is attacked on the same uploads by ``strongest`` and by every solver that applies, each with the same budget of CPU seconds
for a victim. A victim counts as matched when its mean PSNR under ``strongest`` is at most ``TIE`` below the best solver's. A setting
whose gain over the best floor is not above 0 says so, beside its floor.

    OMP_NUM_THREADS=1 python -m experiments.benchmarks.strongest [--seconds 20] [--victims 3] [--only MLP] [--write] [--json FILE]

``--write`` puts the table into docs/strongest.md. Every row says with which budget, on how many victims and by which source it was
measured; rows that differ in that are no table, and are refused.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from attacks._choice import LADDER, Choice
from attacks.strongest import Strongest
from experiments.benchmarks.strongest_page import PAGE, TIE, UNKNOWN, Conditions, page, shared, table
from experiments.controls import best_floor, floors
from experiments.directory import source_digest
from experiments.groups import fixed_rng
from experiments.matching import assign
from experiments.metrics import evaluate
from experiments.statistics import bootstrap_mean
from experiments.victims import Victim, trained, victim
from simulator import config
from simulator.dataset import DataSet, take
from simulator.network import network
from simulator.rng import stream
from simulator.types import LocalTraining

FEDSGD = LocalTraining(batch_size=0, batch_norm="eval")
FEDAVG = LocalTraining(algorithm="fedavg", batch_size=4, epochs=2, learning_rate=0.01, batch_norm="eval")
TRAIN_MODE = replace(FEDSGD, batch_norm="train")


@dataclass(frozen=True)
class Setting:
    """One row: the model, what a client trains on, and how.

    Attributes:
        steps: of training before the attacked round, with batches of 16 records that are no victims; 0 attacks the initial model.
    """

    name: str
    model: dict[str, Any]
    batch: int = 1
    recipe: LocalTraining = FEDSGD
    steps: int = 0
    clients: int = 1
    data: str = "photos"


SETTINGS = (
    Setting("MLP, b = 1", {"name": "mlp"}),
    Setting("MLP, b = 8", {"name": "mlp"}, batch=8),
    Setting("MLP 512, b = 32", {"name": "mlp", "hidden": [512]}, batch=32),
    Setting("MLP, b = 8, trained", {"name": "mlp"}, batch=8, steps=100),
    Setting("MLP, FedAvg n = 8, E = 2, B = 4", {"name": "mlp", "hidden": [512]}, batch=8, recipe=replace(FEDAVG, learning_rate=0.001)),
    Setting("MLP, sum of 4 clients of 2", {"name": "mlp"}, batch=2, clients=4),
    Setting("LeNet, b = 1", {"name": "lenet"}),
    Setting("LeNet, b = 8", {"name": "lenet"}, batch=8),
    Setting("LeNet, b = 1, trained", {"name": "lenet"}, steps=100),
    Setting("CNN, b = 1", {"name": "cnn"}),
    Setting("CNN, b = 8", {"name": "cnn"}, batch=8),
    Setting("CNN, b = 8, trained", {"name": "cnn"}, batch=8, steps=100),
    Setting("ConvNet-16, b = 1", {"name": "convnet"}),
    Setting("ConvNet-16, b = 8", {"name": "convnet"}, batch=8),
    Setting("ConvNet-16, b = 1, trained", {"name": "convnet"}, steps=100),
    Setting("ConvNet-16, FedAvg n = 8, E = 2, B = 4", {"name": "convnet"}, batch=8, recipe=FEDAVG),
    Setting("ResNet-20 GroupNorm, b = 1", {"name": "resnet20", "norm": "group"}),
    Setting("ResNet-20 BatchNorm frozen, b = 1", {"name": "resnet20"}),
    Setting("ResNet-20 BatchNorm train mode, b = 8", {"name": "resnet20"}, batch=8, recipe=TRAIN_MODE),
    Setting(
        "ResNet-20 BatchNorm train mode, FedAvg n = 8, trained",
        {"name": "resnet20"}, batch=8, recipe=replace(FEDAVG, batch_norm="train"), steps=100,
    ),
    Setting("ViT, b = 1", {"name": "vit"}),
    Setting("ViT, b = 8", {"name": "vit"}, batch=8),
)  # fmt: skip


def victims(setting: Setting, count: int) -> Iterator[Victim]:
    """Uploads of disjoint records, each with its own initial model."""
    data: DataSet = config.build_plugin("data", setting.data, "data").load()
    each = setting.batch * setting.clients
    order = torch.randperm(len(data.records), generator=stream(0, "benchmark"))
    family = config.build_plugin("models", setting.model, "model")
    for number in range(count):
        model = network(family, data.schema, setting.recipe, number)
        own = order[number * each : (number + 1) * each]
        state = None
        if setting.steps:
            rest = take(data.records, order[count * each :])
            state = trained(model, rest, steps=setting.steps, batch_size=16, learning_rate=0.05, seed=number)
        clients = [take(data.records, part) for part in torch.split(own, setting.batch)]
        yield victim(model, data.schema, clients, setting.recipe, seed=number, state=state)


def solve(attack: Any, target: Victim, number: int) -> tuple[float, int, float]:
    """Mean PSNR in dB over the records of one victim (mid-gray where the attack fails), certified records, and CPU seconds."""
    began = time.process_time()
    try:
        guess = attack(target.view, target.knowledge, rng=stream(number, "attack"))
    except Exception as error:  # counts as a failure of the attack, like in a run
        print(f"  {attack.name} failed: {type(error).__name__}: {error}", file=sys.stderr)
        guess = None
    seconds = time.process_time() - began
    inputs = None if guess is None else guess.inputs
    truth = target.truth.inputs
    scores = evaluate(inputs, truth, None if inputs is None else assign(inputs, truth))
    proven = 0 if guess is None else sum(map(bool, guess.certificate))
    return statistics.fmean(score.psnr_db for score in scores), proven, seconds


def row(setting: Setting, under: Conditions) -> dict[str, Any]:
    """Everything about one setting."""
    count, seconds = under.victims, under.budget
    data: DataSet = config.build_plugin("data", setting.data, "data").load()
    solvers = [cls(seconds=seconds) if any(item.name == "seconds" for item in fields(cls)) else cls() for cls in LADDER]
    ours, floor, best, proven, spent, records = [], [], [], 0, [], 0
    singles: dict[str, list[float]] = {}
    for number, target in enumerate(victims(setting, count)):
        psnr, certified, took = solve(Strongest(seconds=seconds / len(target.truth)), target, number)
        alone, choice = {}, Choice(target.view, target.knowledge)
        for solver in solvers:
            if choice.applies(type(solver)):  # also those that strongest thinks another makes superfluous
                alone[solver.name] = solve(solver, target, number)[0]
                singles.setdefault(solver.name, []).append(alone[solver.name])
        truth = target.truth.inputs
        index = torch.tensor([int((data.records.inputs == image).flatten(1).all(1).nonzero()[0]) for image in truth])
        levels = [best_floor(item)[1].psnr_db for item in floors(truth, data.records, index, rng=stream(number, "floors"))]
        ours.append(psnr)
        floor.append(statistics.fmean(levels))
        best.append(max(alone.values(), default=float("nan")))
        proven, records = proven + certified, records + len(truth)
        spent.append(took)
        print(f"{setting.name}, victim {number}: strongest {psnr:.1f} dB, {alone}", file=sys.stderr, flush=True)
    gains = [one - other for one, other in zip(ours, floor, strict=True)]
    return {
        "setting": setting.name,
        **asdict(under),
        "records": records,
        "strongest_db": ours,
        "proven": proven,
        "seconds": spent,
        "solvers_db": singles,
        "best_db": best,
        "matched": sum(one >= other - TIE for one, other in zip(ours, best, strict=True)),
        "floor_db": floor,
        "gain": asdict(bootstrap_mean(gains, range(len(gains)), rng=fixed_rng())),
    }


def main() -> None:
    """Run the settings; print, and write where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="CPU seconds for each victim and attack")
    parser.add_argument("--victims", type=int, default=3, help="uploads of each setting")
    parser.add_argument("--only", default="", help="settings whose name starts with this")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    parser.add_argument("--json", type=Path, help="write every figure here as it comes, and go on from what is there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    order = [setting.name for setting in SETTINGS]
    if options.json and options.json.is_file():
        rows = json.loads(options.json.read_text(encoding="utf-8"))
    done = {entry["setting"] for entry in rows}
    pending = [setting for setting in SETTINGS if setting.name.startswith(options.only) and setting.name not in done]
    stored = source_digest() if pending or not rows else rows[0].get("source", UNKNOWN)
    under = shared(rows, Conditions(options.seconds, options.victims, stored))
    for setting in pending:
        rows.append(row(setting, under))
        if options.json:
            options.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    rows.sort(key=lambda entry: order.index(entry["setting"]))
    print(table(rows))
    if options.write:
        PAGE.write_text(page(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
