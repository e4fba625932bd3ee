"""The report: one page that opens anywhere and survives whatever was logged."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from dltrain.tracking.chart import Series, number, smooth, thin
from dltrain.tracking.journal import Journal, Row
from dltrain.tracking.report import write_report
from hypothesis import given
from hypothesis import strategies as st

HOSTILE = "</script><img src=http://evil.example onerror=alert(1)>\"'&\u202e\ud800"


class Page(HTMLParser):
    """The parsed report: its elements, and its text by the innermost element."""

    VOID = ("meta", "link", "input", "img", "path", "circle", "line")

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(self.source)
        self.close()
        assert not self._open, "every element is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.setdefault(self._open[-1] if self._open else "", []).append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def charts(self) -> list[dict[str, Any]]:
        return [json.loads(text) for text in self.text["script"] if text.startswith("{")]


def report(folder: Path, rows: list[Row], facts: dict[str, str] | None = None, title: str = "digits") -> Page:
    journal = Journal(folder / "metrics.jsonl")
    journal.extend(rows)
    journal.close()
    path = write_report(folder, title=title, facts=facts or {})
    assert path == folder / "report.html"
    assert [file.name for file in folder.iterdir() if file.name.startswith(".")] == []
    return Page(path)


def training(steps: int) -> list[Row]:
    rows = []
    for step in range(steps):
        metrics = {"train/loss": 2.0 / (step + 1), "train/lr": 1e-3, "train/samples_per_second": 100.0 + step}
        if step % 10 == 9:
            metrics |= {"val/loss": 2.1 / (step + 1), "val/accuracy": step / steps}
        rows.append(Row(step, 1.7e9 + step, metrics))
    return [*rows, Row(steps, 1.8e9, {"test/loss": 0.1, "test/accuracy": 0.975})]


def test_splits_share_a_chart_and_the_result_stands_on_top(tmp_path: Path) -> None:
    page = report(tmp_path, training(100), {"Nodes": "2"})
    assert page.text["figcaption"] == ["loss", "accuracy", "samples_per_second", "lr"]
    assert page.text["span"][:2] == ["test/accuracy", "test/loss"]
    assert [b for b in page.text["b"] if b == "0.975"]
    loss = page.charts()[0]
    assert [len(curve) for curve in loss["curves"]] == [100, 10, 1]
    assert set(loss["axes"]) == {"linear", "log"}
    assert set(page.charts()[3]["axes"]) == {"linear"}, "a constant has no logarithmic axis"
    assert page.text["h2"] == ["Learning", "Speed and schedule", "Facts", "Metrics"]


def test_it_needs_no_network(tmp_path: Path) -> None:
    page = report(tmp_path, training(20))
    assert "//" not in re.sub(r"\s//.*", "", page.source), "no address of anything"
    assert not [tag for tag, attributes in page.elements if attributes.get("src")]
    assert [link["href"] for link in page.all("link")] == ["data:,"]
    (policy,) = [meta["content"] for meta in page.all("meta") if "http-equiv" in meta]
    assert policy
    assert policy.startswith("default-src 'none'")


def test_hostile_names_and_texts_stay_text(tmp_path: Path) -> None:
    metrics = {HOSTILE: 1.0, f"val/{HOSTILE}": 0.5, "</style>": 2.0, "": 3.0, "note": HOSTILE, "huge": 10**400}
    page = report(tmp_path, [Row(0, 1.0, metrics), Row(1, 2.0, metrics)], {HOSTILE: HOSTILE}, title=HOSTILE)
    assert not page.all("img")
    assert len(page.all("script")) == len(page.charts()) + 1
    assert len(page.all("style")) == 1
    shown = HOSTILE.replace("\ud800", "\\ud800")
    for tag in ("title", "h1", "th"):
        assert "".join(page.text[tag]).count(shown) == 1


@pytest.mark.parametrize("metrics", [None, {}, {"note": "text"}, {"loss": math.nan}, {"loss": 1e308}])
def test_nothing_to_draw_is_said(metrics: dict[str, Any] | None, tmp_path: Path) -> None:
    page = report(tmp_path, [] if metrics is None else [Row(0, 1.0, metrics)], {"Result": "failed"})
    assert page.text["p"] == ["No numbers were logged in this run."]
    assert page.text["td"][0] == "failed"


def test_one_row_is_a_dot(tmp_path: Path) -> None:
    page = report(tmp_path, [Row(7, 1.0, {"train/loss": 0.5})])
    assert len(page.charts()) == 1
    (dot,) = page.all("circle")
    assert 0 < float(dot["cx"] or "nan") < 640


def test_a_gap_is_a_gap(tmp_path: Path) -> None:
    values = [1.0, 2.0, math.nan, math.inf, 3.0, 2.5]
    page = report(tmp_path, [Row(step, 1.0, {"train/loss": value}) for step, value in enumerate(values)])
    assert page.charts()[0]["curves"] == [[[0, 1.0], [1, 2.0], [2, None], [3, None], [4, 3.0], [5, 2.5]]]
    curves = [path["d"] or "" for path in page.all("path") if "curve" in (path["class"] or "")]
    assert [curve.count("M") for curve in curves] == [2, 2]
    assert "nan" not in page.source.lower().replace('nan";', "").split("<script>")[0]
    assert page.text["td"][-1] == "2", "what is not finite is counted"


@pytest.mark.parametrize(
    "values",
    [[5e-324, 1e-323], [9e299, -9e299], [1e16, 1e16 + 2], [-1.0, 0.0], [0.0, 0.0], [1e-7, 1e9], [0.5, 0.5 + 1e-16]],
    ids=str,
)
def test_any_range_of_numbers_is_drawn(values: list[float], tmp_path: Path) -> None:
    page = report(tmp_path, [Row(step, 1.0, {"v": value}) for step, value in enumerate(values)])
    assert len(page.charts()) == 1
    assert not [path for path in page.all("path") if "nan" in (path["d"] or "") or "inf" in (path["d"] or "")]


@given(st.lists(st.floats(-1e6, 1e6) | st.just(math.nan), min_size=1, max_size=400), st.integers(2, 50))
def test_thinning_keeps_the_extremes_the_order_and_the_size(values: list[float], most: int) -> None:
    series = Series("v")
    for step, value in enumerate(values):
        series.add(3 * step, value)
    thinned = thin(series, most)
    assert len(thinned) <= max(most, 2) + 2
    assert [step for step, _ in thinned] == sorted({step for step, _ in thinned})
    shown = [value for _, value in thinned if value == value]
    finite = series.finite()
    assert bool(shown) == bool(finite)
    if finite:
        assert (min(shown), max(shown)) == (min(finite), max(finite))
    originals = {(step, str(value)) for step, value in zip(series.steps, series.values, strict=True)}
    assert {(step, str(value)) for step, value in thinned} <= originals


def test_only_a_noisy_curve_gets_a_mean() -> None:
    noisy, calm = Series("noisy"), Series("calm")
    chance = random.Random(0)
    for step in range(3000):
        noisy.add(step, step / 3000 + chance.random())
        calm.add(step, math.cos(step / 1000))
    means = smooth(noisy)
    assert 100 <= len(means) <= 200
    assert max(abs(value - step / 3000 - 0.5) for step, value in means) < 0.3
    assert smooth(calm) == []


def test_a_long_run_makes_a_small_page(tmp_path: Path) -> None:
    page = report(tmp_path, [Row(step, 1.0, {"train/loss": math.sin(step)}) for step in range(20_000)])
    assert len(page.source) < 150_000


def test_an_older_report_stays_when_the_new_one_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report(tmp_path, training(10))
    before = (tmp_path / "report.html").read_bytes()
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(OSError, match="metrics"):
        write_report(tmp_path, title="again", facts={})
    assert (tmp_path / "report.html").read_bytes() == before


def test_the_pointer_reads_values_off_in_a_browser(tmp_path: Path) -> None:
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("there is no chromium")
    page = report(tmp_path, training(101))
    point = """<script>addEventListener("load", () => {
      const svg = document.querySelector("svg"), at = svg.getBoundingClientRect();
      const move = { clientX: at.left + at.width * 344 / 640, clientY: at.top + 20 };
      document.querySelector(".log-toggle").checked = true;
      svg.dispatchEvent(new PointerEvent("pointermove", move));
    })</script></body>"""
    (tmp_path / "pointed.html").write_text(page.source.replace("</body>", point), encoding="utf-8")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += f" --disable-component-update --disable-sync --user-data-dir={tmp_path / 'profile'} --dump-dom"
    command = [browser, *flags.split(), f"file://{tmp_path / 'pointed.html'}"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    step = re.search(r"<figcaption>loss at step (\d+)</figcaption>", shown)
    assert step
    assert 48 <= int(step[1]) <= 52
    assert f"<b>{2 / (int(step[1]) + 1):.4g}</b>" in shown
    circle = re.search(r'<line class="cursor"[^>]*></line><circle[^>]*cx="([\d.]+)" cy="([\d.]+)"', shown)
    assert circle
    assert 330 < float(circle[1]) < 360
    assert 12 < float(circle[2]) < 246


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((0.0, "0"), (3.0, "3"), (0.98333, "0.9833"), (1234.0, "1,234"), (11759.6, "11,760"), (-2500.4, "-2,500")),
        *((1e9, "1e+09"), (1.5e-7, "1.5e-07"), (float("inf"), "inf"), (float("nan"), "NaN")),
    ],
)
def test_numbers_are_written_as_people_read_them(value: float, text: str) -> None:
    assert number(value) == text
