"""Where the layers sit that analytic attacks read: found by running the model once, never by their names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from simulator.adversary import Knowledge
from simulator.models.dropout import masks_from
from simulator.types import Broadcast, Tensors


@dataclass(frozen=True)
class Call:
    """One call of a layer that owns parameters: its name in the model, and what went in and came out."""

    name: str
    layer: nn.Module
    inputs: Tensor
    outputs: Tensor

    @property
    def weight(self) -> str:
        """Name of the layer's weight among the model's parameters."""
        return f"{self.name}.weight".lstrip(".")

    @property
    def bias(self) -> str:
        """Name of the layer's bias among the model's parameters."""
        return f"{self.name}.bias".lstrip(".")


@dataclass(frozen=True)
class Affine:
    """The elementwise map z = scale·x + offset from a flattened image to the input of the first linear layer.

    Attributes:
        scale, offset: where dropout stands before the layer, those of the pixels that it keeps.
        whole: whether the layer sees every pixel of a record; else what it gives away exactly is a picture with holes.
    """

    scale: Float[Tensor, " pixels"]
    offset: Float[Tensor, " pixels"]
    whole: bool = True

    def undo(self, z: Float[Tensor, "batch pixels"]) -> Float[Tensor, "batch pixels"]:
        """Return x with scale·x + offset = z."""
        return (z - self.offset) / self.scale


def all_buffers(model: nn.Module, broadcast: Broadcast) -> Tensors:
    """The buffers of the model as copies, at their broadcast values where the broadcast has them.

    With every buffer passed explicitly, functional_call writes into copies and never into the model.
    """
    return {name: broadcast.buffers.get(name, tensor).detach().clone() for name, tensor in model.named_buffers()}


@contextmanager
def _recording(model: nn.Module, calls: list[Call], frozen: bool) -> Iterator[None]:
    def record(name: str) -> object:
        def hook(layer: nn.Module, inputs: Sequence[Tensor], outputs: Tensor) -> None:
            calls.append(Call(name, layer, inputs[0].detach(), outputs.detach()))

        return hook

    handles = [
        layer.register_forward_hook(record(name))
        for name, layer in model.named_modules()
        if next(layer.parameters(recurse=False), None) is not None or (frozen and isinstance(layer, nn.Linear | nn.Conv2d))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def trace(model: nn.Module, parameters: Tensors, buffers: Tensors, inputs: Tensor, *, frozen: bool = False) -> tuple[list[Call], Tensor]:
    """Run the model once; return the calls of its parameterized layers in order, and the logits.

    With ``frozen`` also of linear and convolutional layers whose weights are buffers.
    """
    calls: list[Call] = []
    copies = {name: tensor.clone() for name, tensor in buffers.items()}
    with _recording(model, calls, frozen):
        logits = functional_call(model, {**parameters, **copies}, (inputs,))
    return calls, logits


def probe(knowledge: Knowledge, broadcast: Broadcast, inputs: Tensor, *, frozen: bool = False) -> list[Call]:
    """:func:`trace` at the broadcast parameters and buffers."""
    return trace(knowledge.model, broadcast.parameters, all_buffers(knowledge.model, broadcast), inputs, frozen=frozen)[0]


def last_linear(knowledge: Knowledge, broadcast: Broadcast) -> Call | None:
    """The linear layer that computes the logits; None if the model does not end in one."""
    calls = probe(knowledge, broadcast, torch.full((2, *knowledge.schema.shape), 0.5))
    last = calls[-1] if calls else None
    return last if last and isinstance(last.layer, nn.Linear) and last.layer.out_features == knowledge.schema.num_classes else None


def first_linear(knowledge: Knowledge, broadcast: Broadcast) -> tuple[Call, Affine] | str:
    """The model's first layer if it is linear with bias on the flattened input, and the map that feeds it; else why not."""
    pixels = int(torch.tensor(knowledge.schema.shape).prod())
    ramp = torch.linspace(0.1, 0.9, pixels).view(knowledge.schema.shape)
    calls = undropped(knowledge, broadcast, torch.stack([torch.zeros_like(ramp), torch.ones_like(ramp), ramp]))
    if not calls:
        return "the model has no parameters"
    first = calls[0]
    if not isinstance(first.layer, nn.Linear):
        return f"the first layer with parameters must be nn.Linear, got {type(first.layer).__name__}"
    if first.layer.bias is None:
        return "the first linear layer has no bias to divide by"
    if first.inputs.shape != (3, pixels):
        return f"the first linear layer must take the flattened input of {pixels} values, got shape {tuple(first.inputs.shape[1:])}"
    zero, one, seen = first.inputs
    affine = Affine(one - zero, zero, whole=not drops_before(knowledge, broadcast, first))
    if not torch.allclose(seen, affine.scale * ramp.flatten() + zero, rtol=1e-4, atol=1e-5) or bool((affine.scale == 0).any()):
        return "what precedes the first linear layer must be an elementwise affine map, such as normalization"
    return first, affine


