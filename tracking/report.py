"""``report.html``: a run's curves and facts in one file that opens anywhere, without a network."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path

from .chart import Series, draw, number
from .files import write_whole
from .journal import read_rows
from .report_page import PALETTE, page
from .samples import section

_SPLITS = ("train", "val", "test")
_FIRST = ("loss", "accuracy")
_SPEED = "Speed and schedule"
_OF_SPEED = ("samples_per_second", "step_seconds", "data_seconds", "lr", "grad_norm")
_MOST_CHARTS = 120


def write_report(run_dir: str | Path, *, title: str, facts: Mapping[str, str]) -> Path:
    """Write ``<run_dir>/report.html`` from the run's ``metrics.jsonl`` and pictures; its path.

    Args:
        title: the page's headline.
        facts: rows of a table, in order; plain text.

    Raises:
        OSError: the metrics cannot be read or the report cannot be written.
    """
    folder = Path(run_dir)
    series = _read(folder / "metrics.jsonl")
    curves = f"{_tiles(series)}{_charts(series.values())}{section(folder)}"
    body = f"<h1>{escape(title)}</h1>{curves}{_facts(facts)}{_table(series.values())}"
    path = folder / "report.html"
    write_whole(path, page(title, body))
    return path


def _read(path: Path) -> dict[str, Series]:
    """Every metric that is a number, by name."""
    series: dict[str, Series] = {}
    for row in read_rows(path):
        for name, value in row.numbers():
            if name not in series:
                series[name] = Series(name)
            series[name].add(row.step, value)
    return series


def _place(name: str) -> tuple[str, str]:
    """Section and chart of a metric: a metric of several splits, or of several parts, is one chart."""
    first, _, rest = name.partition("/")
    if first in _SPLITS and rest:
        last = rest.rpartition("/")[2]
        return (_SPEED if last in _OF_SPEED else "Learning"), last
    return (first if rest else "Other"), name


def _rank(chart: tuple[str, str]) -> tuple[object, ...]:
    section, title = chart
    known = _FIRST if section == "Learning" else _OF_SPEED
    place = known.index(title) if section in ("Learning", _SPEED) and title in known else len(known)
    return section != "Learning", section != _SPEED, section == "Other", section, place, title


def _charts(series: Iterable[Series]) -> str:
    charts: dict[tuple[str, str], list[Series]] = {}
    for one in series:
        chart = _place(one.name)
        if one.finite() and chart != ("Learning", "epoch"):
            charts.setdefault(chart, []).append(one)
    if not charts:
        return '<p class="card note">No numbers were logged in this run.</p>'
    sections: dict[str, list[str]] = {}
    for index, chart in enumerate(sorted(charts, key=_rank)[:_MOST_CHARTS]):
        section, title = chart
        drawn = sorted(charts[chart], key=lambda one: (_split(one.name), one.name))
        sections.setdefault(section, []).append(draw(title, drawn, colors=_colors(drawn), key=f"chart{index}"))
    html = "".join(f'<h2>{escape(name)}</h2><div class="charts">{"".join(of)}</div>' for name, of in sections.items())
    left_out = len(charts) - _MOST_CHARTS
    return html + (f'<p class="note">{left_out} more charts are left out.</p>' if left_out > 0 else "")


def _split(name: str) -> int:
    first = name.partition("/")[0]
    return _SPLITS.index(first) if first in _SPLITS else len(_SPLITS)


def _colors(series: list[Series]) -> list[int]:
    """Each split has its colour in every chart, where a split is one curve of the chart."""
    splits = [_split(one.name) for one in series]
    if len(set(splits)) == len(splits) and max(splits) < len(_SPLITS):
        return splits
    return [index % PALETTE for index in range(len(series))]


def _tiles(series: Mapping[str, Series]) -> str:
    tiles: list[tuple[str, float]] = []
    for split in ("test", "val"):
        tiles += [(name, one.last()) for name, one in sorted(series.items()) if name.startswith(f"{split}/")]
    if "train/loss" in series:
        tiles.append(("train/loss", series["train/loss"].last()))
    speeds = series["train/samples_per_second"].finite() if "train/samples_per_second" in series else []
    if speeds:
        tiles.append(("samples per second, median", statistics.median(speeds)))
    html = "".join(f"<div><span>{escape(name)}</span><b>{number(value)}</b></div>" for name, value in tiles[:12])
    return f'<div class="tiles">{html}</div>' if tiles else ""


def _facts(facts: Mapping[str, str]) -> str:
    if not facts:
        return ""
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in facts.items())
    return f'<h2>Facts</h2><div class="card scroll"><table class="facts">{rows}</table></div>'


def _table(series: Iterable[Series]) -> str:
    rows = "".join(
        f"<tr><td>{escape(one.name)}</td><td>{number(one.last())}</td><td>{one.steps[-1]:,}</td>"
        f"<td>{number(min(finite)) if finite else '–'}</td><td>{number(max(finite)) if finite else '–'}</td>"
        f"<td>{len(one.values):,}</td><td>{one.not_finite or ''}</td></tr>"
        for one in series
        for finite in [one.finite()]
    )
    if not rows:
        return ""
    names = ("metric", "last", "at step", "least", "most", "rows", "not finite")
    head = f"<tr>{''.join(f'<th>{name}</th>' for name in names)}</tr>"
    return f'<h2>Metrics</h2><div class="card scroll"><table class="numbers">{head}{rows}</table></div>'
