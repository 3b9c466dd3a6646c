"""Small convolutional networks without normalization layers: the victims that papers attack most."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import nn

from simulator.errors import SpecError
from simulator.models.activation import ACTIVATIONS, Activation
from simulator.models.dropout import Dropout
from simulator.models.initial import drawn_from
from simulator.models.normalize import Normalize
from simulator.registry import register
from simulator.types import Schema


@register("models", "lenet")
@dataclass(frozen=True)
class LeNet:
    """The sigmoid LeNet of DLG: strides instead of pooling, and wide initial weights, on which L-BFGS attacks work best.

    Source: Zhu et al., 2019, arXiv:1906.08935: smooth activations, since the attack differentiates the gradient once more,
    and weights from U(−0.5, 0.5). With PyTorch's own narrow weights the attack matches the gradient with a wrong image.

    Attributes:
        init: weights and biases are uniform in [−init, init]; 0 keeps PyTorch's own initial weights.
        activation: after each convolution; DLG's is the sigmoid.
        dropout: probability to drop each feature that enters the head, in the clients' training alone.
    """

    init: float = 0.5
    activation: Activation = "sigmoid"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        Dropout(self.dropout)
        if not self.init >= 0:
            raise ValueError(f"init must be ≥ 0, got {self.init}. Use 0 for PyTorch's own initial weights.")

    def build(self, schema: Schema, rng: torch.Generator) -> nn.Module:
        """Build the network for inputs of at least 8×8, with weights drawn from ``rng``."""
        _require_size(schema, 8, self.__class__.__name__)
        channels = schema.shape[0]
        with drawn_from(rng):
            body = nn.Sequential()
            for i, (narrow, stride) in enumerate(((channels, 2), (12, 2), (12, 1))):
                body.add_module(f"conv{i}", nn.Conv2d(narrow, 12, kernel_size=5, stride=stride, padding=2))
                body.add_module(f"activation{i}", ACTIVATIONS[self.activation]())
            model = _classifier(body, schema, dropout=self.dropout)
            if self.init:
                for parameter in model.parameters():
                    nn.init.uniform_(parameter, -self.init, self.init)
        return model


@register("models", "convnet")
@dataclass(frozen=True)
class ConvNet:
    """A plain ReLU network of five 3×3 convolutions, two of stride 2: the realistic small victim without BatchNorm.

    Attributes:
        width: channels of the first convolution; the last has four times as many.
    """

    width: int = 16

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"width must be ≥ 1, got {self.width}. Typical: 16 to 64.")

    def build(self, schema: Schema, rng: torch.Generator) -> nn.Module:
        """Build the network for inputs of at least 8×8, with weights drawn from ``rng``."""
        _require_size(schema, 8, self.__class__.__name__)
        narrow, w = schema.shape[0], self.width
        with drawn_from(rng):
            body = nn.Sequential()
            for i, (wide, stride) in enumerate(((w, 1), (2 * w, 2), (2 * w, 1), (4 * w, 2), (4 * w, 1))):
                body.add_module(f"conv{i}", nn.Conv2d(narrow, wide, kernel_size=3, stride=stride, padding=1))
                body.add_module(f"activation{i}", nn.ReLU())
                narrow = wide
            body.add_module("pool", nn.AvgPool2d(2))
            return _classifier(body, schema)


@register("models", "cnn")
@dataclass(frozen=True)
class CNN:
    """Two ReLU convolutions, one hidden fully connected ReLU layer and the head: the usual small classifier of FL tutorials.

    Attributes:
        width: channels of both convolutions.
        hidden: width of the fully connected layer.
        dropout: probability to drop each of its units, in the clients' training alone.
    """

    width: int = 32
    hidden: int = 256
    dropout: float = 0.0

    def __post_init__(self) -> None:
        Dropout(self.dropout)
        if self.width < 1 or self.hidden < 1:
            raise ValueError(f"width and hidden must be ≥ 1, got {self.width} and {self.hidden}. Typical: 32 and 256.")

    def build(self, schema: Schema, rng: torch.Generator) -> nn.Module:
        """Build the network for inputs of at least 8×8, with weights drawn from ``rng``."""
        _require_size(schema, 8, self.__class__.__name__)
        with drawn_from(rng):
            body = nn.Sequential()
            body.add_module("conv0", nn.Conv2d(schema.shape[0], self.width, kernel_size=5, stride=2, padding=2))
            body.add_module("activation0", nn.ReLU())
            body.add_module("conv1", nn.Conv2d(self.width, self.width, kernel_size=3, padding=1))
            body.add_module("activation1", nn.ReLU())
            return _classifier(body, schema, self.hidden, dropout=self.dropout)


def _classifier(body: nn.Module, schema: Schema, hidden: int = 0, *, dropout: float = 0.0) -> nn.Module:
    """Normalization, the body, a hidden fully connected layer and dropout if they are wanted, and a linear layer on all features."""
    with torch.no_grad():
        features = body(torch.zeros(1, *schema.shape)).numel()
    layers: OrderedDict[str, nn.Module] = OrderedDict(normalize=Normalize(), body=body, flatten=nn.Flatten())
    if hidden:
        layers.update(hidden=nn.Linear(features, hidden), activation=nn.ReLU())
    if dropout:
        layers.update(dropout=Dropout(dropout))
    return nn.Sequential(layers | {"head": nn.Linear(hidden or features, schema.num_classes)})


def _require_size(schema: Schema, smallest: int, model: str) -> None:
    if min(schema.shape[1:]) < smallest:
        raise SpecError(f"inputs of {model} must be at least {smallest}×{smallest} pixels, got {schema.shape}. Use linear or mlp.")
