"""The noise of a variational bottleneck: read off one record's gradient, else optimized along with the images.

The gradient of a linear layer for one record is an outer product: δ ⊗ its input, with δ the gradient of its bias. So the encoder's
gradient gives away the features h, hence μ(h) and σ(h), and the decoder's gives away z = μ + σ·ε: what is left of the defense is ε, a
known number, and the network with it is deterministic again.

Source: Scheliga et al., 2022, arXiv:2208.04767 (that the bottleneck's noise is what stops gradient matching), and Balunović et al., 2022,
    arXiv:2111.04706, section 5 (reading a layer's input off its gradient under PRECODE); reading ε off is our own. Where several records
    share the gradient their ε are variables, as dropout's masks are in Scheliga et al., 2022, arXiv:2208.06163.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attacks._gradient import mean_gradient, noise_level, several_steps
from attacks._matching.client import Trial
from attacks._matching.masks import Masked
from attacks._matching.simulate import Victim, prepare, run_recipe
from simulator.adversary import Knowledge
from simulator.models.latent import Bottleneck, noise_from
from simulator.types import Observation, Tensors

WIDE = 8.0
"""Range of ε, in deviations, onto which [0, 1] is mapped: that is where the engine keeps what a client adds."""

SLOW = 0.1
"""Step of those numbers in units of the step of a pixel."""

READABLE = 1e-4
"""Noise of known defenses, relative to the update, up to which ε can be read off."""

_TOLD: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()
_SIZES: WeakKeyDictionary[nn.Module, dict[object, int]] = WeakKeyDictionary()


class Told(nn.Module):
    """A bottleneck whose noise is known: a buffer, so that it is handed in with the others."""

    def __init__(self, inner: Bottleneck) -> None:
        super().__init__()
        self.encoder, self.decoder, self.beta = inner.encoder, inner.decoder, inner.beta
        self.register_buffer("noise", torch.zeros(inner.decoder.in_features))

    def forward(self, inputs: Float[Tensor, "batch features"]) -> Float[Tensor, "batch features"]:
        """As the bottleneck with this noise."""
        noise: Tensor = self.get_buffer("noise")
        with noise_from(lambda like: noise.to(like.dtype).expand(like.shape)):
            return Bottleneck.forward(self, inputs)  # type: ignore[arg-type]


def bottlenecks(model: nn.Module) -> dict[str, Bottleneck]:
    """The layers that draw noise, by name."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, Bottleneck)}


def input_of(gradient: Tensors, layer: str) -> Float[Tensor, " features"]:
    """What a linear layer was given for the one record behind this gradient: least squares for x in ∂W = ∂b·xᵀ."""
    weight, bias = gradient[f"{layer}.weight"].double(), gradient[f"{layer}.bias"].double()
    return weight.T @ bias / bias.square().sum().clamp(min=1e-300)


def read_noise(name: str, parameters: Tensors, gradient: Tensors) -> Float[Tensor, " k"]:
    """ε of the bottleneck ``name`` for the one record behind this gradient."""
    encoder = {key: parameters[f"{name}.encoder.{key}"].double() for key in ("weight", "bias")}
    mean, log_variance = (encoder["weight"] @ input_of(gradient, f"{name}.encoder") + encoder["bias"]).chunk(2)
    sample = input_of(gradient, f"{name}.decoder")
    return ((sample - mean) / (0.5 * log_variance).exp()).float()


def readable(view: Observation, knowledge: Knowledge) -> bool:
    """Whether one record's gradient, unharmed but for its scale, shows the noise of its bottleneck."""
    alone = knowledge.num_examples == 1 and several_steps(view, knowledge) is None
    return alone and {name for name, _ in knowledge.defenses} <= {"precode", "clip"} and noise_level(view, knowledge) <= READABLE


def prepare_told(view: Observation, knowledge: Knowledge) -> Victim:
    """One upload made ready for matching, with the noise of bottlenecks in place where it can be read off."""
    victim, found = prepare(view, knowledge), bottlenecks(knowledge.model)
    if not found or not readable(view, knowledge):
        return victim
    if victim.model not in _TOLD:
        told = copy.deepcopy(victim.model)
        for name, layer in bottlenecks(told).items():
            parent, _, own = name.rpartition(".")
            setattr(told.get_submodule(parent), own, Told(layer))
        _TOLD[victim.model] = told
    gradient = mean_gradient(view, knowledge)
    noise = {f"{name}.noise": read_noise(name, victim.parameters, gradient) for name in found}
    return replace(victim, model=_TOLD[victim.model], buffers={**victim.buffers, **noise})


def latent_size(victim: Victim) -> int:
    """Values of noise in the simulated client's run; each model is asked once."""
    known = _SIZES.setdefault(victim.model, {})
    if victim.kin not in known:
        known[victim.kin] = _count(victim) if bottlenecks(victim.model) else 0
    return known[victim.kin]


def _count(victim: Victim) -> int:
    seen: list[int] = []

    def record(like: Tensor) -> Tensor:
        seen.append(like.numel())
        return torch.zeros_like(like)

    blank = torch.full((len(victim.labels), *victim.shape), 0.5)
    with noise_from(record):
        run_recipe(
            victim.model, victim.parameters, victim.buffers, blank, victim.labels,
            recipe=victim.recipe, order=victim.order, names=victim.names,
        )  # fmt: skip
    return sum(seen)


def noise_of(numbers: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """ε from numbers in [0, 1]."""
    return WIDE * (numbers - 0.5)


@dataclass(frozen=True)
class Noisy(Masked):
    """The recipe with masks of dropout and the noise of bottlenecks as further variables, masks first."""

    def start(self, victim: Victim, rng: torch.Generator) -> Float[Tensor, " extras"]:
        """Masks as of :class:`Masked`, noise at its mean."""
        return torch.cat([super().start(victim, rng), torch.full((latent_size(victim),), 0.5, dtype=torch.float64)])

    def simulate(self, trial: Trial) -> tuple[Float[Tensor, " coordinates"], Tensors]:
        """Run the recipe under masks and noise."""
        size = latent_size(trial.kin)
        if not size:
            return super().simulate(trial)
        left = trial.extras[len(trial.extras) - size :]

        def cut(like: Tensor) -> Tensor:
            nonlocal left
            values, left = left[: like.numel()].view(like.shape), left[like.numel() :]
            return noise_of(values)

        with noise_from(cut):
            return super().simulate(replace(trial, extras=trial.extras[: len(trial.extras) - size]))

    def rates(self, victim: Victim) -> Float[Tensor, " extras"] | None:
        """Slower for noise than for pixels and masks."""
        size = latent_size(victim)
        if not size:
            return super().rates(victim)
        return torch.cat([torch.ones(len(super().start(victim, torch.Generator()))), torch.full((size,), SLOW)])


def unlikely(trial: Trial) -> Float[Tensor, ""]:
    """Mean of ε², the negative log-density of the noise but for a factor."""
    size = latent_size(trial.kin)
    return noise_of(trial.extras[len(trial.extras) - size :]).square().mean() if size else trial.inputs.new_zeros(())
