"""Two guesses of the same records, and the better records of each.

Analytic solvers rebuild some records of a batch to the last digit and miss others; matching rebuilds them all, none so well. No proof
tells which, but the update does: a record is exchanged for the other guess's where that explains the update better.
"""

from __future__ import annotations

import time
from math import inf

import torch
from scipy.optimize import linear_sum_assignment

from attacks._rest import mismatch
from simulator.adversary import Knowledge
from simulator.types import Batch, Observation

SWEEPS = 2
"""Passes over the records; what was kept in the first may be exchanged once others were."""


def blended(
    view: Observation, knowledge: Knowledge, better: Batch, other: Batch, score: float, *, until: float = inf
) -> tuple[Batch, tuple[int | None, ...], tuple[float, float]] | None:
    """``better`` with those records of ``other`` that lower :func:`attacks._rest.mismatch`, tried one after the other.

    Args:
        score: of ``better``.
        until: CPU time of this process after which no further exchange is tried.

    Returns:
        The blend, for each of its records the place in ``other`` that it is from, or None, and its angle and score; None if no record
        of ``other`` helps.
    """
    counted = knowledge.label_counts is not None  # then a record may only be exchanged for one of the same class
    twin = partners(better, other, ordered=knowledge.labels is not None, same_class=counted)
    taken, best = [False] * len(better), (float("nan"), score)
    for _ in range(SWEEPS):
        changed = False
        for place in range(len(better)):
            if time.process_time() > until:
                break
            if counted and better.labels[place] != other.labels[twin[place]]:
                continue
            tried = [flag != (i == place) for i, flag in enumerate(taken)]
            now = mismatch(view, knowledge, mixed(better, other, twin, tried))
            if now[1] < best[1]:
                taken, best, changed = tried, now, True
        if not changed:
            break
    if not any(taken):
        return None
    return mixed(better, other, twin, taken), tuple(there if flag else None for flag, there in zip(taken, twin, strict=True)), best


def partners(one: Batch, other: Batch, *, ordered: bool, same_class: bool) -> list[int]:
    """For each record of one guess the index of its twin in the other: by place where labels fix the order, else the nearest picture.

    Args:
        same_class: prefer a twin of the same label to any other.
    """
    if ordered:
        return list(range(len(one)))
    distance = torch.cdist(one.inputs.flatten(1).double(), other.inputs.flatten(1).double())
    if same_class:
        distance = distance + distance.max() * len(one) * (one.labels[:, None] != other.labels[None])
    return [int(column) for column in linear_sum_assignment(distance.numpy())[1]]


def mixed(one: Batch, other: Batch, twin: list[int], taken: list[bool]) -> Batch:
    """``one`` with the twins of the records that are ``taken``."""
    which = torch.tensor(taken)
    inputs = torch.where(which[:, None, None, None], other.inputs[twin].to(one.inputs), one.inputs)
    return Batch(inputs, torch.where(which, other.labels[twin], one.labels))
