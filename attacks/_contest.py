"""The ladder against the learned inverter, in rehearsal: which of the two serves a kind of victim is seen on public records.

Where matching is far from its end (several local steps, sums, deep networks), the mean of all records that fit the update shows more than
the best single fit. The fit does not tell: the mean explains the update worse. An attacker who holds public records need not guess, and
asks before the victim's time is spent: whoever serves better gets what is left of it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

import torch

from attacks._apart import inseparable
from attacks._learned.mechanisms import chain
from attacks._rehearsal import psnr_db, rehearsal
from attacks._solving import State, charged, clocks, merged, taken
from attacks.update.adaptive_matching import AdaptiveMatching
from attacks.update.learning_to_invert import FEWEST, LearningToInvert, kinds
from attacks.update.multi_round_matching import MultiRoundMatching
from attacks.update.support_leak import SupportLeak
from simulator.adversary import Knowledge, Reconstruction
from simulator.types import Observation

REHEARSALS = 4
"""Uploads of public records, at most, on which the two are compared; as many as victims, if those are fewer."""

LEARNING = 0.2
"""Of the time that is left, what the inverter is taught in for the rehearsal. The ladder gets on each rehearsed upload what would be left
of the rest for a victim."""

RESERVE = 0.1
"""Of that time, what the winner gets where the rehearsal took longer than it should."""

CLOSE = 0.1
"""Angle in radians between the simulated and the observed update below which a guess is not contested: no mean explains so much."""

Climb = Callable[[Sequence[Observation], Sequence[Knowledge], Sequence[torch.Generator], float], list[State]]
"""Views, what is known, randomness, CPU seconds for each → how far the ladder came."""


def may_rehearse(state: State) -> bool:
    """Whether public records suffice to learn from some and rehearse on others, for a client that can be imitated."""
    view, knowledge = state.view, state.knowledge
    held = 0 if knowledge.public is None else len(knowledge.public)
    if held < FEWEST + REHEARSALS * knowledge.num_examples or view.upload.buffers or rounds_count(state) or LearningToInvert in state.able:
        return False
    known = chain(view, knowledge)
    imitated = not known.unknown and all(step.heuristic != "soteria" for step in known.steps)  # which is only simulated for an inverter
    return imitated and LearningToInvert().supports(view, knowledge) is None


def rounds_count(state: State) -> bool:
    """Whether other rounds say something of this one's records, which no rehearsal of one round imitates."""
    view, knowledge = state.view, state.knowledge
    if not knowledge.history:
        return False
    alone = {MultiRoundMatching, SupportLeak}.isdisjoint(state.able) and not AdaptiveMatching().others(view, knowledge)
    return not alone or inseparable(view, knowledge) is None


def contested(states: Sequence[State], rngs: Sequence[torch.Generator], climb: Climb, left: Callable[[State], float]) -> list[State]:
    """The states after the rehearsal: those of victims whom the inverter serves better have its answer, and no solver to ask.

    Where the rehearsal or the inverter fails the ladder goes on, and the answer counts as unconverged.

    Args:
        left: CPU seconds that are left for a victim.
    """
    states = list(states)
    waiting = [i for i, state in enumerate(states) if worth(state) and left(state) > 0]
    views, knowledge = [states[i].view for i in waiting], [states[i].knowledge for i in waiting]
    for places in kinds(views, knowledge, [{} for _ in waiting]):  # which coordinates a defense left does not decide who is better
        mine = [waiting[place] for place in places]
        began = clocks()
        answers: Sequence[Reconstruction | None] | None = [None] * len(mine)
        try:
            answers = learned([states[i] for i in mine], [rngs[i] for i in mine], climb, sum(left(states[i]) for i in mine))
        except Exception:  # a failed rehearsal must not cost what algebra found
            logging.getLogger("fedpeek").exception("the rehearsal failed inside strongest")
        told = [states[i] for i in mine]
        if answers is not None:
            told = [taken(state, "learning_to_invert", answer) for state, answer in zip(told, answers, strict=True)]
        for i, state in zip(mine, charged(told, began), strict=True):
            states[i] = state
    return states


def learned(states: Sequence[State], rngs: Sequence[torch.Generator], climb: Climb, seconds: float) -> list[Reconstruction] | None:
    """The inverter's answers for victims of one kind; None if the ladder serves their kind better.

    Args:
        seconds: CPU seconds that are left for all of them.
    """
    began = time.process_time()
    if not inverter_wins(states[0].view, states[0].knowledge, len(states), seconds, climb):
        return None
    rest = max(seconds - (time.process_time() - began), RESERVE * seconds) / len(states)
    views, knowledge = [state.view for state in states], [state.knowledge for state in states]
    return LearningToInvert(seconds=rest).many(views, knowledge, rngs=rngs)


def worth(state: State) -> bool:
    """Whether there is something to contest."""
    return not (state.solved or state.whole or state.inside or state.angle < CLOSE) and may_rehearse(state)


def inverter_wins(view: Observation, knowledge: Knowledge, victims: int, seconds: float, climb: Climb) -> bool:
    """Whether the inverter was better than the ladder on rehearsed uploads like this one; no, where the ladder solves them.

    Args:
        seconds: CPU seconds that are left for all victims of the kind.
    """
    tried, told, truth = rehearsal(view, knowledge, min(REHEARSALS, victims))
    own = [torch.Generator().manual_seed(number) for number in range(len(tried))]
    climbed = climb(tried, told, own, (1 - LEARNING) * seconds / (victims + len(tried)))
    if all(state.solved or state.whole for state in climbed):
        return False
    matched = [None if state.answer is None else merged(state, known).inputs for state, known in zip(climbed, told, strict=True)]
    answers = LearningToInvert(seconds=LEARNING * seconds / len(tried)).many(tried, told, rngs=own)
    gains = [
        psnr_db(answer.inputs, batch) - psnr_db(images, batch) for answer, images, batch in zip(answers, matched, truth, strict=True)
    ]
    return sum(gains) > 0
