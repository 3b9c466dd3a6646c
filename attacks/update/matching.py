"""Gradient matching put together from parts that a spec names: the engine of which the presets are instances.

Each preset of gradient matching (inverting_gradients, dlg, sapag, cpl, fedavg_matching, …) is one choice of five independent parts; here
every part is a setting of its own: distance × variable × optimizer × priors × simulated client. The defaults are inverting_gradients.

Source: Geiping et al., 2020, arXiv:2003.14053 (the defaults); each part names its own in attacks/_matching.
Deviations: a preset may do more than match: dlg certifies what it solves, fedavg_matching chooses the order of batches, grad_inversion has
    a group of restarts and Langevin noise. Of combinations that no preset has nothing is claimed.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Literal, get_args, get_origin, get_type_hints

import torch

from attacks._gradient import unusable
from attacks._matching.bases import Cosines, LowResolution
from attacks._matching.client import Client, JointLabels, Recipe
from attacks._matching.distances import DISTANCES, Distance, DistanceName, likelihood, partial
from attacks._matching.lbfgs import lbfgs, published_lbfgs
from attacks._matching.masks import Masked, keep_rate
from attacks._matching.networks import UntrainedNetwork
from attacks._matching.objective import Candidates, Objective, Setting
from attacks._matching.optimize import SOLVED, Run, adam
from attacks._matching.priors import Weighted, rough, task, variation
from attacks._matching.solve import Matching
from attacks._matching.spectrum import Spectrum
from attacks._matching.statistics import uploaded_statistics
from attacks._matching.surrogate import Surrogate
from attacks._matching.unroll import Unrolled
from attacks._matching.variables import Pixels, Variable
from attacks._settings import must_settle
from attacks.update.labels import unrecoverable
from simulator.adversary import Knowledge
from simulator.registry import register
from simulator.types import Observation

VARIABLES: dict[str, Variable] = {
    "spectrum": Spectrum(), "low_resolution": LowResolution(), "cosines": Cosines(), "network": UntrainedNetwork(),
}  # fmt: skip
CLIENTS: dict[str, Client] = {
    "recipe": Recipe(), "masks": Masked(), "soft_labels": JointLabels(), "unrolled": Unrolled(), "surrogate": Surrogate(),
}  # fmt: skip
BY_DIRECTION = ("angle", "cosine", "layer_cosine")
"""Distances that do not ask for the length of an update, of which a surrogate's says nothing."""

SEVERAL = ("unrolled", "surrogate")
"""Clients that may take several local steps."""


