"""Which solvers apply to a view, and which of those another makes superfluous. Asked once per view, without the truth."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from math import log2, prod
from typing import Any

from attacks._features import relu_entrance
from attacks._gradient import noise_level
from attacks._intact import changed, lossy
from attacks._layers import first_linear
from attacks._learned.train import compression
from attacks._matching.coarse import kind_of
from attacks._rounds import same_sender
from attacks._second_order.smoothness import is_smooth
from attacks.modeled import LOSSY, NOISY, NOISY_SUMS, PER_RECORD
from attacks.update.adaptive_matching import AdaptiveMatching
from attacks.update.april import April
from attacks.update.cocktail_party import CocktailParty
from attacks.update.dlg import DLG
from attacks.update.fedavg_matching import FedAvgMatching, once
from attacks.update.hybrid import Hybrid
from attacks.update.inverting_gradients import InvertingGradients
from attacks.update.learning_to_invert import LearningToInvert
from attacks.update.levenberg_marquardt import LevenbergMarquardt
from attacks.update.linear_leak import LinearLeak
from attacks.update.multi_round_matching import MultiRoundMatching
from attacks.update.r_gap import RGap
from attacks.update.sme import SME
from attacks.update.sparse_factorization import SparseFactorization
from attacks.update.support_leak import SupportLeak
from simulator.adversary import Knowledge
from simulator.types import Observation

LADDER: tuple[type[Any], ...] = (
    SupportLeak,
    CocktailParty,
    SparseFactorization,
    LinearLeak,
    April,
    RGap,
    DLG,
    LevenbergMarquardt,
    Hybrid,
    MultiRoundMatching,
    LearningToInvert,
    AdaptiveMatching,
    InvertingGradients,
    SME,
    FedAvgMatching,
)
"""Strongest per second first: what can be exact, then gradient matching."""

EXACT = (SupportLeak, LinearLeak, SparseFactorization, CocktailParty, April, RGap, DLG, LevenbergMarquardt, Hybrid)
"""Solvers that explain an update to its last digits: under noise they explain the noise."""

ALGEBRAIC = (SupportLeak, CocktailParty, SparseFactorization, LinearLeak, April, RGap, Hybrid)
"""Those of them that solve equations first: where these have no solution they have no guess, or one that explains nothing. Only what they
leave is worth a rehearsal."""

MATCHING = (AdaptiveMatching, MultiRoundMatching, InvertingGradients, SME, FedAvgMatching)
"""Solvers that start by chance and end where descent ends: another start may end elsewhere."""

BLUNT = (DLG, LevenbergMarquardt, Hybrid, MultiRoundMatching, InvertingGradients, SME, FedAvgMatching)
"""Solvers that match the update as it is."""

NOISE = 0.01
"""Norm of the noise relative to the update's, beyond which solvers of that kind lose to matching under a prior."""

HIDDEN = 0.15
"""Noise over signal times √(unknowns/coordinates), about the error that the noise leaves in each pixel, beyond which matching under a
prior loses to an inverter learned from public records. That there is such a line: claims learned-noise and learned-noise-matching. Where it
runs is a choice, from trials that no command repeats (photographs, faces and digits; mostly one victim, at most ten): at 0.04 matching was
ahead in all of them, at 0.4 in none."""

FEW = 4.0
"""Values that are left for each unknown, below which an update counts as hidden, too. A choice between 1.5, where learning was ahead, and
22, where matching was, in a trial on ten digits under top-k of 1 % that no command repeats."""

COARSE = 100.0
"""The same where values are rounded to a grid, one of L levels counting as log₂(2L + 1) of 32 bits. A choice: learning was ahead at 5, 13
and 70 in trials on digits under signs and QSGD that no command repeats."""

BITS = 32

ADAPTED = (*LOSSY, "precode")
"""Defenses against which matching in defense space finds far more than matching of the update as it is, on digits by 3 dB to 30:
``pytest --slow tests/attacks/test_adaptive.py -k "found_by_sampling or no_protection"``. It does so against noise
above :data:`NOISE`, too, by 4 dB in that test, where public digits help; photographs gained nothing in a trial that no command repeats.
It alone knows of records that were clipped one by one."""

