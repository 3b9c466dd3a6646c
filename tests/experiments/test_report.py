"""The report: one file without network or script, all numbers in it, every input escaped, and verdicts from numbers alone."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console

from experiments.checks import EQUIVALENCE_DB, FLAGS
from experiments.ladder import BEST
from experiments.report import beside, html, limits, plots, table, values, verdict, words
from experiments.report.html import Picture
from experiments.report.rows import control_of, lines, rows_of, strongest
from experiments.report.threat import threat_card

VOID = {"meta", "img", "source", "link", "br", "hr", "input", "line", "circle"}
HOSTILE = '<script>alert("x")</script><img src=http://evil/x onerror=y> $\\frac{[red]'


def row(defense: str, **changes: object) -> dict[str, object]:
    base: dict[str, object] = {
        "defense": defense,
        "attack": "inverting_gradients",
        "view": "update",
        "victims": 32,
        "statuses": {"ok": 32},
        "scores": {
            "psnr_db": {"mean": 26.04, "low": 24.8, "high": 27.3, "min": 19.1, "median": 26.5, "max": 33.7},
            "ssim": {"mean": 0.81, "low": 0.75, "high": 0.87},
            "mse": {"mean": 0.00249, "low": 0.0018, "high": 0.0033},
            "label_accuracy": {"mean": 1.0},
        },
        "floor": {"psnr_db": 14.2, "name": "mean_image"},
        "gain": {"psnr_db": {"mean": 11.84, "low": 10.6, "high": 13.1}},
        "difference_to_control": {"psnr_db": {"mean": 0.0, "low": -0.1, "high": 0.1}},
        "identified": {"rate": 0.969, "low": 0.838, "high": 0.999, "chance": 0.01},
        "epsilon": "inf",
        "delta": None,
        "epsilon_for": "No guarantee for this server.",
        "ceiling": 1.0,
        "accuracy": 0.9421,
        "seconds": 2.4,
        "upload_bytes": 214_000,
        "flags": [],
    }
    return {**base, **changes}


def leak(rate: tuple[float, float, float], gain: tuple[float, float, float], **changes: object) -> dict[str, object]:
    return row(
        "arm",
        identified={"rate": rate[0], "low": rate[1], "high": rate[2], "chance": 0.01},
        gain={"psnr_db": {"mean": gain[0], "low": gain[1], "high": gain[2]}},
        **changes,
    )


def labels(low: float, floor: float | None, **changes: object) -> dict[str, object]:
    """A row whose attack answered labels only: every score of images is null."""
    scores = {"psnr_db": None, "ssim": None, "mse": None, "exact": None}
    judged = {"label_accuracy": {"mean": 0.9, "low": low, "high": 1.0, "floor": floor}}
    nothing: dict[str, object] = {"gain": None, "identified": None, "floor": None, "difference_to_control": None}
    return row("arm", answered="labels", scores=scores | judged, **(nothing | {"control": True} | changes))


def difference(low: float, high: float) -> dict[str, object]:
    return {"psnr_db": {"mean": (low + high) / 2, "low": low, "high": high}}


def arms() -> list[dict[str, object]]:
    weak = {
        "identified": {"rate": 0.031, "low": 0.001, "high": 0.162, "chance": 0.01},
        "gain": {"psnr_db": {"mean": -1.93, "low": -2.6, "high": -1.2}},
        "difference_to_control": difference(-15, -12),
        "flags": ["floor_not_beaten", "not_converged"],
    }
    return [
        row("none", difference_to_control=None),
        row("clip"),
        row("dp_sgd ε=8", epsilon=7.98, delta=1e-5, epsilon_for="One record, add or remove one.", ceiling=0.9, accuracy=0.874),
        row("dp_sgd ε=1", **(weak | {"epsilon": 0.997, "delta": 1e-5, "ceiling": 0.027, "accuracy": 0.761})),
        row("secure aggregation", **(weak | {"view": "aggregate"})),
        row("secure aggregation + DP", **(weak | {"view": "aggregate", "epsilon": 3.2})),
        row("central DP", accuracy=0.853),
    ]


def pictures(arm: str = "none") -> list[Picture]:
    rng = np.random.default_rng(0)
    return [
        Picture(
            arm=arm,
            attack="inverting_gradients",
            which=which,
            private=rng.random((12, 10, 3)),
            reconstructed=rng.random((12, 10)),
            psnr_db=20.0 + place,
            identified=place == 0,
            caption=f"client {place}, round 1, seed 0",
        )
        for place, which in enumerate(("best", "median", "worst"))
    ]


def terminal(summary: dict[str, object]) -> str:
    console = Console(width=100, record=True, file=io.StringIO(), color_system=None)
    console.print(table.table(summary))
    return console.export_text()


@pytest.fixture
def no_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the plot, which takes most of the time, to the tests that look at it."""
    monkeypatch.setattr(plots, "leakage_vs_accuracy", lambda rows, theme: Figure(figsize=(1, 1)))


