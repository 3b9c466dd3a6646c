"""Layers whose output is random and that add a term to the loss; both go in and come out as values, never as a module's state.

The noise is handed in as dropout's masks are (:mod:`simulator.models.dropout`): random for the client that trains, whatever it likes
for whoever simulates it, and 0, its mean, for everyone else. What a layer adds to the loss is collected by :func:`penalties` around
the forward pass: :func:`simulator.training.loss` is the one place that does, so clients and attacks compute the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

Noise = Callable[[Tensor], Tensor]
"""What the noise is added to → values of its shape."""

_NOISE: ContextVar[Noise | None] = ContextVar("noise", default=None)  # each thread its own: clients may be threads
_ADDED: ContextVar[list[Tensor] | None] = ContextVar("added", default=None)


@contextmanager
def noise_from(source: Noise) -> Iterator[None]:
    """Let every random layer that runs inside take its noise, in the order of the calls, from ``source``."""
    token = _NOISE.set(source)
    try:
        yield
    finally:
        _NOISE.reset(token)


def drawn_noise(rng: torch.Generator) -> Noise:
    """Independent values from N(0, 1)."""

    def draw(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=rng).to(like)

    return draw


def noisy() -> bool:
    """Whether noise is handed in."""
    return _NOISE.get() is not None


@contextmanager
def penalties() -> Iterator[list[Tensor]]:
    """Collect, in order, what the layers that run inside add to the loss."""
    added: list[Tensor] = []
    token = _ADDED.set(added)
    try:
        yield added
    finally:
        _ADDED.reset(token)


def divergence(mean: Float[Tensor, "batch k"], log_variance: Float[Tensor, "batch k"]) -> Float[Tensor, " batch"]:
    """KL(N(mean, exp(log_variance)) ‖ N(0, 1)) of each record in nats, summed over the k values."""
    return 0.5 * (log_variance.exp() + mean.square() - 1 - log_variance).sum(-1)


class Bottleneck(nn.Module):
    """A variational bottleneck: features → N(μ, σ²) of k values → a sample of it → features.

    Its term of the loss is β times the mean divergence of N(μ, σ²) from N(0, 1).
    """

    def __init__(self, features: int, k: int, beta: float) -> None:
        super().__init__()
        self.beta = beta
        self.encoder = nn.Linear(features, 2 * k)
        self.decoder = nn.Linear(k, features)

    def forward(self, inputs: Float[Tensor, "batch features"]) -> Float[Tensor, "batch features"]:
        """z = μ + exp(½·log σ²)·ε with the ε that is handed in, or 0, decoded."""
        mean, log_variance = self.encoder(inputs).chunk(2, dim=-1)
        added, source = _ADDED.get(), _NOISE.get()
        if added is not None:
            added.append(self.beta * divergence(mean, log_variance).mean())
        sample = mean if source is None else mean + (0.5 * log_variance).exp() * source(mean)
        features: Tensor = self.decoder(sample)
        return features

    def extra_repr(self) -> str:
        """Show β when the model is printed."""
        return f"beta={self.beta}"
