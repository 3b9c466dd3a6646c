"""The hooks through which a defense acts, in the order in which data meets them; each one defaults to doing nothing.

    on_model → on_broadcast → on_batch → on_gradient (per example) → on_step → on_update → channel
      → **the observation is taken here** → on_aggregate

A defense is a frozen dataclass registered under ``defenses``; it overrides the hook it needs. What it claims is data
(:meth:`Defense.claim`); turning the claim into ε is the accountant's business (``defenses.accounting``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import nn

from simulator.types import Batch, Broadcast, Tensors, Update

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from dp_accounting import DpEvent

    from simulator.world import World


Role = Literal["", "clip", "noise", "compression"]
"""What a defense does to the whole update: bound it, add noise that such a bound calibrates, or leave coordinates or digits out."""


@dataclass(frozen=True)
class Private:
    """What a client knows of its own round.

    Attributes:
        model: the architecture; its own parameters mean nothing.
        broadcast: what the server sent.
        batches: the private batches, one for each local step, after every ``on_batch``.
    """

    model: nn.Module
    broadcast: Broadcast
    batches: tuple[Batch, ...]


@dataclass(frozen=True)
class Pool:
    """What a client may mix a batch with.

    Attributes:
        held: all records that the client holds, those of the batch among them.
        public: everybody's records of the same kind.
        classes: that a label can name.
    """

    held: Batch
    public: Batch
    classes: int


@dataclass(frozen=True)
class ClientContext:
    """What a client-side hook may know: who acts, in which round and local step, and its own randomness.

    Attributes:
        batch_size: records in the round's first batch; under Poisson sampling the expected number, whatever was drawn.
        step: the local step that ``on_gradient`` and ``on_step`` act in, from 1; 0 outside.
        private: what the client itself knows; None unless the defense says that it :attr:`Defense.looks_again`.
        lasting: randomness that starts the same in every round; each client has its own.
        pool: what ``on_batch`` may mix the batch with; None in every other hook.
        buffers: of the model, as the server sent them.
    """

    client: int
    round: int
    batch_size: int
    rng: torch.Generator
    step: int = 0
    private: Private | None = None
    lasting: torch.Generator | None = None
    pool: Pool | None = None
    buffers: Tensors = field(default_factory=dict)


@dataclass(frozen=True)
class ServerContext:
    """What a server-side hook may know: the round, how many clients answered, its own randomness, and the buffers that it sent."""

    round: int
    cohort: int
    rng: torch.Generator
    buffers: Tensors = field(default_factory=dict)


@dataclass(frozen=True)
class Claim:
    """A differential-privacy claim as data: everything that must be printed beside an ε.

    Attributes:
        event: what was released over the whole training, in dp-accounting's terms.
        adversary: against whom it holds: ``server`` (sees every upload) or ``outsider`` (sees released models only).
        unit: what one neighbor changes: a record, or all that a client holds.
        adjacency: how neighbors differ, in words.
        sampling: what the adversary does not know of who took part, in words.
        attacked: what a guess among candidates is bounded by, where that is another event: one that tells the releases of a unit which took
            part in the attacked round for certain, under zero-out, the other rounds as in ``event``; None where ``event`` says that.
        viewer: the adversary in words, where it sees less than every upload; empty for the usual ones.
    """

    event: DpEvent
    adversary: Literal["server", "outsider"]
    unit: Literal["record", "client"]
    adjacency: str
    sampling: str
    attacked: DpEvent | None = None
    viewer: str = ""


@dataclass(frozen=True)
class Defense:
    """A defense that does nothing; subclasses override one hook."""

    name: ClassVar[str] = ""
    channel: ClassVar[bool] = False
    """Whether it changes who sees what (secure aggregation) instead of values."""
    per_example: ClassVar[bool] = False
    """Whether :meth:`on_gradient` must be called, which costs per-example gradients."""
    looks_again: ClassVar[bool] = False
    """Whether :meth:`on_step` or :meth:`on_update` needs the private batch again: after a mechanism it is then no post-processing."""

    role: ClassVar[Role] = ""
    """What it does to the whole update, by which the order of a stack is judged."""

    def refuses(self, world: World) -> str | None:
        """Return None if the defense can act in this world, else the reason why not (must be / got / do)."""
        return None

    def on_model(self, family: Any) -> Any:
        """The model family that everybody trains instead of ``family``: it is public, as the architecture always is."""
        return family

    def on_broadcast(self, broadcast: Broadcast, model: nn.Module, shape: tuple[int, ...], context: ClientContext) -> str | None:
        """Return None to train on what the server sent, else the reason why not: the server and the transcript get to read it.

        It is handed no record, since whether a client answers is seen by everybody and no noise covers it.

        Args:
            model: the architecture; its own parameters mean nothing.
            shape: (channel, height, width) of a record.
        """
        return None

    def on_batch(self, batch: Batch, context: ClientContext) -> Batch:
        """Transform the private batch before training."""
        return batch

    def on_gradient(self, per_example: Tensors, context: ClientContext) -> Tensors:
        """Combine per-example gradients, each of shape (batch, …), into the gradient of one local step."""
        return {name: tensor.mean(0) for name, tensor in per_example.items()}

    def on_step(self, gradient: Tensors, context: ClientContext) -> Tensors:
        """Transform the gradient of one local step; under FedSGD it is what ``on_update`` gets."""
        return gradient

    def on_update(self, update: Update, context: ClientContext) -> Update:
        """Transform the whole update before it leaves the client."""
        return update

    def on_buffers(self, buffers: Tensors, update: Update, context: ClientContext) -> Tensors:
        """Transform the buffers that leave beside the update, which is as this defense's :meth:`on_update` gets it."""
        return buffers

    def integer_noise(self, world: World, shape: tuple[int, ...], rng: torch.Generator) -> npt.NDArray[np.int64] | None:
        """Noise for the update's coordinates in units of the grid of secure aggregation, added before masking; None adds nothing.

        Args:
            world: the whole federation: a client's noise may count on that of others.
            shape: (coordinates of the update,).
            rng: the client's own randomness for this round.
        """
        return None

    def longest_rounded(self, world: World, coordinates: int) -> float:
        """The L2 norm that the rounded update must keep to, in units of the grid of secure aggregation: rounding is repeated until then."""
        return math.inf

    def word_range(self, world: World, coordinates: int) -> float | None:
        """The largest magnitude that words of secure aggregation make room for, in the update's unit; None takes its ``clip_range``."""
        return None

    def rotation(self, world: World, round: int) -> torch.Generator | None:
        """Public randomness by which secure aggregation turns updates before they are rounded, and their sum back; None turns nothing."""
        return None

    def on_aggregate(self, update: Update, context: ServerContext) -> Update:
        """Transform the aggregate at the server, after the observation was taken."""
        return update

    def on_mean_buffers(self, means: Tensors, context: ServerContext) -> Tensors:
        """Transform the mean of the clients' buffers at the server, which sends them in the next round."""
        return means

    def noise_std(self, world: World) -> float:
        """Standard deviation of the noise that it adds to one coordinate of an upload: what a channel must make room for."""
        return 0.0

    def clipping_and_noise(self, batch: int, *, alone: bool) -> tuple[float, float] | None:
        """The norm that it clips a record's gradient to, and the standard deviation of the Gaussian noise that it then adds; else None.

        Both are in the unit of that gradient; inf clips nothing and 0 adds nothing. What it does at other hooks than the one at which it
        changes the gradient or the update is not asked here. None says that it does something else to the gradient.

        Args:
            batch: by how much the update is smaller than the sum of the records' gradients: what it is divided by.
            alone: whether one record makes up the update for certain, so that what bounds the update bounds that record's gradient.
        """
        return None

    def upload_bytes(self, numbers: int, world: World) -> float | None:
        """Bytes that an efficient coding of one client's upload takes; None where it takes what it took before, 4 a number.

        Args:
            numbers: parameters and buffers of the model.
            world: the federation: a protocol's messages depend on the cohort.
        """
        return None

    def claim(self, world: World, records_held: Sequence[int]) -> Claim | None:
        """The formal claim over the whole training, or None: a defense without one is reported with ε = ∞.

        Args:
            world: the federation, its recipe and the whole stack of defenses.
            records_held: how many records each client holds; the claim is for the client for which it is weakest.
        """
        return None


CLIENT_HOOKS = ("on_model", "on_broadcast", "on_batch", "on_gradient", "on_step", "on_update", "on_buffers", "integer_noise")
"""Where a defense acts at the client, before anything leaves it."""


def overrides(defense: Defense | type[Defense], hook: str) -> bool:
    """Whether ``defense`` acts at ``hook``, or leaves it as the base class has it: doing nothing."""
    kind = defense if isinstance(defense, type) else type(defense)
    return getattr(kind, hook) is not getattr(Defense, hook)
