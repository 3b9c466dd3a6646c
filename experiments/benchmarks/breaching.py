"""Gradient matching here against the peer ``breaching`` 0.1.2: the same observation, network, label and CPU seconds, in pairs.

Four parties: each side as shipped, and each with its weight of total variation chosen among five, and then its step size among three, on
public photographs, by the same rule. Each trial runs alone in a process of its own with one thread, its number of steps fitted to the
budget by a short pilot, so that every schedule ends where the budget ends: a curve over budgets is one of finished runs, not of one run
cut short. Victims are ImageNet photographs scaled down to 32×32, on which nothing here was tuned; labels are given to both sides.

    OMP_NUM_THREADS=1 nice python -m experiments.benchmarks.breaching --trials trials.jsonl --pictures 10 --budgets 10 30 60
    python -m experiments.benchmarks.breaching --trials trials.jsonl --budgets --report docs

Trials are appended to the file as they end; the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments.benchmarks import peer
from experiments.benchmarks.curves import write
from experiments.metrics import image_scores
from experiments.victims import Victim, victim
from simulator import config
from simulator.errors import FedpeekError, SpecError, did_you_mean
from simulator.rng import stream
from simulator.types import Batch, LocalTraining, Schema

PRIVATE: dict[str, Any] = {"name": "imagenet-sample", "size": 32}
PUBLIC: dict[str, Any] = {"name": "photos"}
NETWORKS = ("breaching-16", "breaching-64", "convnet-16")
"""The peer's ConvNet (BatchNorm, max-pooling) at two widths, and our own."""

PEER_WEIGHTS = (0.2, 0.02, 2e-3, 2e-4, 2e-5)
OUR_FACTORS = (1.0, 0.3, 0.1, 0.03, 0.01)
"""What is tried in tuning: the peer's weight of TV, and a factor on both ends of ours. The first of each is what ships."""

RATES = (1.0, 3.0, 0.3)
"""What is tried then, with the best weight: factors on the step size that ships."""

PILOT_STEPS = 10
MOST_STEPS = 24_000  # what breaching runs by default


@dataclass(frozen=True)
class Task:
    """One attack on one picture within one budget; ``weight`` and ``rate`` are of the above."""

    network: str
    side: str
    weight: float
    data: str
    picture: int
    budget: float
    rate: float = 1.0


@dataclass(frozen=True)
class Trial:
    """What came of a task.

    Attributes:
        psnr_db, ssim: of the guess.
        cpu_seconds: of the attack without the pilot.
        steps: iterations that fitted the budget.
        memory_mb: by which the attack raised the peak of its process.
    """

    task: Task
    psnr_db: float
    ssim: float
    cpu_seconds: float
    steps: int
    memory_mb: float


def main() -> None:
    """Run what is not in the file yet; then tune, compare and, if asked, write the report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--network", choices=NETWORKS, default="breaching-16")
    parser.add_argument("--attack", default="inverting_gradients", help="which of ours")
    parser.add_argument("--pictures", type=int, default=10)
    parser.add_argument(
        "--budgets", type=float, nargs="*", default=[10.0, 30.0, 60.0], help="CPU seconds for each attack; none runs nothing"
    )
    parser.add_argument("--tuning-pictures", type=int, default=3)
    parser.add_argument("--tuning-budget", type=float, default=10.0)
    parser.add_argument("--trials", type=Path, required=True, help="JSON lines: read, and appended to")
    parser.add_argument("--report", type=Path, default=None, help="directory for breaching.md, breaching.svg and breaching.jsonl")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    try:
        trials = list(measure(arguments)) if arguments.budgets else read(arguments.trials)
    except FedpeekError as error:
        sys.exit(f"{error}")
    if arguments.report is not None:
        write([asdict(trial) for trial in trials], arguments.report)


def measure(arguments: argparse.Namespace) -> list[Trial]:
    """All trials of the network: those on public photographs that tune both sides, then those that compare them."""
    peer.breaching()
    done = {trial.task: trial for trial in read(arguments.trials)}
    network, private = arguments.network, len(config.build_plugin("data", PRIVATE, "data").load().records)
    if not 1 <= arguments.pictures <= private:
        raise SpecError(f"--pictures must be in 1..{private}, got {arguments.pictures}. There are {private} victims.")
    sides = (("breaching", PEER_WEIGHTS), (arguments.attack, OUR_FACTORS))

    def run(tasks: Sequence[Task]) -> list[Trial]:
        for task in tasks:
            if task not in done:
                done[task] = alone(task)
                with arguments.trials.open("a", encoding="utf-8") as lines:
                    lines.write(json.dumps(asdict(done[task])) + "\n")
                print(f"{task}: {done[task].psnr_db:.2f} dB, {done[task].cpu_seconds:.1f} CPU s", file=sys.stderr, flush=True)
        return [done[task] for task in tasks]

    chosen: dict[str, tuple[float, float]] = {}

    def public(side: str, weight: float, rate: float) -> float:
        budget, pictures = arguments.tuning_budget, range(arguments.tuning_pictures)
        return sum(trial.psnr_db for trial in run([Task(network, side, weight, "public", i, budget, rate) for i in pictures]))

    for side, weights in sides:
        weight = max(weights, key=lambda weight: public(side, weight, 1.0))
        chosen[side] = weight, max(RATES, key=lambda rate: public(side, weight, rate))
        print(f"{side}: weight {weight:g}, step size × {chosen[side][1]:g} chosen on public photographs", file=sys.stderr)
    for budget in sorted(arguments.budgets):
        for picture in range(arguments.pictures):
            run([
                Task(network, side, weight, "private", picture, budget, rate)
                for side, weights in sides
                for weight, rate in dict.fromkeys(((weights[0], 1.0), chosen[side]))
            ])  # fmt: skip
    return list(done.values())


def read(path: Path) -> list[Trial]:
    """The trials in a file; none if it does not exist."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    rows: Iterator[dict[str, Any]] = (json.loads(line) for line in lines)
    return [Trial(task=Task(**row.pop("task")), **row) for row in rows]


