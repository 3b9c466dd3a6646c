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
        targets: a weight for each class, what a client trains towards instead of its labels where a defense mixes records; it stays
            at the client. None trains towards the labels.
    """

    inputs: Float[Tensor, "batch channel height width"]
    labels: Int[Tensor, " batch"]
    targets: Float[Tensor, "batch classes"] | None = None

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
    ``fedavg``: the local optimizer from the broadcast parameters on; the upload is the difference of parameters.

    Attributes:
        algorithm: what the client uploads: ``fedsgd`` the gradient over one batch, ``fedavg`` what local steps changed.
        batch_size: records in a batch; 0 means all that the client holds.
        sampling: ``shuffled`` walks through fresh permutations; ``poisson`` takes each record into each batch on its own with probability
            batch_size / held, so that a batch varies in size and may be empty. Its gradient is divided by the expected size, and the
            upload states what is expected: who was drawn stays secret, which is what amplifies DP-SGD.
        epochs: local epochs (fedavg).
        steps: local steps (fedavg); 0 means as many as ``epochs`` takes.
        drop_last: leave out the partial last batch of each epoch (fedavg; fedsgd always does), as DataLoader(drop_last=True). A client
            with fewer records than ``batch_size`` still trains on them all.
        learning_rate: of the local step (fedavg) or of the server's step along the mean gradient (fedsgd).
        optimizer: of the local steps (fedavg): torch.optim.SGD or torch.optim.Adam, fresh in each round.
        momentum: of local SGD (fedavg), heavy ball without dampening, as in torch.optim.SGD.
        adam_beta1: decay of Adam's mean gradient.
        adam_beta2: decay of Adam's mean squared gradient.
        adam_eps: added to the root of Adam's mean squared gradient.
        weight_decay: L2 coefficient (fedavg), added to the gradient as in torch.optim.SGD and torch.optim.Adam.
        max_grad_norm: L2 norm to which each local step's gradient is scaled down (fedavg), over all parameters together, as
            torch.nn.utils.clip_grad_norm_ between backward() and step(); 0 does not clip.
        proximal: μ of FedProx (fedavg; Li et al., 2020, arXiv:1812.06127): the loss gets + μ/2·‖θ − θ_broadcast‖².
        label_smoothing: ε of the cross-entropy: the target is 1 − ε on the label plus ε/classes on each class (Szegedy et al., 2016).
        batch_norm: ``train`` normalizes with the batch's own statistics and uploads the running ones, as real clients do;
            ``eval`` freezes them at the broadcast values, which is easier to attack and common in papers.
        upload_dtype: number format to which the client rounds its update, after its defenses, and in which it crosses the wire;
            buffers stay float32, and the server converts back before it computes.
    """

    algorithm: Literal["fedsgd", "fedavg"] = "fedsgd"
    batch_size: int = 1
    sampling: Literal["shuffled", "poisson"] = "shuffled"
    epochs: int = 1
    steps: int = 0
    drop_last: bool = False
    learning_rate: float = 0.1
    optimizer: Literal["sgd", "adam"] = "sgd"
    momentum: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 0.0
    proximal: float = 0.0
    label_smoothing: float = 0.0
    batch_norm: Literal["train", "eval"] = "train"
    upload_dtype: Literal["float32", "float16", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        for name, lowest in (("batch_size", 0), ("epochs", 1), ("steps", 0)):
            if getattr(self, name) < lowest:
                raise ValueError(f"{name} must be ≥ {lowest}, got {getattr(self, name)}. The default is {getattr(LocalTraining, name)}.")
        for name in ("learning_rate", "adam_eps"):
            if not 0 < getattr(self, name) < math.inf:
                default = getattr(LocalTraining, name)
                raise ValueError(f"{name} must be > 0 and finite, got {getattr(self, name)}. The default is {default}.")
        for name, plain in (("momentum", "plain SGD"), ("label_smoothing", "hard labels"), ("adam_beta1", "none"), ("adam_beta2", "none")):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}. 0 is {plain}.")
        for name in ("weight_decay", "max_grad_norm", "proximal"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be ≥ 0 and finite, got {getattr(self, name)}. 0 is none.")
        if self.optimizer not in ("sgd", "adam"):
            raise ValueError(f"optimizer must be 'sgd' or 'adam', got {self.optimizer!r}. The default is 'sgd'.")
        if self.sampling not in ("shuffled", "poisson"):
            raise ValueError(f"sampling must be 'shuffled' or 'poisson', got {self.sampling!r}. The default is 'shuffled'.")
        if self.upload_dtype not in ("float32", "float16", "bfloat16"):
            raise ValueError(f"upload_dtype must be float32, float16 or bfloat16, got {self.upload_dtype!r}. The default is float32.")
        if self.optimizer == "adam" and self.momentum:
            raise ValueError(f"momentum must be 0 with optimizer = 'adam', got {self.momentum}. Set adam_beta1 instead.")

    def size_of_batch(self, records: int) -> int:
        """Records in a full batch of a client that holds ``records``; under Poisson sampling the expected number."""
        return max(1, min(self.batch_size or records, records))

    def steps_in_epoch(self, records: int) -> int:
        """Batches in one epoch over ``records``: the partial last one counts unless it is dropped."""
        size = self.size_of_batch(records)
        return records // size if self.drop_last else -(-records // size)

    def local_steps(self, records: int) -> int:
        """Local steps that a client with ``records`` takes in a round."""
        if self.algorithm == "fedsgd":
            return 1
        return self.steps or self.epochs * self.steps_in_epoch(records)

    def sampling_rate(self, records: int) -> float:
        """q: the probability with which Poisson sampling takes one record of a client with ``records`` into a batch."""
        return self.size_of_batch(records) / records

    def examples_in_round(self, records: int) -> int:
        """The distinct records that a client with ``records`` trains on in one round, of one epoch if it drops any.

        Under Poisson sampling the number that it states instead: at most what its batches are expected to hold together. It says
        nothing of the draw.
        """
        if self.algorithm == "fedsgd":
            return self.size_of_batch(records)
        if self.drop_last and self.sampling == "shuffled":
            return self.local_steps(records) * self.size_of_batch(records)
        return min(records, self.steps * self.size_of_batch(records)) if self.steps else records

    def without_effect(self) -> str | None:
        """The reason to refuse settings of the local optimizer that FedSGD, which has none, would silently ignore."""
        if self.algorithm == "fedavg":
            return None
        instead = {
            "optimizer": "The server takes the step",
            "momentum": "The server takes the step",
            "weight_decay": "The gradient is that of the loss",
            "max_grad_norm": "The defense clip clips what is uploaded",
            "proximal": "At the broadcast parameters its gradient is 0",
        }
        for name, why in instead.items():
            if (got := getattr(self, name)) != (default := getattr(LocalTraining, name)):
                return f"{name} must be {default!r} with algorithm = 'fedsgd', got {got!r}. {why}. Drop it or set algorithm = 'fedavg'."
        return None


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
