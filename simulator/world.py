"""A world: everything that determines a federation, and nothing about who attacks it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import reduce
from typing import Annotated, Any, Literal

from simulator.config import Plugin
from simulator.defense import Defense
from simulator.types import LocalTraining


@dataclass(frozen=True, kw_only=True)
class Federation:
    """Who takes part, for how long, and who holds what.

    Attributes:
        clients: number of clients.
        rounds: number of broadcast–upload cycles.
        cohort: clients sampled for each round; 0 means all.
        partition: how records are dealt to clients: ``iid`` evenly at random; ``dirichlet`` with each class's shares over clients drawn
            from Dirichlet(alpha) (Hsu et al., 2019, arXiv:1909.06335); ``quantity`` at random, with numbers of records drawn from
            Dirichlet(alpha) (Li et al., 2022, arXiv:2102.02079). The last two give clients unequal n_i, which weight the mean.
        alpha: concentration of the Dirichlet distribution; small means that a client holds few classes, or that few hold most records.
        server_learning_rate: multiplies the mean update when the server applies it.
        timeout_seconds: how long the server waits for a client's answer.
        min_clients: fewer answers than this end the run.
        record_rounds: rounds whose tensors the transcript keeps; empty means all. The others keep sizes and digests.
        record_models: the models after so many rounds, the last ones, are kept in any case; 1 keeps the last model.
    """

    clients: int = 8
    rounds: int = 1
    cohort: int = 0
    partition: Literal["iid", "dirichlet", "quantity"] = "iid"
    alpha: float = 0.5
    server_learning_rate: float = 1.0
    timeout_seconds: float = 600.0
    min_clients: int = 1
    record_rounds: tuple[int, ...] = ()
    record_models: int = 1

    def __post_init__(self) -> None:
        if self.clients < 1:
            raise ValueError(f"clients must be ≥ 1, got {self.clients}. Set federation.clients.")
        if self.rounds < 1:
            raise ValueError(f"rounds must be ≥ 1, got {self.rounds}. Set federation.rounds.")
        if not 0 <= self.cohort <= self.clients:
            raise ValueError(f"cohort must be between 0 (all) and clients = {self.clients}, got {self.cohort}. Set federation.cohort.")
        if not self.alpha > 0:
            raise ValueError(f"alpha must be > 0, got {self.alpha}. Set federation.alpha; large values approach iid.")
        if not 1 <= self.min_clients <= self.cohort_size:
            raise ValueError(f"min_clients must be in 1..{self.cohort_size}, the cohort, got {self.min_clients}. Lower it.")
        if not 0 < self.server_learning_rate < math.inf:
            raise ValueError(f"server_learning_rate must be > 0 and finite, got {self.server_learning_rate}. The default is 1.")
        if self.record_models < 1:
            raise ValueError(f"record_models must be ≥ 1, got {self.record_models}. 1 keeps the last model.")
        if not self.timeout_seconds > 0:
            raise ValueError(f"timeout_seconds must be > 0, got {self.timeout_seconds}. Use inf to wait for ever.")

    @property
    def cohort_size(self) -> int:
        """Clients in a round."""
        return self.cohort or self.clients


@dataclass(frozen=True, kw_only=True)
class Split:
    """How a data set is divided before clients get theirs.

    Attributes:
        test: share of the records that is held out; the accuracy of the model is measured on it.
        public: share that belongs to no client; the adversary holds it where ``threat.public_data`` grants it.
    """

    test: float = 0.2
    public: float = 0.2

    def __post_init__(self) -> None:
        if not (0 <= self.test < 1 and 0 <= self.public < 1 and self.test + self.public < 1):
            raise ValueError(f"test + public must be ≥ 0 and < 1, got {self.test} + {self.public}. Leave records for the clients.")


@dataclass(frozen=True, kw_only=True)
class Tampering:
    """What an active server plants in the model that it broadcasts; an honest-but-curious one plants nothing.

    Attributes:
        method: ``none`` plants nothing; ``imprint`` brightness thresholds (Fowl et al., 2022, arXiv:2110.13057); ``trap_weights`` rows
            that fire for few records (Boenisch et al., 2023, arXiv:2112.02918). See ``server.active``.
        placed_by: where brightness and contrast of pictures are known from: a ``prior`` assumption, or ``public`` records.
    """

    method: Literal["none", "imprint", "trap_weights"] = "none"
    placed_by: Literal["prior", "public"] = "prior"


@dataclass(frozen=True, kw_only=True)
class World:
    """Data, model, federation, recipe, defenses and seed: the same world gives the same bits on every driver.

    Attributes:
        seed: fixes the initial weights, who holds what, and the order of batches. Small numbers can be guessed from what they fix.
        secret: keys the randomness of the defenses, and who is in a Poisson sample, together with the seed. ``fedpeek run`` draws 128
            bits for each run and writes them to its resolved spec alone, so that no attack can compute either again; empty in tests.
    """

    data: Annotated[Any, Plugin("data")]
    model: Annotated[Any, Plugin("models")]
    split: Split = field(default_factory=Split)
    federation: Federation = field(default_factory=Federation)
    training: LocalTraining = field(default_factory=LocalTraining)
    defenses: Annotated[tuple[Defense, ...], Plugin("defenses")] = ()
    tampering: Tampering = field(default_factory=Tampering)
    seed: int = 0
    secret: str = ""

    @property
    def architecture(self) -> Any:
        """The model family that is trained: the world's, as the defenses change it."""
        return reduce(lambda family, defense: defense.on_model(family), self.defenses, self.model)

    @property
    def channel(self) -> Defense | None:
        """The defense that changes who sees what, if there is one."""
        return next((defense for defense in self.defenses if defense.channel), None)

    def participations(self, records_held: int) -> int:
        """The most releases that one record of a client with ``records_held`` records enters over the whole training.

        FedSGD walks through a fresh permutation of the client's records each epoch, without the partial last batch, so a
        record enters at most once an epoch. FedAvg uses every record once a local epoch; with ``steps`` it may stop early.
        A client takes part in at most every round: the server draws the cohort, so sampling is no secret to it. A Poisson sample may
        hold any record, so that each batch is a release.
        """
        recipe, rounds = self.training, self.federation.rounds
        if recipe.sampling == "poisson":
            return rounds * recipe.local_steps(records_held)
        if recipe.algorithm == "fedsgd":
            return math.ceil(rounds / max(1, records_held // recipe.size_of_batch(records_held)))
        epochs = math.ceil(recipe.steps / recipe.steps_in_epoch(records_held)) if recipe.steps else recipe.epochs
        return rounds * epochs
