"""The active server: off unless the world says so, in plain words where it is on, and what it plants is what the papers say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import norm

from clients.private import private_records
from experiments.checks import FLAGS
from experiments.conclude import conclude, threat
from experiments.directory import TRANSCRIPTS
from experiments.disclose import architecture, disclose
from experiments.refusals import check
from experiments.report.threat import threat_card
from experiments.run import run
from experiments.spec import Experiment, load
from server import active
from simulator import config
from simulator.adversary import ThreatModel
from simulator.dataset import split
from simulator.errors import FederationError, SpecError
from simulator.front import front
from simulator.network import network, tensors
from simulator.rng import stream
from simulator.transcript import read
from simulator.world import World
from tests.federations import federate, world

ACTIVE: dict[str, Any] = {"threat": {"adversary": "active"}, "tampering": {"method": "imprint"}}


def parameters(of: World) -> dict[str, torch.Tensor]:
    return dict(tensors(network(of.model, of.data.load().schema, of.training, of.seed))[0])


def experiment(**settings: Any) -> Experiment:
    table = {"data": "digits", "model": "mlp", "attacks": ["linear_leak"], "arms": [{"name": "none"}], **settings}
    return config.build(Experiment, table)


def test_an_honest_server_broadcasts_its_model_and_the_header_knows_no_tampering(tmp_path: Path) -> None:
    of = world()
    before = parameters(of)
    assert active.tampered(of, before, 1) is before
    record = federate(of, tmp_path / "t")
    assert all(torch.equal(record.observations[0].broadcast.parameters[name], tensor) for name, tensor in before.items())
    assert not {"adversary", "tampering"} & set(record.header)


@pytest.mark.parametrize("method", ["imprint", "trap_weights"])
def test_an_active_server_says_so_in_its_transcript_and_keeps_the_architecture(method: str, tmp_path: Path) -> None:
    of = world(tampering={"method": method})
    record = federate(of, tmp_path / "t")
    assert "ACTIVE" in record.header["adversary"]
    assert record.header["tampering"]["method"] == method
    for observation in record.observations:  # anew in every round
        sent = observation.broadcast.parameters
        assert {name: tensor.shape for name, tensor in sent.items()} == {name: tensor.shape for name, tensor in parameters(of).items()}
        assert not torch.equal(sent["layer0.weight"], parameters(of)["layer0.weight"])


def test_imprint_is_that_of_the_paper() -> None:
    of = world(tampering={"method": "imprint", "placed_by": "public"})
    planted = active.tampered(of, parameters(of), 1)
    layers = front(network(of.model, of.data.load().schema, of.training, 0), (1, 8, 8))
    assert not isinstance(layers, str)
    rows, bias = layers.on_pixels(planted)
    assert torch.allclose(rows, rows[:1].expand_as(rows), rtol=1e-5)
    assert bool((rows > 0).all())
    assert torch.equal(planted["head.weight"], planted["head.weight"][:, :1].expand_as(planted["head.weight"]))
    public = split(of.data.load(), of.split, of.seed).public.inputs.flatten(1).double()
    measured = public @ rows[0]
    expected = norm.ppf(torch.arange(1, 256) / 256, measured.mean(), measured.std(correction=0))
    assert torch.allclose(-bias[1:], torch.tensor(expected), rtol=1e-4)
    assert -bias[0] < 0, "no picture is darker than the lowest threshold"


def test_trap_weights_are_those_of_the_paper() -> None:
    of = world(tampering={"method": "trap_weights"}, training={"batch_size": 8})
    layers = front(network(of.model, of.data.load().schema, of.training, 0), (1, 8, 8))
    assert not isinstance(layers, str)
    rows, bias = layers.on_pixels(active.tampered(of, parameters(of), 1))
    assert bool(((rows < 0).sum(1) == 32).all() & ((rows > 0).sum(1) == 32).all())
    negative, positive = -rows.sort(1).values[:, :32].flip(1), rows.sort(1).values[:, 32:]
    factor = positive / negative
    assert torch.allclose(factor, factor[0, 0].expand_as(factor), rtol=1e-4)
    assert 0 < float(factor[0, 0]) < 1
    assert torch.allclose(bias, torch.zeros_like(bias), atol=1e-5)


def test_factor_of_trap_weights_is_the_papers_in_three_thousand_pixels_and_smaller_in_few() -> None:
    assert active.positive_factor(256, 3072, None, 20) == pytest.approx(0.95, abs=0.03)
    assert active.positive_factor(256, 64, None, 20) < 0.9


def test_firing_rate_is_the_one_that_the_factor_is_computed_from() -> None:
    pixels, factor = 400, 0.8
    picture = 0.4 + 0.2 * torch.randn(pixels, generator=stream(0, "picture"), dtype=torch.float64)
    magnitude = torch.randn(20_000, pixels // 2, generator=stream(0, "rows"), dtype=torch.float64).abs()
    fires = (factor * magnitude @ picture[::2] - magnitude @ picture[1::2] > 0).double().mean()
    away = (1 - factor) * (pixels / torch.pi) ** 0.5 * picture.mean() / picture.std(correction=0) / (1 + factor**2) ** 0.5
    assert float(fires) == pytest.approx(float(norm.sf(away)), abs=0.02)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"tampering": {"method": "imprint"}}, "threat.adversary must be 'active'"),
        ({"threat": {"adversary": "active"}}, "tampering.method must be"),
        ({**ACTIVE, "tampering": {"method": "imprint", "placed_by": "public"}}, "threat.public_data"),
        ({"tampering": {"placed_by": "public"}}, "tampering.placed_by must be"),
        ({**ACTIVE, "model": "lenet"}, "nn.Linear"),
        ({**ACTIVE, "model": {"name": "mlp", "activation": "sigmoid"}}, "ReLU"),
        ({**ACTIVE, "model": "linear"}, "nn.Linear"),
    ],
)
def test_experiments_that_hide_or_only_claim_an_active_server_are_refused(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(SpecError, match="must") as error:
        check(experiment(**settings))
    assert reason in str(error.value)


def test_experiments_with_a_declared_active_server_may_run() -> None:
    """``check`` raises SpecError for what may not run."""
    for declared in (experiment(**ACTIVE), load("active")):
        check(declared)
        assert declared.threat.adversary == "active"
        assert declared.tampering.method


def test_knowledge_says_what_the_threat_model_says(tmp_path: Path) -> None:
    of = world(tampering={"method": "imprint"})
    view = federate(of, tmp_path / "t").observations[0].only(0)
    parts, truth = split(of.data.load(), of.split, of.seed), private_records(of, 0, 1)
    for adversary in ("honest-but-curious", "active"):
        told = disclose(ThreatModel(adversary=adversary), of, parts, truth, view.upload, architecture(of, parts))  # type: ignore[arg-type]
        assert told.adversary == adversary


@pytest.mark.slow
def test_every_row_and_the_report_say_active(tmp_path: Path) -> None:
    small = load("active", ["seeds=[0]", "federation.clients=2", "evaluation.victims=1"])
    out = tmp_path / "run"
    assert run(small, out, workers=1) == []
    _, report, _ = conclude(out)
    summary = (out / "summary.json").read_text()
    assert summary.count('"active_server"') == len(small.arms)
    assert "not an honest-but-curious adversary" in FLAGS["active_server"]
    html = report.read_text()
    assert "ACTIVE server" in html
    assert "NOT honest-but-curious" in html
    assert all("ACTIVE" in read(path).header["adversary"] for path in (out / TRANSCRIPTS).iterdir() if path.is_dir())
    who = dict(threat_card(threat(small), {}))["Who"]
    assert "imprint" in who[0]


@pytest.mark.parametrize(("method", "named"), [("imprint", "imprint"), ("trap_weights", "trap weights")])
def test_clients_that_inspect_the_model_do_not_answer_and_say_why(method: str, named: str, tmp_path: Path) -> None:
    of = world(tampering={"method": method}, defenses=[{"name": "model_inspection"}], training={"batch_size": 8})
    with pytest.raises(FederationError, match=named):
        federate(of, tmp_path / "t")
    lost = read(tmp_path / "t").lost
    assert len(lost) == of.federation.clients
    assert all("model_inspection refuses" in reason and named in reason for _, _, reason in lost)


def test_clients_that_inspect_an_honest_model_send_the_same_bits(tmp_path: Path) -> None:
    plain, inspected = world(federation={"rounds": 1}), world(federation={"rounds": 1}, defenses=[{"name": "model_inspection"}])
    records = [federate(of, tmp_path / str(place)) for place, of in enumerate((plain, inspected))]
    one, other = (record.observations[0].uploads[0].update.tensors for record in records)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert replace(plain, tampering=of_none()) == plain


def of_none() -> Any:
    return config.build(World, {"data": "digits", "model": "mlp"}).tampering
