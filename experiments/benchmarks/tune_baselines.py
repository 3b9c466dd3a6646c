"""The baselines of the defenses spec, tuned on public records alone: clipping norm and learning rate that train best under each noise.

A baseline that nobody tuned makes everything else look good (Aerni, Zhang and Tramèr, 2024, arXiv:2404.17399). For each strength of
noise this trains the spec's federation on one part of the public split, for every setting of a grid, and takes the one with the best mean
accuracy on the rest of it. No private and no test record is touched: what is public under one seed is private under another, so each
seed has its own federation, and the choice is made from their mean.

    OMP_NUM_THREADS=1 python -m experiments.benchmarks.tune_baselines [defenses] [--only dp_sgd] [--cohort 10]

With another cohort a federation has as many uploads in all: a tenth of the senders, ten times the rounds.

Trained as the clients of the spec would: in each round every client's record gives one gradient, clipped to C, with noise of its own;
their mean is the step. Noise of n clients is drawn once, with n times the variance of one, which is the same distribution.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch.func import functional_call

from defenses.client.dp_sgd import clipped_sum
from defenses.client.gaussian_noise import add_gaussian
from experiments.spec import Experiment, load
from simulator.dataset import split, take
from simulator.network import network, tensors
from simulator.rng import stream
from simulator.training import per_example_gradients
from simulator.types import Batch, LocalTraining
from simulator.world import Federation

MULTIPLIERS = (0.01, 0.1, 0.5, 1.5)
SIGMAS = (0.001, 0.01, 0.1)
CLIP_NORMS = (1.0, 3.0, 10.0, 30.0)
LEARNING_RATES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 1.0)

TIMES = 2
"""Federations under each seed, with other held-out records, noise and clients: the choice must not be that of one draw."""

HELD_OUT = 0.3
"""Of the public records, those that accuracy is measured on."""


@dataclass(frozen=True)
class Trained:
    """Settings of one federation on public records, and what came of it.

    Attributes:
        defense: ``none``, ``dp_sgd`` or ``gaussian_noise``.
        strength: noise multiplier or sigma.
        clip_norm: C; infinite without clipping.
        learning_rate: of the mean gradient.
        accuracies: on the public records that were held out, of each federation.
    """

    defense: str
    strength: float
    clip_norm: float
    learning_rate: float
    accuracies: tuple[float, ...] = ()

    @property
    def std(self) -> float:
        """Standard deviation of the noise of one client on each coordinate."""
        return self.strength * self.clip_norm if self.defense == "dp_sgd" else self.strength

    @property
    def accuracy(self) -> float:
        """The mean over the seeds."""
        return math.fsum(self.accuracies) / len(self.accuracies)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train every setting, and print the table and the choice for each strength."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spec", nargs="?", default="defenses")
    parser.add_argument("--only", choices=("none", "gaussian_noise", "dp_sgd"))
    parser.add_argument("--cohort", type=int, help="senders of a round, instead of the spec's")
    options = parser.parse_args(arguments)
    experiment, began = load(options.spec), time.process_time()
    if options.cohort:
        experiment = replace(experiment, federation=resized(experiment.federation, options.cohort))
    for family in families(options.only):
        tuned = [train(experiment, *setting) for setting in family]
        print(table(tuned), file=sys.stdout, flush=True)
    print(f"\n{time.process_time() - began:.0f} CPU s")


def resized(federation: Federation, cohort: int) -> Federation:
    """The federation with other senders in a round, and as many uploads in all."""
    return replace(federation, cohort=cohort, rounds=round(federation.rounds * federation.cohort_size / cohort))


def families(only: str | None = None) -> Iterator[list[tuple[str, float, float, float]]]:
    """The settings to compare, strength by strength: defense, strength, clipping norm, learning rate."""
    if only in (None, "none"):
        yield [("none", 0.0, math.inf, rate) for rate in LEARNING_RATES]
    for sigma in SIGMAS if only in (None, "gaussian_noise") else ():
        yield [("gaussian_noise", sigma, math.inf, rate) for rate in LEARNING_RATES]
    for z in MULTIPLIERS if only in (None, "dp_sgd") else ():
        yield [("dp_sgd", z, bound, rate) for bound in CLIP_NORMS for rate in LEARNING_RATES]


def train(experiment: Experiment, defense: str, strength: float, clip_norm: float, learning_rate: float) -> Trained:
    """Train one setting under every seed of the spec, some times each."""
    setting = Trained(defense, strength, clip_norm, learning_rate)
    return replace(
        setting, accuracies=tuple(accuracy(experiment, setting, seed, time) for seed in experiment.seeds for time in range(TIMES))
    )


def best(tuned: Sequence[Trained]) -> Trained:
    """The choice: the highest mean accuracy, the first of equals."""
    return max(tuned, key=lambda one: one.accuracy)


def accuracy(experiment: Experiment, setting: Trained, seed: int, time: int) -> float:
    """The share of held-out public records that a model trained on the others classifies rightly."""
    parts = split(experiment.data.load(), experiment.split, seed)
    shown, held = halves(parts.public, stream(seed, "tuning", "held out", time))
    recipe, federation = experiment.training, experiment.federation
    require_gradients(recipe)
    model = network(experiment.model, parts.schema, recipe, seed)
    parameters, buffers = tensors(model)
    noise, walks = stream(seed, "tuning", "noise", time), stream(seed, "tuning", "walks", time)
    for records in cohorts(shown, federation.cohort_size, federation.rounds, walks):
        gradients = per_example_gradients(model, parameters, buffers, records, label_smoothing=recipe.label_smoothing)
        total = clipped_sum(gradients, setting.clip_norm)
        if setting.std:
            total = add_gaussian(total, setting.std * math.sqrt(len(records)), noise)
        step = setting.learning_rate * federation.server_learning_rate / len(records)
        parameters = {name: value - step * total[name] for name, value in parameters.items()}
    with torch.no_grad():
        guessed = functional_call(model.eval(), {**parameters, **buffers}, (held.inputs,)).argmax(1)
    return float((guessed == held.labels).float().mean())


def halves(public: Batch, rng: torch.Generator) -> tuple[Batch, Batch]:
    """The public records to train on, and those to be judged on."""
    order = torch.randperm(len(public), generator=rng)
    held = int(HELD_OUT * len(public))
    return take(public, order[held:]), take(public, order[:held])


def cohorts(records: Batch, clients: int, rounds: int, rng: torch.Generator) -> Iterator[Batch]:
    """The records of each round: one of every client, as its own shuffled walk comes to it."""
    hands = torch.randperm(len(records), generator=rng).tensor_split(clients)
    walks: list[list[int]] = [[] for _ in hands]
    for _ in range(rounds):
        for hand, walk in zip(hands, walks, strict=True):
            if not walk:
                walk.extend(hand[torch.randperm(len(hand), generator=rng)].tolist())
        yield take(records, torch.tensor([walk.pop() for walk in walks]))


def require_gradients(recipe: LocalTraining) -> None:
    """Refuse what this does not train: the records of a batch are clipped apart, and the upload is their mean."""
    if recipe.algorithm != "fedsgd" or recipe.batch_size != 1:
        raise SystemExit(f"the spec must train by fedsgd with batches of 1, got {recipe.algorithm} with {recipe.batch_size}. Take another.")


def table(tuned: Sequence[Trained]) -> str:
    """Mean accuracy in percent, a row for each clipping norm and a column for each learning rate, with the choice."""
    first, chosen = tuned[0], best(tuned)
    rates = sorted({one.learning_rate for one in tuned})
    lines = [f"\n{first.defense} {first.strength:g}", "  C \\ rate" + "".join(f"{rate:8g}" for rate in rates)]
    for bound in sorted({one.clip_norm for one in tuned}):
        row = {one.learning_rate: one.accuracy for one in tuned if one.clip_norm == bound}
        lines.append(f"{bound:10g}" + "".join(f"{100 * row[rate]:8.1f}" for rate in rates))
    clipped = f"clip_norm = {chosen.clip_norm:g}, " if math.isfinite(chosen.clip_norm) else ""
    return "\n".join([*lines, f"choice: {clipped}learning_rate = {chosen.learning_rate:g}"])


if __name__ == "__main__":
    main()
