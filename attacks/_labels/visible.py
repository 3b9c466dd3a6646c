"""The label of one record whose update came with holes, as signs or rounded: that of the public record whose gradient is nearest to it.

What is compared is what is seen: of a pruned update the coordinates that stayed, so that a bias that was left out, whose entry is 0 like
that of an absent class, says nothing. Every layer has a say, the head least of all where it has few coordinates.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import vmap

from attacks._gradient import mean_gradient, several_steps
from attacks._intact import lossy
from attacks._labels.runs import PUBLIC, reference
from attacks._layers import all_buffers
from attacks.modeled import PRUNING
from simulator.adversary import Knowledge
from simulator.training import mean_gradient as gradient_of
from simulator.types import Batch, Broadcast, Observation

MOST_MB = 128
"""For the gradients of public records; larger networks are left to their heads."""

Gradients = Float[Tensor, "records coordinates"]

_MADE: WeakKeyDictionary[nn.Module, tuple[Broadcast, Batch, Int[Tensor, " records"], Gradients]] = WeakKeyDictionary()


def nearest_label(view: Observation, knowledge: Knowledge, bias: Float[Tensor, " classes"] | None = None) -> int | None:
    """The class of the nearest public record; None where the update is whole, of several steps, or public records are too few.

    Args:
        bias: of the last layer's gradient. Its only negative entry is that of the label: where one is seen, None is returned, since
            nothing else need be asked; where only positive ones are, they are those of other classes.
    """
    if bias is not None and float(bias.min()) < 0:
        return None
    public = knowledge.public
    if not lossy(view, knowledge) or public is None or knowledge.num_examples != 1 or several_steps(view, knowledge) is not None:
        return None
    size = sum(tensor.numel() for tensor in view.upload.update.tensors.values())
    enough = int(torch.bincount(public.labels, minlength=knowledge.schema.num_classes).min()) > 1
    if not enough or 4 * size * min(len(public), PUBLIC) > MOST_MB * 2**20:
        return None
    if any(isinstance(layer, nn.modules.batchnorm._BatchNorm | nn.Dropout) for layer in knowledge.model.modules()):
        return None
    labels, made = gradients(view, knowledge, public)
    names = [name for name in view.broadcast.parameters if name in view.upload.update.tensors]
    seen = torch.cat([view.upload.update.tensors[name].flatten() != 0 for name in names]).float()
    if not any(name in PRUNING for name, _ in knowledge.defenses):
        seen = torch.ones_like(seen)
    told = mean_gradient(view, knowledge)
    target = torch.cat([told[name].flatten() for name in names]) * seen
    if any(name == "sign_sgd" for name, _ in knowledge.defenses):
        made, target = made.sign(), target.sign()
    norms = (made.square() @ seen).sqrt().clamp(min=1e-30)
    near = made @ target / norms
    if bias is not None:
        near = near - 3.0 * (bias > 0)[labels]
    return int(labels[int(near.argmax())])


def gradients(view: Observation, knowledge: Knowledge, public: Batch) -> tuple[Int[Tensor, " records"], Gradients]:
    """Labels and gradients of public records at the broadcast; made once for all uploads of a round."""
    known = _MADE.get(knowledge.model)
    if known is not None and known[0] is view.broadcast and known[1] is public:
        return known[2], known[3]
    chosen, parameters = reference(knowledge), dict(view.broadcast.parameters)
    buffers, smoothing = all_buffers(knowledge.model, view.broadcast), knowledge.training.label_smoothing
    names = [name for name in parameters if name in view.upload.update.tensors]

    def one(image: Tensor, label: Tensor) -> Tensor:
        batch = Batch(image[None], label[None])
        found, _ = gradient_of(knowledge.model, parameters, buffers, batch, label_smoothing=smoothing)
        return torch.cat([found[name].flatten() for name in names])

    with torch.no_grad():
        parts = zip(torch.split(chosen.inputs, 64), torch.split(chosen.labels, 64), strict=True)
        made = torch.cat([vmap(one)(inputs, labels) for inputs, labels in parts])
    _MADE[knowledge.model] = view.broadcast, public, chosen.labels, made
    return chosen.labels, made
