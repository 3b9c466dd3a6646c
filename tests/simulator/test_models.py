"""Models: shapes, published sizes, weights from one generator alone, and users' own networks."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

from simulator import config, lookup
from simulator.errors import SpecError
from simulator.models.normalize import Normalize
from simulator.rng import stream
from simulator.types import Schema

SHAPES = [(1, 8, 8), (1, 25, 25), (1, 28, 28), (3, 32, 32), (3, 64, 64)]
BUILT_IN = ["cnn", "convnet", "lenet", "linear", "mlp", "resnet18", "resnet20", "vit"]
VARIANTS = [
    *BUILT_IN,
    {"name": "mlp", "hidden": [32, 16], "activation": "sigmoid"},
    {"name": "mlp", "hidden": []},
    {"name": "lenet", "init": 0.0},
    {"name": "convnet", "width": 8},
    {"name": "resnet20", "norm": "group", "width": 8},
    {"name": "resnet18", "norm": "group"},
]
LARGE_ONES_SLOW = [pytest.param(spec, marks=pytest.mark.slow) if "resnet18" in str(spec) else spec for spec in VARIANTS]


def schema(shape: tuple[int, int, int], classes: int = 10) -> Schema:
    return Schema(shape, tuple(map(str, range(classes))))


def build(spec: object, shape: tuple[int, int, int] = (3, 32, 32), seed: int = 0) -> nn.Module:
    return config.build_plugin("models", spec, "model").build(schema(shape), stream(seed, "model"))


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_the_built_in_names() -> None:
    assert set(BUILT_IN) <= set(lookup.names("models"))


@pytest.mark.parametrize("spec", VARIANTS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_logits_are_finite_and_of_the_right_shape(spec: object, shape: tuple[int, int, int]) -> None:
    if "resnet18" in str(spec) and shape not in SHAPES[::4]:
        pytest.skip("one small and one large input are enough for the slow one")
    model = build(spec, shape)
    for mode in (True, False):
        logits = model.train(mode)(torch.rand(2, *shape))
        assert logits.shape == (2, 10)
        assert logits.isfinite().all()


@pytest.mark.parametrize(
    ("spec", "shape", "parameters"),
    [
        ("linear", (1, 28, 28), 7_850),
        ({"name": "mlp", "hidden": [1024]}, (1, 28, 28), 814_090),
        ("lenet", (3, 32, 32), 15_826),
        ("convnet", (3, 32, 32), 80_010),
        ("cnn", (3, 32, 32), 2_111_658),  # 2_432 + 9_248 + (8_192 + 1)·256 + 2_570
        ({"name": "vit", "depth": 1, "width": 64}, (3, 32, 32), 57_994),  # 3_136 + 4_096 + 49_984 + 128 + 650
        ("resnet20", (3, 32, 32), 269_722),  # the paper's 0.27 M
        ("resnet18", (3, 32, 32), 11_173_962),
        ("resnet18", (3, 64, 64), 11_181_642),  # torchvision's 11,689,512 less 990 classes of 513
    ],
    ids=str,
)
def test_sizes_are_the_published_ones(spec: object, shape: tuple[int, int, int], parameters: int) -> None:
    assert count(build(spec, shape)) == parameters


@pytest.mark.parametrize("spec", LARGE_ONES_SLOW, ids=str)
def test_weights_come_from_the_generator_alone(spec: object) -> None:
    before = torch.get_rng_state()
    first = build(spec, (1, 8, 8), seed=1)
    torch.manual_seed(12345)
    same, other = build(spec, (1, 8, 8), seed=1), build(spec, (1, 8, 8), seed=2)
    torch.set_rng_state(before)
    for (name, weight), again in zip(first.named_parameters(), same.parameters(), strict=True):
        assert torch.equal(weight, again), name
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("spec", LARGE_ONES_SLOW, ids=str)
def test_building_uses_up_the_generator_and_leaves_the_global_one_alone(spec: object) -> None:
    before, rng = torch.get_rng_state(), stream(0, "model")
    family = config.build_plugin("models", spec, "model")
    first, second = family.build(schema((1, 8, 8)), rng), family.build(schema((1, 8, 8)), rng)
    assert torch.equal(before, torch.get_rng_state())
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("spec", BUILT_IN)
def test_the_first_layer_normalizes_and_nothing_of_it_is_sent(spec: str) -> None:
    model = build(spec)
    first = next(model.children())
    assert isinstance(first, Normalize)
    assert not list(first.parameters())
    assert not list(first.buffers())
    torch.testing.assert_close(first(torch.tensor([0.0, 0.5, 1.0])), torch.tensor([-2.0, 0.0, 2.0]))
    assert not any("normalize" in name for name in model.state_dict())


@pytest.mark.parametrize("spec", BUILT_IN)
def test_the_last_layer_is_a_linear_head(spec: str) -> None:
    head = dict(build(spec).named_children())["head"]
    assert isinstance(head, nn.Linear)
    assert head.out_features == 10


def test_lenet_has_the_wide_weights_of_dlg() -> None:
    wide, narrow = build("lenet"), build({"name": "lenet", "init": 0.0})
    for parameter in wide.parameters():
        assert parameter.abs().max() <= 0.5
    assert torch.cat([p.flatten() for p in wide.parameters()]).std().item() == pytest.approx(1 / 12**0.5, rel=0.02)
    assert narrow.get_parameter("body.conv1.weight").abs().max() < 0.1


def test_only_batch_norm_has_buffers() -> None:
    assert list(build("resnet20").buffers())
    for spec in ("linear", "mlp", "lenet", "convnet", {"name": "resnet20", "norm": "group"}, {"name": "resnet18", "norm": "group"}):
        assert not list(build(spec, (1, 8, 8)).buffers())


def test_resnet18_is_torchvisions_on_large_inputs() -> None:
    from torchvision.models import resnet18

    model = build("resnet18", (3, 64, 64)).eval()
    reference = resnet18(num_classes=10).eval()
    state = {name.removeprefix("body.").replace("head.", "fc."): tensor for name, tensor in model.state_dict().items()}
    reference.load_state_dict(state)
    inputs = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(model(inputs), reference((inputs - 0.5) / 0.25))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "mlp", "hidden": [0]}, "hidden must be widths ≥ 1"),
        ({"name": "lenet", "init": -1.0}, "init must be ≥ 0"),
        ({"name": "convnet", "width": 0}, "width must be ≥ 1"),
        ({"name": "resnet20", "norm": "layer"}, "must be one of 'batch', 'group'"),
        ({"name": "resnet20", "widht": 8}, "Did you mean 'width'"),
    ],
    ids=str,
)
def test_wrong_settings_are_refused(spec: object, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        build(spec)


@pytest.mark.parametrize("name", ["lenet", "convnet"])
def test_too_small_inputs_are_refused(name: str) -> None:
    with pytest.raises(SpecError, match="at least 8×8 pixels"):
        build(name, (1, 6, 6))


USERS_NETWORKS = """
    from __future__ import annotations
    import torch
    from torch import nn

    class Net(nn.Module):
        '''My small network.'''

        def __init__(self, pixels: int, width: int = 5, slope=0.1, layers: list[int] = [3, 4], dropout: float | None = None, *, bias=True):
            super().__init__()
            self.settings = (pixels, width, slope, layers, dropout, bias)
            self.norm = nn.BatchNorm1d(pixels)
            self.first = nn.Linear(pixels, width, bias=bias)
            self.head = nn.Linear(width, 10)

        def forward(self, inputs):
            return self.head(torch.relu(self.first(self.norm(inputs.flatten(1)))))

    class Empty(nn.Module):
        def forward(self, inputs):
            return inputs.flatten(1)[:, :10]

    class Reserved(nn.Module):
        def __init__(self, name):
            super().__init__()

    def function():
        return Net(64)
