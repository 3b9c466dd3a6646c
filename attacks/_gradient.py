"""What an upload says about the gradient, whichever kind it is."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf, isfinite

import torch
from torch import Tensor

from attacks.modeled import CLIPPING, NOISY_SUMS, PER_RECORD
from simulator.adversary import Knowledge
from simulator.types import LocalTraining, Observation, Tensors

FLOAT32 = torch.finfo(torch.float32)

NEAR = 1e-4
"""A norm this close to the limit, relatively, may be that of a clipped update."""


def records_per_sender(view: Observation, knowledge: Knowledge) -> int:
    """Records of one sender, assuming that the senders of an aggregate hold equally many."""
    return -(-knowledge.num_examples // len(view.upload.senders))


def steps_taken(view: Observation, knowledge: Knowledge) -> int:
    """Local steps behind the upload; 1 for a gradient."""
    if view.upload.update.kind == "gradient":
        return 1
    return knowledge.training.local_steps(records_per_sender(view, knowledge))


def mean_gradient(view: Observation, knowledge: Knowledge) -> Tensors:
    """The gradient in float32, averaged over the local steps behind the upload.

    Exact, but for the rounding to the uploaded number format, for a gradient and for a delta of one step of SGD. For more steps of
    SGD it is the average of the gradients along the client's path, later ones counting less under momentum, decay and FedProx: the
    delta of a client whose gradient stayed the same would be −:func:`reach` times it, and that is divided out. Where the client
    clips its gradients it is the average of the clipped ones (:func:`maybe_clipped`). Adam keeps little but signs (:func:`undo_adam`).
    """
    update = {name: tensor.float() for name, tensor in view.upload.update.tensors.items()}
    if view.upload.update.kind == "gradient":
        return update
    recipe, steps, parameters = knowledge.training, steps_taken(view, knowledge), view.broadcast.parameters
    if recipe.optimizer == "adam":
        return {name: undo_adam(tensor, parameters[name], recipe, steps) for name, tensor in update.items()}
    whole = reach(recipe, steps)
    return {name: -tensor / whole - recipe.weight_decay * parameters[name] for name, tensor in update.items()}


def reach(recipe: LocalTraining, steps: int) -> float:
    """How far steps of SGD along a constant gradient go, in units of it.

    Momentum, decay and the proximal term are linear in the change δ of the parameters, so that it obeys the client's own recursion in
    one dimension: v ← momentum·v + 1 + (weight_decay + proximal)·δ; δ ← δ − learning_rate·v. Decay of the broadcast parameters
    themselves counts as a part of the gradient.
    """
    delta = velocity = 0.0
    for _ in range(steps):
        velocity = recipe.momentum * velocity + 1 + (recipe.weight_decay + recipe.proximal) * delta
        delta -= recipe.learning_rate * velocity
    return -delta


def undo_adam(delta: Tensor, before: Tensor, recipe: LocalTraining, steps: int) -> Tensor:
    """What a delta of Adam says about the gradient, weight decay included: its sign, and its size where it is not far above eps.

    The first step is −learning_rate·d/(|d| + eps), so d = eps·u/(1 − |u|) with u = −delta/learning_rate. Rounding leaves
    1 − |u| uncertain by about ulp(θ)/learning_rate: larger d are returned as small as that allows. Of several steps there is the
    mean direction, −1 to 1, and no size.
    """
    moved = -delta / recipe.learning_rate
    if steps > 1:
        return moved / steps
    rounding = torch.finfo(delta.dtype).eps * (before.abs() / recipe.learning_rate + 1)
    return recipe.adam_eps * moved / (1 - moved.abs()).clamp(min=rounding) - recipe.weight_decay * before


def keeps_sizes(view: Observation, knowledge: Knowledge) -> bool:
    """Whether :func:`mean_gradient` has the gradient's sizes and not just its signs."""
    return view.upload.update.kind == "gradient" or knowledge.training.optimizer != "adam"


def several_steps(view: Observation, knowledge: Knowledge) -> str | None:
    """The reason to refuse an upload from which no gradient at the broadcast parameters can be divided out."""
    if (steps := steps_taken(view, knowledge)) > 1:
        return f"the update must be a gradient or the delta of one step, got {steps} local steps. Use fedavg_matching"
    if not keeps_sizes(view, knowledge):
        return "the update must be a gradient or the delta of a step of SGD, got one of Adam, which keeps signs only. Use fedavg_matching"
    return None


