"""The active server: it tampers with the model that it broadcasts, so that the uploads hold records verbatim. Off by default.

This is no honest-but-curious adversary. It acts only where the world says so (``tampering``), which an experiment may say only with
``threat.adversary = "active"``; transcript, table and report say it, too. It changes numbers, never the architecture, and only of
models that begin with a linear layer with bias on the flattened input, a ReLU and another linear layer, such as ``mlp``.

``imprint``: every row of the first layer measures the brightness of a picture, its bias is minus one of k thresholds, and the columns
of the second layer are all the same. So whatever flows back to a neuron that fires does not depend on which neuron it is, and the
difference of the gradients of two neighbors holds the records whose brightness lies between their thresholds.
``trap_weights``: in each row of the first layer a random half of the weights is negative and the other half holds the same
magnitudes, positive and smaller by a factor, so that a neuron fires for few records, often for one alone.

Source: Fowl et al., 2022, "Robbing the Fed", arXiv:2110.13057, section 3 (imprint); Boenisch et al., 2023, "When the Curious Abandon
    Honesty", arXiv:2112.02918 (trap weights).
Deviations: imprint: the paper puts a module of its own before the model; here the model's own first two layers are overwritten, so
    that nothing looks different but numbers. The lowest threshold lies below black, so that no record is dark enough to be missed.
    Into a head, the columns hold numbers of alternating sign and distinct size and the bias 0, so that no label's signal vanishes.
    trap_weights: the factor is not 0.95 or tuned by hand but computed, so that most records of a batch are expected to have a neuron
    to themselves: 0.95 is right for about 3000 pixels, in 64 pixels almost half of the neurons fire under it. The magnitude is that
    of the weights which were there.
The model is tampered with anew in every broadcast, so that it learns little: its accuracy is that of a sabotaged federation.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import torch
from jaxtyping import Float
from torch import Tensor

from simulator.dataset import split
from simulator.errors import FederationError
from simulator.front import Front, front
from simulator.network import network
from simulator.rng import stream
from simulator.types import Schema, Tensors
from simulator.world import World

BRIGHTNESS = NormalDist(0.5, 0.2)
"""Mean brightness of a picture in [0, 1], as assumed without public records (Fowl et al. assume a normal distribution)."""

BRIGHTNESS_TO_CONTRAST = (1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0)
"""Means of a picture's pixels over their standard deviation, as assumed without public records."""

FACTORS = 400
"""Factors in (0, 1] that are tried for trap weights."""

UNKNOWN_BATCH = 16
"""Records behind an upload, as assumed where clients train on all they hold."""

BELOW_BLACK = -0.01

UNEVEN = (0.5, 1.5)
"""Range of the pixels' shares in the brightness: uneven, so that two pictures of few gray levels do not tie."""


def refusal(world: World) -> str | None:
    """The reason why this world's model cannot be tampered with; None if it can, or is not to be."""
    if world.tampering.method == "none":
        return None
    schema = world.data.load().schema
    found = front(network(world.architecture, schema, world.training, world.seed), schema.shape)
    return f"{found}. Use the model 'mlp' with ReLU" if isinstance(found, str) else None


def tampered(world: World, parameters: Tensors, round: int) -> Tensors:
    """The parameters to broadcast: these ones as they are, or with what an active server plants in them.

    Raises:
        FederationError: there is nowhere to plant it.
    """
    method = world.tampering.method
    if method == "none":
        return parameters
    data = world.data.load()
    found = front(network(world.architecture, data.schema, world.training, world.seed), data.schema.shape)
    if isinstance(found, str):
        raise FederationError(f"{found}. Use the model 'mlp' with ReLU, or no tampering.")
    public = None
    if world.tampering.placed_by == "public":
        public = split(data, world.split, world.seed).public.inputs.flatten(1).double()
    rng = stream(world.seed, "tampering", round)
    if method == "imprint":
        return imprint(found, data.schema, parameters, public, rng)
    return trap_weights(found, parameters, public, expected_records(world), rng)


def expected_records(world: World) -> int:
    """How many records the server expects behind one upload."""
    batch = world.training.batch_size or UNKNOWN_BATCH
    return batch * (world.federation.cohort_size if world.channel is not None else 1)


