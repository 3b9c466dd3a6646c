"""Which pictures the report shows: best, median and worst victim of each arm, by PSNR."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from safetensors.torch import load_file

from experiments.arms import Arm
from experiments.directory import PICTURES
from experiments.ladder import BEST
from experiments.report.html import Picture
from experiments.result import Trial
from experiments.spec import Experiment

Shown = tuple[Trial, int, NDArray[Any], NDArray[Any]]
"""A trial, the place of a record in it, the record, and the guess."""


def gallery(experiment: Experiment, trials: Sequence[Trial], out: Path) -> Iterator[Picture]:
    """Yield three pictures of each arm and attack; where several attacks rebuilt pictures, of each arm, each victim by its strongest."""
    by_task: dict[tuple[str, str, int], list[Trial]] = {}
    for trial in trials:
        by_task.setdefault((trial.arm, trial.attack, trial.seed), []).append(trial)
    for arm in experiment.arms:
        by_attack = {attack.name: list(_pictures(arm, attack.name, experiment.seeds, by_task, out)) for attack in experiment.rungs}
        shown = {attack: found for attack, found in by_attack.items() if found}
        if len(shown) > 1:
            shown = {BEST: _strongest([item for found in shown.values() for item in found])}
        for attack, found in shown.items():
            yield from _three(arm.name, attack, sorted(found, key=_psnr, reverse=True))


def _three(arm: str, attack: str, ranked: Sequence[Shown]) -> Iterator[Picture]:
    places: tuple[tuple[Literal["best", "median", "worst"], int], ...] = (
        ("best", 0), ("median", len(ranked) // 2), ("worst", len(ranked) - 1),
    )  # fmt: skip
    for which, place in places:
        trial, index, private, guess = ranked[place]
        record = trial.records[index]
        caption = f"client {record.client}, round {trial.round}, seed {trial.seed}"
        yield Picture(
            arm=arm, attack=attack, which=which, private=private, reconstructed=guess, psnr_db=record.psnr_db, identified=record.identified,
            caption=f"{caption}, {trial.attack}" if attack == BEST else caption,
        )  # fmt: skip


def _strongest(found: Sequence[Shown]) -> list[Shown]:
    """For each victim the picture that came nearest to it."""
    best: dict[tuple[int, int, int, int], Shown] = {}
    for item in found:
        trial, record = item[0], item[0].records[item[1]]
        victim = trial.seed, trial.round, record.client, record.record
        if victim not in best or _psnr(item) > _psnr(best[victim]):
            best[victim] = item
    return list(best.values())


def _psnr(item: Shown) -> float:
    trial, index, _, _ = item
    return trial.records[index].psnr_db


def _pictures(
    arm: Arm, attack: str, seeds: Sequence[int], by_task: Mapping[tuple[str, str, int], Sequence[Trial]], out: Path
) -> Iterator[Shown]:
    for seed in seeds:
        path = out / PICTURES / f"{arm.slug}-seed{seed}-{attack}.safetensors"
        if not path.is_file():
            continue
        mine = by_task.get((arm.name, attack, seed), ())
        if any(trial.answered != "inputs" for trial in mine):
            continue  # it guessed no pictures
        pictures = load_file(path)
        places = [(trial, index) for trial in mine for index in range(len(trial.records))]
        for (trial, index), private, guess in zip(places, pictures["private"], pictures["guess"], strict=False):
            yield trial, index, *(np.asarray(picture.permute(1, 2, 0).squeeze(-1).numpy()) for picture in (private, guess))  # type: ignore[misc]
