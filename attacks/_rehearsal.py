"""A rehearsal: uploads of public records, as the victim's client would have sent them, are attacked before the victim's own is.

What serves them best is what the attacker takes. It knows the recipe and the defenses, and draws their randomness itself; no victim is
looked at. How much an attack finds depends on the network, the batch and the defense; its objective does not tell, since a guess may
explain an update and be no picture.
"""

from __future__ import annotations

from dataclasses import replace
from math import log10

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from attacks._learned.pairs import sender, updates
from attacks._learned.train import compression, with_update
from simulator.adversary import Knowledge
from simulator.types import Batch, Observation

EXACT = 1e-6
"""Mean squared error below which a record is back: one that is nearer still must not outweigh those that are not."""

Rehearsed = tuple[list[Observation], list[Knowledge], list[Batch]]


def rehearsal(view: Observation, knowledge: Knowledge, count: int) -> Rehearsed:
    """Uploads of public records as this client would have sent them, what the attacker would be told of them, and the records.

    What the attacker is told to hold of public records is the others: whoever learns from them must not have seen the answer.
    """
    assert knowledge.public is not None
    public, rng = knowledge.public, torch.Generator().manual_seed(0)
    of, records = sender(view, knowledge, compression(view, knowledge)), knowledge.num_examples
    order = torch.randperm(len(public), generator=rng)
    rows, others = order[: count * records].view(count, records), order[count * records :].sort().values
    rest = Batch(public.inputs[others], public.labels[others]) if len(others) else public
    uploads = updates(of, public.inputs[rows], public.labels[rows], rng)
    uploads = uploads + of.noise * torch.randn(uploads.shape, generator=rng)
    truth = [Batch(public.inputs[own], public.labels[own]) for own in rows]
    told = [
        replace(
            knowledge,
            public=rest,
            history=(),
            labels=None if knowledge.labels is None else batch.labels,
            label_counts=None if knowledge.label_counts is None else torch.bincount(batch.labels, minlength=knowledge.schema.num_classes),
        )
        for batch in truth
    ]
    return [with_update(view, of, upload) for upload in uploads], told, truth


def psnr_db(guess: Tensor | None, truth: Batch) -> float:
    """Mean peak signal-to-noise ratio in dB after the best assignment; a failed attempt counts as mid-gray."""
    images = torch.full_like(truth.inputs, 0.5) if guess is None or not bool(torch.isfinite(guess).all()) else guess
    errors = (images.flatten(1)[:, None] - truth.inputs.flatten(1)[None]).square().mean(2).double().numpy()
    return float(sum(-10 * log10(max(error, EXACT)) for error in errors[linear_sum_assignment(errors)]) / len(truth))