def imprint(
    layers: Front, schema: Schema, parameters: Tensors, public: Float[Tensor, "record pixels"] | None, rng: torch.Generator
) -> dict[str, Tensor]:
    """Plant rows that measure brightness against ascending thresholds, and equal columns behind them."""
    neurons, pixels = parameters[layers.weight].shape
    shares = UNEVEN[0] + (UNEVEN[1] - UNEVEN[0]) * torch.rand(pixels, generator=rng, dtype=torch.float64)
    shares /= shares.sum()
    limits, spread = thresholds(neurons, None if public is None else public @ shares)
    # 1/neurons keeps the sum over all neurons, and so the logits, near 1: the signals of the records stay alike in size
    unit = 1 / (neurons * spread)
    weight, bias = layers.from_pixels((unit * shares).expand(neurons, pixels), -unit * limits)
    planted = {**parameters, layers.weight: weight, layers.bias: bias}
    following = parameters[layers.next_weight]
    column = (-1.0) ** torch.arange(len(following)) * torch.linspace(0.2, 0.4, len(following))
    planted[layers.next_weight] = column[:, None].expand_as(following).to(following).contiguous()
    if layers.next_bias is not None and len(following) == schema.num_classes:
        planted[layers.next_bias] = torch.zeros_like(parameters[layers.next_bias])
    return planted


def thresholds(count: int, brightness: Float[Tensor, " record"] | None) -> tuple[Float[Tensor, " count"], float]:
    """Brightnesses, ascending, between which equally many records are expected, and the brightness's standard deviation."""
    expected = BRIGHTNESS
    if brightness is not None:
        expected = NormalDist(float(brightness.mean()), float(brightness.std(correction=0).clamp(min=1e-3)))
    limits = torch.tensor([min(0.0, expected.mean) + BELOW_BLACK, *(expected.inv_cdf(place / count) for place in range(1, count))])
    limits = limits.double().sort().values
    spread = expected.stdev
    return limits, spread


def trap_weights(
    layers: Front, parameters: Tensors, public: Float[Tensor, "record pixels"] | None, records: int, rng: torch.Generator
) -> dict[str, Tensor]:
    """Plant rows of half negative, half smaller positive weights."""
    neurons, pixels = parameters[layers.weight].shape
    half = pixels // 2
    magnitude = torch.randn(neurons, half, generator=rng, dtype=torch.float64).abs()
    factor = positive_factor(neurons, pixels, public, records)
    places = torch.rand(neurons, pixels, generator=rng).argsort(1)
    weight = torch.zeros(neurons, pixels, dtype=torch.float64)
    weight.scatter_(1, places[:, :half], -magnitude).scatter_(1, places[:, half : 2 * half], factor * magnitude)
    usual = layers.on_pixels(parameters)[0].square().mean().sqrt()
    inner, bias = layers.from_pixels(weight * usual / weight.square().mean().sqrt(), torch.zeros(neurons))
    return {**parameters, layers.weight: inner, layers.bias: bias}


def positive_factor(neurons: int, pixels: int, public: Float[Tensor, "record pixels"] | None, records: int) -> float:
    """The factor of the positive weights with which most of ``records`` records are expected to have a neuron to themselves.

    A row's weights sum to −(1 − f)·Σ magnitudes, which a picture's mean multiplies; the deviations of its pixels from the mean meet
    weights of random sign. So the neuron's input is normal with mean −(1 − f)·(pixels/2)·√(2/π)·mean and variance
    (1 + f²)/2·pixels·contrast², in units of the magnitudes' deviation, and the neuron fires for this picture with the probability
    that it is above 0.
    """
    ratio = torch.tensor(BRIGHTNESS_TO_CONTRAST, dtype=torch.float64)
    if public is not None:
        ratio = public.mean(1) / public.std(1, correction=0).clamp(min=1e-3)

    def isolated(factor: float) -> float:
        away = (1 - factor) * math.sqrt(pixels / math.pi) * ratio / math.sqrt(1 + factor**2)
        fires = torch.special.ndtr(-away)
        alone = fires * (1 - fires).mean() ** (records - 1)
        return float(1 - ((1 - alone) ** neurons).mean())

    return max((step / FACTORS for step in range(FACTORS + 1)), key=isolated)
