"""What defenses share that train on mixtures of records."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from simulator.dataset import take
from simulator.defense import ClientContext, Pool
from simulator.types import Batch
from simulator.world import World


def pool_of(context: ClientContext) -> Pool:
    """What the batch may be mixed with."""
    if context.pool is None:
        raise ValueError("a batch must be mixed in on_batch, got a context without a pool. Call it there.")
    return context.pool


def targets(batch: Batch, classes: int) -> Float[Tensor, "batch classes"]:
    """What the batch is trained towards, as a weight for each class."""
    return F.one_hot(batch.labels, classes).to(batch.inputs) if batch.targets is None else batch.targets


def partners(records: Batch, count: int, rng: torch.Generator) -> Batch:
    """``count`` records drawn at random with replacement: anyone may meet itself, as in a random permutation."""
    return take(records, torch.randint(len(records), (count,), generator=rng))


def mixed(shares: Float[Tensor, "batch k"], parts: Sequence[Tensor]) -> Tensor:
    """Σⱼ shares[:, j]·parts[j], record by record."""
    terms = [share.view(-1, *(1,) * (part.ndim - 1)) * part for share, part in zip(shares.T, parts, strict=True)]
    return torch.stack(terms).sum(0)


def beta_shares(alpha: float, count: int, rng: torch.Generator) -> Float[Tensor, " batch"]:
    """``count`` draws from Beta(alpha, alpha), which PyTorch cannot draw from a generator of ours."""
    seed = int(torch.randint(2**62, (1,), generator=rng))
    return torch.from_numpy(np.random.default_rng(seed).beta(alpha, alpha, count)).float()


def nobody_to_mix_with(world: World) -> str | None:
    """The reason to refuse a world whose clients hold one record on average."""
    private = 1 - world.split.test - world.split.public
    held = int(len(world.data.load().records) * private) // world.federation.clients
    return None if held > 1 else f"clients must hold ≥ 2 records to mix, got {held}. Lower federation.clients."
