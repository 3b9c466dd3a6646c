"""The private records: who holds what, and which of them enter a round.

The truth is recomputed from the seed by whoever is entitled to it (the client, the evaluator); it is never transmitted.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from simulator.dataset import Splits, split, take
from simulator.rng import secret_stream, stream
from simulator.training import batch_indices
from simulator.types import Batch
from simulator.world import Split, World


def splits(world: World) -> Splits:
    """The world's data set, divided into private, test and public records; nobody may change them in place."""
    return _splits(world.data, world.split, world.seed)


@lru_cache(maxsize=4)
def _splits(data: Any, shares: Split, seed: int) -> Splits:
    return split(data.load(), shares, seed)


@lru_cache(maxsize=8)
def partition(world: World) -> tuple[Tensor, ...]:
    """The indices, within the private records, of what each client holds.

    IID deals a shuffled deck evenly, quantity by shares drawn from Dir(alpha) (Li et al., 2022). Dirichlet draws each class's shares
    over clients from Dir(alpha) (Hsu et al., 2019). Every client that got nothing is given one record of the largest, so that all
    can take part.
    """
    private = splits(world).private
    clients, generator = world.federation.clients, stream(world.seed, "partition")
    if world.federation.partition == "iid":
        return torch.randperm(len(private), generator=generator).tensor_split(clients)
    numpy_rng = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
    piles: list[list[int]] = [[] for _ in range(clients)]
    skewed = world.federation.partition == "dirichlet"
    groups = [torch.nonzero(private.labels == label).flatten() for label in range(int(private.labels.max()) + 1)]
    for group in groups if skewed else [torch.arange(len(private))]:
        members = numpy_rng.permutation(group.numpy())
        shares = numpy_rng.dirichlet([world.federation.alpha] * clients)
        for pile, part in zip(piles, np.split(members, (shares.cumsum()[:-1] * len(members)).astype(int)), strict=True):
            pile.extend(int(index) for index in part)
    for pile in piles:
        if not pile:
            pile.append(max(piles, key=len).pop())
    return tuple(torch.tensor(sorted(pile)) for pile in piles)


def held_by(world: World, client: int) -> Batch:
    """All records that ``client`` holds."""
    return take(splits(world).private, partition(world)[client])


def records_held(world: World) -> tuple[int, ...]:
    """How many records each client holds."""
    return tuple(len(indices) for indices in partition(world))


def stated_examples(world: World, client: int, round: int) -> int:
    """The number of records that ``client`` states with its upload: how many it trained on, or was expected to under Poisson sampling."""
    if world.training.sampling == "poisson":
        return world.training.examples_in_round(len(partition(world)[client]))
    return len(private_record_ids(world, client, round))


def round_indices(world: World, client: int, round: int) -> list[Tensor]:
    """The indices, within what ``client`` holds, of each local step's batch in ``round`` (counted from 1).

    FedSGD walks through a fresh permutation each epoch and leaves out the partial last batch; FedAvg trains on everything. Who is in a
    Poisson sample is a secret of the client, keyed as the noise of its defenses is.
    """
    held, recipe = len(partition(world)[client]), world.training
    if recipe.sampling == "poisson":
        return batch_indices(held, recipe, secret_stream(world.seed, world.secret, "sample", client, round))
    if recipe.algorithm == "fedavg":
        return batch_indices(held, recipe, stream(world.seed, "order", client, round))
    size = min(recipe.batch_size or held, held)
    epoch, step = divmod(round - 1, held // size)
    order = torch.randperm(held, generator=stream(world.seed, "order", client, epoch))
    return [order[step * size : (step + 1) * size]]


def private_batches(world: World, client: int, round: int) -> list[Batch]:
    """The batches that ``client`` trains on in ``round``, one for each local step."""
    held = held_by(world, client)
    return [take(held, indices) for indices in round_indices(world, client, round)]


def private_records(world: World, client: int, round: int) -> Batch:
    """The distinct records behind the upload of ``client`` in ``round``: the truth that an attack is scored against; maybe none."""
    return take(splits(world).private, private_record_ids(world, client, round))


def private_record_ids(world: World, client: int, round: int) -> Tensor:
    """The indices of :func:`private_records` within all private records, each once, in order of first use."""
    used = torch.cat(round_indices(world, client, round)).tolist()
    return partition(world)[client][torch.tensor(list(dict.fromkeys(used)), dtype=torch.int64)]
