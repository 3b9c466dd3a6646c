"""Defenses of the batch: what they do to records and targets, by the papers' own formulas and by Pillow, and in a whole federation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch.nn import functional as F

from clients.local import local_upload
from clients.private import held_by, private_batches, splits
from defenses.client.ats import ATS
from defenses.client.instahide import GRAY, InstaHide, draw_shares
from defenses.client.mixup import MixUp
from simulator.dataset import take
from simulator.defense import ClientContext, Defense, Pool
from simulator.mechanisms import augment
from simulator.network import network, tensors
from simulator.rng import secret_stream, stream
from simulator.training import loss, mean_gradient, per_example_gradients
from simulator.types import Batch, Broadcast
from simulator.world import World
from tests.federations import federate, without_flower, world

MIXING: dict[str, Any] = {
    "mixup": {"name": "mixup"},
    "instahide, intra": {"name": "instahide"},
    "instahide, inter": {"name": "instahide", "partners": "inter"},
    "ats": {"name": "ats"},
}


def pool(rng: int = 0) -> Pool:
    return Pool(records(30, rng), records(20, rng + 1), 5)


def records(count: int, seed: int = 0) -> Batch:
    rng = stream(seed, "records")
    return Batch(torch.rand(count, 1, 8, 8, generator=rng), torch.randint(5, (count,), generator=rng))


def context(seed: int = 0, of: Pool | None = None) -> ClientContext:
    return ClientContext(client=0, round=1, batch_size=4, rng=stream(seed, "noise"), pool=of or pool())


def pure(count: int = 30) -> Pool:
    """Every record is one hot in a pixel of its own, so that a mixture shows its shares."""
    held, public = torch.zeros(2, count, 64).unbind()
    held[range(count), range(count)] = 1
    public[range(count), range(count, 2 * count)] = 1
    labels = torch.arange(count)
    return Pool(Batch(held.view(-1, 1, 8, 8), labels), Batch(public.view(-1, 1, 8, 8), labels), count)


# --- targets ---


def model() -> tuple[Any, Any, Any]:
    of = world(data={"name": "digits"}, model={"name": "mlp", "hidden": [8]})
    built = network(of.architecture, of.data.load().schema, of.training, 0)
    return built, *tensors(built)


def test_the_loss_of_targets_is_the_mix_of_the_losses_of_labels() -> None:
    built, parameters, buffers = model()
    batch = Batch(torch.rand(3, 1, 8, 8, generator=stream(0, "x")), torch.tensor([1, 2, 3]))
    others = torch.tensor([7, 7, 2])
    share = torch.tensor([0.2, 0.9, 0.5])
    targets = share[:, None] * F.one_hot(batch.labels, 10) + (1 - share[:, None]) * F.one_hot(others, 10)
    mixed = loss(built, parameters, buffers, replace(batch, targets=targets))[0]
    each = [
        share[i] * loss(built, parameters, buffers, take(batch, [i]))[0]
        + (1 - share[i]) * loss(built, parameters, buffers, Batch(batch.inputs[i : i + 1], others[i : i + 1]))[0]
        for i in range(3)
    ]
    torch.testing.assert_close(mixed, torch.stack(each).mean())


def test_per_example_gradients_follow_the_targets() -> None:
    built, parameters, buffers = model()
    batch = records(3)
    batch = replace(batch, targets=torch.rand(3, 10, generator=stream(0, "targets")))
    apart = per_example_gradients(built, parameters, buffers, batch)
    whole, _ = mean_gradient(built, parameters, buffers, batch)
    for name, tensor in whole.items():
        torch.testing.assert_close(apart[name].mean(0), tensor)
    hard = per_example_gradients(built, parameters, buffers, replace(batch, targets=None))
    assert not torch.allclose(hard["head.weight"], apart["head.weight"])


def test_taking_records_takes_their_targets() -> None:
    batch = replace(records(4), targets=torch.eye(4))
    assert torch.equal(take(batch, [2, 0]).targets, torch.eye(4)[[2, 0]])  # type: ignore[arg-type]
    assert take(records(4), [1]).targets is None


# --- MixUp ---


def test_mixup_mixes_labels_as_it_mixes_records() -> None:
    of = pure()
    batch = take(of.held, torch.arange(20))
    out = MixUp().on_batch(batch, context(of=of))
    assert out.targets is not None
    assert torch.equal(out.inputs.flatten(1)[:, :30], out.targets)  # shares of records are shares of labels
    torch.testing.assert_close(out.targets.sum(1), torch.ones(20))
    assert ((out.targets > 0).sum(1) <= 2).all()
    own = out.targets[range(20), range(20)]
    assert 0 < own.min() < 0.3 < 0.7 < own.max() <= 1
    assert torch.equal(out.labels, batch.labels)


@pytest.mark.parametrize(("alpha", "variance"), [(1.0, 1 / 12), (0.2, 1 / 5.6), (8.0, 1 / 68)])
def test_mixups_shares_have_the_variance_of_a_beta_distribution(alpha: float, variance: float) -> None:
    of = pure(2)
    batch = take(of.held, torch.zeros(4000, dtype=torch.int64))
    out = MixUp(alpha).on_batch(batch, context(of=Pool(take(of.held, [1]), of.public, 2)))
    assert out.targets is not None
    share = out.targets[:, 0]
    assert float(share.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(share.var()) == pytest.approx(variance, rel=0.1)


# --- InstaHide ---


@pytest.mark.parametrize(("k", "largest", "least"), [(4, 0.65, 0.0), (6, 0.65, 0.3), (2, 0.65, 0.0), (3, 0.4, 0.3)])
def test_instahides_shares_stay_within_their_bounds(k: int, largest: float, least: float) -> None:
    shares = draw_shares(3000, k, largest, least=least, rng=stream(0, "shares"))
    torch.testing.assert_close(shares.sum(1), torch.ones(3000))
    assert shares.min() >= 0
    assert shares.max() <= largest
    assert shares[:, :2].sum(1).min() >= least
    mean = shares.mean(0).tolist()
    alike = [mean] if not least or k == 3 else [mean[:2], mean[2:]]  # the lower bound draws the first two up
    assert all(part == pytest.approx([sum(part) / len(part)] * len(part), abs=0.02) for part in alike)


@pytest.mark.parametrize("partners", ["intra", "inter"])
def test_instahides_magnitudes_are_those_of_the_mixture_and_its_signs_are_coins(partners: Any) -> None:
    of = pure()
    batch = take(of.held, torch.arange(20))
    out = InstaHide(partners=partners).on_batch(batch, context(of=of))
    assert out.targets is not None
    magnitude = (out.inputs - GRAY).abs().flatten(1)
    shares = 0.5 - magnitude  # |share − 0.5| = 0.5 − share up to 0.5, the other way beyond
    shares[:, :30] = torch.where((shares[:, :30] - out.targets).abs() < 1e-6, shares[:, :30], 1 - shares[:, :30])
    torch.testing.assert_close(shares[:, :30], out.targets)
    signs = (out.inputs > GRAY).float().mean()
    assert 0.45 < float(signs) < 0.55
    private, public = shares[:, :30].sum(1), shares[:, 30:60].sum(1)
    torch.testing.assert_close(out.targets.sum(1), private)
    if partners == "intra":
        torch.testing.assert_close(private, torch.ones(20))
    else:
        assert private.min() >= 0.3
        assert public.min() > 0
        assert ((shares[:, 30:60] > 1e-6).sum(1) <= 2).all()
        assert ((out.targets > 0).sum(1) <= 2).all()


def test_a_record_is_encoded_anew_each_time() -> None:
    here = context()
    batch = take(pool().held, [0, 1])
    first, second = (InstaHide().on_batch(batch, here) for _ in range(2))
    turned = ((first.inputs > GRAY) != (second.inputs > GRAY)).float().mean()
    assert 0.3 < float(turned) < 0.7
    assert not torch.equal(first.targets, second.targets)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MixUp(0.0), "alpha must be > 0"),
        (lambda: InstaHide(k=1), "k must be ≥ 2"),
        (lambda: InstaHide(k=2, partners="inter"), "k must be ≥ 3"),
        (lambda: InstaHide(k=4, c_max=0.26), "c_max must be in"),
        (lambda: ATS("3-50"), r"numbers in 0\.\.49"),
        (lambda: ATS(""), r"numbers in 0\.\.49"),
        (lambda: ATS("3--1"), r"numbers in 0\.\.49"),
    ],
)
def test_settings_are_checked(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_worlds_without_partners_are_refused() -> None:
    lonely = world(federation={"clients": 1078}, defenses=[MIXING["mixup"]])
    assert "clients must hold ≥ 2 records" in (lonely.defenses[0].refuses(lonely) or "")
    closed = world(split={"public": 0.0}, defenses=[MIXING["instahide, inter"]])
    assert "split.public must leave" in (closed.defenses[0].refuses(closed) or "")
    for table in MIXING.values():
        assert world(defenses=[table]).defenses[0].refuses(world(defenses=[table])) is None


# --- ATS ---


def pillow(name: str, level: int, picture: Image.Image, sign: int) -> Image.Image:
    """AutoAugment's operations, by Pillow itself."""
    share, size = sign * level / 9, picture.size
    affine: dict[str, Any] = {
        "shearX": ((1, 0.3 * share, 0, 0, 1, 0), Image.Resampling.BICUBIC),
        "shearY": ((1, 0, 0, 0.3 * share, 1, 0), Image.Resampling.BICUBIC),
        "translateX": ((1, 0, 150 / 331 * share * size[0], 0, 1, 0), Image.Resampling.NEAREST),
        "translateY": ((1, 0, 0, 0, 1, 150 / 331 * share * size[1]), Image.Resampling.NEAREST),
    }
    if name in affine:
        matrix, resampling = affine[name]
        return picture.transform(size, Image.Transform.AFFINE, matrix, resampling, fillcolor=(0, 0, 0))
    enhance: dict[str, Any] = {
        "color": ImageEnhance.Color, "contrast": ImageEnhance.Contrast,
        "brightness": ImageEnhance.Brightness, "sharpness": ImageEnhance.Sharpness,
    }  # fmt: skip
    if name in enhance:
        return enhance[name](picture).enhance(1 + 0.5 * share)
    if name == "rotate":
        return picture.rotate(30 * level / 9, fillcolor=(128, 128, 128))
    if name == "posterize":
        return ImageOps.posterize(picture, round(8 - 4 * level / 9))
    if name == "solarize":
        return ImageOps.solarize(picture, 256 - 256 * level / 9)
    return {"autocontrast": ImageOps.autocontrast, "equalize": ImageOps.equalize, "invert": ImageOps.invert}[name](picture)


