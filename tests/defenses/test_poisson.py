"""Poisson sampling: who is drawn, what leaves the client, what it amplifies, and that nothing else tells how many were drawn."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from scipy import stats

from clients.local import local_upload
from clients.private import private_record_ids, private_records, records_held, round_indices, stated_examples
from defenses.accounting import guarantee
from defenses.client.dp_sgd import DPSGD
from experiments.refusals import check
from experiments.spec import load
from simulator import training
from simulator.errors import SpecError
from simulator.network import network, tensors
from simulator.rng import stream
from simulator.training import batch_indices
from simulator.types import Batch, Broadcast, LocalTraining, Upload
from tests.defenses.test_dp import per_example
from tests.defenses.tiny import world
from tests.federations import federate
from tests.federations import world as real_world

POISSON = {"batch_size": 2, "sampling": "poisson"}


def upload(of, client: int, round: int) -> Upload:
    model = network(of.architecture, of.data.load().schema, of.training, of.seed)
    return local_upload(of, model, Broadcast(round, *tensors(model), of.training), client)


def empty_round(of) -> tuple[int, int]:
    """A client and a round in which nobody was drawn."""
    for round in range(1, 200):
        for client in range(of.federation.clients):
            if not len(round_indices(of, client, round)[0]):
                return client, round
    raise AssertionError("no empty sample")


# --- the draw ---


def test_each_record_is_drawn_on_its_own_with_the_stated_rate() -> None:
    recipe = LocalTraining(algorithm="fedavg", steps=4000, batch_size=3, sampling="poisson")
    steps = batch_indices(20, recipe, stream(0, "sample"))
    drawn = torch.zeros(4000, 20)
    for step, indices in enumerate(steps):
        drawn[step, indices] = 1
    assert recipe.sampling_rate(20) == pytest.approx(0.15)
    assert all(stats.binomtest(int(k), 4000, 0.15).pvalue > 1e-4 for k in drawn.sum(0))
    counts = torch.bincount(drawn.sum(1).long(), minlength=21).numpy()  # sizes are binomial: neither fixed nor without an empty one
    expected = 4000 * stats.binom.pmf(range(21), 20, 0.15)
    assert stats.chi2.sf((((counts - expected) ** 2 / expected)[:9]).sum(), 9) > 1e-3
    assert counts[0] > 0
    correlation = torch.corrcoef(drawn.T) - torch.eye(20)
    assert float(correlation.abs().max()) < 0.08


def test_all_records_are_drawn_where_the_batch_is_everything() -> None:
    for recipe in (LocalTraining(batch_size=0, sampling="poisson"), LocalTraining(batch_size=99, sampling="poisson")):
        assert [indices.tolist() for indices in batch_indices(7, recipe, stream(0, "s"))] == [list(range(7))]


def test_the_draw_is_keyed_with_the_secret_and_differs_between_rounds() -> None:
    """The seed fixes what everybody may know; who is in a sample is no such thing."""
    from dataclasses import replace

    of = world(training=POISSON)
    one, other = ([round_indices(replace(of, secret=secret), 0, round)[0].tolist() for round in range(1, 30)] for secret in ("a", "b"))
    assert one != other
    assert len({tuple(indices) for indices in one}) > 5
    shuffled = world(training={"batch_size": 2})
    assert torch.equal(round_indices(shuffled, 0, 1)[0], round_indices(replace(shuffled, secret="a"), 0, 1)[0])


# --- what leaves the client ---


@pytest.mark.parametrize(
    "recipe", [POISSON, {**POISSON, "algorithm": "fedavg", "steps": 3}, {**POISSON, "algorithm": "fedavg", "epochs": 2}]
)
def test_the_upload_states_what_was_expected_whatever_was_drawn(recipe: dict) -> None:
    of = world(training=recipe)
    stated = {upload(of, 0, round).num_examples for round in range(1, 12)}
    drawn = {len(private_record_ids(of, 0, round)) for round in range(1, 12)}
    assert stated == {of.training.examples_in_round(records_held(of)[0])}
    assert stated_examples(of, 0, 1) in stated
    assert len(drawn) > 1


def test_the_gradient_is_the_sum_over_the_expected_number() -> None:
    of = world(training=POISSON)
    for round in range(1, 12):
        records = private_records(of, 0, round)
        got = upload(of, 0, round).update.tensors
        model = network(of.architecture, of.data.load().schema, of.training, of.seed)
        total = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
        for image, label in zip(records.inputs, records.labels, strict=True):
            loss = torch.nn.functional.cross_entropy(model(image[None]), label[None])
            for name, part in zip(total, torch.autograd.grad(loss, list(model.parameters())), strict=True):
                total[name] += part / 2
        for name, tensor in total.items():
            torch.testing.assert_close(got[name], tensor, rtol=1e-5, atol=1e-6)


def test_an_empty_sample_uploads_nothing_or_noise_alone() -> None:
    bare = world(training=POISSON)
    client, round = empty_round(bare)
    assert not len(private_records(bare, client, round))
    sent = upload(bare, client, round)
    assert sent.num_examples == 2
    assert all(not tensor.any() for tensor in sent.update.tensors.values())
    noisy = upload(world(DPSGD(0.5, 3.0), training=POISSON), client, round).update.tensors
    values = torch.cat([tensor.flatten() for tensor in noisy.values()])
    assert float(values.std()) == pytest.approx(3.0 * 0.5 / 2, rel=0.3)
    assert values.abs().min() > 0


def test_an_empty_sample_has_no_per_example_gradients_and_changes_no_buffer() -> None:
    model, parameters, batch = per_example()
    nobody = Batch(batch.inputs[:0], batch.labels[:0])
    apart = training.per_example_gradients(model, parameters, {}, nobody)
    assert {name: tuple(tensor.shape) for name, tensor in apart.items()} == {n: (0, *p.shape) for n, p in parameters.items()}
    buffers = {"running": torch.ones(1)}
    gradient, after = training.sampled_gradient(model, parameters, buffers, nobody, expected=4)
    assert after is buffers
    assert not any(tensor.any() for tensor in gradient.values())


def test_dp_sgd_divides_by_the_expected_batch() -> None:
    of, exact = (world(DPSGD(clip, 0.0), training=POISSON) for clip in (0.01, math.inf))
    for round in range(1, 9):
        drawn = len(private_record_ids(of, 0, round))
        norm = float(torch.cat([t.flatten() for t in upload(of, 0, round).update.tensors.values()]).norm())
        assert norm <= 0.01 * drawn / 2 * (1 + 1e-5)
        for name, tensor in upload(exact, 0, round).update.tensors.items():
            torch.testing.assert_close(tensor, upload(world(training=POISSON), 0, round).update.tensors[name], rtol=1e-5, atol=1e-6)


# --- what it is worth ---


def test_amplification_is_claimed_for_poisson_samples_alone() -> None:
    """z = 1, q = 0.01, 1000 rounds: the reference's 1.8282; shuffled batches of the same size get 10 full releases."""
    poisson = world(DPSGD(), rounds=1000, training={"batch_size": 1, "sampling": "poisson"})
    found = guarantee(poisson, records_held=(100,) * 4)
    assert found.epsilon == pytest.approx(1.8282, rel=4e-3)
    assert "Poisson, q = 0.01" in found.sampling
    assert found.claim is not None
    assert found.claim.event == SelfComposedDpEvent(PoissonSampledDpEvent(0.01, GaussianDpEvent(1.0)), 1000)
    shuffled = guarantee(world(DPSGD(), rounds=1000, training={"batch_size": 1}), records_held=(100,) * 4)
    assert shuffled.epsilon > 17


