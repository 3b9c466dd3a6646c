"""With a ladder each victim is shown as its strongest attack left it; with one attack, as that one did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from experiments.directory import PICTURES
from experiments.gallery import gallery
from experiments.ladder import BEST
from experiments.result import Trial
from experiments.spec import Experiment
from simulator import config
from tests.experiments.test_summary import record, trial


def experiment(*attacks: str) -> Experiment:
    table: dict[str, Any] = {"data": "digits", "model": {"name": "linear"}, "attacks": list(attacks), "arms": [{"name": "none"}]}
    return config.build(Experiment, table)


def tried(out: Path, attack: str, *psnrs: float, answered: str = "inputs") -> list[Trial]:
    """One upload a victim; the guess is a picture of one shade, by which it is known again."""
    (out / PICTURES).mkdir(exist_ok=True)
    shade = {"dlg": 0.25, "linear_leak": 0.75, "candidate_identification": 0.5}[attack]
    guess = torch.full((len(psnrs), 1, 8, 8), shade)
    save_file({"private": torch.zeros_like(guess), "guess": guess}, out / PICTURES / f"none-seed0-{attack}.safetensors")
    return [
        trial(attack=attack, senders=(client,), answered=answered, records=(record(client, client, psnr_db=psnr),))
        for client, psnr in enumerate(psnrs)
    ]  # fmt: skip


def test_each_victim_is_shown_by_its_strongest_attack(tmp_path: Path) -> None:
    trials = [*tried(tmp_path, "dlg", 10.0, 30.0, 12.0), *tried(tmp_path, "linear_leak", 20.0, 11.0, 11.0)]
    trials += tried(tmp_path, "candidate_identification", 60.0, 60.0, 60.0, answered="candidates")
    shown = list(gallery(experiment("dlg", "linear_leak", "candidate_identification"), trials, tmp_path))
    assert [(picture.attack, picture.which, picture.psnr_db) for picture in shown] == [
        (BEST, "best", 30.0), (BEST, "median", 20.0), (BEST, "worst", 12.0),
    ]  # fmt: skip
    assert [float(picture.reconstructed[0, 0]) for picture in shown] == [0.25, 0.75, 0.25]
    assert shown[1].caption == "client 0, round 1, seed 0, linear_leak"


def test_one_attack_that_draws_is_shown_under_its_name(tmp_path: Path) -> None:
    trials = [*tried(tmp_path, "dlg", 10.0, 30.0), *tried(tmp_path, "candidate_identification", 60.0, 60.0, answered="candidates")]
    shown = list(gallery(experiment("dlg", "candidate_identification"), trials, tmp_path))
    assert {picture.attack for picture in shown} == {"dlg"}
    assert shown[0].caption == "client 1, round 1, seed 0"
