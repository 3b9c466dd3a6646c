"""Gradient matching by an attacker who knows the defenses: the update is matched as they leave it, under the likelihood of their noise.

Which defenses acted, and their settings, is public (Kerckhoffs); what they drew at random is not, unless the upload shows it. So
  - what is deterministic is done to the simulated update, too: clipping of the whole and of single records' gradients, signs, and the
    rounding grid; coordinates that were left out (the zeros of top-k, random pruning, Soteria, Outpost) are no observations;
  - noise is a likelihood: Gaussian noise squared distance, Laplace noise absolute distance, stochastic rounding −log(1 − |gap|), in
    nats, against a prior of total variation with a fixed weight in nats, so that noise alone decides what the prior counts;
  - randomness inside the model (PRECODE's ε) is read off one record's gradient, and else optimized along with the images;
  - soft labels of mixed records (MixUp, InstaHide) are optimized along: what is rebuilt is the mixture;
  - other rounds in which the client took the same records again add their evidence, and noise averages out;
  - one small record behind noise, pruning, signs or QSGD is, where public records are held, found by sampling, and polished
    (attacks._matching.linearized): descent alone ends at the first jump that a ReLU makes in the gradient.

Source: Balunović et al., 2022, arXiv:2111.04706, sections 3 to 5 (the objective, and Soteria and PRECODE broken by leaving out what they
    changed); Geiping et al., 2020, arXiv:2003.14053, for the optimizer; Yue et al., 2023, arXiv:2206.04055 (pruned updates on their
    visible support); Athalye et al., 2018, arXiv:1802.00420, for adaptive attacks as such.
Deviations: Soteria's defended layer is matched on the columns that it left, not dropped. PRECODE's ε is known or a variable, and only
    what stands behind its sample is dropped; Balunović et al. drop the bottleneck, too. Signs are matched by the
    angle to u/√(u² + (m/2)²), m the tensor's mean |u|, under three times the total variation. Smooth networks without noise go to
    L-BFGS as in dlg, others to signed Adam. Censor is matched by the norms and the orthogonality that it leaves: nothing to see.
Measured: behind Soteria and PRECODE on a ReLU ConvNet within 2 dB of no defense, and at least 5 dB above the attack that does not ask
    (``pytest --slow -s tests/attacks/test_adaptive.py`` prints them); behind Soteria and top-k of 10 % on a sigmoid LeNet above 60 dB (the
    same file). QSGD, signs and pruning: the pages in docs/defenses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Literal

import torch

from attacks._dropout import layers as dropping_layers
from attacks._gradient import unusable
from attacks._matching.client import Client, JointLabels
from attacks._matching.coarse import kind_of, sampled
from attacks._matching.latents import Noisy, bottlenecks, prepare_told, readable, unlikely
from attacks._matching.lbfgs import lbfgs
from attacks._matching.masks import keep_rate
from attacks._matching.objective import Candidates, Objective, Setting
from attacks._matching.optimize import SOLVED, Run, adam
from attacks._matching.priors import Weighted, rough
from attacks._matching.records import PerRecord
from attacks._matching.rounds import Rounds, averaged, recurring
from attacks._matching.simulate import Victim, unroll_length
from attacks._matching.solve import Matching, solve
from attacks._matching.spectrum import Spectrum
from attacks._matching.stack import Stack, known_stack
from attacks._matching.statistics import uploaded_statistics
from attacks._matching.unroll import Unrolled
from attacks._rounds import of_round, redraws, same_sender
from attacks._second_order.smoothness import is_smooth
from attacks._settings import must_settle
from attacks.update.labels import unrecoverable
from attacks.update.multi_round_matching import MultiRoundMatching, by_all_rounds
from simulator.adversary import Knowledge, Reconstruction
from simulator.registry import register
from simulator.types import Observation

COARSE = 3.0
"""Factor on the weight of the total variation where signs are all that is left: they say nothing of magnitudes, so the prior must."""

HISTORY = 100
"""Remembered pairs of L-BFGS, as in dlg."""


@dataclass(frozen=True)
class Plan:
    """How one victim is attacked; victims with equal plans go together.

    Attributes:
        stack: of defenses.
        smooth: whether L-BFGS takes it.
        steps: local steps behind the upload.
        rounds: that show the records, each one's evidence counting in full.
        averaged: whether they are averaged first.
        values: numbers in one record.
        several: whether several records are behind the upload.
    """

    stack: Stack
    smooth: bool
    steps: int
    rounds: int
    averaged: bool
    values: int
    several: bool


@register("attacks", "adaptive_matching")
@dataclass(frozen=True)
class AdaptiveMatching(Matching):
    """Gradient matching in defense space, for the defenses that the attacker was told of; without any, inverting_gradients or dlg.

    Attributes:
        steps: iterations of signed Adam; evaluations of L-BFGS are six times as many.
        learning_rate: of signed Adam, in units of the pixel range [0, 1].
        tv: weight of the total variation at the start against the angle between updates, where nothing is noise.
        tv_final: weight at 7/8 of the run, reached geometrically.
        nats: weight of the total variation against a likelihood at the start, for each number of a record.
        nats_final: the same at 7/8 of the run: what a prior for natural images counts.
        optimizer: ``auto`` takes L-BFGS for smooth networks without noise, else signed Adam.
        rounds: of the recorded ones in which the client took the same records, at most; 1 attacks one.
        restarts: random starts for each victim; the lowest objective wins.
        statistics: weight of the distance from the batch statistics that the upload's buffers reveal.
        keep_rate: weight of the squared distance of the mean dropout mask from 1 − p.
        latent: weight of the mean square of a bottleneck's noise, where it is optimized.
        unroll: local steps to simulate; a client that takes more is simulated in as many longer ones.
        seconds: CPU time for each victim, at most.
        memory_mb: budget for victims and restarts that are attacked at once.
    """

    steps: int = 1000
    learning_rate: float = 0.2
    tv: float = 0.3
    tv_final: float = 0.02
    nats: float = 30.0
    nats_final: float = 3.0
    optimizer: Literal["auto", "adam"] = "auto"
    rounds: int = 8
    restarts: int = 1
    statistics: float = 10.0
    keep_rate: float = 0.1
    latent: float = 1e-3
    unroll: int = 4
    seconds: float = 600.0
    memory_mb: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.optimizer not in ("auto", "adam"):
            raise ValueError(f"optimizer must be 'auto' or 'adam', got {self.optimizer!r}. The default is 'auto'.")
        must_settle(self)
        must_settle(self, "nats", "nats_final")

    def supports(self, view: Observation, knowledge: Knowledge) -> str | None:
        """Refuse labels that cannot be had, and several local steps where the model draws noise in each."""
        if (steps := unroll_length(view, knowledge)) > 1 and bottlenecks(knowledge.model):
            return f"a model with noise of its own must take 1 local step, got {steps}. Use learning_to_invert"
        return unusable(view, knowledge) or unrecoverable(view, knowledge)

    def many(
        self, views: Sequence[Observation], knowledge: Sequence[Knowledge], *, rngs: Sequence[torch.Generator]
    ) -> list[Reconstruction]:
        """Attack many victims at once, those behind the same defenses together."""
        groups: dict[Plan, list[int]] = {}
        found: dict[int, Reconstruction] = {}
        for place, (view, known, rng) in enumerate(zip(views, knowledge, rngs, strict=True)):
            kind = kind_of(view, known)
            if kind is not None and not self.others(view, known):
                found[place] = sampled(view, known, kind, rng=rng, seconds=self.seconds, task=self.name)
            else:
                groups.setdefault(self.plan(view, known), []).append(place)
        for plan, members in groups.items():
            attack, mine = _Planned(self, plan), ([views[i] for i in members], [knowledge[i] for i in members], [rngs[i] for i in members])
            answers = solve(*mine, setting=self.matched(plan), optimize=attack.optimize, task=self.name, ready=attack.ready)
            found.update(zip(members, answers, strict=True))
        return [found[i] for i in range(len(views))]

    def plan(self, view: Observation, knowledge: Knowledge) -> Plan:
        """How this victim is attacked."""
        stack, others = known_stack(view, knowledge), self.others(view, knowledge)
        noise = stack.distance
        gaussian = bool(noise.sigma or noise.laplace) and not (noise.masked or noise.levels)
        pooled = bool(others) and gaussian and MultiRoundMatching().averages(view, knowledge, others)
        rounds = 1 + len(others)
        if pooled:
            sigma = tuple(deviation / rounds**0.5 for deviation in noise.sigma)
            stack = replace(stack, distance=replace(noise, sigma=sigma, laplace=noise.laplace / rounds**0.5))
        return Plan(
            stack=stack,
            smooth=self.optimizer == "auto" and noise.exact and rounds == 1 and is_smooth(knowledge, view.broadcast),
            steps=unroll_length(view, knowledge),
            rounds=1 if pooled else rounds,
            averaged=pooled,
            values=prod(knowledge.schema.shape),
            several=knowledge.num_examples > 1,
        )

    def others(self, view: Observation, knowledge: Knowledge) -> list[Observation]:
        """The other rounds of one sender that show the same records, with nothing random in the model but what can be read off."""
        alone = len(view.upload.senders) == 1 and not dropping_layers(knowledge.model)
        if not alone or (bottlenecks(knowledge.model) and not readable(view, knowledge)):
            return []
        if redraws(knowledge.training, knowledge.num_examples) is not None:
            return []
        return same_sender(view, knowledge)[: self.rounds - 1]

    def matched(self, plan: Plan) -> Setting:
        """The parts of the objective."""
        distance = replace(plan.stack.distance, squared=plan.smooth)
        share = plan.values / plan.rounds  # rounds come in turn: each carries its share of the prior
        weights = (self.nats * share, self.nats_final * share)
        if not distance.random:
            factor = COARSE if distance.signs else 1.0
            weights = (factor * self.tv, factor * self.tv_final)
        client: Client = Noisy()
        if plan.stack.mixed:
            client = JointLabels()
        elif plan.several and plan.stack.record_clip < float("inf"):
            client = PerRecord(plan.stack.record_clip)
        elif plan.steps > 1:
            client = Unrolled(order="mean", most=self.unroll)
        priors = (
            Weighted(rough, *(weights if not plan.smooth else (0.0, 0.0))),
            Weighted(uploaded_statistics, self.statistics),
            *((Weighted(keep_rate, self.keep_rate), Weighted(unlikely, self.latent)) if isinstance(client, Noisy) else ()),
        )
        return Setting(
            distance=distance,
            client=client,
            priors=tuple(prior for prior in priors if prior.weight),
            restarts=self.restarts,
            seconds=self.seconds,
            memory_mb=self.memory_mb,
            **({"variable": Spectrum(), "dtype": torch.float64} if plan.smooth else {}),  # type: ignore[arg-type]
        )


@dataclass(frozen=True)
class _Planned:
    """The attack on the victims of one plan."""

    attack: AdaptiveMatching
    plan: Plan

    def ready(self, view: Observation, knowledge: Knowledge) -> Victim:
        """Made ready for matching, with the other rounds of the same records."""
        others = self.attack.others(view, knowledge)
        if not others:
            return prepare_told(view, unmixed(knowledge, self.plan))
        known = by_all_rounds(view, knowledge, others)
        found = recurring(prepare_told(view, known), tuple(prepare_told(seen, of_round(known, seen)) for seen in others))
        return averaged(found) if self.plan.averaged else found

    def optimize(self, objective: Objective, start: Candidates) -> Run:
        """L-BFGS for smooth networks, else signed Adam, on rounds in turn."""
        steps = self.attack.steps
        if self.plan.smooth:
            return lbfgs(objective, start, evaluations=6 * steps, history=HISTORY, solved=SOLVED[objective.victims[0].target.dtype])
        problem = Rounds(objective, at_once=1) if self.plan.rounds > 1 else objective
        return adam(problem, start, steps=steps, learning_rate=self.attack.learning_rate, signed=True)


def unmixed(knowledge: Knowledge, plan: Plan) -> Knowledge:
    """The knowledge without labels where records were mixed: those that were disclosed are not what the client trained towards."""
    return replace(knowledge, labels=None, label_counts=None) if plan.stack.mixed else knowledge
