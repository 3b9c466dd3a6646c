"""The catalog is that of the registry, README's figures are those of the claims, and it says what the defenses' measurements lack."""

from __future__ import annotations

import re
import tomllib
from dataclasses import replace
from typing import get_args

import pytest

from experiments import measurements, readme
from experiments.claims.claim import Figure, claims, select
from experiments.readme import CATALOG, README, catalog, updated
from experiments.readme_figures import BLOCKS, FIGURE, filled
from simulator import lookup
from simulator.registry import Kind

TEXT = README.read_text(encoding="utf-8")


def test_tables_and_figures_are_current() -> None:
    assert updated(TEXT) == TEXT, "run python -m experiments.readme"
    assert CATALOG.read_text(encoding="utf-8") == catalog(), "run python -m experiments.readme"
    assert "| `threat.labels` | `\"none\"` | " in TEXT


def test_the_catalog_names_everything_in_words_that_mean_something_there() -> None:
    text = catalog()
    for kind in get_args(Kind):
        assert set(lookup.offered(kind)) <= set(re.findall(r"^\| `([^`]+)` \|", text, flags=re.MULTILINE))
    assert "| `training.batch_size` | `1` | records in a batch; 0 means all that the client holds. |" in text
    assert "| `secure_aggregation` | Secure aggregation by double masking. |" in text
    assert "``" not in text
    assert "see the module" not in text


def test_what_the_defenses_measurements_lack_is_said_while_they_lack_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for lacks, said in (({"unfinished": 3, "planned": 9}, "3 of 9 runs"), ({}, "")):
        monkeypatch.setattr(measurements, "content", lambda lacks=lacks: {"rows": [], **lacks})
        assert said in readme.preliminary()
        assert bool(readme.preliminary()) == bool(said)
        assert f"<!-- preliminary -->\n{readme.preliminary()}\n<!-- /preliminary -->" in updated(TEXT)


def filed(name: str, figure: str) -> float:
    """As the file says, read by nothing of ours."""
    return float(tomllib.loads(claims()[name].read_text(encoding="utf-8"))["figures"][figure]["ours"])


def test_numbers_are_those_of_the_files() -> None:
    against, alone = (next(line for line in TEXT.splitlines() if f"| {name} |" in line) for name in ("B16-against", "B15b"))
    assert f"{filed('B16-against', 'difference_db'):+.1f} dB, paired | {filed('B16-against', 'cpu_ratio'):.2f} of its time" in against
    assert f"| {filed('B15b', 'psnr_db'):.1f} dB | {filed('B15b', 'cpu_seconds'):.0f} |" in alone
    assert f"{filed('learned-noise-adaptive', 'psnr_db'):.1f} by `adaptive_matching`" in TEXT
    bars = [figure for path in claims().values() for figure in tomllib.loads(path.read_text(encoding="utf-8"))["figures"].values()]
    missed = sum(not figure.get("met", True) for figure in bars)
    assert f"**{missed} of {len(bars)} bars are not met**: [docs/claims.md](docs/claims.md)" in TEXT
    assert f"## {missed} bars are not met" in (README.parent / "docs" / "claims.md").read_text(encoding="utf-8")


def test_every_claim_that_the_text_names_beside_a_row_is_printed_in_it() -> None:
    shown = {match[1] for text in BLOCKS.values() for match in FIGURE.finditer(text)}
    assert len(shown) > 30
    assert not re.search(r"[{}]", re.sub(FIGURE, "", "".join(BLOCKS.values())).replace("{missed}", "").replace("{bars}", ""))


def test_another_value_is_another_text_and_a_name_that_is_none_is_an_error() -> None:
    (claim,) = select(["B5"])
    text = "{B5.exact_batches:of}, {B5.exact_batches:pct}, {B5.cpu_seconds_median:.2f}"
    assert filled(text, {"B5": claim}) == "20 of 20, 100 %, 0.05"
    worse = replace(claim, figures={**claim.figures, "exact_batches": replace(claim.figures["exact_batches"], ours=0.95)})
    assert filled(text, {"B5": worse}) == "19 of 20, 95 %, 0.05"
    missed = {"cpu_seconds_median": Figure(ours=3.0, at_most=2.0, met=False, within=1.0, reason="none")}
    assert filled("{B5.cpu_seconds_median:.0f} s", {"B5": replace(claim, figures=missed)}) == "3 (bar ≤ 2: **not met**) s"
    with pytest.raises(KeyError):
        filled("{B5.exact_batch:of}", {"B5": claim})
    with pytest.raises(ValueError, match="markers of 'figures' once, got 0"):
        updated(TEXT.replace("<!-- figures -->", ""))
