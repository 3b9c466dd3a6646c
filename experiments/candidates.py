"""N: among how many records the true one must be found."""

from __future__ import annotations

import torch

from clients.private import splits
from experiments.spec import Evaluation, Experiment


def number(experiment: Experiment, evaluation: Evaluation | None = None) -> int:
    """As many as are asked for; where that is 0, all that there are for every victim of the run: one N has one chance and one ceiling."""
    return (evaluation or experiment.evaluation).candidates or available(experiment)


def available(experiment: Experiment) -> int:
    """The records that the threat model does not rule out, of the victim for whom they are fewest: public ones and told classes do."""
    threat, arm = experiment.threat, experiment.arms[0]
    fewest = []
    for seed in experiment.seeds:
        parts = splits(experiment.world(arm, seed))
        labels = torch.cat([part.labels for part in ([parts.private, parts.test] if threat.public_data else parts.all)])
        fewest.append(int(labels.bincount().min()) if threat.labels != "none" else len(labels))
    return min(fewest)