def smoothed(shares: Tensor, recipe: LocalTraining) -> Tensor:
    """The mean target of records with these shares of the classes (their last axis): (1 − ε)·share + ε/classes.

    With mean cross-entropy ∂b = mean softmax − mean target, so ∂b_c = p̄_c − (1 − ε)·n_c/B − ε/classes.
    """
    return (1 - recipe.label_smoothing) * shares + recipe.label_smoothing / shares.shape[-1]


def unsmoothed(targets: Tensor, recipe: LocalTraining) -> Tensor:
    """The inverse of :func:`smoothed`: shares of the classes from the mean target, which is mean softmax − ∂b."""
    return (targets - recipe.label_smoothing / targets.shape[-1]) / (1 - recipe.label_smoothing)


def maybe_clipped(view: Observation, knowledge: Knowledge) -> bool:
    """Whether a clipping that the adversary knows of may have scaled the upload by a factor that it does not know.

    One sender's whole update keeps its scale when its norm is below the clip norm; so does one step of its own optimizer. Of records
    clipped one by one, of an aggregate of clipped updates and of several clipped steps, the norm tells nothing. Adam hides any scale.
    """
    if not keeps_sizes(view, knowledge):
        return True
    limits = [(name, clip_limit(view, name, settings)) for name, settings in knowledge.defenses if name in CLIPPING]
    limits = [(name, limit) for name, limit in limits if isfinite(limit)]
    each = knowledge.training.max_grad_norm if view.upload.update.kind == "delta" else 0.0
    if len(view.upload.senders) > 1 or any(name in PER_RECORD for name, _ in limits):
        return bool(limits) or each > 0
    steps, update = steps_taken(view, knowledge), view.upload.update.tensors
    if each and steps > 1:
        return True
    slack, whole = rounding(update), reach(knowledge.training, steps)
    lost = (slack + FLOAT32.eps * norm(view.broadcast.parameters)) / whole  # the delta is a difference of rounded parameters
    # clip_grad_norm_ divides by the norm plus 1e-6: what it clipped to ``each`` is up to 1e-6 shorter
    if each and norm(mean_gradient(view, knowledge)) + lost > (1 - NEAR) * (each - 1e-6):
        return True
    return any(norm(update) + slack > (1 - NEAR) * limit for _, limit in limits)


def clip_limit(view: Observation, name: str, settings: Mapping[str, object]) -> float:
    """The norm that a clipping defense keeps to; one that adapts was told which. Clipping in L1 keeps the L2 norm to an unknown part."""
    if name == "adaptive_clipping" and (told := view.broadcast.buffers.get("adaptive_clip_norm")) is not None:
        return float(told)
    if name == "simulated_enclave" and not float(str(settings["noise_multiplier"])):
        return inf
    return 0.0 if settings.get("mechanism") == "laplace" else float(str(settings["clip_norm"]))


def number(settings: Mapping[str, object], name: str) -> float:
    """A setting as a number."""
    return float(str(settings[name]))


def norm(tensors: Tensors) -> float:
    """The L2 norm of all tensors together, in float64."""
    return float(torch.stack([tensor.double().square().sum() for tensor in tensors.values()]).sum().sqrt())


def rounding(tensors: Tensors) -> float:
    """The largest L2 norm of the error that rounding to these tensors' number format can have left."""
    formats = [torch.finfo(tensor.dtype) for tensor in tensors.values()]
    size = sum(tensor.numel() for tensor in tensors.values())
    relative = max(format.eps / 2 for format in formats)
    smallest = max(format.eps * format.smallest_normal / 2 for format in formats)
    return relative * norm(tensors) + smallest * float(size**0.5)


def share_of_noise(settings: Mapping[str, object], senders: int) -> float:
    """Deviation of one sender's share of the noise on a sum: what it is told to add, where more than z·C/√senders, as for drop-outs."""
    if (told := settings.get("noise_std")) is not None:
        return float(str(told))
    times = float(str(settings["noise_multiplier"]))
    return times * float(str(settings["clip_norm"])) / senders**0.5 if times else 0.0


