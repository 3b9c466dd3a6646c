"""Any model with one thing taken away that gradient inversion feeds on: the first bias, the first layer's update, BatchNorm."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from simulator.config import Plugin
from simulator.errors import SpecError
from simulator.models.mlp import MLP
from simulator.models.norm import norm_layer
from simulator.models.resnet import ResNet20
from simulator.models.surgery import first_and_last, replace
from simulator.registry import register
from simulator.types import Schema


@register("models", "no_first_bias")
@dataclass(frozen=True)
class NoFirstBias:
    """Another model whose first layer has no bias; the defense ``no_first_bias`` takes it away.

    Attributes:
        of: the other model.
    """

    of: Annotated[Any, Plugin("models")] = field(default_factory=MLP)

    def build(self, schema: Schema, rng: torch.Generator) -> nn.Module:
        """Build the other model and drop the bias of the linear or convolutional layer that runs first."""
        model: nn.Module = self.of.build(schema, rng)
        name, _ = first_and_last(model, schema)
        layer = model.get_submodule(name)
        if layer.bias is None:
            raise SpecError(f"the first layer, {name}, must have a bias for no_first_bias, got none to take away. Drop no_first_bias.")
        layer.register_parameter("bias", None)
        return model


@register("models", "frozen_first_layer")
@dataclass(frozen=True)
class FrozenFirstLayer:
    """Another model whose first layer stays as it was drawn; the defense ``frozen_first_layer`` freezes it.

    Attributes:
        of: the other model.
    """

    of: Annotated[Any, Plugin("models")] = field(default_factory=MLP)

    def build(self, schema: Schema, rng: torch.Generator) -> nn.Module:
        """Build the other model and turn the weights of the layer that runs first into buffers: sent along, but not trained."""
        model: nn.Module = self.of.build(schema, rng)
        name, last = first_and_last(model, schema)
        if name == last:
            raise SpecError(f"the model must have more than 1 layer for frozen_first_layer, got {name} alone. Use a deeper model.")
        layer = model.get_submodule(name)
        for own, parameter in list(layer.named_parameters(recurse=False)):
            delattr(layer, own)
            layer.register_buffer(own, parameter.detach())
        return model


@register("models", "group_norm")
@dataclass(frozen=True)
class GroupNormed:
    """Another model with GroupNorm in place of BatchNorm; the defense ``group_norm`` changes it.

    Attributes:
        of: the other model.
        groups: of channels that are normalized together.
    """

    of: Annotated[Any, Plugin("models")] = field(default_factory=ResNet20)
    groups: int = 8

    def build(self, schema: Schema, rng: torch.Generator) -> nn.Module:
        """Build the other model and change its norms; they start with scale 1 and shift 0, as BatchNorm's do."""
        model: nn.Module = self.of.build(schema, rng)
        norms = {name: layer.num_features for name, layer in model.named_modules() if isinstance(layer, _BatchNorm)}
        if not norms:
            raise SpecError("the model must have BatchNorm for group_norm, got none to replace. Drop group_norm.")
        for name, channels in norms.items():
            replace(model, name, norm_layer("group", channels, self.groups))
        return model
