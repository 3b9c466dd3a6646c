"""Defenses of the architecture: the bottleneck against closed forms and a gradient written by hand, the hygiene by what is left."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from clients.local import local_upload
from clients.private import private_batches
from defenses.client.precode import Precode
from experiments.disclose import architecture
from simulator import config, lookup
from simulator.adversary import Knowledge
from simulator.models.latent import Bottleneck, divergence, drawn_noise, noise_from, penalties
from simulator.models.surgery import first_and_last
from simulator.network import network, tensors
from simulator.rng import secret_stream, stream
from simulator.training import loss, mean_gradient, per_example_gradients
from simulator.types import Batch, Broadcast, Observation, Schema
from simulator.world import World
from tests.attacks.victims import attack_surface, records
from tests.federations import federate, without_flower, world

SCHEMA = Schema((3, 16, 16), tuple("0123456789"))
MODELS: dict[str, Any] = {
    "mlp": {"name": "mlp", "hidden": [20]},
    "lenet": "lenet",
    "cnn": {"name": "cnn", "width": 4, "hidden": 16},
    "resnet20": {"name": "resnet20", "width": 4},
    "vit": {"name": "vit", "width": 16, "depth": 1, "heads": 2},
}
HYGIENE: dict[str, Any] = {
    "no_first_bias": {"name": "mlp", "hidden": [20]},
    "frozen_first_layer": {"name": "mlp", "hidden": [20]},
    "group_norm": {"name": "resnet20", "width": 4},
}
EVERY = {**HYGIENE, "precode": {"name": "mlp", "hidden": [20]}}


def built(of: World) -> nn.Module:
    return network(of.architecture, of.data.load().schema, of.training, of.seed)


def family(name: str, of: Any, **settings: Any) -> Any:
    return config.build_plugin("models", {"name": name, "of": of, **settings}, "model")


def upload(of: World, client: int = 0, round: int = 1) -> dict[str, torch.Tensor]:
    model = built(of)
    return dict(local_upload(of, model, Broadcast(round, *tensors(model), of.training), client).update.tensors)


# --- the bottleneck ---


def test_the_divergence_is_torchs() -> None:
    mean, log_variance = torch.randn(2, 5, 7, generator=stream(0, "x")).unbind()
    wanted = kl_divergence(Normal(mean, (0.5 * log_variance).exp()), Normal(0.0, 1.0)).sum(1)
    torch.testing.assert_close(divergence(mean, log_variance), wanted)
    assert float(divergence(torch.zeros(1, 3), torch.zeros(1, 3))) == 0


def test_a_sample_has_the_mean_and_the_variance_that_the_encoder_states() -> None:
    layer = Bottleneck(3, 2, 0.0)
    layer.decoder = nn.Identity()  # type: ignore[assignment]
    features = torch.rand(1, 3, generator=stream(0, "x")).expand(50_000, 3)
    mean, log_variance = layer.encoder(features[:1])[0].chunk(2)
    assert torch.equal(layer(features[:1])[0], mean), "without noise it is the mean"
    with noise_from(drawn_noise(stream(0, "noise"))):
        sample = layer(features)
    torch.testing.assert_close(sample.mean(0), mean, atol=0.02, rtol=0)
    torch.testing.assert_close(sample.var(0), log_variance.exp(), atol=0, rtol=0.05)
    assert torch.equal(layer(features[:1])[0], mean), "the source is gone"


def by_hand(p: dict[str, torch.Tensor], x: torch.Tensor, labels: torch.Tensor, eps: torch.Tensor, beta: float) -> torch.Tensor:
    """The loss of the mlp with a bottleneck, without the simulator."""
    hidden = F.relu(F.linear((x.flatten(1) - 0.5) / 0.25, p["layer0.weight"], p["layer0.bias"]))
    both = F.linear(hidden, p["head.bottleneck.encoder.weight"], p["head.bottleneck.encoder.bias"])
    k = both.shape[1] // 2
    mean, log_variance = both[:, :k], both[:, k:]
    z = mean + torch.sqrt(torch.exp(log_variance)) * eps
    features = F.linear(z, p["head.bottleneck.decoder.weight"], p["head.bottleneck.decoder.bias"])
    logits = F.linear(features, p["head.linear.weight"], p["head.linear.bias"])
    kl = kl_divergence(Normal(mean, torch.sqrt(torch.exp(log_variance))), Normal(0.0, 1.0)).sum(1).mean()
    return F.cross_entropy(logits, labels) + beta * kl


@pytest.mark.parametrize("beta", [0.0, 1e-3, 1.0])
def test_the_update_of_precode_is_the_gradient_by_hand(beta: float) -> None:
    of = world(model=MODELS["mlp"], training={"batch_size": 4}, defenses=[{"name": "precode", "k": 6, "beta": beta}])
    parameters, _ = tensors(built(of))
    batch = private_batches(of, 1, 1)[0]
    eps = torch.randn(4, 6, generator=secret_stream(of.seed, of.secret, "latent", 1, 1))
    wanted = grad(by_hand)(dict(parameters), batch.inputs, batch.labels, eps, beta)
    got = upload(of, client=1)
    assert set(got) == set(wanted)
    for name, tensor in wanted.items():
        torch.testing.assert_close(got[name], tensor, atol=1e-6, rtol=1e-4)
    assert not torch.allclose(
        got["layer0.weight"], grad(by_hand)(dict(parameters), batch.inputs, batch.labels, 0 * eps, beta)["layer0.weight"]
    )


def test_the_penalty_is_in_the_loss_once_and_nowhere_else() -> None:
    model = family("precode", MODELS["mlp"], k=6, beta=0.5).build(SCHEMA, stream(0, "model"))
    parameters, buffers = tensors(model)
    batch = Batch(torch.rand(3, *SCHEMA.shape, generator=stream(0, "x")), torch.tensor([1, 2, 3]))
    with penalties() as added:
        logits = functional_call(model, dict(parameters), (batch.inputs,))
    assert len(added) == 1
    value = loss(model, parameters, buffers, batch)[0]
    torch.testing.assert_close(value, F.cross_entropy(logits, batch.labels) + added[0])
    torch.testing.assert_close(model(batch.inputs), logits)


def test_per_record_gradients_draw_noise_of_their_own_and_have_the_mean_without_it() -> None:
    model = family("precode", MODELS["mlp"], k=6).build(SCHEMA, stream(0, "model"))
    parameters, buffers = tensors(model)
    batch = Batch(torch.rand(1, *SCHEMA.shape, generator=stream(0, "x")).expand(3, -1, -1, -1), torch.tensor([1, 1, 1]))
    quiet = per_example_gradients(model, parameters, buffers, batch)["layer0.weight"]
    assert torch.equal(quiet[0], quiet[1])
    with noise_from(drawn_noise(stream(0, "noise"))):
        apart = per_example_gradients(model, parameters, buffers, batch)["layer0.weight"]
    assert not torch.allclose(apart[0], apart[1])
    rng = stream(0, "noise")
    eps = torch.cat([torch.randn(1, 6, generator=rng) for _ in range(3)])
    for i in range(3):
        wanted = grad(by_hand)(dict(parameters), batch.inputs[:1], batch.labels[:1], eps[i : i + 1], 1e-3)["layer0.weight"]
        torch.testing.assert_close(apart[i], wanted, atol=1e-6, rtol=1e-4)


def test_attacks_can_batch_and_differentiate_it_twice() -> None:
    """The gradient with respect to records, and to the noise, of a distance of updates; under vmap, against finite differences."""
    model = family("precode", {"name": "mlp", "hidden": [6], "activation": "tanh"}, k=3, beta=0.1).build(SCHEMA, stream(0, "m")).double()
    parameters = {name: tensor.double() for name, tensor in tensors(model)[0].items()}

    def size(x: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
        with noise_from(lambda like: eps.view(like.shape)):
            gradient, _ = mean_gradient(model, parameters, {}, Batch(x, torch.tensor([1])))
        return torch.stack([tensor.square().sum() for tensor in gradient.values()]).sum()

    x = torch.rand(2, 1, *SCHEMA.shape, generator=stream(0, "x"), dtype=torch.float64)
    eps = torch.randn(2, 3, generator=stream(0, "eps"), dtype=torch.float64)
    slopes_x, slopes_eps = vmap(grad(size, argnums=(0, 1)))(x, eps)
    for i in range(2):
        alone = grad(size, argnums=(0, 1))(x[i], eps[i])
        torch.testing.assert_close(slopes_x[i], alone[0])
        step = torch.zeros_like(x[i])
        step[0, 1, 3, 4] = 1e-5
        torch.testing.assert_close(
            slopes_x[i][0, 1, 3, 4], (size(x[i] + step, eps[i]) - size(x[i] - step, eps[i])) / 2e-5, rtol=1e-5, atol=0
        )
        bump = torch.tensor([0, 1e-5, 0], dtype=torch.float64)
        torch.testing.assert_close(slopes_eps[i][1], (size(x[i], eps[i] + bump) - size(x[i], eps[i] - bump)) / 2e-5, rtol=1e-5, atol=0)


@pytest.mark.parametrize("of", MODELS.values(), ids=MODELS)
def test_the_bottleneck_stands_before_the_last_layer_of_any_model(of: Any) -> None:
    plain = config.build_plugin("models", of, "model").build(SCHEMA, stream(0, "model"))
    model = family("precode", of).build(SCHEMA, stream(0, "model"))
    assert model.training
    _, last = first_and_last(plain, SCHEMA)
    added = {name for name, _ in model.named_parameters() if ".bottleneck." in name}
    assert len(added) == 4
    own = {name.replace(f"{last}.linear.", f"{last}."): p for name, p in model.named_parameters() if name not in added}
    assert set(own) == {name for name, _ in plain.named_parameters()}
    for name, parameter in plain.named_parameters():
        assert torch.equal(own[name], parameter), "the weights are those without the defense"
    bottleneck = model.get_submodule(f"{last}.bottleneck")
    assert isinstance(bottleneck, Bottleneck)
    assert bottleneck.encoder.out_features == 512
    assert model(torch.rand(2, *SCHEMA.shape)).shape == (2, 10)


# --- hygiene ---


@pytest.mark.parametrize("of", [MODELS[name] for name in ("mlp", "lenet", "cnn")], ids=["mlp", "lenet", "cnn"])
def test_the_first_bias_is_gone_and_nothing_else(of: Any) -> None:
    plain = config.build_plugin("models", of, "model").build(SCHEMA, stream(0, "model"))
    model = family("no_first_bias", of).build(SCHEMA, stream(0, "model"))
    first, _ = first_and_last(plain, SCHEMA)
    before, after = dict(plain.named_parameters()), dict(model.named_parameters())
    assert before.keys() - after.keys() == {f"{first}.bias"}
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())
    image = torch.rand(2, *SCHEMA.shape)
    plain.get_submodule(first).bias.data.zero_()  # type: ignore[union-attr, operator]
    torch.testing.assert_close(model(image), plain(image))


@pytest.mark.parametrize("name", ["mlp", "lenet", "cnn", "resnet20"])
def test_a_frozen_layer_sends_no_gradient_and_never_changes(name: str, tmp_path: Path) -> None:
    of = world(
        data={"name": "synthetic", "records": 60, "size": 16, "classes": 4}, model=MODELS[name], defenses=[{"name": "frozen_first_layer"}],
        training={"algorithm": "fedavg", "batch_size": 4, "weight_decay": 0.1, "learning_rate": 0.01},
    )  # fmt: skip
    plain = built(replace(of, defenses=()))
    first, _ = first_and_last(plain, of.data.load().schema)
    own = {f"{first}.{part}": tensor for part, tensor in plain.get_submodule(first).named_parameters()}
    record = federate(of, tmp_path / "t")
    for observation in record.observations:
        assert all(own.keys().isdisjoint(sent.update.tensors) for sent in observation.uploads)
        rest = {key for key, _ in plain.named_parameters()} - own.keys()
        assert all(rest == set(sent.update.tensors) for sent in observation.uploads)
    assert record.released is not None
    parameters, buffers = record.released
    assert own.keys().isdisjoint(parameters)
    for key, tensor in own.items():
        torch.testing.assert_close(buffers[key], tensor, rtol=1e-6, atol=0)
    assert not any(torch.equal(parameters[key], plain.get_parameter(key)) for key in rest if "bias" not in key)


def test_group_norm_leaves_no_batch_norm_and_no_statistics() -> None:
    model = family("group_norm", MODELS["resnet20"]).build(SCHEMA, stream(0, "model"))
    kinds = {type(layer) for layer in model.modules()}
    assert nn.GroupNorm in kinds
    assert nn.BatchNorm2d not in kinds
    assert not list(model.buffers())
    same = config.build_plugin("models", {"name": "resnet20", "width": 4, "norm": "group"}, "model").build(SCHEMA, stream(0, "model"))
    image = torch.rand(2, *SCHEMA.shape)
    torch.testing.assert_close(model(image), same(image))
    torch.testing.assert_close(model(image)[:1], model(image[:1]), msg="records do not see each other")


@pytest.mark.parametrize(
    ("defense", "model", "message"),
    [
        ("no_first_bias", {"name": "resnet20", "width": 4}, "must have a bias"),
        ("frozen_first_layer", "linear", "more than 1 layer"),
        ("group_norm", "mlp", "must have BatchNorm"),
    ],
)
def test_models_on_which_a_defense_would_do_nothing_are_refused(defense: str, model: Any, message: str) -> None:
    of = world(model=model, defenses=[{"name": defense}])
    assert message in (of.defenses[0].refuses(of) or "")


@pytest.mark.parametrize(("settings", "message"), [({"k": 0}, "k must be ≥ 1"), ({"beta": -1.0}, "beta must be ≥ 0")])
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Precode(**settings)


# --- in place ---


@pytest.mark.parametrize("name", EVERY)
def test_the_architecture_reaches_the_attacks_process_and_the_world_its_clients(name: str) -> None:
    of = world(model=EVERY[name], defenses=[{"name": name}])
    told = config.dump(of.architecture)
    assert told["name"] == name
    assert config.build_plugin("models", told, "model") == of.architecture
    assert config.build(World, config.dump(of)) == of
    assert isinstance(hash(of), int)
    from clients.private import splits

    theirs = {key: tensor.shape for key, tensor in architecture(of, splits(of)).state_dict().items()}
    assert theirs == {key: tensor.shape for key, tensor in built(of).state_dict().items()}
    assert of.defenses[0].refuses(of) is None


@pytest.mark.parametrize(
    "training", [{"batch_size": 4}, {"algorithm": "fedavg", "batch_size": 8, "steps": 2, "learning_rate": 0.05}], ids=["sgd", "avg"]
)
@pytest.mark.parametrize("name", EVERY)
def test_a_federation_trains_on_it(name: str, training: dict[str, Any], tmp_path: Path) -> None:
    of = world(model=EVERY[name], training=training, defenses=[{"name": name}])
    plain, sent = upload(replace(of, defenses=())), upload(of)
    assert plain.keys() != sent.keys() or any(not torch.equal(tensor, plain[key]) for key, tensor in sent.items())
    record = federate(of, tmp_path / "t")
    parameters, buffers = without_flower(of)
    assert record.released is not None
    for mine, theirs in zip((parameters, buffers), record.released, strict=True):
        assert all(torch.equal(theirs[key], tensor) for key, tensor in mine.items())


def test_precodes_noise_is_the_clients_secret() -> None:
    of = world(model=MODELS["mlp"], defenses=[{"name": "precode", "k": 6}])
    one, same, other = upload(of), upload(of), upload(replace(of, secret="another"))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["layer0.weight"], other["layer0.weight"])
    assert not torch.equal(upload(of, round=2)["head.linear.weight"], one["head.linear.weight"])


def test_defenses_of_the_model_stack() -> None:
    of = world(model=MODELS["resnet20"], defenses=[{"name": "group_norm"}, {"name": "precode", "k": 8}])
    model = built(of)
    assert of.architecture.name == "precode"
    assert any(isinstance(layer, Bottleneck) for layer in model.modules())
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in model.modules())


@functools.cache
def surface(wrapper: str, count: int) -> tuple[Observation, Knowledge]:
    model = family(wrapper, EVERY[wrapper]).build(Schema((1, 8, 8), SCHEMA.class_names), stream(0, "model"))
    return attack_surface(model, [records(count, (1, 8, 8))])


@pytest.mark.parametrize("name", lookup.names("attacks"))
def test_attacks_run_on_these_models_or_say_why_not(name: str) -> None:
    for wrapper in EVERY:
        for count in (1, 3):
            reason = lookup.get("attacks", name)().supports(*surface(wrapper, count))
            assert reason is None or len(reason) > 10


def test_every_wrapper_is_a_model_with_a_default() -> None:
    for name in EVERY:
        model = lookup.get("models", name)().build(SCHEMA, stream(0, "model"))
        assert model(torch.rand(2, *SCHEMA.shape)).shape == (2, SCHEMA.num_classes)
