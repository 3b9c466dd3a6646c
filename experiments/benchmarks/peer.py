"""The peer ``breaching`` on one of our observations: the same network, parameters, gradient and label, in its own conventions.

Nothing of it is patched: its attacker gets the payloads that its own server and user would hand it. Its candidates live in
normalized pixels, so our first layer, which normalizes, becomes its ``mean`` and ``std``. ``report()`` is never called: it downloads.

It is not a dependency: 0.1.2 declares packages that this attack does not use and that do not all install here. Get it by
``pip install 'fedpeek[benchmark]'`` and ``pip install --no-deps breaching==0.1.2``.
"""

from __future__ import annotations

import contextlib
import copy
import io
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from experiments.victims import Victim
from simulator.errors import FedpeekError
from simulator.models.initial import drawn_from
from simulator.models.normalize import Normalize
from simulator.rng import stream
from simulator.types import Schema

SHIPPED_TV = 0.2
SHIPPED_RATE = 0.1
"""Weight of total variation and step size in its preset ``invertinggradients``."""


def installed() -> bool:
    """Whether the peer and its configuration library can be imported."""
    return find_spec("breaching") is not None and find_spec("hydra") is not None


def breaching() -> Any:
    """The peer's package, without the deprecation warnings of its import.

    Raises:
        FedpeekError: it is not installed.
    """
    if not installed():
        raise FedpeekError("breaching must be installed, got none. Run: pip install hydra-core; pip install --no-deps breaching==0.1.2")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import breaching as package
    return package


def its_convnet(width: int, schema: Schema, seed: int) -> nn.Module:
    """Its ConvNet (eight convolutions with BatchNorm, two max-poolings) behind our normalization, in eval mode as it attacks it."""
    breaching()
    from breaching.cases.models.model_preparation import ConvNet

    with drawn_from(stream(seed, "model")):
        network = ConvNet(width=width, num_classes=schema.num_classes, num_channels=schema.shape[0])
    return nn.Sequential(OrderedDict(normalize=Normalize(), peer=network)).eval()


def attacker(model: nn.Module, *, tv: float, steps: int, rate: float = 1.0) -> Any:
    """Its attack ``invertinggradients`` on the network after our normalization.

    Args:
        tv: weight of total variation.
        steps: iterations.
        rate: factor on the step size that ships.
    """
    package = breaching()
    overrides = [f"regularization.total_variation.scale={tv}", f"optim.max_iterations={steps}", "optim.callback=1000000"]
    overrides.append(f"optim.step_size={rate * SHIPPED_RATE}")
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = package.get_attack_config("invertinggradients", overrides=overrides)
        setup = {"device": torch.device("cpu"), "dtype": torch.float32}
        return package.attacks.prepare_attack(without_normalization(model)[0], nn.CrossEntropyLoss(), config, setup)


def without_normalization(model: nn.Module) -> tuple[nn.Module, Normalize]:
    """The network without its first layer, and that layer."""
    bare = copy.deepcopy(model)
    name, layer = next((name, module) for name, module in bare.named_children() if isinstance(module, Normalize))
    setattr(bare, name, nn.Identity())
    return bare, layer


def payloads(victim: Victim) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What its server and its user would hand over for this observation; a gradient and labels that are disclosed."""
    view, knowledge = victim.view, victim.knowledge
    normalize = without_normalization(knowledge.model)[1]
    channels = knowledge.schema.shape[0]
    about = SimpleNamespace(
        shape=list(knowledge.schema.shape), classes=knowledge.schema.num_classes, modality="vision",
        mean=[normalize.mean] * channels, std=[normalize.std] * channels,
    )  # fmt: skip
    broadcast, update = view.broadcast, view.upload.update
    names = [name for name, _ in knowledge.model.named_parameters()]
    buffers = [broadcast.buffers.get(name, tensor) for name, tensor in knowledge.model.named_buffers()]
    server = {"parameters": [broadcast.parameters[name] for name in names], "buffers": buffers, "metadata": about}
    user = {
        "gradients": [update.tensors[name].clone() for name in names],
        "buffers": None,
        "metadata": {"num_data_points": knowledge.num_examples, "labels": knowledge.labels, "local_hyperparams": None},
    }
    return [server], [user]


def prepare(victim: Victim, *, tv: float, steps: int, seed: int, rate: float = 1.0) -> Callable[[], Tensor]:
    """Its attack on this victim, ready to be called for a guess of the inputs in [0, 1].

    It draws its start from torch's global generator, which is seeded and restored.
    """
    server, user = payloads(victim)
    peer = attacker(victim.knowledge.model, tv=tv, steps=steps, rate=rate)

    def run() -> Tensor:
        with torch.random.fork_rng(devices=[]), contextlib.redirect_stdout(sys.stderr):
            torch.manual_seed(seed)
            answer, _ = peer.reconstruct(server, user, server_secrets={}, dryrun=False)
        guess: Tensor = (answer["data"] * peer.ds + peer.dm).clamp(0, 1).detach()
        return guess

    return run
