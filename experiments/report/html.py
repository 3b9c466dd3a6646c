"""The report: one HTML file that needs no network, no script and no other file, and the same pictures as PNG files beside it."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jinja2
import numpy as np
from markupsafe import Markup

from experiments import marginals
from experiments.checks import INFORMATION
from experiments.report import beside, costs, front, limits, pareto, plots, senders, values, words
from experiments.report import pictures as pixels
from experiments.report.headline import Row, laddered, name, rows_of, strongest, texts_of
from experiments.report.rows import SCORES, Line, lines, main_lines
from experiments.report.theme import DARK, LIGHT
from experiments.report.threat import threat_card
from experiments.report.values import estimate
from experiments.report.verdict import Verdict

FOLDER = Path(__file__).parent
PLOT, FRONT, CURVE = "leakage-vs-accuracy.png", "pareto.svg", "leakage-vs-senders.png"
PIXELATED_BELOW = 128  # pixels; a smaller picture is enlarged without smoothing, so that a reader sees what the adversary has
ORDER = {"best": 0, "median": 1, "worst": 2}


def write(
    directory: Path,
    *,
    summary: Mapping[str, object],
    pictures: Sequence[Picture],
    threat: Mapping[str, object],
    spec_toml: str,
    provenance: Mapping[str, str],
) -> Path:
    """Write ``report.html``, the plot and one PNG for each pair of pictures; return the report's path.

    Args:
        directory: where to write; made if it is missing.
        summary: the content of ``summary.json``; an optional key that is missing is printed as an em dash.
        pictures: best, median and worst victim of each arm.
        threat: the fields of the threat model (see :mod:`experiments.report.threat`).
        spec_toml: the resolved spec.
        provenance: what is needed to run it again, by name: command, seeds, versions, hash.
    """
    directory.mkdir(parents=True, exist_ok=True)
    rows = rows_of(summary)
    light, dark = (plots.png(plots.leakage_vs_accuracy(rows, theme)) for theme in (LIGHT, DARK))
    (directory / PLOT).write_bytes(light)
    fronts = _fronts(rows, directory / FRONT)
    curves = _curves(rows, directory / CURVE)
    main, details = main_lines(summary), lines(summary)
    galleries = _galleries(pictures, main if laddered(rows) else details)
    _write_pairs(directory / "pictures", galleries)
    page = _template().render(
        css=Markup((FOLDER / "report.css").read_text(encoding="utf-8")),
        answer=words.answer(summary, threat),
        no_better=words.no_better(summary),
        facts=words.facts(summary),
        lines=main,
        details=details,
        ladder=laddered(rows),
        costs=costs.lines(rows),
        limits=limits.lines(rows),
        layers=[line for row in _listed(summary, "layers") for line in marginals.lines(row)],
        layer_headings=marginals.HEADINGS,
        chances=list(dict.fromkeys(values.percent(line.chance) for line in main if line.chance is not None)),
        class_chances=values.percent_span([line.class_chance for line in main if line.class_chance is not None]),
        several=len({line.attack for line in details}) > 1,
        sentences=list(dict.fromkeys(line.sentence for line in main if line.sentence)),
        flags=[(flag, _explained(flag, rows)) for flag in dict.fromkeys(flag for line in (*main, *details) for flag in line.flags)],
        senders=beside.senders(rows),
        shown=[place for place in range(len(SCORES)) if any(line.scores[place].mean != values.MISSING for line in details)],
        information=INFORMATION,
        galleries=galleries,
        plot=(pixels.data_uri(light), pixels.data_uri(dark)),
        plot_text=_plot_text(rows),
        front=fronts,
        front_text=pareto.text(rows),
        curve=curves,
        curve_text=senders.text(rows),
        front_lines=pareto.lines(rows),
        front_says=front.sentences(rows),
        threat=threat_card(threat, summary),
        glossary=words.GLOSSARY,
        verdicts=words.verdicts(),
        spec_toml=spec_toml,
        provenance=_provenance(summary, provenance),
        v=values,
    )
    path = directory / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _listed(summary: Mapping[str, object], key: str) -> list[Mapping[str, Any]]:
    found = summary.get(key)
    return [row for row in found if isinstance(row, Mapping)] if isinstance(found, list) else []


def _explained(flag: str, rows: Sequence[Row]) -> str:
    """The sentence that explains a flag, with the defenses that it is about."""
    about = dict.fromkeys(found for row in rows for found in texts_of(row, "not_modeled")) if flag == "defense_not_modeled" else ()
    return f"{words.explain(flag)} Here: {', '.join(about)}." if about else words.explain(flag)


def _fronts(rows: Sequence[Mapping[str, object]], path: Path) -> list[str]:
    """Write the Pareto plot as an SVG file, and return it for the page, light and dark; none where no arm can be compared with another."""
    if max(len(front.panel(rows, which)) for which in front.PANELS) < 2:
        return []
    light, dark = (pareto.pareto(rows, theme) for theme in (LIGHT, DARK))
    path.write_text(pareto.svg(light), encoding="utf-8")
    return [pixels.data_uri(plots.png(drawn)) for drawn in (light, dark)]


def _curves(rows: Sequence[Mapping[str, object]], path: Path) -> list[str]:
    """Write the curve over the number of senders, and return it for the page, light and dark; none where arms have too few numbers."""
    drawn = [plots.png(figure) for theme in (LIGHT, DARK) if (figure := senders.curve(rows, theme)) is not None]
    if drawn:
        path.write_bytes(drawn[0])
    return [pixels.data_uri(each) for each in drawn]


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html.j2")


def _galleries(pictures: Sequence[Picture], all_lines: Sequence[Line]) -> list[Gallery]:
    """Group the pictures by arm and attack, in the table's order; a group that the table lacks comes last."""
    groups: dict[tuple[str, str], list[Picture]] = {(line.defense, line.attack): [] for line in all_lines}
    verdicts: dict[tuple[str, str], set[Verdict]] = {}
    for line in all_lines:
        verdicts.setdefault((line.defense, line.attack), set()).add(line.verdict)
    for picture in pictures:
        groups.setdefault((picture.arm, picture.attack), []).append(picture)
    return [
        Gallery(
            arm=arm,
            attack=attack,
            verdict=_agreed(verdicts.get((arm, attack), set())),
            frames=tuple(map(_frame, sorted(found, key=_order))),
        )
        for (arm, attack), found in groups.items()
        if found
    ]