def noise_level(view: Observation, knowledge: Knowledge) -> float:
    """Norm of the noise that known defenses added before the upload, relative to the norm of the upload; 0 without any.

    The setting tells one upload's noise: sigma of gaussian_noise, b·√2 of laplace_noise, z·C of client_dp, z·2C of local_dp, z·C/n of
    dp_sgd's mean gradient; for a delta of dp_sgd the steps' noises add up. Senders' noises average out; those of distributed_dp are
    made for that.
    """
    update, senders = view.upload.update, len(view.upload.senders)
    records, steps = records_per_sender(view, knowledge), steps_taken(view, knowledge)
    square = 0.0
    for name, settings in knowledge.defenses:
        told = {key: float(str(value)) for key, value in settings.items() if key in ("sigma", "clip_norm", "noise_multiplier")}
        if name == "gaussian_noise":
            square += told["sigma"] ** 2
        if name == "laplace_noise":
            square += 2 * float(str(settings["scale"])) ** 2
        if name == "local_dp" and told["noise_multiplier"]:
            square += (2 * told["noise_multiplier"] * told["clip_norm"]) ** 2 * (2 if settings["mechanism"] == "laplace" else 1)
        if name == "client_dp":
            square += (told["noise_multiplier"] * told["clip_norm"]) ** 2 if told["noise_multiplier"] else 0.0
        if name in NOISY_SUMS:
            square += share_of_noise(settings, senders) ** 2
        if name == "dp_sgd" and told["noise_multiplier"]:
            batch = min(knowledge.training.batch_size or records, records)
            scale = 1.0 if update.kind == "gradient" else knowledge.training.learning_rate * steps**0.5
            square += (scale * told["noise_multiplier"] * told["clip_norm"] / batch) ** 2
    size, count = norm(update.tensors), sum(tensor.numel() for tensor in update.tensors.values())
    return (square * count / senders) ** 0.5 / size if square and size else 0.0


def not_finite(view: Observation) -> str | None:
    """The reason to refuse an upload that holds NaN or infinity."""
    bad = [name for name, tensor in view.upload.update.tensors.items() if not bool(torch.isfinite(tensor).all())]
    return f"the update must be finite, got NaN or infinity in {', '.join(bad)}" if bad else None


def another_model(view: Observation, knowledge: Knowledge) -> str | None:
    """The reason to refuse an update, or a broadcast, whose tensors are not those of the model."""
    own = {name: tuple(tensor.shape) for name, tensor in knowledge.model.named_parameters()}
    for what, tensors in (("broadcast", view.broadcast.parameters), ("update", view.upload.update.tensors)):
        theirs = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        for name in [*own, *theirs]:
            if own.get(name) != theirs.get(name):
                mine, got = (f"of shape {shape}" if shape is not None else "none" for shape in (own.get(name), theirs.get(name)))
                return f"the {what} must have the model's tensors, {name!r} {mine}, got {got}. It is of another model: give the right one"
    return None


def contradiction(view: Observation, knowledge: Knowledge) -> str | None:
    """The reason to refuse a view whose numbers cannot all be true: examples, senders, batch size, kind of update, labels.

    Fewer examples than the batch size are none: a client that holds fewer trains on all it has.
    """
    upload, recipe, records, senders = view.upload, knowledge.training, knowledge.num_examples, len(view.upload.senders)
    expected = "gradient" if recipe.algorithm == "fedsgd" else "delta"
    if upload.update.kind != expected:
        return f"the update must be a {expected} with algorithm = {recipe.algorithm!r}, got a {upload.update.kind}. Correct the recipe"
    if records != upload.num_examples:
        return f"num_examples must be what the upload says, {upload.num_examples}, got {records}. Correct one of them"
    if senders < 1 or records < senders:
        return f"num_examples must be ≥ 1 for each of ≥ 1 senders, got {records} for {senders}. Correct the upload"
    steps = 1 if recipe.algorithm == "fedsgd" else recipe.steps
    if steps and recipe.batch_size and records > (most := steps * recipe.batch_size * senders):
        return (
            f"num_examples must be ≤ {most}: {senders} senders with {steps} batches of batch_size = {recipe.batch_size}, got {records}. "
            "Correct batch_size"
        )
    for name, count in (
        ("labels", None if knowledge.labels is None else len(knowledge.labels)),
        ("label_counts", None if knowledge.label_counts is None else int(knowledge.label_counts.sum())),
    ):
        if count is not None and count != records:
            return f"{name} must be of num_examples = {records} records, got {count}. Correct the knowledge"
    return None


def unusable(view: Observation, knowledge: Knowledge) -> str | None:
    """The reason why no attack can use this view: contradicting numbers, an update of another model, NaN or infinity.

    Zeros are usable: a zeroed update carries nothing, and an attack must show so by scoring no better than its floor.
    """
    return contradiction(view, knowledge) or another_model(view, knowledge) or not_finite(view)
