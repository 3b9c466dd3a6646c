"""What the identifiability report predicts, against closed forms and against what the attacks get."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attacks._features import Entrance, relu_entrance
from attacks._matching.simulate import prepare
from attacks._second_order.residual import Residual
from attacks.identifiability import Identifiability, effective_rank, identify, likely_images, separating_share, singular_values
from experiments.victims import trained
from simulator.data.photos import Photos
from simulator.dataset import take
from simulator.rng import stream
from simulator.types import Batch
from tests.attacks.victims import attack_surface, build, records, smooth

KNOWN = (1.0, 1.0)
"""Singular values where they do not matter: they are what takes time."""


def report(
    name: str, count: int, shape: tuple[int, int, int] = (3, 32, 32), known: tuple[float, float] | None = None, **settings: object
) -> Identifiability:
    return identify(*attack_surface(build(name, shape, **settings), [records(count, shape)]), rng=stream(0), range_of_values=known)


def test_it_predicts_where_the_factorization_works() -> None:
    """B23 for B5: eight records in 256 neurons are separable, 200 are not, nor is a record that is there twice."""
    yes, no = report("mlp", 8, known=KNOWN), report("mlp", 200, known=KNOWN)
    assert (yes.exact, yes.rank, yes.relu_layers) == (8, 8, (("layer0", 256),))
    assert no.exact == 0
    assert "too many" in no.prediction
    batch = records(4, (3, 32, 32))
    twice = Batch(batch.inputs[[0, 1, 2, 2]], batch.labels[[0, 1, 2, 2]])
    double = identify(*attack_surface(build("mlp", (3, 32, 32)), [twice]), rng=stream(0), range_of_values=KNOWN)
    assert (double.exact, double.rank) == (0, 3)


def test_it_predicts_where_features_fix_the_image() -> None:
    """B23 for B16: at width 32 the active features outnumber the pixels, at width 16 they do not."""
    wide, narrow = report("cnn", 8, known=KNOWN), report("cnn", 8, known=KNOWN, width=16)
    assert wide.exact == 8
    assert narrow.exact == 0
    assert wide.active_features is not None
    assert narrow.active_features is not None
    assert narrow.active_features < 3072 < wide.active_features
    assert "active features" in narrow.prediction


def test_records_that_switch_nearly_the_same_neurons_are_not_predicted() -> None:
    """A trained layer's patterns are alike: of 8 records no search surely finds the columns, though rank and width allow it."""
    shape, batch = (3, 32, 32), records(8, (3, 32, 32))
    model, photos = build("mlp", shape), Photos().load().records
    state = trained(model, photos, steps=100, batch_size=16, learning_rate=0.05, seed=0)
    model.load_state_dict({**state[0], **state[1]}, strict=False)
    view, knowledge = attack_surface(model, [batch])
    found = identify(view, knowledge, rng=stream(0), range_of_values=KNOWN)
    assert (found.exact, found.rank) == (0, 8)
    assert "apart that are most alike" in found.prediction
    told = identify(view, replace(knowledge, public=take(photos, torch.arange(0, len(photos), 7))), rng=stream(0), range_of_values=KNOWN)
    assert told.exact == 0, "and by the patterns of public records"
    few = attack_surface(model, [records(1, shape)])
    assert identify(*few, rng=stream(0), range_of_values=KNOWN).exact == 1, "one record is a quotient, however its neurons are switched"


