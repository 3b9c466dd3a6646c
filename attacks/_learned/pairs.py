"""Pairs of records and update, made by the attacker: public records through the client's own recipe and defenses."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Int
from torch import Tensor
from torch.func import vmap
from torch.nn.modules.batchnorm import _BatchNorm

from attacks._gradient import steps_taken
from attacks._layers import all_buffers
from attacks._learned.batches import Images, shuffled
from attacks._learned.latents import drawn_values, in_turn, masks_in_turn
from attacks._learned.mechanisms import Chain, Compressed, PerRecord, Stack, applied, chain, compressed, unit_signs
from attacks._matching.defended import struck
from attacks._matching.simulate import flat
from simulator.adversary import Knowledge
from simulator.models.dropout import masks_from
from simulator.models.latent import noise_from
from simulator.training import GradientRule, batch_indices, local_update, per_example_gradients
from simulator.types import Batch, Observation, Tensors

AT_ONCE_MB = 64


@dataclass(frozen=True)
class Sender:
    """One simulated client: how the attacker turns many batches into as many updates.

    Attributes:
        knowledge: of the upload under attack.
        parameters, buffers: at the broadcast.
        names: the tensors of the update, in the order in which they are flattened.
        sizes: records of each sender behind the upload.
        chain: the defenses that were told.
        seen: the compression that shows, by tensor.
    """

    knowledge: Knowledge
    parameters: Tensors
    buffers: Tensors
    names: tuple[str, ...]
    sizes: tuple[int, ...]
    chain: Chain
    seen: Mapping[str, Compressed] = field(default_factory=dict)

    @property
    def numels(self) -> list[int]:
        """Coordinates of each tensor."""
        return [self.parameters[name].numel() for name in self.names]

    @property
    def weights(self) -> list[float]:
        """Of the senders in the mean that is uploaded."""
        return [size / sum(self.sizes) for size in self.sizes]

    @property
    def noise(self) -> float:
        """Deviation of the noise on each coordinate of the upload that :func:`updates` leaves out; 0 for none."""
        if self.draws_all:
            return 0.0
        own = self.chain.last**2
        record = self.chain.record
        per_sender = [own + (record.sigma / size) ** 2 if record and self.late(record) else own for size in self.sizes]
        return math.sqrt(sum(weight**2 * square for weight, square in zip(self.weights, per_sender, strict=True)))

    def late(self, record: PerRecord) -> bool:
        """Whether the noise on the records' sum is the same as noise on the upload, which need not be drawn."""
        return bool(record.sigma) and self.knowledge.training.algorithm == "fedsgd" and not self.chain.steps

    @property
    def compresses(self) -> bool:
        """Whether compression shows that no known heuristic explains: it is imitated by its looks."""
        return bool(self.seen) and not self.chain.heuristics

    def comparable(self, tensors: Tensors) -> dict[str, Tensor]:
        """An observed update as it is compared with simulated ones: without scale where it holds signs, without what Soteria touched."""
        signs = any(step.heuristic == "sign_sgd" for step in self.chain.heuristics)
        gone = {f"{step.settings['layer']}.weight" for step in self.chain.heuristics if step.heuristic == "soteria"}
        plain = {name: tensor.sign() if signs else tensor for name, tensor in unit_signs(tensors, self.seen).items()}
        return {name: torch.zeros_like(tensor) if name in gone else tensor for name, tensor in plain.items()}

    @property
    def adds_up(self) -> bool:
        """Whether several senders are one who holds all of their records: one step of plain gradients, whose mean is linear in records."""
        chain, recipe = self.chain, self.knowledge.training
        joint = any(isinstance(layer, _BatchNorm) for layer in self.knowledge.model.modules())
        plain = recipe.algorithm == "fedsgd" and recipe.upload_dtype == "float32" and not joint
        return len(self.sizes) > 1 and plain and not (chain.record or chain.steps or self.compresses)

    @property
    def draws_all(self) -> bool:
        """Whether noise must be drawn, since compression comes after it."""
        return self.compresses


def sender(view: Observation, knowledge: Knowledge, seen: Mapping[str, Compressed]) -> Sender:
    """The client behind an upload, or the senders of an aggregate, which are assumed to hold equally many records."""
    count = len(view.upload.senders)
    least, more = divmod(knowledge.num_examples, count)
    known = chain(view, knowledge)
    if spared(view, knowledge):
        known = replace(known, steps=tuple(step for step in known.steps if step.heuristic != "outpost"))
    return Sender(
        knowledge,
        {name: tensor.detach() for name, tensor in view.broadcast.parameters.items()},
        all_buffers(knowledge.model, view.broadcast),
        tuple(name for name in view.broadcast.parameters if name in view.upload.update.tensors),
        tuple(least + (place < more) for place in range(count)),
        known,
        seen,
    )


def spared(view: Observation, knowledge: Knowledge) -> bool:
    """Whether Outpost, if it is known of, left this upload alone, or there is no telling."""
    told = any(name == "outpost" for name, _ in knowledge.defenses)
    return told and (steps_taken(view, knowledge) > 1 or not struck(view.upload.update.tensors, knowledge.num_examples))