def test_what_amplification_is_worth() -> None:
    """100 records, batches of 10, 100 rounds, z = 1: a record is in 10 shuffled batches, √10-GDP (exact: Dong et al., 2022, corollary 1)."""
    recipe = {"batch_size": 10}
    shuffled = guarantee(world(DPSGD(), rounds=100, training=recipe), records_held=(100,) * 4)
    poisson = guarantee(world(DPSGD(), rounds=100, training={**recipe, "sampling": "poisson"}), records_held=(100,) * 4)
    mu, e = math.sqrt(10), shuffled.epsilon
    assert stats.norm.cdf(mu / 2 - e / mu) - math.exp(e) * stats.norm.cdf(-mu / 2 - e / mu) == pytest.approx(1e-5, rel=1e-2)
    assert e == pytest.approx(17.9, abs=0.05)
    assert poisson.epsilon == pytest.approx(7.0, abs=0.1)


def test_the_claim_takes_the_largest_rate_and_the_most_steps() -> None:
    recipe = {"algorithm": "fedavg", "epochs": 2, "batch_size": 5, "sampling": "poisson"}
    claim = DPSGD().claim(world(DPSGD(), rounds=3, training=recipe), (10, 50, 20, 0))
    assert claim is not None
    assert claim.event == SelfComposedDpEvent(PoissonSampledDpEvent(0.5, GaussianDpEvent(1.0)), 3 * 2 * 10)
    whole = DPSGD().claim(world(DPSGD(), rounds=3, training={"batch_size": 0, "sampling": "poisson"}), (10, 50, 20, 20))
    assert whole is not None
    assert whole.event == SelfComposedDpEvent(GaussianDpEvent(1.0), 3)


def test_without_noise_sampling_claims_nothing() -> None:
    found = guarantee(world(training=POISSON), records_held=(10,) * 4)
    assert found.epsilon == math.inf


# --- the whole way ---


def test_the_server_never_learns_how_many_were_drawn(tmp_path: Path) -> None:
    """Everything that crosses but the noisy numbers themselves is the same in a round with an empty sample and in others."""
    of = real_world(
        training={"batch_size": 1, "sampling": "poisson"}, federation={"clients": 6, "rounds": 3}, defenses=[{"name": "dp_sgd"}]
    )
    record = federate(of, tmp_path)
    drawn = {len(private_record_ids(of, client, round)) for client in range(6) for round in (1, 2, 3)}
    assert 0 in drawn
    assert len(drawn) > 2
    uploads = [upload for seen in record.observations for upload in seen.uploads]
    assert len(uploads) == 18
    assert {upload.num_examples for upload in uploads} == {1}
    shapes = {tuple((name, tensor.shape, tensor.dtype) for name, tensor in upload.update.tensors.items()) for upload in uploads}
    assert len(shapes) == 1
    assert not any(upload.buffers for upload in uploads)


def test_labels_may_not_be_disclosed_beside_a_secret_sample() -> None:
    experiment = load(None, ['training.sampling = "poisson"', 'threat.labels = "counts"'])
    with pytest.raises(SpecError, match=r"threat.labels must be 'none' with training.sampling = 'poisson', got 'counts'"):
        check(experiment)


def test_sampling_is_shuffled_or_poisson() -> None:
    with pytest.raises(ValueError, match="sampling must be 'shuffled' or 'poisson', got 'random'"):
        LocalTraining(sampling="random")  # type: ignore[arg-type]
