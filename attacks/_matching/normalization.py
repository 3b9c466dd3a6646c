"""What normalizes the candidates where the client's BatchNorm used the statistics of its own batch."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Literal

import torch
from torch import nn

from attacks._layers import trace
from attacks._matching.simulate import Victim
from attacks._matching.statistics import batch_moments, tracking
from simulator.types import Tensors

Assumption = Literal["train", "estimated", "running"]
"""``train``: the candidates' own statistics, as the client does, so that they are right where the records are. ``estimated``: those of
the private batch, which the uploaded buffers give away, held fixed: each record is then simulated by itself, but the gradient lacks what
flows through the statistics. ``running``: the broadcast ones, held fixed: a guess that the batch is like the data behind them."""


def assumed(victims: Sequence[Victim], assumption: Assumption) -> list[Victim]:
    """The victims as the attacker simulates them; those without train-mode BatchNorm as they are. One copy of each model."""
    frozen: dict[int, nn.Module] = {}
    out = []
    for victim in victims:
        if assumption == "train" or not victim.model.training or not tracking(victim.model):
            out.append(victim)
            continue
        model = frozen.setdefault(id(victim.model), copy.deepcopy(victim.model).eval())
        buffers = victim.buffers if assumption == "running" else {**victim.buffers, **estimated(victim)}
        out.append(replace(victim, model=model, buffers=buffers))
    return out


def estimated(victim: Victim) -> Tensors:
    """Mean and biased variance with which each BatchNorm layer normalized the batch, in place of the running ones.

    Exact for one step and one sender; else an average of several.
    """
    records = victim.order[0][1] - victim.order[0][0]
    calls, _ = trace(victim.model, victim.parameters, victim.buffers, torch.full((max(2, records), *victim.shape), 0.5))
    counts = {call.name: records * prod(call.inputs.shape[2:]) for call in calls}
    found = {}
    for name, (mean, var) in batch_moments(victim.model, victim.buffers, victim.uploaded, len(victim.order)).items():
        found[f"{name}.running_mean".lstrip(".")] = mean
        found[f"{name}.running_var".lstrip(".")] = var.clamp(min=0) * (1 - 1 / max(2, counts[name]))
    return found