"""


@pytest.fixture
def networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "users_networks.py").write_text(textwrap.dedent(USERS_NETWORKS))
    monkeypatch.syspath_prepend(tmp_path)
    return "users_networks"


def test_a_users_list_makes_a_world_that_is_a_key(networks: str) -> None:
    from tests.federations import world

    assert hash(world(model={"name": f"{networks}:Net", "pixels": 64, "layers": [7]})) == hash(
        world(model={"name": f"{networks}:Net", "pixels": 64, "layers": [7]})
    )
    assert isinstance(hash(world(model={"name": f"{networks}:Net", "pixels": 64})), int)


def test_a_users_module_by_dotted_path(networks: str) -> None:
    spec = {"name": f"{networks}:Net", "pixels": 64, "slope": 0.3, "layers": [7]}
    family = config.build_plugin("models", spec, "model")
    before = torch.get_rng_state()
    model = family.build(schema((1, 8, 8)), stream(0, "model"))
    assert torch.equal(before, torch.get_rng_state())
    assert model.settings == (64, 5, 0.3, [7], None, True)
    assert model.training
    assert int(model.norm.num_batches_tracked) == 0  # the trial run changed nothing
    again = config.build_plugin("models", spec, "model")
    assert again == family
    assert torch.equal(again.build(schema((1, 8, 8)), stream(0, "model")).first.weight, model.first.weight)
    assert config.dump(family)["name"] == f"{networks}:Net"
    assert config.build_plugin("models", config.dump(family), "model") == family
    assert type(family).__doc__.startswith("My small network.")


@pytest.mark.parametrize(
    ("cls", "settings", "message"),
    [
        ("Net", {"pixels": 64, "widht": 3}, "Did you mean 'width'"),
        ("Net", {}, "pixels must be given"),
        ("Net", {"pixels": "64"}, "must be a whole number"),
        ("Net", {"pixels": 65}, "must accept inputs of shape"),
        ("Empty", {}, "must have parameters"),
        ("Reserved", {}, "reserved name"),
        ("function", {}, "must be a class derived from torch.nn.Module"),
        ("Missing", {}, "importable"),
    ],
    ids=str,
)
def test_a_users_module_that_does_not_fit(networks: str, cls: str, settings: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        build({"name": f"{networks}:{cls}", **settings}, (1, 8, 8))


def test_a_users_module_with_other_classes(networks: str) -> None:
    family = config.build_plugin("models", {"name": f"{networks}:Net", "pixels": 64}, "model")
    with pytest.raises(SpecError, match=r"logits of shape .* = \(2, 3\), got \(2, 10\)"):
        family.build(schema((1, 8, 8), classes=3), stream(0, "model"))