def write(directory: Path, **changes: object) -> str:
    arguments: dict[str, object] = {
        "summary": {"schema": 1, "fedpeek": "0.1.0", "environment": {"torch": "2.8"}, "rows": arms()},
        "pictures": pictures(),
        "threat": {"adversary": "honest-but-curious", "labels": "none", "public_data": False},
        "spec_toml": '[world]\ndata = "faces"\n',
        "provenance": {"command": "fedpeek run", "seeds": "0, 1", "source": "https://example.org/paper"},
    }
    path = html.write(directory, **(arguments | changes))  # type: ignore[arg-type]
    assert path == directory / "report.html"
    return path.read_text(encoding="utf-8")


class Page(HTMLParser):
    """Collects tags with their attributes and text; refuses what does not nest."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {key: value or "" for key, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for found, attributes in self.tags if found == tag]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, Page]:
    directory = tmp_path_factory.mktemp("report")
    source = write(directory)
    return directory, source, Page(source)


def decode(uri: str) -> np.ndarray:
    kind, content = uri.split(",", 1)
    assert kind == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content, validate=True))))


def test_page_loads_nothing_and_runs_nothing(report: tuple[Path, str, Page]) -> None:
    _, source, page = report
    assert not page.all("script")
    assert not page.all("link")
    assert not page.all("iframe")
    for _, attributes in page.tags:
        assert not [key for key in attributes if key.startswith("on")]
        for key in ("src", "srcset", "href", "action", "data", "poster"):
            assert attributes.get(key, "#").startswith(("data:image/png;base64,", "#"))
    assert "url(" not in source
    assert "@import" not in source
    assert any("default-src 'none'" in attributes.get("content", "") for attributes in page.all("meta"))


def test_links_lead_somewhere(report: tuple[Path, str, Page]) -> None:
    page = report[2]
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {attributes["href"].removeprefix("#") for attributes in page.all("a")} <= set(ids)


def test_every_arm_and_its_numbers_are_on_the_page(report: tuple[Path, str, Page]) -> None:
    text = report[2].text
    for arm in arms():
        assert str(arm["defense"]) in text
    for part in (
        "∞",
        "7.98",
        "0.997",
        "97\u00a0%",
        "84–99.9\u00a0%",
        "+11.8\u00a0dB",
        "−1.9\u00a0dB",
        "94.2\u00a0%",
        "214\u00a0kB",
        "aggregate",
    ):
        assert part in text
    for part in (
        "δ = 10⁻⁵",
        "mean image",
        "One record, add or remove one.",
        "not converged",
        'data = "faces"',
        "fedpeek run",
        "https://example.org/paper",
    ):
        assert part in text


def test_page_is_accessible(report: tuple[Path, str, Page]) -> None:
    page = report[2]
    assert page.all("html") == [{"lang": "en"}]
    assert all(attributes.get("alt") for attributes in page.all("img"))
    assert all(attributes.get("scope") in ("col", "row") for attributes in page.all("th"))
    assert len(page.all("h1")) == 1


def test_embedded_pictures_are_the_pictures_that_were_given(report: tuple[Path, str, Page]) -> None:
    page = report[2]
    embedded = [decode(attributes["src"]) for attributes in page.all("img") if "plot" not in attributes.get("class", "")]
    expected = [np.rint(array * 255) for picture in pictures() for array in (picture.private, picture.reconstructed)]
    assert len(embedded) == len(expected) == 6
    for got, want in zip(embedded, expected, strict=True):
        np.testing.assert_array_equal(got, want)
    light, dark = (decode(attributes[key]) for tag, key in (("img", "src"), ("source", "srcset")) for attributes in page.all(tag)[-1:])
    assert light.shape == dark.shape
    assert light[..., :3].mean() > 200 > 60 > dark[..., :3].mean()


def test_files_beside_the_page(report: tuple[Path, str, Page]) -> None:
    directory = report[0]
    assert Image.open(directory / "leakage-vs-accuracy.png").size[0] > 1000
    names = sorted(path.name for path in (directory / "pictures").iterdir())
    assert names == [f"01-none-inverting-gradients-{which}.png" for which in ("best", "median", "worst")]
    pair = np.asarray(Image.open(directory / "pictures" / names[0]))
    factor = 256 // 12
    np.testing.assert_array_equal(pair[::factor, : 10 * factor : factor], np.rint(pictures()[0].private * 255))


@pytest.mark.usefixtures("no_plot")
def test_input_is_escaped_everywhere(tmp_path: Path) -> None:
    hostile = row(
        HOSTILE,
        attack=HOSTILE,
        view=HOSTILE,
        epsilon_for=HOSTILE,
        flags=[HOSTILE],
        floor={"psnr_db": 1.0, "name": HOSTILE},
        statuses={HOSTILE: 3},
    )
    picture = Picture(
        arm=HOSTILE,
        attack=HOSTILE,
        which="best",
        private=np.zeros((4, 4)),
        reconstructed=np.ones((4, 4)),
        psnr_db=0.0,
        identified=False,
        caption=HOSTILE,
    )
    source = write(
        tmp_path,
        summary={"rows": [hostile], "environment": {HOSTILE: HOSTILE}},
        pictures=[picture],
        threat={"adversary": HOSTILE, HOSTILE: HOSTILE, "labels": HOSTILE},
        spec_toml=HOSTILE + "</code></pre>",
        provenance={HOSTILE: HOSTILE},
    )
    page = Page(source)
    assert not page.all("script")
    assert len(page.all("img")) == 3
    assert not [attributes for _, attributes in page.tags if "onerror" in attributes]
    assert HOSTILE in page.text
    assert {path.parent for path in tmp_path.rglob("*.png")} <= {tmp_path, tmp_path / "pictures"}


@pytest.mark.parametrize("missing", [*row("none"), "everything"])
def test_missing_and_empty_keys_are_tolerated(missing: str) -> None:
    whole = row("none", difference_to_control=None)
    cut = {} if missing == "everything" else {key: value for key, value in whole.items() if key != missing}
    for changed in (cut, {**whole, missing: None}, {**whole, missing: "inf"}, {**whole, missing: {}}, {**whole, missing: float("nan")}):
        summary = {"rows": [changed, row("clip")]}
        assert len(lines(summary)) == 2
        assert table.table(summary).row_count == 2
        assert words.answer(summary, {})
        assert words.facts(summary)


@pytest.mark.usefixtures("no_plot")
def test_a_bare_row_still_makes_a_page(tmp_path: Path) -> None:
    endless = {"psnr_db": {"mean": "inf", "low": 1, "high": "inf"}}
    bare = [{}, {"defense": "x", "epsilon": float("inf"), "scores": None, "identified": {"rate": None}, "gain": endless}]
    source = write(tmp_path, summary={"rows": bare}, pictures=[], threat={}, spec_toml="", provenance={})
    assert "—" in Page(source).text
    assert 'id="gallery"' not in source
    assert "no rows" in Page(write(tmp_path, summary={}, pictures=[])).text


def test_each_attack_of_an_arm_has_its_row_and_the_strongest_stands_for_the_arm() -> None:
    strong = row("none", difference_to_control=None)
    weak = leak((0.1, 0.02, 0.3), (1.0, 0.2, 2.0), attack="dlg", difference_to_control=None) | {"defense": "none"}
    summary = {"rows": [weak, strong, row("clip"), row("clip", attack="dlg")]}
    assert strongest(rows_of(summary))[0] is strong
    assert [line.strongest for line in lines(summary)] == [False, True, True, False]
    assert control_of(summary["rows"][3], rows_of(summary)) is weak


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (leak((1.0, 0.9, 1.0), (11.0, 10.0, 12.0)), "recognizable"),
        (leak((0.6, verdict.RECOGNIZABLE_RATE, 0.7), (verdict.RECOGNIZABLE_GAIN_DB, 0.1, 4.0)), "recognizable"),
        (leak((0.6, verdict.RECOGNIZABLE_RATE - 0.01, 0.7), (verdict.RECOGNIZABLE_GAIN_DB, 0.1, 4.0)), "partial"),
        (leak((0.6, 0.55, 0.7), (verdict.RECOGNIZABLE_GAIN_DB - 0.01, 0.1, 4.0)), "partial"),
        (leak((0.6, 0.55, 0.7), (9.0, 0.0, 14.0)), "identifiable"),
        (leak((0.03, 0.01, 0.1), (1.0, 0.1, 2.0)), "faint"),
        (leak((0.03, 0.01, 0.1), (1.0, -0.1, 2.0)), "floor"),
        (leak((1.0, 0.9, 1.0), (11.0, 10.0, 12.0), statuses={"ok": 0}), "unmeasured"),
        (row("x", identified=None, gain=None), "unmeasured"),
        (labels(0.8, 0.53), "labels"),
        (labels(0.53, 0.53), "floor"),
        (labels(0.8, None), "floor"),
        (labels(0.8, 0.53, statuses={"ok": 0, "unsupported": 2}), "unmeasured"),
        (row("x", gain=None), "identifiable"),
        (row("x", identified=None), "faint"),
    ],
)
def test_verdict_levels(changed: dict[str, object], expected: str) -> None:
    assert verdict.level(changed) == expected
    assert verdict.verdict(changed).words == verdict.WORDS[expected]  # type: ignore[index]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (-0.1, 0.1, verdict.EQUAL),
        (0.0, 0.0, verdict.EQUAL),
        (-EQUIVALENCE_DB + 0.01, EQUIVALENCE_DB - 0.01, verdict.EQUAL),
        (-EQUIVALENCE_DB, 0.1, verdict.UNDECIDED),
        (-0.1, EQUIVALENCE_DB, verdict.UNDECIDED),
        (-EQUIVALENCE_DB, -0.1, verdict.LESS),
        (0.1, EQUIVALENCE_DB, verdict.MORE),
        (-1.0, -0.1, verdict.LESS + verdict.SLIGHTLY),
    ],
)
def test_comparison_with_no_defense(low: float, high: float, expected: str) -> None:
    assert verdict.verdict(row("x", difference_to_control=difference(low, high))).against_control == expected


@pytest.mark.parametrize(("p_holm", "words"), [(0.001, verdict.LESS), (0.05, verdict.LESS + verdict.ALONE), (None, verdict.LESS)])
def test_a_difference_that_is_lost_among_all_rows_says_so(p_holm: float | None, words: str) -> None:
    """One row of hundreds lies outside of 95 % by chance."""
    found = {**difference(-9, -7), "p_holm": p_holm}
    assert verdict.verdict(row("x", difference_to_control=found)).against_control == words


def test_no_credit_where_the_undefended_attack_fails() -> None:
    failed = leak((0.0, 0.0, 0.1), (-1.0, -2.0, 0.0), difference_to_control=None)
    assert verdict.verdict(row("x", difference_to_control=difference(-9, -7)), failed).against_control == verdict.NO_CREDIT
    blurred = leak((0.6, 0.5, 0.7), (-1.0, -2.0, 0.0), difference_to_control=None)
    assert verdict.verdict(row("x", difference_to_control=difference(-9, -7)), blurred).against_control == verdict.NO_CREDIT
    assert verdict.verdict(failed, failed).against_control == ""


def test_no_credit_where_no_victim_is_left_to_compare() -> None:
    nothing = {"psnr_db": None, "identified": None, "pairs": 8, "undefended_missed": 8, "p": None, "p_holm": None}
    assert verdict.verdict(row("x", difference_to_control=nothing), row("none")).against_control == verdict.NO_CREDIT


def test_the_control_is_the_row_that_says_so() -> None:
    rows = [row("noise", control=False, difference_to_control=None), row("none", control=True, difference_to_control=None)]
    assert control_of(rows[0], rows) is rows[1]


def test_labels_are_judged_as_labels_and_null_is_never_zero(tmp_path: Path, no_plot: None) -> None:
    summary = {"rows": [labels(0.8, 0.53)]}
    line = lines(summary)[0]
    assert (line.verdict.words, line.identified_bar, line.gain_bar) == ("labels recovered", None, None)
    text = Page(write(tmp_path, summary=summary, pictures=[])).text
    body = text[text.index("Flags") : text.index("Dots are means")]
    for part in ("labels recovered", "90\u00a0% of the labels right (80–100\u00a0%), floor 53\u00a0%", "—"):
        assert part in body
    assert not re.search(r"(?<!\d)0\u00a0(%|dB)", body)
    assert "recovers the labels, but no pictures, under arm" in text
    printed = terminal(summary)
    assert re.search(r"labels +— +∞", printed)
    assert "90\u00a0% [80, 100]" in printed
    assert "floor 53\u00a0%" in printed
    assert "chance" not in printed


def test_an_arm_is_answered_by_pictures_before_labels_and_by_labels_before_nothing() -> None:
    nothing = row("arm", attack="linear_leak", identified=None, gain=None, scores={}, statuses={"ok": 0, "unsupported": 2})
    recovered, seen = labels(0.8, 0.53, attack="label_recovery"), row("arm", attack="dlg")
    assert strongest([nothing, recovered]) == [recovered]
    assert strongest([nothing, recovered, seen]) == [seen]


def test_verdict_ignores_the_arms_name() -> None:
    assert {verdict.verdict(row(name)) for name in ("none", "clip", "secure aggregation", HOSTILE)} == {verdict.verdict(row("x"))}


def test_answer_names_each_arm_once_under_what_it_leaks() -> None:
    pieces = words.answer({"rows": arms()}, {})
    assert sorted(text for text, arm in pieces if arm) == sorted(str(arm["defense"]) for arm in arms())
    sentence = "".join(text for text, _ in pieces)
    assert "The honest-but-curious server can recognize the clients’ pictures under none, clip, dp_sgd ε=8 and central DP; " in sentence
    assert sentence.endswith(
        "it was not shown to do better than a blind guess under dp_sgd ε=1, secure aggregation and secure aggregation + DP."
    )
    assert [text for text, arm in words.no_better({"rows": arms()}) if arm] == ["clip", "dp_sgd ε=8", "central DP"]


def test_threat_card_speaks_of_what_was_disclosed() -> None:
    card = dict(threat_card({"labels": "exact", "public_data": True, "colluding_clients": 2}, {"rows": arms()}))
    assert list(card) == ["Who", "What it sees", "What it was told", "What it cannot do"]
    told = " ".join(card["What it was told"])
    assert "Each private label" in told
    assert "Public pictures" in told
    assert "Colluding clients: 2" in told
    assert len(card["What it sees"]) == 2
    assert dict(threat_card({"who": "A nosy landlord."}, {}))["Who"] == ["A nosy landlord."]


def test_flags_are_explained_and_warnings_stand_out(tmp_path: Path, no_plot: None) -> None:
    assert all(words.explain(flag).endswith(".") for flag in FLAGS)
    assert words.explain("my_flag") == ""
    source = write(tmp_path, summary={"rows": [row("x", flags=["floor_not_beaten", "not_distinguishable", "my_flag"])]}, pictures=[])
    assert re.findall(r'<span class="(flag|note)">([^<]+)</span>', source) == [
        ("flag", "floor not beaten"),
        ("note", "not distinguishable"),
        ("flag", "my flag"),
    ]
    assert "Raised by the run" in source


def test_reasons_and_lost_clients_are_named(tmp_path: Path, no_plot: None) -> None:
    unsupported = row("arm", statuses={"ok": 0, "unsupported": 4}, identified=None, gain=None, reasons=["needs a dense layer"])
    lost = row("other", client_failures=["client 3 sent NaN in round 1"])
    text = Page(write(tmp_path, summary={"rows": [unsupported, lost]}, pictures=[])).text
    for part in ("not measured", "needs a dense layer", "4 unsupported", "other: client 3 sent NaN in round 1"):
        assert part in text
    printed = terminal({"rows": [unsupported, unsupported | {"defense": "clip"}, row("none", reasons=["one of many fell over"])]})
    assert "inverting_gradients under arm and clip: not measured: needs a dense layer" in printed
    assert "fell over" not in printed
    broken = row("arm", statuses={"ok": 0, "failed": 3, "diverged": 1}, reasons=["CUDA fell over"])
    assert verdict.verdict(broken) == verdict.Verdict("unmeasured", verdict.FAILED, "")
    assert "inverting_gradients under arm: every attack failed: CUDA fell over" in terminal({"rows": [broken]})


def test_accuracy_that_was_not_measured_is_a_dash() -> None:
    unknown = {"rows": [row("x", accuracy=None)]}
    assert re.search(r"100\u00a0% +— *$", terminal(unknown), re.MULTILINE)


def test_rows_of_several_rounds_are_told_apart() -> None:
    rows = [
        row(arm, rounds=[at], difference_to_control=None if arm == "none" else difference(-1, 1))
        for arm in ("none", "clip")
        for at in (0, 9)
    ]
    assert [line.rounds for line in lines({"rows": rows})] == ["round 0", "round 9"] * 2
    assert [line.rounds for line in lines({"rows": rows[:1]})] == [""]
    assert control_of(rows[3], rows) is rows[1]


def test_terminal_table_holds_the_numbers_in_100_columns() -> None:
    text = terminal({"rows": [*arms(), labels(0.81234, 0.53), row("a [bold]very long[/bold] stack of defenses " * 3)]})
    assert max(map(len, text.splitlines())) <= 100
    for part in (
        "97\u00a0% [84, 99.9]",
        "+11.8 [10.6, 13.1]",
        "−1.9 [−2.6, −1.2]",
        "∞",
        "7.98",
        "2.7\u00a0%",
        "94.2\u00a0%",
        "aggregate",
        "dp_sgd ε=8",
        "[bold]",
    ):
        assert part in text
    assert "a: floor not beaten." in text
    assert re.search(r"dp_sgd ε=1 .* a b", text)
    assert "(all" not in text
    assert "dp_sgd ε=8: One record, add or remove one." in " ".join(text.split())


def test_beside_the_ceiling_for_what_the_attack_saw_stands_that_of_the_whole_training() -> None:
    text = terminal({"rows": [*arms()[:1], row("dp", epsilon=1.0, ceiling=0.027, training_ceiling=0.9)]})
    assert max(map(len, text.splitlines())) <= 100
    assert re.search("2.7\u00a0%.*\n.*\\(all 90\u00a0%\\)", text)
    assert "for whoever has every upload of the training" in text
    assert limits.identification({"ceiling": 0.3, "training_ceiling": 0.3}) == "30\u00a0%"
    assert limits.identification({"ceiling": 0.3, "training_ceiling": None}) == "30\u00a0%"


@pytest.mark.parametrize(
    ("rows", "panels"), [(arms(), 7), ([], 0), ([row("x", accuracy=None)], 0), ([row("$\\bad", gain={"psnr_db": {"mean": "inf"}})], 0)]
)
def test_plot_labels_each_arm_directly(rows: list[dict[str, object]], panels: int) -> None:
    figure = plots.leakage_vs_accuracy(rows)
    names = [text.get_text() for text in figure.axes[0].texts]
    assert sum(str(arm["defense"]) in names for arm in rows) == panels
    assert plots.png(figure).startswith(b"\x89PNG")


@pytest.mark.usefixtures("no_plot")
def test_picture_of_an_impossible_shape_is_refused(tmp_path: Path) -> None:
    bad = Picture(
        arm="none", attack="a", which="best", private=np.zeros((3, 8, 8)), reconstructed=np.zeros((8, 8)), psnr_db=1.0, identified=False
    )
    with pytest.raises(ValueError, match="Move the channels last"):
        write(tmp_path, pictures=[bad])


@pytest.mark.usefixtures("no_plot")
def test_a_picture_that_is_no_number_is_still_drawn(tmp_path: Path) -> None:
    broken = Picture(
        arm="none",
        attack="a",
        which="best",
        private=np.zeros((4, 4, 1)),
        reconstructed=np.full((4, 4), np.nan),
        psnr_db=float("nan"),
        identified=False,
    )
    assert "—" in write(tmp_path, pictures=[broken])


@pytest.mark.parametrize(
    ("got", "expected"),
    [
        (values.number("inf"), float("inf")),
        (values.number("∞"), float("inf")),
        (values.number("many"), None),
        (values.number(True), None),
        (values.number({"mean": 2}), 2.0),
        (values.fixed(-0.04, sign=True), "+0.0"),
        (values.percent(0.0), "0\u00a0%"),
        (values.percent(0.9995), "100\u00a0%"),
        (values.percent(0.162), "16\u00a0%"),
        (values.significant(1e-5), "10⁻⁵"),
        (values.significant(2.5e-7), "2.5·10⁻⁷"),
        (values.size(856_000), "856\u00a0kB"),
        (values.duration(0.0123), "12\u00a0ms"),
        (values.duration(0.0996), "100\u00a0ms"),
        (values.duration(0.264), "260\u00a0ms"),
        (values.duration(0.9949), "990\u00a0ms"),
        (values.duration(0.996), "1.0\u00a0s"),
        (values.duration(None), "—"),
    ],
)
def test_numbers_are_read_and_printed(got: object, expected: object) -> None:
    assert got == expected


def test_names_of_arms_break_at_spaces_only(report: tuple[Path, str, Page], tmp_path: Path, no_plot: None) -> None:
    """Each word of a name stands in a span that does not wrap, but for one that is longer than any name should be."""
    css = (html.FOLDER / "report.css").read_text(encoding="utf-8")
    assert re.search(r"^\.whole \{[^}]*white-space: nowrap", css, re.MULTILINE)
    for name in ("dp_sgd ε=8", "secure aggregation + DP"):
        spans = " ".join(f'<span class="whole">{word}</span>' for word in name.split())
        assert f'<th scope="row">{spans}' in report[1]
        assert f"<b>{spans}</b>" in report[1]
    assert f"<span>{'x' * 33}</span>" in write(tmp_path, summary={"rows": [row("x" * 33)]}, pictures=[])


def test_who_sent_a_record_is_printed_where_an_attack_names_it_beside_chance(tmp_path: Path, no_plot: None) -> None:
    """On the page twice, among the attacks and below the table; in the terminal; and never of the best attack per victim."""
    named = {"attributed": {"rate": 0.78125, "low": 0.6, "high": 0.907, "records": 32, "chance": 0.25}}
    rows = [row("none"), row("sum", attack="support_leak", **named), row("sum", attack=BEST, **named)]
    said = "78\u00a0% [60–91\u00a0%] of 32 records, chance 25\u00a0%"
    assert beside.senders(rows) == [("sum", "support_leak", said)]
    text = Page(write(tmp_path, summary={"rows": rows}, pictures=[])).text
    assert f"sum, support_leak: names the sender of {said}" in text
    assert text.count(said) == 2
    assert f"Senders named rightly: support_leak, sum: {said}." in re.sub("[ \n]+", " ", terminal({"rows": rows}))
    assert "Senders named" not in Page(write(tmp_path, summary={"rows": rows[:1]}, pictures=[])).text + terminal({"rows": rows[:1]})


def test_names_of_chance_lines_that_are_close_are_one() -> None:
    def chance(value: float, view: str) -> dict[str, object]:
        return row(f"{view} {value}", view=view, identified={"rate": 0.5, "low": 0.4, "high": 0.6, "chance": value})

    figure = plots.leakage_vs_accuracy([chance(0.01, "update"), chance(0.02, "update"), chance(0.04, "aggregate"), chance(0.5, "sum")])
    words_ = [text.get_text() for text in figure.axes[1].texts if text.get_text().startswith("chance")]
    assert words_ == ["chance\n4 %, aggregate\n2 %, update\n1 %, update", "chance\n50 %, sum"]


def test_an_interval_says_what_it_holds_and_the_range_of_the_seeds_means_stands_beside_it(tmp_path: Path, no_plot: None) -> None:
    """What it does not hold is another initial model; repetitions of a victim are said, and no row of an older version breaks."""
    ranges = {
        "gain": {"psnr_db": {"mean": 11.84, "low": 10.6, "high": 13.1, "seeds": {"low": 9.5, "high": 14.2}}},
        "identified": {"rate": 0.5, "low": 0.3, "high": 0.7, "seeds": {"low": 0.25, "high": 0.75}, "chance": 0.01},
    }
    rows = [row("none", victims=6, scored=24, **ranges)]
    text = Page(write(tmp_path, summary={"rows": rows}, pictures=[])).text
    assert "10.6 to 13.1seeds 9.5 to 14.2" in text
    assert "seeds 25–75\u00a0%" in text
    assert "6 (scored 24 times)" in text
    assert "over victims, given these initial models" in text
    assert "over victims, given these initial models" in re.sub(r"\s+", " ", terminal({"rows": rows}))
    older = Page(write(tmp_path, summary={"rows": [row("none")]}, pictures=[])).text
    assert "seeds 9" not in older
    assert "given these initial models" not in older
    assert "It does not cover other initial models" in older
