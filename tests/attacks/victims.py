"""Small victims for the tests of attacks, made with the simulator's own local training."""

from __future__ import annotations

from functools import cache
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from simulator import lookup
from simulator.adversary import Knowledge
from simulator.aggregate import weighted_mean
from simulator.models.dropout import drawn_masks, masks_from
from simulator.models.latent import drawn_noise, noise_from
from simulator.rng import stream
from simulator.training import batch_indices, local_update
from simulator.types import Batch, Broadcast, LocalTraining, Observation, Schema, Update, Upload

CLASSES = tuple("0123456789")


def build(name: str, shape: tuple[int, int, int], *, seed: int = 0, **settings: object) -> nn.Module:
    return lookup.get("models", name)(**settings).build(Schema(shape, CLASSES), stream(seed, "model"))


def smooth(shape: tuple[int, int, int] = (1, 4, 4), activation: type[nn.Module] = nn.Sigmoid) -> nn.Module:
    """A tiny network with the layers that attacks look for: linear first and last."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(prod(shape), 12), activation(), nn.Linear(12, 10))


def records(count: int, shape: tuple[int, int, int], seed: int = 0) -> Batch:
    rng = stream(seed, "records", count, shape)
    return Batch(torch.rand(count, *shape, generator=rng), torch.randint(10, (count,), generator=rng))


def digits(count: int, shape: tuple[int, int, int] = (1, 8, 8), offset: int = 0) -> Batch:
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images[offset : offset + count] / 16, dtype=torch.float32)[:, None]
    images = nn.functional.interpolate(images, size=shape[1:], mode="bilinear").expand(-1, *shape)
    return Batch(images.clone(), torch.tensor(data.target[offset : offset + count]).long())


def photos(count: int, size: int = 32, seed: int = 0) -> Batch:
    """Crops of photographs that ship with scikit-learn and scikit-image, disjoint and halved in size; labels are random."""
    every, rng = crops(size), stream(seed, "photos", size)
    order = torch.randperm(len(every), generator=rng)[:count]
    assert len(order) == count, f"there are {len(every)} crops"
    return Batch(every[order], torch.randint(10, (count,), generator=rng))


@cache
def crops(size: int) -> Tensor:
    import skimage.data
    from sklearn.datasets import load_sample_images

    pictures = [*load_sample_images().images, skimage.data.astronaut(), skimage.data.chelsea(), skimage.data.coffee()]
    found = []
    for picture in pictures:
        image = nn.functional.avg_pool2d(torch.tensor(np.array(picture)).permute(2, 0, 1).double()[None] / 255, 2)
        blocks = image[..., : image.shape[2] // size * size, : image.shape[3] // size * size].unfold(2, size, size).unfold(3, size, size)
        found.append(blocks[0].permute(1, 2, 0, 3, 4).reshape(-1, 3, size, size).float())
    every = torch.cat(found)
    return every[every.flatten(1).std(1) > 0.05]  # sky is the same everywhere


def cifar10() -> Batch:
    """The 20 pictures that ship with foolbox; read by file, it is never imported."""
    from importlib.util import find_spec

    from PIL import Image

    spec = find_spec("foolbox")
    assert spec is not None
    assert spec.origin is not None
    files = sorted((Path(spec.origin).parent / "data").glob("cifar10_*.png"))
    images = [torch.from_numpy(np.array(Image.open(file).convert("RGB"))).permute(2, 0, 1) / 255 for file in files]
    return Batch(torch.stack(images), torch.tensor([int(file.stem.split("_")[-1]) for file in files]))


def attack_surface(
    model: nn.Module, clients: list[Batch], recipe: LocalTraining | None = None, seed: int = 0
) -> tuple[Observation, Knowledge]:
    """One observation of one upload: of the one client, or the weighted mean over several."""
    recipe = recipe or LocalTraining(batch_size=0)
    parameters = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    buffers = {name: tensor.clone() for name, tensor in model.named_buffers() if tensor.is_floating_point()}
    everything = {name: tensor.clone() for name, tensor in model.named_buffers()}
    updates, after, sizes = [], [], [len(batch) for batch in clients]
    for number, batch in enumerate(clients):
        order = [torch.arange(len(batch))]
        if recipe.algorithm == "fedavg":
            order = batch_indices(len(batch), recipe, stream(seed, "client order", number))
        batches = [Batch(batch.inputs[i], batch.labels[i]) for i in order]
        with masks_from(drawn_masks(stream(seed, "dropout", number))), noise_from(drawn_noise(stream(seed, "latent", number))):
            update, left = local_update(model, parameters, everything, batches, recipe)
        updates.append(update.tensors)
        after.append({name: left[name] for name in buffers})
    upload = Upload(
        senders=frozenset(range(len(clients))),
        update=Update("delta" if recipe.algorithm == "fedavg" else "gradient", weighted_mean(updates, sizes)),
        buffers=weighted_mean(after, sizes),
        num_examples=sum(sizes),
    )
    shape = tuple(clients[0].inputs.shape[1:])
    knowledge = Knowledge(model, Schema(shape, CLASSES), recipe, sum(sizes))  # type: ignore[arg-type]
    return Observation(Broadcast(0, parameters, buffers, recipe), (upload,)), knowledge


def psnr_db(guess: Tensor | None, truth: Tensor) -> float:
    assert guess is not None
    return float(-10 * torch.log10((guess.double() - truth.double()).square().mean()))