@register("attacks", "matching")
@dataclass(frozen=True)
class ComposedMatching(Matching):
    """Gradient matching whose distance, variable, optimizer, priors and simulated client are settings; by default inverting_gradients.

    Attributes:
        distance: of updates, by its name in attacks._matching.distances; ``likelihood`` is that of stated Gaussian noise, in nats.
        sigma: deviation of that noise on each coordinate; > 0 with ``likelihood`` only.
        clip_norm: to which the client clips its update before that noise; with ``likelihood`` only.
        share: of the coordinates that are compared, those in which the observed update is largest; 1 compares all.
        variable: what is moved: ``pixels``, their ``spectrum`` scaled by that of natural images, a ``low_resolution`` image, ``cosines``
            with damped steps, or the weights of an untrained ``network``.
        begin: where pixels start: ``uniform`` in [0, 1]; ``normal``: N(0, 1) as the network sees them; ``patterned``: a repeated square.
        client: ``recipe`` follows it; ``masks`` also has dropout masks, and ``soft_labels`` has labels, that are optimized along;
            ``unrolled`` takes several steps, each on all records; ``surrogate`` takes one gradient at a learned point of its path.
        optimizer: ``signed_adam``, ``adam``, ``lbfgs`` with a line search, ``plain_lbfgs`` as torch.optim.LBFGS has it, without one.
        steps: of Adam; evaluations of ``lbfgs``; calls of ``plain_lbfgs``, of 20 steps each.
        learning_rate: of Adam, in units of the pixel range [0, 1].
        schedule: of the step of Adam: ``tenths`` takes a tenth at 3/8, 5/8 and 7/8 of the run, ``cosine`` falls to 0 along half a cosine.
        tv: weight of the total variation at the start: mean absolute difference of neighbours, horizontal plus vertical, in [0, 1].
        tv_final: weight at 7/8 of a run of Adam, reached geometrically, and throughout one of L-BFGS.
        variation: ``opponents`` adds that of the channel differences, ``plain`` does not.
        task: weight of the squared distance between predicted probabilities and labels.
        statistics: weight of the distance from the batch statistics that the upload's buffers reveal.
        keep_rate: weight of the squared distance of the mean dropout mask from 1 − p; with ``masks`` only.
        precision: of the simulation.
        history: remembered pairs of L-BFGS.
        seconds: CPU time for each victim, at most.
        restarts: random starts for each victim; the lowest objective wins.
        memory_mb: budget for victims and restarts that are attacked at once.
    """

    distance: Literal[DistanceName, "likelihood"] = "angle"
    sigma: float = 0.0
    clip_norm: float = inf
    share: float = 1.0
    variable: Literal["pixels", "spectrum", "low_resolution", "cosines", "network"] = "pixels"
    begin: Literal["uniform", "normal", "patterned"] = "uniform"
    client: Literal["recipe", "masks", "soft_labels", "unrolled", "surrogate"] = "masks"
    optimizer: Literal["signed_adam", "adam", "lbfgs", "plain_lbfgs"] = "signed_adam"
    steps: int = 1000
    learning_rate: float = 0.2
    schedule: Literal["tenths", "cosine"] = "tenths"
    tv: float = 0.3
    tv_final: float = 0.02
    variation: Literal["opponents", "plain"] = "opponents"
    task: float = 0.0
    statistics: float = 10.0
    keep_rate: float = 0.1
    precision: Literal["float32", "float64"] = "float32"
    history: int = 100
    seconds: float = 600.0
    restarts: int = 1
    memory_mb: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, hint in get_type_hints(type(self)).items():
            allowed = get_args(hint) if get_origin(hint) is Literal else ()
            if allowed and getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}. Choose one of them.")
        must_settle(self)
        stated = self.distance == "likelihood"
        if stated != (self.sigma > 0) or not self.sigma < inf:
            raise ValueError(f"sigma must be > 0 and finite with likelihood, else 0, got {self.sigma} with {self.distance}. Set both.")
        if not self.clip_norm > 0 or (self.clip_norm < inf and not stated):
            raise ValueError(f"clip_norm must be > 0, and inf without likelihood, got {self.clip_norm} with {self.distance}. Set both.")
        if not 0 < self.share <= 1:
            raise ValueError(f"share must be > 0 and ≤ 1, got {self.share}. 1 compares all coordinates.")
        if self.client == "surrogate" and self.distance not in BY_DIRECTION:
            raise ValueError(f"distance must be one of {', '.join(BY_DIRECTION)} for a surrogate, got {self.distance}. Use one of them.")
        if self.begin != "uniform" and self.variable != "pixels":
            raise ValueError(f"begin must be 'uniform' unless pixels start there, got {self.begin!r} with {self.variable}. Leave it out.")

    def supports(self, view: Observation, knowledge: Knowledge) -> str | None:
        """Refuse several local steps that the simulated client does not take, and labels that cannot be had."""
        if self.client not in SEVERAL:
            return super().supports(view, knowledge)
        if self.client == "surrogate" and (view.upload.update.kind != "delta" or knowledge.training.optimizer != "sgd"):
            return "the update must be a delta of SGD for a surrogate, which goes along it. Use client = 'unrolled'"
        return unusable(view, knowledge) or unrecoverable(view, knowledge)

    def setting(self) -> Setting:
        """The parts by their names."""
        measure: Distance = likelihood(self.sigma, self.clip_norm) if self.distance == "likelihood" else DISTANCES[self.distance]
        priors = (
            Weighted(rough if self.variation == "opponents" else variation, self.tv, self.tv_final),
            Weighted(uploaded_statistics, self.statistics),
            Weighted(keep_rate, self.keep_rate if self.client == "masks" else 0.0),
            Weighted(task, self.task),
        )
        return Setting(
            distance=measure if self.share == 1 else partial(measure, self.share),
            variable=Pixels(self.begin) if self.variable == "pixels" else VARIABLES[self.variable],
            client=CLIENTS[self.client],
            priors=tuple(prior for prior in priors if prior.weight),
            dtype=torch.float64 if self.precision == "float64" else torch.float32,
            restarts=self.restarts,
            seconds=self.seconds,
            memory_mb=self.memory_mb,
        )

    def optimize(self, objective: Objective, start: Candidates) -> Run:
        """The optimizer by its name."""
        if self.optimizer == "plain_lbfgs":
            return published_lbfgs(objective, start, outer=self.steps, history=self.history)
        if self.optimizer == "lbfgs":
            solved = SOLVED[objective.victims[0].target.dtype]
            return lbfgs(objective, start, evaluations=self.steps, history=self.history, solved=solved)
        signed, annealed = self.optimizer == "signed_adam", self.schedule == "cosine"
        return adam(objective, start, steps=self.steps, learning_rate=self.learning_rate, signed=signed, annealed=annealed)
