"""From the defenses that the adversary was told of, by name and settings, to what the simulated client and the distance must do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from attacks._gradient import number, records_per_sender, share_of_noise, steps_taken
from attacks._layers import probe
from attacks._matching.defended import Defended, struck
from attacks.modeled import LATENT, MIXING, NOISY_SUMS, PRUNING
from simulator.adversary import Knowledge
from simulator.mechanisms.outpost import probability, risks
from simulator.models.latent import Bottleneck
from simulator.types import Observation

Settings = Mapping[str, object]


@dataclass(frozen=True)
class Stack:
    """What is known to lie between a record and its upload.

    Attributes:
        distance: in defense space.
        record_clip: norm to which each record's gradient is scaled down.
        latent: whether the model draws noise of its own.
        mixed: whether records and labels were mixed.
    """

    distance: Defended = field(default_factory=Defended)
    record_clip: float = float("inf")
    latent: bool = False
    mixed: bool = False

    @property
    def plain(self) -> bool:
        """Whether an attack that knows of no defense does the same."""
        return self == Stack(Defended(clip_norm=self.distance.clip_norm))


def known_stack(view: Observation, knowledge: Knowledge) -> Stack:
    """What the disclosed defenses do, in the order in which they act; those that are not modeled are left out.

    Noise of several senders averages out; that of a channel is none.
    """
    found = Stack()
    for name, settings in knowledge.defenses:
        found = _with(found, name, settings, view, knowledge)
    senders = len(view.upload.senders)
    if senders == 1:
        found = replace(found, distance=hidden(found.distance, view, knowledge))
    else:
        each = found.distance
        # a sum of sparse updates has a union of supports, and one of signs has levels: what each sender did is no longer seen in it
        sigma = tuple(deviation / senders**0.5 for deviation in each.sigma)
        found = replace(found, distance=replace(each, sigma=sigma, laplace=each.laplace / senders**0.5, levels=0))
    return found


def _with(found: Stack, name: str, settings: Settings, view: Observation, knowledge: Knowledge) -> Stack:
    """The stack with one more defense."""
    distance = found.distance
    if name == "clip":
        return replace(found, distance=replace(distance, clip_norm=min(distance.clip_norm, number(settings, "clip_norm"))))
    if name == "client_dp":
        clip, times = number(settings, "clip_norm"), number(settings, "noise_multiplier")
        clipped = replace(distance, clip_norm=min(distance.clip_norm, clip))
        return replace(found, distance=noised(clipped, times * clip if times else 0.0))
    if name == "gaussian_noise":
        return replace(found, distance=noised(distance, number(settings, "sigma")))
    if name == "laplace_noise":
        return replace(found, distance=replace(distance, laplace=number(settings, "scale")))
    if name in NOISY_SUMS:  # on the sum as a whole
        clip = number(settings, "clip_norm")
        bounded = replace(distance, clip_norm=min(distance.clip_norm, clip)) if name == "distributed_dp" else distance
        return replace(found, distance=noised(bounded, share_of_noise(settings, len(view.upload.senders))))
    if name == "local_dp":
        return replace(found, distance=local_dp(distance, settings))
    if name == "dp_sgd":
        clip, times = number(settings, "clip_norm"), number(settings, "noise_multiplier")
        if knowledge.num_examples == 1 and view.upload.update.kind == "gradient":
            distance = replace(distance, clip_norm=min(distance.clip_norm, clip))
        return replace(found, record_clip=clip, distance=noised(distance, dp_sgd_noise(view, knowledge, clip, times)))
    if name in (*PRUNING, "soteria"):
        return replace(found, distance=replace(distance, masked=True))
    if name == "sign_sgd":
        return replace(found, distance=replace(distance, signs=True))
    if name == "qsgd":
        levels, bucket = int(number(settings, "levels")), int(number(settings, "bucket"))
        return replace(found, distance=replace(distance, levels=levels, bucket=bucket))
    if name == "outpost":
        return replace(found, distance=outpost(distance, settings, view, knowledge))
    if name == "censor":
        acts = not (last := int(number(settings, "rounds"))) or view.broadcast.round <= last
        return replace(found, distance=replace(distance, orthogonal=acts))
    if name in LATENT:
        return replace(found, latent=True, distance=replace(distance, weights=before_noise(view, knowledge)))
    return replace(found, mixed=True) if name in MIXING else found


def hidden(distance: Defended, view: Observation, knowledge: Knowledge) -> Defended:
    """The distance where Gaussian noise came after pruning: no zeros show which coordinates stayed, and the others hold noise alone.

    Coordinates left out at random are then modeled if the others were not rescaled.
    """
    tensors = view.upload.update.tensors.values()
    zeros = sum(int((tensor == 0).sum()) for tensor in tensors) / sum(tensor.numel() for tensor in tensors)
    for name, settings in knowledge.defenses:
        if name not in PRUNING or not distance.sigma or zeros > number(settings, "pruned") / 2:
            continue
        if name == "top_k":
            distance = replace(distance, masked=False, pruned=number(settings, "pruned"))
        elif not settings["rescaled"]:
            distance = replace(distance, masked=False, dropped=number(settings, "pruned"))
    return distance


def before_noise(view: Observation, knowledge: Knowledge) -> tuple[float, ...]:
    """Weights of the tensors that leave out those behind the noise of the model's bottlenecks.

    Their gradients are many times larger than those of the layers that see the picture, and say nothing more of it.
    """
    names = tuple(name for name in view.broadcast.parameters if name in view.upload.update.tensors)
    calls = probe(knowledge, view.broadcast, torch.full((2, *knowledge.schema.shape), 0.5))
    decoders = [f"{name}.decoder" for name, layer in knowledge.model.named_modules() if isinstance(layer, Bottleneck)]
    first = next((place for place, call in enumerate(calls) if call.name in decoders), len(calls))
    behind = {tensor for call in calls[first:] for tensor in (call.weight, call.bias)}
    return tuple(float(name not in behind) for name in names) if behind else ()


def local_dp(distance: Defended, settings: Settings) -> Defended:
    """The distance under local DP: noise of z times the sensitivity 2S. That Laplace noise comes after clipping in L1 is left out."""
    clip, times = number(settings, "clip_norm"), number(settings, "noise_multiplier")
    scale = 2 * times * clip if times else 0.0
    if settings["mechanism"] == "laplace":
        return replace(distance, laplace=scale)
    return noised(replace(distance, clip_norm=min(distance.clip_norm, clip)), scale)


def noised(distance: Defended, sigma: float) -> Defended:
    """The distance under more Gaussian noise."""
    if not sigma:
        return distance
    return replace(distance, sigma=tuple((own**2 + sigma**2) ** 0.5 for own in distance.sigma or (0.0,)))


def dp_sgd_noise(view: Observation, knowledge: Knowledge, clip: float, times: float) -> float:
    """Deviation of the noise on one sender's upload under DP-SGD: of the mean gradient, or added up over the steps of a delta."""
    if not times:
        return 0.0
    batch = knowledge.training.size_of_batch(records_per_sender(view, knowledge))
    steps = steps_taken(view, knowledge)
    scale = 1.0 if view.upload.update.kind == "gradient" else knowledge.training.learning_rate * steps**0.5
    return scale * times * clip / batch


def outpost(distance: Defended, settings: Settings, view: Observation, knowledge: Knowledge) -> Defended:
    """The distance after Outpost, if the upload shows that it struck: a step that it left alone has no zeros to speak of.

    Of several steps it is not told which were struck; the noise is then what they add up to on average.
    """
    pruned, noise = number(settings, "pruned"), number(settings, "scale")
    steps, update = steps_taken(view, knowledge), view.upload.update
    each = {name: noise * float(risk) for name, risk in risks(view.broadcast.parameters).items() if name in update.tensors}
    if steps == 1:
        if not struck(update.tensors, knowledge.num_examples):
            return distance
        rate = 1.0 if update.kind == "gradient" else knowledge.training.learning_rate
        return replace(distance, masked=True, pruned=pruned, sigma=tuple(max(rate * each[name], 1e-8) for name in each))
    before = (view.broadcast.round - 1) * steps if settings["iterations"] == "training" else 0
    expected = sum(probability(before + step, number(settings, "decay")) for step in range(1, steps + 1))
    scale = knowledge.training.learning_rate * expected**0.5
    return replace(distance, sigma=tuple(max(scale * each[name], 1e-8) for name in each)) if noise else distance