def test_random_pictures_are_as_alike_as_photographs() -> None:
    """The median of the smallest one-sided difference of patterns is that of many batches, and within a factor of 1.6 of photographs'."""
    view, knowledge = attack_surface(build("mlp", (3, 32, 32)), [records(8, (3, 32, 32))])
    entrance = relu_entrance(knowledge, view.broadcast)
    assert isinstance(entrance, Entrance)
    photos = Photos().load().records.inputs
    real, random = separating_share(entrance, photos[::3], 8), separating_share(entrance, likely_images(knowledge, stream(0), 64), 8)
    assert real / 1.6 < random < 1.6 * real
    weight, bias = (view.broadcast.parameters[name] for name in (entrance.layer.weight, entrance.layer.bias))
    on = (entrance.features(photos) @ weight.T + bias) > 0
    least = []
    for seed in range(200):
        own = on[torch.randperm(len(on), generator=stream(seed, "batch"))[:8]]
        least.append(min(int((own[i] & ~own[j]).sum()) for i in range(8) for j in range(8) if i != j))
    assert 256 * separating_share(entrance, photos, 8) == pytest.approx(float(torch.tensor(least).median()), abs=3)


def test_a_direction_below_the_rounding_is_refused() -> None:
    surface = attack_surface(build("lenet", (1, 8, 8)), [records(1, (1, 8, 8))])
    assert identify(*surface, rng=stream(0), range_of_values=(1e-4, 1.0)).exact == 1
    blind = identify(*surface, rng=stream(0), range_of_values=(1e-9, 1.0))
    assert (blind.exact, blind.smallest_singular_value) == (0, 1e-9)
    assert "smallest singular value 1e-09" in str(blind)
    assert f"{blind.equations} equations for 64 unknowns" in str(blind)


def test_smooth_networks_are_counted_and_kinked_ones_refused() -> None:
    assert report("lenet", 1, (1, 8, 8)).exact == 1
    many = report("lenet", 200, (1, 8, 8))
    assert many.exact == 0
    assert "equations" in many.prediction
    assert report("convnet", 1, (1, 8, 8)).exact == 0


def test_rank_of_noise_free_noisy_and_empty_gradients() -> None:
    rng = torch.Generator().manual_seed(0)
    exact = torch.randn(40, 5, generator=rng) @ torch.randn(5, 60, generator=rng)
    assert effective_rank(exact, 8) == 5
    assert effective_rank(exact + 1e-4 * torch.randn(40, 60, generator=rng), 5) == 5
    assert effective_rank(torch.zeros(40, 60), 8) == 0


@pytest.mark.parametrize("shape", [(1, 4, 4), (1, 18, 18)])
def test_singular_values_are_those_of_the_jacobian(shape: tuple[int, int, int]) -> None:
    model = smooth(shape)
    batch = records(1, shape)
    view, knowledge = attack_surface(model, [batch])
    knowledge = replace(knowledge, labels=batch.labels)
    points = likely_images(knowledge, stream(0))
    low, high = singular_values(view, knowledge, points, stream(0))
    residual = Residual(prepare(view, knowledge), balanced=False)
    jacobian = torch.autograd.functional.jacobian(residual, points[:1].double()).flatten(1)
    values = torch.linalg.svdvals(jacobian)
    assert high == pytest.approx(float(values[0]), rel=1e-3)
    assert low >= 0.999 * float(values[-1]), "an estimate from above"
    if points[0].numel() <= 256:
        assert low == pytest.approx(float(values[-1]), rel=1e-6)


def test_an_update_of_nothing_tells_nothing() -> None:
    view, knowledge = attack_surface(build("mlp", (1, 8, 8)), [records(2, (1, 8, 8))])
    empty = {name: torch.zeros_like(tensor) for name, tensor in view.upload.update.tensors.items()}
    upload = replace(view.upload, update=replace(view.upload.update, tensors=empty))
    found = identify(replace(view, uploads=(upload,)), knowledge, rng=stream(0))
    assert (found.exact, found.rank, found.smallest_singular_value) == (0, 0, 0.0)
    broken = {**empty, "head.bias": torch.full((10,), torch.nan)}
    upload = replace(view.upload, update=replace(view.upload.update, tensors=broken))
    with pytest.raises(ValueError, match="finite"):
        identify(replace(view, uploads=(upload,)), knowledge, rng=stream(0))
