"""Features, labels and images of the hybrid attack against closed forms, and its bars."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from attacks._features import Entrance, relu_entrance
from attacks._second_order.inversion import batched_cg, finish, sensitivity
from attacks._sparse.factorize import Factorization
from attacks.update import hybrid
from attacks.update.hybrid import Hybrid, assigned, label_scores, one_negative
from simulator.rng import stream
from simulator.types import Batch
from tests.attacks.victims import attack_surface, build, digits, records

SMALL = (1, 8, 8)


def entrance_of(model: nn.Module, batch: Batch) -> Entrance:
    view, knowledge = attack_surface(model, [batch])
    found = relu_entrance(knowledge, view.broadcast)
    assert isinstance(found, Entrance)
    return found


def photos(count: int, seed: int) -> Batch:
    """Crops of the photographs in scikit-image and scikit-learn, 3×32×32."""
    import skimage.data
    from sklearn.datasets import load_sample_images

    pictures = [*load_sample_images().images, skimage.data.astronaut(), skimage.data.chelsea(), skimage.data.coffee()]
    rng, crops = stream(seed, "photos"), []
    while len(crops) < count:
        picture = torch.tensor(pictures[int(torch.randint(len(pictures), (), generator=rng))].copy()).permute(2, 0, 1) / 255
        picture = nn.functional.avg_pool2d(picture[None], 2)[0]
        y, x = (int(torch.randint(size - 32, (), generator=rng)) for size in picture.shape[1:])
        crop = picture[:, y : y + 32, x : x + 32]
        if float(crop.std()) > 0.05:
            crops.append(crop)
    return Batch(torch.stack(crops), torch.randint(10, (count,), generator=rng))


def test_features_and_what_lies_beyond_are_those_of_the_model() -> None:
    model, batch = build("cnn", SMALL, width=4, hidden=32), records(3, SMALL)
    entrance = entrance_of(model, batch)
    assert entrance.layer.name == "hidden"
    wanted = model[:3](batch.inputs)
    assert torch.allclose(entrance.features(batch.inputs), wanted)
    assert entrance.features(batch.inputs.double()).dtype == torch.float64
    hidden, logits = entrance.beyond(wanted.detach(), torch.full(SMALL, 0.5))
    assert torch.allclose(logits, model(batch.inputs), atol=1e-6)
    assert torch.allclose(hidden, model[:5](batch.inputs), atol=1e-6)
    x = batch.inputs.clone().requires_grad_(True)
    slope = torch.autograd.grad(entrance.features(x).square().sum(), x)[0]
    y = batch.inputs.clone().requires_grad_(True)
    assert torch.allclose(slope, torch.autograd.grad(model[:3](y).square().sum(), y)[0])
    assert not model.hidden._forward_pre_hooks


@pytest.mark.parametrize("seed", range(5))
def test_labels_follow_exactly_from_the_features(seed: int) -> None:
    model, batch = build("cnn", SMALL, seed=seed, width=4, hidden=64), records(6, SMALL, seed)
    batch = Batch(batch.inputs, batch.labels % 3)
    view, _ = attack_surface(model, [batch])
    entrance = entrance_of(model, batch)
    features = entrance.features(batch.inputs.double()).detach()
    scores = label_scores(entrance, features, view.upload.update.tensors, "head", torch.full(SMALL, 0.5))
    truth = (model(batch.inputs).softmax(1) - nn.functional.one_hot(batch.labels, 10)).double() / 6
    assert (scores - truth).abs().max() < 1e-4 * truth.abs().max()
    assert torch.equal(scores.argmin(1), batch.labels)
    shuffled = batch.labels[torch.tensor([3, 1, 0, 5, 4, 2])]
    assert torch.equal(scores.argmin(1)[assigned(scores, shuffled)], shuffled)


def test_each_image_has_its_own_conjugate_gradients() -> None:
    rng = torch.Generator().manual_seed(0)
    factors = torch.randn(3, 12, 12, generator=rng, dtype=torch.float64)
    matrices = factors @ factors.mT + torch.eye(12, dtype=torch.float64)
    right = torch.randn(3, 1, 3, 4, generator=rng, dtype=torch.float64)

    def operator(v: Tensor) -> Tensor:
        return (matrices @ v.flatten(1)[:, :, None]).view(v.shape)

    wanted = torch.linalg.solve(matrices, right.flatten(1)[:, :, None]).view(right.shape)
    found = batched_cg(operator, right, steps=60, tolerance=1e-12)
    assert torch.allclose(found.x, wanted, rtol=1e-8)
    assert float(found.residual.max()) <= 1e-12


def test_finish_is_exact_from_near_and_sensitivity_is_the_smallest_singular_value() -> None:
    model, batch = build("cnn", SMALL, width=32, hidden=16), records(2, SMALL)
    entrance = entrance_of(model, batch)
    truth = batch.inputs.double()
    target = entrance.features(truth).detach()
    near = truth + 0.01 * torch.randn(truth.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = finish(entrance.features, target, near, rounds=20, steps=60, deadline=1e9)
    assert float((found.images - truth).abs().max()) < 1e-4
    got = sensitivity(entrance.features, truth, rng=torch.Generator().manual_seed(0), steps=300, deadline=1e9, rounds=6)
    for value, image in zip(got, truth, strict=True):
        jacobian = torch.autograd.functional.jacobian(entrance.features, image[None]).view(-1, 64)
        assert float(value) == pytest.approx(float(torch.linalg.svdvals(jacobian)[-1]), rel=0.3)


def test_scores_of_mixed_records_name_no_label() -> None:
    scores = torch.tensor([[0.1, -0.9, 0.8], [0.5, 0.3, 0.2], [-0.5, -0.4, 0.9], [-0.9, -0.1, 1.0]])
    assert one_negative(scores).tolist() == [True, False, False, True]


def test_hybrid_recovers_a_small_batch_with_its_labels() -> None:
    model, batch = build("cnn", SMALL, width=32, hidden=128), digits(3, offset=60)
    view, knowledge = attack_surface(model, [batch])
    attack = Hybrid(seconds=20, steps=200)
    assert attack.supports(view, knowledge) is None
    guess = attack(view, knowledge, rng=stream(0))
    assert guess.inputs is not None
    distance = torch.cdist(guess.inputs.flatten(1).double(), batch.inputs.flatten(1).double()).square() / 64
    nearest = distance.argmin(1)
    assert sorted(nearest.tolist()) == [0, 1, 2]
    assert torch.equal(guess.labels, batch.labels[nearest])
    for error, proof in zip(distance.min(1).values.tolist(), guess.certificate, strict=True):
        assert not proof or error < 1e-6
    told = replace(knowledge, labels=batch.labels)
    assert torch.equal(attack(view, told, rng=stream(0)).labels, batch.labels)


def test_directions_that_the_features_do_not_see_are_noticed() -> None:
    """Features of 40 of 64 values: nothing is reported as sensitivity, however well they are met."""
    rng = torch.Generator().manual_seed(0)
    matrix = torch.randn(80, 64, generator=rng) * (torch.arange(64) < 40)
    got = sensitivity(
        lambda x: x.flatten(1) @ matrix.to(x.dtype).T, torch.rand(3, 1, 8, 8, generator=rng), rng=rng, steps=500, deadline=1e9
    )
    assert got.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("certified", [(True, False, True), (False, False, False)])
def test_a_record_that_is_not_certified_does_not_spoil_the_others(certified: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """The factorization is replaced by the truth with one record wrong; small networks fix no image, so sensitivity is taken as 1."""
    model, batch = build("cnn", SMALL, width=32, hidden=128), digits(3, offset=60)
    view, knowledge = attack_surface(model, [batch])
    features = entrance_of(model, batch).features(batch.inputs.double()).detach()
    features[1] = features[1, torch.randperm(features.shape[1], generator=torch.Generator().manual_seed(0))]
    backward = torch.zeros(128, 3, dtype=torch.float64)
    given = Factorization(features, backward, certified, 3, (1.0, 0.9, 1.0), 0.0)
    monkeypatch.setattr(hybrid, "factorize", lambda *_, **__: given)
    monkeypatch.setattr(hybrid, "sensitivity", lambda _, images, **__: torch.ones(len(images), dtype=torch.float64))
    guess = Hybrid(seconds=20, steps=200, restarts=1)(view, knowledge, rng=stream(0))
    assert guess.inputs is not None
    error = (guess.inputs - batch.inputs).square().mean((1, 2, 3))
    assert guess.certificate[1] == ""
    assert error[1] > 1e-3
    assert max(error[0], error[2]) < 1e-4
    for place in (0, 2):
        assert (guess.certificate[place] != "") <= certified[place]
        assert not guess.certificate[place] or guess.labels[place] == batch.labels[place]
    assert (guess.certificate[0] != "") == certified[0]


def test_hybrid_says_what_it_needs() -> None:
    for name, needs in (("convnet", "hidden linear layer"), ("mlp", "first"), ("lenet", "hidden linear layer")):
        view, knowledge = attack_surface(build(name, SMALL), [records(2, SMALL)])
        assert needs in str(Hybrid().supports(view, knowledge))
    view, knowledge = attack_surface(build("cnn", SMALL, width=4, hidden=8), [records(4, SMALL)])
    assert "neurons" in str(Hybrid().supports(view, knowledge))


@pytest.mark.nightly
@pytest.mark.parametrize(("size", "hidden", "least", "most"), [(8, 256, 36, 12), (16, 512, 32, 25)])
def test_hybrid_bar(size: int, hidden: int, least: float, most: float) -> None:
    """Claims B16, B17: photographs, labels unknown; means over 5 seeds."""
    means, lowest, seconds, right = [], [], [], []
    for seed in range(5):
        batch = photos(size, seed)
        view, knowledge = attack_surface(build("cnn", (3, 32, 32), seed=seed, width=32, hidden=hidden), [batch])
        began = time.process_time()
        guess = Hybrid()(view, knowledge, rng=stream(seed))
        seconds.append(time.process_time() - began)
        assert guess.inputs is not None
        error = torch.cdist(guess.inputs.flatten(1).double(), batch.inputs.flatten(1).double()).square() / 3072
        nearest = error.argmin(1)
        psnr = -10 * torch.log10(error.min(1).values.clamp(min=1e-6))  # capped at 60 dB
        means.append(float(psnr.mean()))
        lowest.append(float(psnr.min()))
        right.append(float((guess.labels == batch.labels[nearest]).double().mean()))
        certified = sum(proof != "" for proof in guess.certificate)
        print(f"hybrid, b = {size}, seed {seed}: mean {means[-1]:.1f} dB (capped at 60), min {lowest[-1]:.1f}, labels {right[-1]:.0%}, "
              f"{certified} certified, {seconds[-1]:.1f} CPU s")  # fmt: skip
        assert all(value < 1e-6 for value, proof in zip(error.min(1).values.tolist(), guess.certificate, strict=True) if proof)
    assert sum(means) / 5 >= least
    assert sum(seconds) / 5 <= most


def test_only_pictures_are_proven() -> None:
    """Whatever lies outside the pixel range by more than a proof's error can be no record."""
    images = torch.rand(4, 1, 8, 8, generator=stream(0), dtype=torch.float64)
    images[1, 0, 3, 3], images[2, 0, 0, 0] = 1.02, -0.02
    images[3, 0, 0, 0] = 1.0005
    assert hybrid.pictures(images).tolist() == [True, False, False, True]
