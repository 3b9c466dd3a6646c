"""Residual networks: the deep victims, with BatchNorm as deployed or with GroupNorm as in private training."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from simulator.models.initial import drawn_from
from simulator.models.norm import Norm, norm_layer
from simulator.models.normalize import Normalize
from simulator.registry import register
from simulator.types import Schema

CIFAR_STEM_BELOW_PIXELS = 64
"""Smaller inputs would leave torchvision's first two layers with a quarter of an already small grid."""


@register("models", "resnet20")
@dataclass(frozen=True)
class ResNet20:
    """The ResNet-20 for CIFAR: three stages of three blocks and parameter-free shortcuts.

    Source: He et al., 2016, arXiv:1512.03385, section 4.2, with its shortcut "option A" and weights from He et al., 2015,
    arXiv:1502.01852.

    Attributes:
        norm: ``batch`` as in the paper; ``group`` for per-example gradients and for uploads without running statistics.
        width: channels of the first stage; the last has four times as many.
    """

    norm: Norm = "batch"
    width: int = 16

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"width must be ≥ 1, got {self.width}. The paper has 16.")

    def build(self, schema: Schema, rng: torch.Generator) -> nn.Module:
        """Build the network for inputs of any size, with weights drawn from ``rng``."""
        w = self.width
        with drawn_from(rng):
            body = nn.Sequential()
            body.add_module("conv", nn.Conv2d(schema.shape[0], w, kernel_size=3, padding=1, bias=False))
            body.add_module("norm", norm_layer(self.norm, w))
            body.add_module("activation", nn.ReLU())
            for stage, (narrow, wide) in enumerate(((w, w), (w, 2 * w), (2 * w, 4 * w))):
                blocks = [Block(narrow if i == 0 else wide, wide, self.norm) for i in range(3)]
                body.add_module(f"stage{stage}", nn.Sequential(*blocks))
            body.add_module("pool", nn.AdaptiveAvgPool2d(1))
            for module in body.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            head = nn.Linear(4 * w, schema.num_classes)
        return nn.Sequential(OrderedDict(normalize=Normalize(), body=body, flatten=nn.Flatten(), head=head))


class Block(nn.Module):
    """Two 3×3 convolutions around a shortcut; where the block widens, it halves the grid and the shortcut pads with zeros."""

    def __init__(self, narrow: int, wide: int, norm: Norm) -> None:
        super().__init__()
        self.stride, self.padding = (1, 0) if wide == narrow else (2, wide - narrow)
        self.conv1 = nn.Conv2d(narrow, wide, kernel_size=3, stride=self.stride, padding=1, bias=False)
        self.norm1 = norm_layer(norm, wide)
        self.conv2 = nn.Conv2d(wide, wide, kernel_size=3, padding=1, bias=False)
        self.norm2 = norm_layer(norm, wide)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (batch, narrow, h, w) to (batch, wide, ⌈h/stride⌉, ⌈w/stride⌉)."""
        hidden = F.relu(self.norm1(self.conv1(inputs)))
        shortcut = F.pad(inputs[..., :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.padding))
        return F.relu(self.norm2(self.conv2(hidden)) + shortcut)


@register("models", "resnet18")
@dataclass(frozen=True)
class ResNet18:
    """torchvision's ResNet-18, untrained; inputs below 64 pixels get a 3×3 first layer of stride 1 and no max-pooling.

    Source: He et al., 2016, arXiv:1512.03385, table 1.

    Attributes:
        norm: ``batch`` as in the paper; ``group`` for per-example gradients and for uploads without running statistics.
    """

    norm: Norm = "batch"

    def build(self, schema: Schema, rng: torch.Generator) -> nn.Module:
        """Build the network for inputs of any size, with weights drawn from ``rng``."""
        from torchvision.models import resnet18  # slow to import

        channels, height, width = schema.shape
        with drawn_from(rng):
            body = resnet18(num_classes=schema.num_classes, norm_layer=partial(norm_layer, self.norm))
            if min(height, width) < CIFAR_STEM_BELOW_PIXELS:
                body.conv1 = nn.Conv2d(channels, 64, kernel_size=3, padding=1, bias=False)
                body.maxpool = nn.Identity()
            else:
                body.conv1 = nn.Conv2d(channels, 64, kernel_size=7, stride=2, padding=3, bias=False)
            nn.init.kaiming_normal_(body.conv1.weight, mode="fan_out", nonlinearity="relu")  # as torchvision does
        head, body.fc = body.fc, nn.Identity()
        return nn.Sequential(OrderedDict(normalize=Normalize(), body=body, head=head))