def photo() -> Image.Image:
    """Smooth, in color, of full contrast and an odd size."""
    import skimage.data

    return Image.fromarray(skimage.data.astronaut()).resize((31, 24))


def as_tensor(picture: Image.Image) -> torch.Tensor:
    import numpy as np

    return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("number", range(50))
def test_transformations_are_pillows(number: int, sign: int) -> None:
    name, level = augment.LIBRARY[number]
    picture = photo()
    seed = next(seed for seed in range(20) if 2 * int(torch.randint(2, (1,), generator=stream(seed, "sign"))) - 1 == sign)
    got = augment.apply(as_tensor(picture), number, stream(seed, "sign"))
    difference = (got - as_tensor(pillow(name, level, picture, sign))).abs() * 255
    if name.startswith("shear"):  # another bicubic kernel, and the fill bleeds in at the border
        assert float(difference.mean()) < 4
        assert float((difference > 12).float().mean()) < 0.06
    else:
        assert float(difference.max()) < 1.5, name  # Pillow rounds in between


def test_the_library_is_the_papers() -> None:
    """50 entries; those of the published policies by name."""
    assert len(augment.LIBRARY) == 50
    named = [[augment.LIBRARY[number] for number in policy] for policy in ATS().policies]
    assert named[0] == [("translateX", 9), ("contrast", 6), ("translateY", 2)]
    assert named[1] == [("translateY", 3), ("contrast", 7), ("contrast", 7)]
    assert {name for name, _ in augment.LIBRARY} <= {*augment.SIGNED, *augment.PLAIN}


