"""A small vision transformer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from simulator.models.dropout import Dropout
from simulator.models.initial import drawn_from
from simulator.models.normalize import Normalize
from simulator.registry import register
from simulator.types import Schema


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al., 2017, arXiv:1706.03762, equation 1) in elementary operations.

    PyTorch's fused attention has no second derivative on the CPU, and attacks need one.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(4))

    def forward(self, tokens: Tensor) -> Tensor:
        """Mix tokens of shape (batch, tokens, width)."""
        batch, count, width = tokens.shape
        query, key, value = (
            layer(tokens).reshape(batch, count, self.heads, width // self.heads).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        weights = torch.softmax(query @ key.transpose(-1, -2) / (width // self.heads) ** 0.5, dim=-1)
        mixed: Tensor = self.output((weights @ value).transpose(1, 2).reshape(batch, count, width))
        return mixed


class Block(nn.Module):
    """Attention and a two-layer perceptron, each behind a layer normalization and around a shortcut."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.dropout = Dropout(dropout)
        self.norm0, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm1, self.up, self.activation, self.down = (
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width),
        )  # fmt: skip

    def forward(self, tokens: Tensor) -> Tensor:
        """Transform tokens of shape (batch, tokens, width)."""
        tokens = tokens + self.dropout(self.attention(self.norm0(tokens)))
        change: Tensor = self.dropout(self.down(self.dropout(self.activation(self.up(self.norm1(tokens))))))
        return tokens + change


class Patches(nn.Module):
    """Square patches of an image as tokens, with a learned embedding of their places; edges are filled with zeros."""

    def __init__(self, shape: tuple[int, int, int], patch: int, width: int) -> None:
        super().__init__()
        channels, height, breadth = shape
        self.missing = (0, -breadth % patch, 0, -height % patch)
        self.embed = nn.Conv2d(channels, width, kernel_size=patch, stride=patch)
        self.place = nn.Parameter(0.02 * torch.randn(-(-height // patch) * -(-breadth // patch), width))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return tokens of shape (batch, tokens, width)."""
        tokens: Tensor = self.embed(F.pad(inputs, self.missing)).flatten(2).transpose(1, 2)
        return tokens + self.place


class Mean(nn.Module):
    """The mean over tokens."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Return shape (batch, width)."""
        return tokens.mean(1)


@register("models", "vit")
@dataclass(frozen=True)
class ViT:
    """A small vision transformer: patches with learned places, pre-norm blocks, mean over tokens.

    Source: Dosovitskiy et al., 2021, arXiv:2010.11929, with the mean over tokens in place of a class token.

    Attributes:
        patch: height and width of a patch, in pixels.
        width: of a token.
        depth: number of blocks.
        heads: of the attention; must divide ``width``.
        dropout: probability to drop each value after the embedding and after each linear layer of a block but those of query, key and
            value, as in the paper; in the clients' training alone.
    """

    patch: int = 4
    width: int = 64
    depth: int = 2
    heads: int = 4
    dropout: float = 0.0

    def __post_init__(self) -> None:
        Dropout(self.dropout)
        for name in ("patch", "width", "depth", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be ≥ 1, got {getattr(self, name)}. The default is {getattr(ViT, name)}.")
        if self.width % self.heads:
            raise ValueError(f"heads must divide width = {self.width}, got {self.heads}. Use 1, or a divisor.")

    def build(self, schema: Schema, rng: torch.Generator) -> nn.Module:
        """Build the network with weights drawn from ``rng``."""
        with drawn_from(rng):
            model = nn.Sequential()
            model.add_module("normalize", Normalize())
            model.add_module("patches", Patches(schema.shape, self.patch, self.width))
            if self.dropout:
                model.add_module("dropout", Dropout(self.dropout))
            for i in range(self.depth):
                model.add_module(f"block{i}", Block(self.width, self.heads, self.dropout))
            model.add_module("norm", nn.LayerNorm(self.width))
            model.add_module("pool", Mean())
            model.add_module("head", nn.Linear(self.width, schema.num_classes))
        return model
