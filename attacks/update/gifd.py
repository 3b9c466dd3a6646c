"""The search of GIFD in a substitute for its GAN: a latent code first, then what enters each block, then the pixels.

Source: Fang et al., 2023, arXiv:2308.04699, algorithm 1 (ICCV; github.com/ffhibnese/GIFD_Gradient_Inversion_Attack for step counts and
    rates): cosine, total variation, intermediate features in ℓ1 balls that grow with depth, the best layer by the matching loss.
Deviations: **no pretrained GAN, so that these are not the paper's results, and there is no gifd-paper**: BigGAN and StyleGAN2, which the
    paper searches, do not come with this project. In their place a small decoder is learned from the adversary's public records when the
    attack starts (generative latent optimization), and without such records the attack refuses; the latent space is then the unit ball
    and not a Gaussian. ℓ1 balls are relative to the features' norm (published: 1000 to 7500 in absolute units). A last
    search of the pixels is added. One restart (published: 4). No image-norm prior.
    It is not on the ladder of ``strongest``: in trials on faces and photographs, which no command repeats, inverting_gradients was as
    good in as much time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from attacks._matching.distances import angle
from attacks._matching.generators import Layers, Plan, entering, features_at, learn
from attacks._matching.networks import Features, Latent
from attacks._matching.objective import Candidates, Objective, Setting
from attacks._matching.optimize import Run, adam
from attacks._matching.priors import Weighted, rough
from attacks._matching.solve import Matching, solve
from simulator.adversary import Knowledge, Reconstruction
from simulator.registry import register
from simulator.types import Batch, Observation

CHANNELS = (64, 48, 48, 32)
FEWEST = 16
"""Public records below which there is nothing to learn a generator from."""


@register("attacks", "gifd")
@dataclass(frozen=True)
class GIFD(Matching):
    """Gradient matching inside a decoder learned from public records, in place of the paper's pretrained GAN.

    Attributes:
        latent: numbers in a code.
        learning_seconds: CPU time to learn the generator in, about; once for all victims with the same public records.
        latent_steps: iterations on the codes.
        feature_steps: iterations on the features that enter each block.
        pixel_steps: iterations on the pixels from the best layer's images on; 1 all but switches them off, as published.
        learning_rate: of signed Adam on pixels, in units of the pixel range [0, 1].
        latent_rate: of Adam on the codes, which lie in the unit ball.
        feature_rate: of Adam on features, which have unit mean square.
        radius: of the first block's ℓ1 ball, in units of its features' ℓ1 norm; each later block's is as much larger again.
        tv: weight of the total variation for codes and features, see inverting_gradients.
        tv_final: weight for the pixels.
        seconds: CPU time for each victim, at most, without the generator.
        memory_mb: budget for victims that are attacked at once.
    """

    latent: int = 64
    learning_seconds: float = 10.0
    latent_steps: int = 200
    feature_steps: int = 100
    pixel_steps: int = 500
    learning_rate: float = 0.05
    latent_rate: float = 0.03
    feature_rate: float = 0.05
    radius: float = 0.3
    tv: float = 0.05
    tv_final: float = 0.02
    seconds: float = 600.0
    memory_mb: int = 1024

    def supports(self, view: Observation, knowledge: Knowledge) -> str | None:
        """Refuse without public records, deltas of several steps, and labels that cannot be had."""
        held = 0 if knowledge.public is None else len(knowledge.public)
        if held < FEWEST:
            needed = f"the adversary must hold at least {FEWEST} public records to learn a generator from, for want of GIFD's GAN"
            return f"{needed}, got {held}. Set public_data = true"
        return super().supports(view, knowledge)

    def setting(self) -> Setting:
        """The angle between gradients of pixels; the generator comes in with :meth:`many`."""
        return Setting(distance=angle, priors=(Weighted(rough, self.tv),), seconds=self.seconds, memory_mb=self.memory_mb)

    def many(
        self, views: Sequence[Observation], knowledge: Sequence[Knowledge], *, rngs: Sequence[torch.Generator]
    ) -> list[Reconstruction]:
        """Attack many victims at once, with one generator for all that share their public records."""
        found: dict[int, Reconstruction] = {}
        for public in {id(known.public): known.public for known in knowledge}.values():
            members = [i for i, known in enumerate(knowledge) if known.public is public]
            if public is None:
                raise ValueError("the adversary must hold public records, got none. Ask supports() first.")
            search = partial(self.search, *self.generator(public))
            parts = [[sequence[i] for i in members] for sequence in (views, knowledge, rngs)]
            guesses = solve(*parts, setting=self.setting(), optimize=search, task=self.name)  # type: ignore[arg-type]
            found.update(zip(members, guesses, strict=True))
        return [found[i] for i in range(len(views))]

    def generator(self, public: Batch) -> tuple[Plan, Layers]:
        """A decoder of the public records: a function of them alone, hence its own fixed generator."""
        shape = (int(public.inputs.shape[1]), int(public.inputs.shape[2]), int(public.inputs.shape[3]))
        plan = Plan(self.latent, CHANNELS, shape)
        return plan, learn(plan, public.inputs, seconds=self.learning_seconds, rng=torch.Generator().manual_seed(0))

    def search(self, plan: Plan, layers: Layers, objective: Objective, start: Candidates) -> Run:
        """Codes, features of each block, pixels; between stages the best images by the matching loss are kept."""
        victim, blocks = objective.victims[0], len(plan.channels) - 1
        total = self.latent_steps + blocks * self.feature_steps + self.pixel_steps

        def part(variable: Latent | Features | None, steps: int) -> Objective:
            setting = replace(objective.setting, seconds=self.seconds * steps / total)
            if variable is None:
                return replace(objective, setting=replace(setting, priors=(Weighted(rough, self.tv_final),)))
            return replace(objective, setting=replace(setting, variable=variable))

        latent = Latent(plan, layers)
        seeds = [torch.Generator().manual_seed(int(row.double().square().sum() * 2**20) % 2**62) for row in start]
        codes = torch.stack([latent.start(victim, rng) for rng in seeds]).to(start.dtype)
        stage = part(latent, self.latent_steps)
        run = adam(stage, codes, steps=self.latent_steps, learning_rate=self.latent_rate)
        best, rows = pictures(stage, run), torch.arange(len(start))
        lowest = objective(best, rows).match
        features = entering(plan, layers, run.best.view(-1, plan.latent))
        for block in range(blocks):
            features = features_at(layers, features, block, first=max(0, block - 1))
            variable = Features(plan, layers, block, features.reshape(len(start), -1), self.radius * (block + 1))
            stage = part(variable, self.feature_steps)
            run = adam(stage, variable.center, steps=self.feature_steps, learning_rate=self.feature_rate)
            features = run.best.view(features.shape)
            images = pictures(stage, run)
            match = objective(images, rows).match
            better = match < lowest
            best[better], lowest[better] = images[better], match[better]
        return adam(part(None, self.pixel_steps), best, steps=self.pixel_steps, learning_rate=self.learning_rate, signed=True)


@torch.no_grad()
def pictures(objective: Objective, run: Run) -> Candidates:
    """The images of a run's best rows, flat."""
    return torch.stack([objective.decode(row)[0].flatten() for row in run.best])