def test_ats_takes_each_policy_and_leaves_labels_alone() -> None:
    batch = records(40)
    out = ATS("47+31").on_batch(batch, context())
    inverted = torch.isclose(out.inputs, 1 - batch.inputs).flatten(1).all(1)
    stretched = out.inputs.flatten(1).amax(1) == 1
    assert (inverted ^ stretched).all()
    assert 8 < int(inverted.sum()) < 32
    assert torch.equal(out.labels, batch.labels)
    assert out.targets is None
    assert bool(((ATS().on_batch(batch, context()).inputs - 0.5).abs() <= 0.5).all())


# --- in place ---


def upload(of: World, client: int = 0, round: int = 1) -> torch.Tensor:
    built = network(of.architecture, of.data.load().schema, of.training, of.seed)
    tensors_of = local_upload(of, built, Broadcast(round, *tensors(built), of.training), client).update.tensors
    return torch.cat([tensor.flatten() for tensor in tensors_of.values()])


@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("table", MIXING.values(), ids=MIXING)
def test_the_update_changes_by_the_secret_alone(table: dict[str, Any], batch_size: int) -> None:
    plain = upload(world(training={"batch_size": batch_size}))
    one, same = (upload(world(training={"batch_size": batch_size}, defenses=[table])) for _ in range(2))
    other = upload(replace(world(training={"batch_size": batch_size}, defenses=[table]), secret="another"))
    assert torch.equal(one, same)
    for changed in (plain, other):
        assert float((one - changed).norm() / changed.norm()) > 0.05