def alone(task: Task) -> Trial:
    """The trial in a process of its own, so that its peak of memory is its own and neither side warms the other's caches."""
    context = multiprocessing.get_context("fork")  # nothing differentiates in this process, so autograd survives the fork
    with context.Pool(1) as pool:
        return pool.apply(attempt, (task,))


def attempt(task: Task) -> Trial:
    """Build the victim, fit the number of steps to the budget, attack, score."""
    torch.set_num_threads(1)
    of = build(task)
    before = peak_mb()
    clock(of, task, PILOT_STEPS)  # what only the first call costs
    short, long = (clock(of, task, steps)[1] for steps in (PILOT_STEPS, 3 * PILOT_STEPS))
    rate = max(long - short, 1e-3) / (2 * PILOT_STEPS)
    steps = max(PILOT_STEPS, min(MOST_STEPS, int((task.budget - max(short - PILOT_STEPS * rate, 0.0)) / rate)))
    guess, seconds = clock(of, task, steps)
    (score,) = image_scores(guess, of.truth.inputs)
    return Trial(task, score.psnr_db, score.ssim, seconds, steps, peak_mb() - before)


def build(task: Task) -> Victim:
    """One gradient of one picture; the model has the classes of the private data, whichever picture it sees."""
    private = config.build_plugin("data", PRIVATE, "data").load()
    records = private.records
    if task.data == "public":
        public = config.build_plugin("data", PUBLIC, "data").load().records
        order = torch.randperm(len(public), generator=stream(0, "public"))
        records = Batch(public.inputs[order], public.labels[order])
    one = Batch(records.inputs[task.picture][None], records.labels[task.picture][None])
    return victim(network(task.network, private.schema), private.schema, [one], LocalTraining(batch_norm="eval"), labels="exact")


def network(name: str, schema: Schema) -> nn.Module:
    """One of :data:`NETWORKS` with its initial weights."""
    family, _, width = name.partition("-")
    if family == "breaching":
        return peer.its_convnet(int(width), schema, seed=0)
    model: nn.Module = config.build_plugin("models", {"name": family, "width": int(width)}, "model").build(schema, stream(0, "model"))
    return model.eval()


def clock(of: Victim, task: Task, steps: int) -> tuple[Tensor, float]:
    """The guess after this many steps, and its CPU seconds; reading a configuration is not counted."""
    if task.side == "breaching":
        attack = peer.prepare(of, tv=task.weight, rate=task.rate, steps=steps, seed=task.picture)
    else:
        ours = scaled(config.build_plugin("attacks", {"name": task.side}, "attack"), task.weight, task.rate, steps)
        attack = partial(_answer, ours, of, stream(task.picture, "attack"))
    started = time.process_time()
    guess = attack()
    return guess, time.process_time() - started


def _answer(attack: Any, of: Victim, rng: torch.Generator) -> Tensor:
    guess: Tensor = attack(of.view, of.knowledge, rng=rng).inputs
    return guess


def scaled(attack: Any, weight: float, rate: float, steps: int) -> Any:
    """The attack with this many steps, its weights of total variation times ``weight`` and its step size times ``rate``.

    Raises:
        SpecError: it has no steps to fit to a budget.
    """
    names = {field.name for field in fields(attack)}
    if "steps" not in names:
        raise SpecError(f"--attack must have a setting steps, got {attack.name!r}. {did_you_mean('', ['inverting_gradients'])}")
    factors = {"tv": weight, "tv_final": weight, "learning_rate": rate}
    return replace(attack, steps=steps, **{name: factor * getattr(attack, name) for name, factor in factors.items() if name in names})


def peak_mb() -> float:
    """The most memory that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