def undropped(knowledge: Knowledge, broadcast: Broadcast, inputs: Tensor) -> list[Call]:
    """:func:`probe` with dropout that happens to keep everything, and so scales it by 1/(1 − p)."""
    with masks_from(lambda values, _: torch.ones_like(values)):
        return probe(knowledge, broadcast, inputs)


def drops_before(knowledge: Knowledge, broadcast: Broadcast, first: Call) -> bool:
    """Whether dropout stands before the model's first layer: what that layer shows is then no picture, but one with holes."""
    image = torch.rand(1, *knowledge.schema.shape, generator=torch.Generator().manual_seed(0))  # none that normalization makes 0
    with masks_from(lambda inputs, _: torch.zeros_like(inputs)):
        dropped = probe(knowledge, broadcast, image)[0]
    kept = probe(knowledge, broadcast, image)[0]
    return kept.name != first.name or not torch.equal(dropped.inputs, kept.inputs)


class _ReLUInputs(TorchFunctionMode):
    """Keeps every tensor that a ReLU is applied to, be it a module, a function or a method."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def __torch_function__(  # type: ignore[override]
        self, func: Callable[..., Tensor], types: object, args: Sequence[Tensor] = (), kwargs: Mapping[str, object] | None = None
    ) -> Tensor:
        if getattr(func, "__name__", "") in ("relu", "relu_"):
            self.seen.append(args[0] if args else kwargs["input"])  # type: ignore[index, arg-type]
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def linear_before_relu(knowledge: Knowledge, broadcast: Broadcast) -> list[str]:
    """Names of the linear layers with bias that see one row for each record and whose output goes through a ReLU."""
    model, outputs, records = knowledge.model, list[tuple[str, Tensor]](), 3
    handles = []
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and layer.bias is not None:

            def hook(layer: nn.Module, inputs: Sequence[Tensor], output: Tensor, name: str = name) -> None:
                if inputs[0].shape == (records, layer.in_features):
                    outputs.append((name, output))

            handles.append(layer.register_forward_hook(hook))
    try:
        with _ReLUInputs() as mode:
            copies = all_buffers(model, broadcast)
            functional_call(model, {**broadcast.parameters, **copies}, (torch.full((records, *knowledge.schema.shape), 0.5),))
    finally:
        for handle in handles:
            handle.remove()
    return [name for name, output in outputs if any(output is tensor for tensor in mode.seen)]


def backward_signals(
    knowledge: Knowledge, broadcast: Broadcast, name: str, images: Float[Tensor, "batch channel height width"]
) -> Float[Tensor, "classes batch neurons"]:
    """The gradient of each image's own loss with respect to the output of the layer ``name``, for every label that it can have."""
    outputs: list[Tensor] = []

    def keep(_layer: nn.Module, _inputs: Sequence[Tensor], output: Tensor) -> None:
        outputs.append(output)

    handle = knowledge.model.get_submodule(name).register_forward_hook(keep)
    buffers = all_buffers(knowledge.model, broadcast)
    try:
        with torch.enable_grad():
            parameters = {key: tensor.detach() for key, tensor in broadcast.parameters.items()}
            logits = functional_call(knowledge.model, {**parameters, **buffers}, (images.detach().requires_grad_(),))
            signals = []
            for label in range(logits.shape[1]):
                total = F.cross_entropy(logits, torch.full((len(images),), label), reduction="sum")
                signals.append(torch.autograd.grad(total, outputs[0], retain_graph=True)[0].detach())
    finally:
        handle.remove()
    return torch.stack(signals)