@pytest.mark.parametrize("table", MIXING.values(), ids=MIXING)
def test_the_update_is_that_of_the_encoded_batch(table: dict[str, Any]) -> None:
    """By hand: the hook with the client's stream and pool, then the gradient of soft cross-entropy, unclamped."""
    of = world(training={"batch_size": 4}, defenses=[table])
    parts = splits(of)
    rng = secret_stream(of.seed, of.secret, "defense", 2, 1)
    mixing = ClientContext(2, 1, 4, rng, pool=Pool(held_by(of, 2), parts.public, 10))
    encoded = of.defenses[0].on_batch(private_batches(of, 2, 1)[0], mixing)
    built = network(of.architecture, parts.schema, of.training, of.seed)
    wanted = F.one_hot(encoded.labels, 10).float() if encoded.targets is None else encoded.targets
    value = -(wanted * built(encoded.inputs).log_softmax(1)).sum(1).mean()
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(value, list(built.parameters()))])
    torch.testing.assert_close(upload(of, client=2), gradient, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize(
    "training", [{"batch_size": 4}, {"algorithm": "fedavg", "batch_size": 8, "steps": 2, "learning_rate": 0.05}], ids=["sgd", "avg"]
)
@pytest.mark.parametrize("table", MIXING.values(), ids=MIXING)
def test_a_federation_trains_on_it(table: dict[str, Any], training: dict[str, Any], tmp_path: Path) -> None:
    of = world(training=training, defenses=[table])
    record = federate(of, tmp_path / "t")
    assert len(record.observations) == 2
    parameters, _ = without_flower(of)
    assert record.released is not None
    for name, tensor in parameters.items():
        assert torch.equal(record.released[0][name], tensor)


class Probe(Defense):
    """Keeps what it is given."""

    def __init__(self) -> None:
        object.__setattr__(self, "seen", [])

    def on_update(self, update: Any, context: ClientContext) -> Any:
        self.seen.append(context)  # type: ignore[attr-defined]
        return update


def test_other_hooks_get_no_pool() -> None:
    probe = Probe()
    upload(replace(world(), defenses=(MixUp(), probe)))
    assert [context.pool for context in probe.seen] == [None]  # type: ignore[attr-defined]


def test_a_batch_can_be_mixed_and_transformed() -> None:
    of = context()
    batch = take(pool().held, [0, 1, 2])
    twice = MixUp().on_batch(InstaHide().on_batch(batch, of), of)
    assert twice.targets is not None
    torch.testing.assert_close(twice.targets.sum(1), torch.ones(3))
