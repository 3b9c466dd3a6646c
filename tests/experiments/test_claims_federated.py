"""Measurements on federations: records are paired, senders counted against a deal, and memory is of the rounds nearby."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from experiments.claims import federated
from experiments.claims.federated import OwnersMeasure, PairedMeasure, RoundsMeasure, remembering
from experiments.claims.runs import Ran
from experiments.result import Trial
from simulator.errors import SpecError
from tests.experiments.test_summary import record, trial


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, ...], list[Trial]]:
    """What runs leave, by their assignments; none is started."""
    found: dict[tuple[str, ...], list[Trial]] = {}
    monkeypatch.setattr(federated, "ran", lambda spec, assignments, *, workers: Ran((), tuple(found[assignments])))
    return found


def of(seed: int, *scores: float, **changes: Any) -> Trial:
    return trial(seed=seed, senders=tuple(range(len(scores))), records=tuple(record(i, i, psnr_db=db) for i, db in enumerate(scores)), **changes)


def test_the_difference_is_of_the_same_records_and_its_interval_over_whole_federations(left: dict[tuple[str, ...], list[Trial]]) -> None:
    """Uploads whose scores lie 20 dB apart, and their differences 1 dB: in whatever order they were written down."""
    left["a",] = [of(seed, 10.0 * seed + 13, 10.0 * seed + 12) for seed in range(3)]
    left["a", "b"] = [of(seed, 10.0 * seed + 10, 10.0 * seed + 10) for seed in (2, 0, 1)]
    figures = PairedMeasure(spec="s", attack="ig", set=("a",), other_set=("b",))()
    assert figures["difference_db"] == pytest.approx(2.5)
    assert figures["difference_db_low"] == pytest.approx(2.5)
    assert figures["psnr_db"] - figures["other_psnr_db"] == pytest.approx(2.5)
    left["a", "b"] = [of(seed, 10.0, 10.0) for seed in (0, 1, 3)]
    with pytest.raises(SpecError, match="must be of the same victims"):
        PairedMeasure(spec="s", attack="ig", set=("a",), other_set=("b",))()


def test_an_attack_that_did_not_answer_is_no_figure(left: dict[tuple[str, ...], list[Trial]]) -> None:
    left[()] = [of(0, 10.0), trial(status="unsupported", reason="too many", records=())]
    with pytest.raises(SpecError, match="must answer under 'none' of s, got unsupported: too many"):
        PairedMeasure(spec="s", attack="ig", other_attack="other")()
    with pytest.raises(SpecError, match="got no trial"):
        PairedMeasure(spec="s", attack="nobody's", other_attack="ig")()
    with pytest.raises(ValueError, match="Say what is compared"):
        PairedMeasure(spec="s", attack="ig")


def test_named_senders_are_counted_of_all_records_and_of_the_named_ones(left: dict[tuple[str, ...], list[Trial]]) -> None:
    """Three records of each of two senders, three seeds: of six one is named rightly, one in one seed wrongly; a deal gets half right."""
    named = {0: (True, None, False), 1: (True, None, None), 2: (True, None, None)}
    left[()] = [
        trial(
            arm="sums", attack="who", seed=seed, senders=(0, 1),
            records=tuple(record(i % 2, i, attributed=said[i] if i < 3 else None) for i in range(6)),
        )
        for seed, said in named.items()
    ]  # fmt: skip
    figures = OwnersMeasure(spec="s", attack="who", arm="sums")()
    assert figures["owners_named"] == pytest.approx(4 / 18)
    assert figures["owners_right"] == pytest.approx(3 / 18)
    assert figures["owners_wrong"] == pytest.approx(1 / 18)
    assert figures["owners_chance"] == pytest.approx(0.5, abs=0.05)
    assert figures["over_chance"] == pytest.approx(3 / 18 - figures["owners_chance"])
    assert figures["named_over_chance"] == pytest.approx(3 / 4 - figures["owners_chance"], abs=0.05)
    assert figures["named_over_chance_low"] < figures["named_over_chance"]
    left[()] = [replace(one, senders=(0,)) for one in left[()]]
    with pytest.raises(SpecError, match="≥ 2 senders"):
        OwnersMeasure(spec="s", attack="who", arm="sums")()


def test_a_server_remembers_the_attacked_round_and_those_nearest_to_it() -> None:
    """Every step adds rounds and takes none away."""
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Remembered:
        round: int
        knowledge: Any

    @dataclass(frozen=True)
    class Known:
        history: tuple[Any, ...]

    whole = Remembered(5, Known(tuple(SimpleNamespace(broadcast=SimpleNamespace(round=number)) for number in range(1, 9) if number != 5)))
    kept = {count: [seen.broadcast.round for seen in remembering(whole, count).knowledge.history] for count in (1, 3, 8)}  # type: ignore[type-var]
    assert kept == {1: [], 3: [4, 6], 8: [1, 2, 3, 4, 6, 7, 8]}


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"set": ()}, "must attack one round with threat.rounds = 'all'"),  # the spec attacks four
        ({"set": ("evaluation.rounds=[1]", "federation.rounds=4")}, "of 16 rounds or more"),
    ],
)
def test_a_curve_over_rounds_needs_one_attacked_round_and_enough_others(settings: dict[str, Any], word: str) -> None:
    with pytest.raises(SpecError, match=word):
        _ = RoundsMeasure(spec="several_rounds", attack="strongest", otherwise="strongest", arm="none", **settings).experiment


def test_rounds_must_ascend() -> None:
    with pytest.raises(ValueError, match="ascending"):
        RoundsMeasure(spec="several_rounds", attack="strongest", otherwise="strongest", arm="none", rounds=(4, 1))