BLIND = 32
"""Records up to which linear_leak and sparse_factorization, which start by chance, need no help; beyond, cocktail_party takes the place
of the latter: claim cocktail-relu-64. It comes first, since it needs the update as it came: what is left of it once others took records out
has their rounding in it."""

FORMED = 5000
"""Unknowns up to which levenberg_marquardt forms its normal equations in its default memory; without, dlg was far ahead in equal time on
batches of eight photographs, in a trial that no command repeats."""


@dataclass(frozen=True)
class Choice:
    """What decides which solvers are asked about one view; each thing is computed once, when a rule first needs it.

    Attributes:
        view, knowledge: what the adversary has.
    """

    view: Observation
    knowledge: Knowledge
    _own: dict[type[Any], str | None] = field(default_factory=dict, repr=False)

    @cached_property
    def noise(self) -> float:
        """Norm of the known defenses' noise relative to the update's."""
        return noise_level(self.view, self.knowledge)

    @cached_property
    def smooth(self) -> bool:
        """Whether the network has second derivatives."""
        return is_smooth(self.knowledge, self.view.broadcast)

    @cached_property
    def unknowns(self) -> int:
        """Pixels of all records."""
        return self.knowledge.num_examples * prod(self.knowledge.schema.shape)

    @cached_property
    def rounds(self) -> int:
        """Rounds that show the same records, each under noise of its own, which averages out."""
        if not self.applies(MultiRoundMatching):
            return 1
        return min(MultiRoundMatching().rounds, 1 + len(same_sender(self.view, self.knowledge)))

    @cached_property
    def hidden(self) -> bool:
        """Whether public records say more than the update: under strong noise, or where signs or few coordinates are all that is left."""
        if not self.applies(LearningToInvert) or kind_of(self.view, self.knowledge):
            return False
        size, noise = sum(tensor.numel() for tensor in self.view.upload.update.tensors.values()), self.noise**2 / self.rounds
        if noise * self.unknowns / size > HIDDEN**2 * max(0.0, 1 - noise):
            return True
        unknowns = self.unknowns / self.rounds
        for name, settings in self.knowledge.defenses:
            if name == "qsgd" and size * log2(2 * int(str(settings["levels"])) + 1) / BITS <= COARSE * unknowns:
                return True
        tensors, seen = self.view.upload.update.tensors, compression(self.view, self.knowledge)
        if len(seen) < len(tensors):
            return False
        left = {name: tensor.numel() if seen[name].kept is None else int(seen[name].kept or 0) for name, tensor in tensors.items()}
        rounded = all(how.levels for how in seen.values())
        told = sum(count * (log2(2 * seen[name].levels + 1) / BITS if seen[name].levels else 1.0) for name, count in left.items())
        return told <= (COARSE if rounded else FEW) * unknowns

    @property
    def adapted(self) -> tuple[str, ...]:
        """The known defenses that matching in defense space gains on."""
        noisy = (*NOISY, *NOISY_SUMS) if self.noise > NOISE else PER_RECORD if self.knowledge.num_examples > 1 else ()
        return tuple(name for name, _ in self.knowledge.defenses if name in (*self.lossy, "precode", *noisy))

    @cached_property
    def lossy(self) -> tuple[str, ...]:
        """The known defenses after which the update is not what the client computed."""
        return lossy(self.view, self.knowledge)

    def altered(self, solver: type[Any]) -> str | None:
        """Why an exact solver cannot trust the tensors that it reads; r_gap says so itself."""
        if not self.lossy or solver in (SupportLeak, LinearLeak, RGap):
            return None
        if solver in (SparseFactorization, CocktailParty):
            first = first_linear(self.knowledge, self.view.broadcast)
            return first if isinstance(first, str) else changed(self.view, self.knowledge, first[0].weight, first[0].bias)
        if solver is Hybrid:
            entrance = relu_entrance(self.knowledge, self.view.broadcast)
            return entrance if isinstance(entrance, str) else changed(self.view, self.knowledge, entrance.layer.weight, entrance.layer.bias)
        return f"the update must be what the client computed, got it after {' and '.join(self.lossy)}. adaptive_matching knows them"

    def own(self, solver: type[Any]) -> str | None:
        """A solver's own reason not to be asked."""
        if solver not in self._own:
            self._own[solver] = solver().supports(self.view, self.knowledge)
        return self._own[solver]

    def applies(self, solver: type[Any]) -> bool:
        """Whether a solver has no reason of its own against this view."""
        return self.own(solver) is None

    def refusal(self, solver: type[Any]) -> str | None:
        """Why a solver is not asked: its own reason, or that another is stronger wherever both apply."""
        if solver in EXACT and self.noise > NOISE:
            limit = f"the noise must be at most {NOISE:.0%} of the update to be explained exactly"
            return f"{limit}, got {self.noise:.0%} by the known defenses"
        if solver in EXACT and (reason := self.altered(solver)) is not None:
            return reason
        reason = self.own(solver)
        return self.stronger(solver) if reason is None else reason

    def stronger(self, solver: type[Any]) -> str | None:
        """Which other solver makes this one, which applies too, superfluous."""
        records, adapted = self.knowledge.num_examples, self.adapted
        if solver is AdaptiveMatching and not adapted:
            return f"a known defense must be {', '.join(ADAPTED)} or noise to be adapted to, got none. inverting_gradients does the same"
        if solver is AdaptiveMatching and self.hidden:
            return "the update must not be hidden by noise, signs or pruning where public records are held. learning_to_invert uses them"
        unharmed = solver is Hybrid and set(adapted) <= {*self.lossy, *PER_RECORD}  # what it reads was asked for before
        if solver in BLUNT and not unharmed and adapted and self.applies(AdaptiveMatching):
            return f"no known defense must be one that can be adapted to, got {' and '.join(adapted)}. adaptive_matching does"
        if (solver is LearningToInvert) != self.hidden:
            if solver is LearningToInvert:
                return "the update must be hidden by noise, signs or pruning, got one that matching sees more in"
            return "the update must not be hidden by noise, signs or pruning where public records are held. learning_to_invert uses them"
        if solver is SupportLeak and not self.knowledge.history:
            return "the history must hold other sums, got none. linear_leak looks through this one"
        if records > BLIND and solver is SparseFactorization and self.applies(CocktailParty):
            return f"the records must be ≤ {BLIND} for starts by chance, got {records}. cocktail_party has better ones"
        if solver is SparseFactorization and records == 1 and self.applies(LinearLeak):
            return "the records must be > 1 to be mixed, got 1. linear_leak divides it out"
        if solver is CocktailParty and records == 1:
            return "the records must be > 1 to be mixed, got 1. linear_leak divides it out"
        if solver is CocktailParty and records <= BLIND and self.applies(SparseFactorization):
            return f"the records must be > {BLIND} for chance to need help, got {records}. sparse_factorization finds them"
        if solver is SME and once(self.view, self.knowledge, FedAvgMatching().unroll):
            return "records must be taken more than once, got one short epoch. fedavg_matching takes the same steps in order"
        if solver is InvertingGradients and self.applies(MultiRoundMatching):
            return "one round must be all that shows the records, got several. multi_round_matching uses them all"
        if solver is DLG and not self.smooth:
            return "the network must be smooth, got kinks such as ReLU's, at which L-BFGS on the gradient of a gradient stalls"
        if solver is LevenbergMarquardt and self.unknowns > FORMED:
            return f"the unknowns must be ≤ {FORMED} for normal equations, got {self.unknowns}. dlg makes more of its time"
        seen_through = self.unknowns <= FORMED and self.noise <= NOISE and self.applies(DLG) and self.smooth
        if solver is InvertingGradients and seen_through:
            return "the network must have kinks, got a smooth one, at which L-BFGS sees more than the signs of first-order steps"
        return None
