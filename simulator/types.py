"""The nouns of a federated round, as frozen data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float, Int
from torch import Tensor

Tensors = Mapping[str, Tensor]
"""Named tensors: parameters, buffers, or an update of them."""


@dataclass(frozen=True)
class Batch:
    """Records with their labels.

    Attributes:
        inputs: images, float32 in [0, 1], channels first; normalization is the model's first layer.
        labels: class indices, int64.
    """

    inputs: Float[Tensor, "batch channel height width"]
    labels: Int[Tensor, " batch"]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Schema:
    """What one record looks like: the shape (channel, height, width) of an input, and the names of the classes."""

    shape: tuple[int, int, int]
    class_names: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        """Classes that a label can name."""
        return len(self.class_names)


@dataclass(frozen=True, kw_only=True)
class LocalTraining:
    """The recipe that the server broadcasts: what a client computes in one round.

    ``fedsgd``: the gradient of the mean loss over one batch (McMahan et al., 2017, arXiv:1602.05629, with E = 1, B = batch_size).
    ``fedavg``: plain SGD from the broadcast parameters; the upload is the difference of parameters.

    Attributes:
        batch_size: records in a batch; 0 means all that the client holds.
        epochs: local epochs (fedavg).
        steps: local steps (fedavg); 0 means as many as ``epochs`` takes.
        learning_rate: of the local step (fedavg) or of the server's step along the mean gradient (fedsgd).
        momentum: of local SGD (fedavg), heavy ball without dampening, as in torch.optim.SGD.
        weight_decay: L2 coefficient of local SGD (fedavg), added to the gradient.
        batch_norm: ``train`` normalizes with the batch's own statistics and uploads the running ones, as real clients do;
            ``eval`` freezes them at the broadcast values, which is easier to attack and common in papers.
    """

    algorithm: Literal["fedsgd", "fedavg"] = "fedsgd"
    batch_size: int = 1
    epochs: int = 1
    steps: int = 0
    learning_rate: float = 0.1
    momentum: float = 0.0
    weight_decay: float = 0.0
    batch_norm: Literal["train", "eval"] = "train"

    def __post_init__(self) -> None:
        for name, lowest in (("batch_size", 0), ("epochs", 1), ("steps", 0)):
            if getattr(self, name) < lowest:
                raise ValueError(f"{name} must be ≥ {lowest}, got {getattr(self, name)}. The default is {getattr(LocalTraining, name)}.")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be > 0 and finite, got {self.learning_rate}. The default is 0.1.")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {self.momentum}. 0 is plain SGD.")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must be ≥ 0 and finite, got {self.weight_decay}. 0 is none.")


@dataclass(frozen=True)
class Update:
    """What training changed.

    ``gradient``: the gradient of the mean batch loss at the broadcast parameters. ``delta``: local minus broadcast parameters.
    """

    kind: Literal["gradient", "delta"]
    tensors: Tensors


@dataclass(frozen=True)
class Broadcast:
    """What the server sent in a round: the model and the recipe."""

    round: int
    parameters: Tensors
    buffers: Tensors
    training: LocalTraining


@dataclass(frozen=True)
class Upload:
    """What came back: one client's update, or the weighted mean over several clients under secure aggregation.

    Attributes:
        senders: the clients behind the update; more than one when a channel shows the server only their aggregate.
        update: the update, or its mean weighted by the senders' numbers of examples.
        buffers: the model's floating-point buffers after training (BatchNorm statistics), or their weighted mean.
        num_examples: records behind the update, summed over the senders.
    """

    senders: frozenset[int]
    update: Update
    buffers: Tensors
    num_examples: int


@dataclass(frozen=True)
class Observation:
    """The adversary's view of one round: the broadcast and the uploads it got for it."""

    broadcast: Broadcast
    uploads: tuple[Upload, ...]

    @property
    def upload(self) -> Upload:
        """The upload under attack.

        Raises:
            ValueError: the observation does not hold exactly one upload; narrow it with :meth:`only` first.
        """
        if len(self.uploads) != 1:
            raise ValueError(f"observation must hold exactly 1 upload, got {len(self.uploads)}. Use observation.only(i).")
        return self.uploads[0]

    def only(self, index: int) -> Observation:
        """This round with the one upload ``index``: the usual target of an attack."""
        return Observation(self.broadcast, (self.uploads[index],))