def _agreed(verdicts: Collection[Verdict]) -> Verdict | None:
    return next(iter(verdicts)) if len(verdicts) == 1 else None


def _order(picture: Picture) -> int:
    return ORDER.get(picture.which, len(ORDER))


def _frame(picture: Picture) -> Frame:
    private, reconstructed = (pixels.eight_bit(np.asarray(array)) for array in (picture.private, picture.reconstructed))
    return Frame(
        picture=picture,
        private=pixels.data_uri(pixels.png(private)),
        reconstructed=pixels.data_uri(pixels.png(reconstructed)),
        pixelated=max(private.shape[:2]) < PIXELATED_BELOW,
        psnr=values.decibel(values.number(float(picture.psnr_db))),
    )


def _write_pairs(folder: Path, galleries: Sequence[Gallery]) -> None:
    """Write each pair as ``<place>-<arm>-<attack>-<which>.png``; names are made safe, and the place keeps them apart."""
    for place, gallery in enumerate(galleries, start=1):
        folder.mkdir(exist_ok=True)
        stem = "-".join(re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40] or "arm" for text in (gallery.arm, gallery.attack))
        for frame in gallery.frames:
            content = pixels.png(pixels.pair(np.asarray(frame.picture.private), np.asarray(frame.picture.reconstructed)))
            (folder / f"{place:02d}-{stem}-{frame.picture.which}.png").write_bytes(content)


def _plot_text(rows: Sequence[Mapping[str, object]]) -> str:
    """Say in words what the plot shows, for who cannot see it."""
    parts = [
        f"{name(row, 'defense')}: accuracy {values.percent(estimate(row, 'accuracy').value, 1)}, "
        f"identified {values.percent(estimate(row, 'identified').value)}, "
        f"PSNR gain {values.decibel(estimate(row, 'gain', 'psnr_db').value, sign=True)}"
        for row in strongest(rows)
    ]
    return "Leakage over accuracy, one point an arm. " + "; ".join(parts) + "."


def _provenance(summary: Mapping[str, object], provenance: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return what was given, then fedpeek's version and the environment from the summary where they were not."""
    found = {str(key): str(value) for key, value in provenance.items()}
    environment = summary.get("environment")
    extra: dict[str, object] = {"fedpeek": summary.get("fedpeek"), **(environment if isinstance(environment, Mapping) else {})}
    for key, value in extra.items():
        if value is not None:
            found.setdefault(str(key), str(value))
    return list(found.items())


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One victim's private picture beside what an attack made of the upload.

    Attributes:
        arm: the stack of defenses, named as in the summary's ``defense``.
        attack: the attack's name, as in the summary.
        which: the victim's place among all victims, by PSNR from the adversary's side.
        private: the truth, HW or HWC in [0, 1].
        reconstructed: the guess, likewise.
        psnr_db: of this pair.
        identified: whether the truth is the guess's nearest among the candidates.
        caption: who and when, such as "client 3, round 1, seed 0".
    """

    arm: str
    attack: str
    which: Literal["best", "median", "worst"]
    private: np.ndarray
    reconstructed: np.ndarray
    psnr_db: float
    identified: bool
    caption: str = ""


@dataclass(frozen=True, kw_only=True)
class Frame:
    """A picture ready for the page."""

    picture: Picture
    private: str
    reconstructed: str
    pixelated: bool
    psnr: str


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """The pictures of one arm under one attack; the verdict is None where the table has no such row, or several that differ."""

    arm: str
    attack: str
    verdict: Verdict | None
    frames: tuple[Frame, ...]
