"""What the adversary is, what it was told, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from simulator.types import Batch, LocalTraining, Observation, Schema


@dataclass(frozen=True, kw_only=True)
class ThreatModel:
    """Who attacks and what it is told beyond its view; the default is the weakest adversary.

    Attributes:
        adversary: an ``honest-but-curious`` server follows the protocol and analyses what it received; an ``active`` one breaks it
            and tampers with the model that it broadcasts (``tampering``).
        labels: what it is told of the private labels: nothing, how many of each class, or each one.
        public_data: whether it holds public records of the same kind (the data set's public split).
        rounds: what it may use of its own recording: the attacked round alone, or all rounds.
        colluding: clients that tell the server what they sent; they are no victims, and it takes them out of every aggregate.
        candidates: whether it is handed a list of records, labels and all, that holds the true ones among others: it need only guess
            which, as in the definition of reconstruction robustness (Balle et al., 2022, arXiv:2201.04845).
        metadata: whether it sees what an update comes with: a lone sender's number of examples, and BatchNorm's running statistics.
    """

    adversary: Literal["honest-but-curious", "active"] = "honest-but-curious"
    labels: Literal["none", "counts", "exact"] = "none"
    public_data: bool = False
    rounds: Literal["one", "all"] = "one"
    colluding: int = 0
    candidates: bool = False
    metadata: bool = True

    def __post_init__(self) -> None:
        if self.colluding < 0:
            raise ValueError(f"colluding must be ≥ 0, got {self.colluding}. 0 is a server without accomplices.")


@dataclass(frozen=True)
class Knowledge:
    """What the threat model disclosed; everything withheld is None.

    Attributes:
        model: the architecture, in the mode (train or eval) that the recipe states; parameters come from the broadcast.
        schema: shape of a record and number of classes.
        training: the recipe that the clients follow; the server wrote it.
        num_examples: records behind the upload: n_i, or their sum under secure aggregation.
        labels: the private labels, in the clients' order.
        label_counts: how often each class occurs among them.
        public: public records of the same kind.
        defenses: name and settings of each defense (Kerckhoffs), never its randomness.
        adversary: ``active`` if the server wrote the broadcast parameters in order to be told more.
        history: the other recorded rounds as the server saw them, ascending, with the uploads of all clients; empty unless the
            threat model grants all rounds.
        candidates: records among which those behind the upload are, in an order that says nothing.
        encoded: whether a defense changes records before they are trained on. What an update proves, it then proves of the changed ones:
            a certificate says nothing of the record, and none is taken.
    """

    model: nn.Module
    schema: Schema
    training: LocalTraining
    num_examples: int
    labels: Int[Tensor, " batch"] | None = None
    label_counts: Int[Tensor, " classes"] | None = None
    public: Batch | None = None
    defenses: tuple[tuple[str, Mapping[str, object]], ...] = ()
    adversary: Literal["honest-but-curious", "active"] = "honest-but-curious"
    history: tuple[Observation, ...] = ()
    candidates: Batch | None = None
    encoded: bool = False


@dataclass(frozen=True)
class Reconstruction:
    """The adversary's guess of the records behind one upload.

    Attributes:
        inputs: guessed inputs, in [0, 1]; None when the attack recovers labels only.
        labels: guessed class indices, in the order of ``inputs``.
        objective: the attack's own objective at the guess, lower is better; it ranks restarts and never saw the truth.
        trace: (step, objective) pairs over the run of the attack.
        certificate: for each record, the name of the proof that it is exact, or "" where there is none.
        solver: for each record, the name of the attack that produced it, where several took part; empty where one did it all.
        clients: for each record, the sender whom it is attributed to, or −1 where the attack does not say; empty without any.
        seconds: wall-clock time; for attacks that take many victims at once, the victim's share.
        converged: whether more time would have changed nothing: the objective had flattened, or all was tried. An attack that does not
            say so counts as cut short.
    """

    inputs: Float[Tensor, "batch channel height width"] | None
    labels: Int[Tensor, " batch"]
    objective: float = float("nan")
    trace: tuple[tuple[int, float], ...] = ()
    certificate: tuple[str, ...] = ()
    solver: tuple[str, ...] = ()
    clients: tuple[int, ...] = ()
    seconds: float = 0.0
    converged: bool = False


@runtime_checkable
class Attack(Protocol):
    """An attack: a frozen dataclass whose fields are its settings, and these two methods. There is nothing to inherit."""

    name: ClassVar[str]

    def supports(self, view: Observation, knowledge: Knowledge) -> str | None:
        """Return None if the attack can run on this view, else the reason why not."""

    def __call__(self, view: Observation, knowledge: Knowledge, *, rng: torch.Generator) -> Reconstruction:
        """Reconstruct the records behind ``view.upload``."""


@runtime_checkable
class BatchedAttack(Attack, Protocol):
    """An attack that is faster on many victims at once; the runner hands it all it has."""

    def many(
        self, views: Sequence[Observation], knowledge: Sequence[Knowledge], *, rngs: Sequence[torch.Generator]
    ) -> list[Reconstruction]:
        """Reconstruct the records behind each view; equal to calling the attack on each, up to floating-point order."""