def updates(of: Sender, images: Images, labels: Int[Tensor, "pairs batch"], rng: torch.Generator) -> Stack:
    """The uploads of these batches, flat, without the noise that ``of.noise`` states."""
    if of.adds_up:
        return uploaded(replace(of, sizes=(sum(of.sizes),)), images, labels, rng)
    total: Tensor | float = 0.0
    ends = torch.tensor(of.sizes).cumsum(0).tolist()
    places = [torch.arange(end - size, end) for size, end in zip(of.sizes, ends, strict=True)]
    if len(places) > 1:  # which record is whose is not known
        shuffle = torch.stack([torch.randperm(images.shape[1], generator=rng) for _ in images])
        images, labels = shuffled(images, shuffle), shuffled(labels, shuffle)
    for weight, mine in zip(of.weights, places, strict=True):
        total = total + weight * uploaded(of, images[:, mine], labels[:, mine], rng)
    assert isinstance(total, Tensor)
    return total


def uploaded(of: Sender, images: Images, labels: Tensor, rng: torch.Generator) -> Stack:
    """What one sender uploads for each of these batches."""
    rows = trained(of, images, labels, rng)
    rows = applied(of.chain.steps, rows, rng, parameters=of.parameters, names=of.names)
    if of.draws_all and of.chain.last:
        rows = rows + of.chain.last * torch.randn(rows.shape, generator=rng)
    if of.compresses:
        parts = zip(of.names, torch.split(rows, of.numels, dim=1), strict=True)
        rows = torch.cat([compressed(part, of.seen.get(name, Compressed())) for name, part in parts], 1)
    return rows.to(getattr(torch, of.knowledge.training.upload_dtype)).float()


def trained(of: Sender, images: Images, labels: Tensor, rng: torch.Generator) -> Stack:
    """Local training on each batch, in an order of its own, with what the defenses do to each record's gradient."""
    recipe, records = replace(of.knowledge.training, sampling="shuffled"), images.shape[1]  # who is in a Poisson sample is not known
    schedule = [torch.arange(records)]
    if recipe.algorithm == "fedavg":
        schedule = batch_indices(records, recipe, rng)
    sizes = [len(step) for step in schedule]
    orders = torch.cat(schedule).expand(len(images), -1)
    if recipe.algorithm == "fedavg" and (len(schedule) > 1 or recipe.drop_last):
        orders = torch.stack([torch.cat(batch_indices(records, recipe, rng)) for _ in images])
    noisy = of.chain.record if of.chain.record and of.chain.record.sigma and (of.draws_all or not of.late(of.chain.record)) else None
    coordinates = sum(of.numels)

    latents, kept = drawn_values(of.knowledge, of.parameters, of.buffers, sizes)

    def one(inputs: Tensor, targets: Tensor, noise: Tensor, latent: Tensor, mask: Tensor) -> Tensor:
        batches = [Batch(x, y) for x, y in zip(torch.split(inputs, sizes), torch.split(targets, sizes), strict=True)]
        rule = None if of.chain.record is None else clipping(of, of.chain.record, sizes, noise)
        with noise_from(in_turn(latent)) if latents else nullcontext(), masks_from(masks_in_turn(mask)) if len(kept) else nullcontext():
            update, _ = local_update(of.knowledge.model, of.parameters, of.buffers, batches, recipe, rule)
        return flat(update.tensors, of.names)

    drawn = len(sizes) * coordinates if noisy else 0
    at_once = max(1, min(64, AT_ONCE_MB * 2**20 // (4 * (coordinates * (len(sizes) if of.chain.record is None else records) + drawn))))
    out = []
    with torch.no_grad():
        for rows in torch.split(torch.arange(len(images)), at_once):
            inputs, targets = shuffled(images[rows], orders[rows]), shuffled(labels[rows], orders[rows])
            noise = torch.randn(len(rows), drawn, generator=rng) * (noisy.sigma if noisy else 0.0)
            latent = torch.randn(len(rows), latents, generator=rng)
            masks = (torch.rand(len(rows), len(kept), generator=rng) < kept).to(inputs.dtype)
            out.append(vmap(one)(inputs, targets, noise, latent, masks))
    return torch.cat(out)


def clipping(of: Sender, record: PerRecord, sizes: Sequence[int], noise: Tensor) -> GradientRule:
    """A rule of gradient that clips each record's to a norm and adds to their sum, step after step, the given noise."""
    per_step: Iterator[Tensor] = iter(noise.view(len(sizes), -1) if noise.numel() else [noise] * len(sizes))
    smoothing, first = of.knowledge.training.label_smoothing, sizes[0]

    def rule(model: torch.nn.Module, parameters: Tensors, buffers: Tensors, batch: Batch) -> tuple[Tensors, Tensors]:
        each = per_example_gradients(model, parameters, buffers, batch, label_smoothing=smoothing)
        norms = torch.stack([tensor.flatten(1).square().sum(1) for tensor in each.values()]).sum(0).sqrt()
        scale = record.clip_norm / norms.clamp(min=record.clip_norm) if record.clip_norm < float("inf") else torch.ones_like(norms)
        added, out = next(per_step), {}
        parts = dict(zip(of.names, torch.split(added, of.numels), strict=True)) if added.numel() else {}
        for name, tensor in each.items():
            total = torch.einsum("b,b...->...", scale, tensor)
            out[name] = (total + parts[name].view_as(total) if name in parts else total) / first
        return out, buffers

    return rule
